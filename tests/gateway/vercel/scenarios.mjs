// Uses of Vercel's AI SDK and of OpenAI's SDK for JavaScript. Run by test_sdks.py: node scenarios.mjs NAME,NAME... URL
import assert from "node:assert/strict";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, Output, streamText, tool, ToolLoopAgent } from "ai";
import OpenAI from "openai";
import { z } from "zod";

const [, , names, url] = process.argv;
const QUESTION = "Is it sunny in Rome?";
const city = z.enum(["Paris", "Rome"]);
const options = { baseURL: url, apiKey: "random-string" };
const compatible = createOpenAICompatible({ ...options, name: "mpt", supportsStructuredOutputs: true })("demo");
const chat = createOpenAI(options).chat("demo");
const responses = createOpenAI(options).responses("demo");

// The first step requires a call, whose result the next one replies to; then the conversation goes on, as a stream.
async function agent(model, providerOptions) {
  const asked = [];
  const getWeather = tool({
    description: "Tell the weather of a city.",
    inputSchema: z.object({ city }),
    execute: async (input) => asked.push(input.city) && "sunny",
  });
  const reporter = new ToolLoopAgent({
    model,
    providerOptions,
    instructions: "Be brief.",
    tools: { getWeather },
    maxOutputTokens: 150,
    temperature: 0, // drawn at random, a text may be empty
    prepareStep: ({ stepNumber }) => ({ toolChoice: stepNumber === 0 ? "required" : "none" }),
  });
  const result = await reporter.generate({ prompt: QUESTION });
  assert.deepEqual(result.steps.map((step) => step.finishReason === "tool-calls"), [true, false]);
  assert.ok(result.text);
  const numAsked = asked.length;
  assert.ok(numAsked > 0);
  const messages = [{ role: "user", content: QUESTION }, ...result.responseMessages, { role: "user", content: "Really?" }];
  const stream = await reporter.stream({ messages });
  let text = "";
  for await (const piece of stream.textStream) text += piece;
  assert.equal((await stream.steps).length, 2);
  assert.ok(text && asked.length > numAsked);
}

async function structured(model) {
  const schema = z.object({ city, days: z.literal([1, 2, 3]) });
  const request = { model, prompt: QUESTION, maxOutputTokens: 200, output: Output.object({ schema }) };
  schema.parse((await generateText(request)).output);
  const stream = streamText(request);
  for await (const part of stream.partialOutputStream) assert.equal(typeof part, "object");
  schema.parse(await stream.output);
}

const scenarios = {
  vercel_agent: async () => {
    await agent(compatible);
    await agent(chat);
    // By default, messages are sent as references to what OpenAI has stored.
    await agent(responses, { openai: { store: false } });
  },
  vercel_structured_output: async () => {
    for (const model of [compatible, chat, responses]) await structured(model);
  },
  openai_javascript: async () => {
    const client = new OpenAI({ ...options, maxRetries: 0 });
    const request = { model: "demo", messages: [{ role: "user", content: QUESTION }], max_tokens: 12, seed: 1 };
    const complete = await client.chat.completions.create(request);
    let text = "";
    for await (const chunk of await client.chat.completions.create({ ...request, stream: true })) {
      text += chunk.choices[0].delta.content ?? "";
    }
    assert.equal(text, complete.choices[0].message.content);
    const response = await client.responses.create({ model: "demo", input: QUESTION, max_output_tokens: 12, temperature: 0 });
    assert.ok(response.output_text);
    await assert.rejects(client.chat.completions.create({ ...request, temperature: -1 }), { status: 400, param: "temperature" });
  },
};

for (const name of names.split(",")) {
  await scenarios[name]();
  console.log("passed", name);
}
