// The fields of the form as settings of requests, in the names of the OpenAI-compatible API.
const NUMBERS = ["max_tokens", "top_k", "top_p", "min_p", "repetition_penalty"];
const MAX_STREAMS = 50;

// Fields left empty take the server's defaults.
export function settings(fields) {
  const result = {};
  for (const name of NUMBERS) {
    if (fields.get(name)) result[name] = Number(fields.get(name));
  }
  if (fields.get("stop")) result.stop = fields.get("stop").replaceAll("\\n", "\n");
  if (fields.get("ignore_eos")) Object.assign(result, { ignore_eos: true, skip_special_tokens: false });
  return result;
}

// Returns {label, settings} of each stream: those of each pair of a temperature and a seed, which the label names if there
// are several. Each stream has its own seed: the given one plus its number.
export function variants(fields) {
  const temperatures = numbers(fields.get("temperature"));
  const seeds = numbers(fields.get("seed"));
  const result = [];
  for (const temperature of temperatures) {
    for (const first of seeds) {
      for (let number = 0; number < streams(fields); number++) {
        const seed = first === undefined ? undefined : first + number;
        const names = [];
        if (temperatures.length > 1) names.push(`temperature ${temperature}`);
        if (seed !== undefined) names.push(`seed ${seed}`);
        result.push({ label: names.join(", "), settings: { temperature, seed } });
      }
    }
  }
  return result;
}

// Returns the body of a request: the prompt, or the messages of a chat after those of the conversation, and the settings.
export function bodyOf(fields, conversation, chosen) {
  if (fields.get("kind") === "text") return { prompt: fields.get("prompt"), ...chosen };
  const system = fields.get("system") ? [{ role: "system", content: fields.get("system") }] : [];
  const messages = [...system, ...conversation, { role: "user", content: fields.get("message") }];
  return { messages, drop_oldest_turns: true, ...chosen };
}

// Returns what is wrong with each list of numbers, by the name of its field; empty for one that is right.
export function problems(fields) {
  const temperature = parts(fields.get("temperature")).every((part) => /^-?(\d+\.?\d*|\.\d+)$/.test(part));
  const seed = parts(fields.get("seed")).every((part) => /^\d+$/.test(part) && Number.isSafeInteger(Number(part)));
  const count = numbers(fields.get("temperature")).length * numbers(fields.get("seed")).length * streams(fields);
  const excess = count > MAX_STREAMS ? `These are ${count} streams; at most ${MAX_STREAMS} can be compared.` : "";
  return {
    temperature: temperature ? excess : "Use numbers separated by commas, such as 0.2, 0.8.",
    seed: seed ? "" : "Use whole numbers below 2^53, separated by commas, such as 7, 8.",
  };
}

// A chat has one stream for each pair of a temperature and a seed.
function streams(fields) {
  return Number(fields.get("streams") ?? 1);
}

// Returns the numbers of a list with commas; one that is undefined if it is empty.
function numbers(text) {
  const given = parts(text);
  return given.length ? given.map(Number) : [undefined];
}

function parts(text) {
  return text.split(",").map((part) => part.trim()).filter((part) => part);
}
