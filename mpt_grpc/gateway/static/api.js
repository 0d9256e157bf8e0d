// The part of the OpenAI-compatible API that this page uses: a chat or text completion as one stream of pieces.
const NUM_ALTERNATIVES = 6;
// Browsers open at most six connections to a server, and the engine panel needs one.
const MAX_CONNECTIONS = 5;
let open = 0;
const waiting = new Set();

// Yields {requestId, text, tokens, finish}, where a token is {bytes, logprob, alternatives: [{text, logprob}]}; the first
// token of a prompt has no log probability. Throws an Error with the server's message.
export async function* completion(kind, body, signal) {
  await connection(signal);
  try {
    yield* pieces(kind, body, signal);
  } finally {
    open--;
    const [next] = waiting;
    next?.();
  }
}

// Resolves when another connection may be opened, and counts it as open.
async function connection(signal) {
  while (open >= MAX_CONNECTIONS) {
    let resume;
    await new Promise((resolve, reject) => {
      resume = resolve;
      waiting.add(resume);
      signal.addEventListener("abort", reject, { once: true });
    }).finally(() => waiting.delete(resume));
  }
  open++;
}

// Returns {text, tokens}, as in a piece, of the prompt that the chat template makes of messages. Throws an Error with the
// server's message.
export async function renderedPrompt(messages) {
  const { tokens: prompt } = await (await post("tokenize", { messages })).json();
  const body = { prompt, max_tokens: 0, echo: true, logprobs: NUM_ALTERNATIVES, skip_special_tokens: false };
  const { choices: [{ text, logprobs }] } = await (await post("v1/completions", body)).json();
  return { text, tokens: textTokens(logprobs) };
}

// Returns whether the server requires an access token, which a request without the browser's shows.
export async function needsToken() {
  return (await fetch("version", { credentials: "omit" })).status === 401;
}

async function post(path, body, signal) {
  const headers = { "content-type": "application/json" };
  const response = await fetch(path, { method: "POST", headers, body: JSON.stringify(body), signal });
  if (!response.ok) throw new Error(await errorOf(response));
  return response;
}

async function* pieces(kind, body, signal) {
  const path = kind === "chat" ? "v1/chat/completions" : "v1/completions";
  const logprobs =
    kind === "chat" ? { logprobs: true, top_logprobs: NUM_ALTERNATIVES } : { logprobs: NUM_ALTERNATIVES };
  const response = await post(path, { ...body, ...logprobs, stream: true }, signal);
  for await (const event of events(response.body)) {
    if (event === "[DONE]") return;
    const { error, choices, id } = JSON.parse(event);
    if (error) throw new Error(error.message);
    for (const choice of choices) {
      yield {
        requestId: id.slice(id.indexOf("-") + 1),
        text: (kind === "chat" ? choice.delta.content : choice.text) ?? "",
        tokens: kind === "chat" ? chatTokens(choice.logprobs) : textTokens(choice.logprobs),
        finish: choice.finish_reason,
      };
    }
  }
  throw new Error("connection lost");
}

async function errorOf(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server responded with status ${response.status}`;
  }
}

// Yields the data of server-sent events.
async function* events(body) {
  let pending = "";
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  for (let { done, value } = await reader.read(); !done; { done, value } = await reader.read()) {
    pending += value;
    const lines = pending.split("\n");
    pending = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data: ")) yield line.slice(6).trimEnd();
    }
  }
}

function chatTokens(logprobs) {
  return (logprobs?.content ?? []).map(({ bytes, logprob, top_logprobs }) => ({
    bytes: Uint8Array.from(bytes),
    logprob,
    alternatives: top_logprobs.map((top) => ({ text: top.token, logprob: top.logprob })),
  }));
}

function textTokens(logprobs) {
  return (logprobs?.tokens ?? []).map((token, index) => ({
    bytes: bytesOf(token),
    logprob: logprobs.token_logprobs[index],
    alternatives: Object.entries(logprobs.top_logprobs[index] ?? {}).map(([text, logprob]) => ({ text, logprob })),
  }));
}

// A token that is not valid UTF-8 by itself is written as "bytes:\xe2\x80".
function bytesOf(token) {
  if (!/^bytes:(\\x[0-9a-f]{2})+$/.test(token)) return new TextEncoder().encode(token);
  return Uint8Array.from(token.slice(6).split("\\x").slice(1), (hex) => parseInt(hex, 16));
}
