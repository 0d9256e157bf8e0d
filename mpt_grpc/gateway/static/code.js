// A request as code: a command of curl or grpcurl, or a program in Python.
const GROUPS = {
  sampling: { temperature: "temperature", top_k: "top_k", top_p: "top_p", min_p: "min_p", seed: "seed" },
  decoding: { repetition_penalty: "repetition_penalty" },
  stopping: { max_tokens: "max_new_tokens", stop: "stop_strings", ignore_eos: "ignore_eos" },
  output_options: { skip_special_tokens: "skip_special_tokens" },
};
const REPEATED = new Set(["stop_strings"]);
const IS_SECURE = location.protocol === "https:";
const AUTHORIZATION = ` -H "authorization: Bearer $MPT_GRPC_TOKEN"`;
const GRPC_TARGET = `${location.hostname}:50051`; // the default port, since the page does not know the server's

// Returns the code of a request whose body is that of the OpenAI-compatible API. An access token is read from the
// environment.
export function asCode(form, kind, body, needsToken) {
  if (form === "curl") return curl(kind, body, needsToken);
  return form === "grpcurl" ? grpcurl(body, needsToken) : python(body, needsToken);
}

function curl(kind, body, needsToken) {
  const path = kind === "chat" ? "v1/chat/completions" : "v1/completions";
  const url = new URL(path, location.href);
  const headers = `-H 'content-type: application/json'${needsToken ? AUTHORIZATION : ""}`;
  return `curl ${quoted(url.href)} ${headers} -d ${quoted(JSON.stringify(body))}`;
}

function grpcurl({ prompt, messages, drop_oldest_turns, ...settings }, needsToken) {
  const conversation = messages && {
    messages: messages.map(({ role, content }) => ({ role: `ROLE_${role.toUpperCase()}`, content })),
    drop_oldest_turns,
  };
  const request = messages ? { conversation } : { text: prompt };
  for (const [group, names] of Object.entries(GROUPS)) {
    const fields = Object.entries(names).filter(([name]) => settings[name] !== undefined);
    if (fields.length) request[group] = Object.fromEntries(fields.map(([name, field]) => [field, REPEATED.has(field) ? [settings[name]] : settings[name]]));
  }
  const command = `grpcurl${IS_SECURE ? "" : " -plaintext"}${needsToken ? AUTHORIZATION : ""}`;
  return `${command} -d ${quoted(JSON.stringify(request))} ${GRPC_TARGET} mpt.v1.TextGenerationService/Generate`;
}

function python({ prompt, messages, ...settings }, needsToken) {
  const names = Object.assign({ drop_oldest_turns: "drop_oldest_turns" }, ...Object.values(GROUPS));
  const options = Object.entries(settings)
    .filter(([, value]) => value !== undefined)
    .map(([name, value]) => `, ${names[name]}=${literal(value)}`);
  const token = needsToken ? ', token=os.environ["MPT_GRPC_TOKEN"]' : "";
  return `${needsToken ? "import os\n\n" : ""}from mpt_grpc_client import Client

with Client(${literal((IS_SECURE ? "grpcs://" : "") + GRPC_TARGET)}${token}) as client:
    print(client.generate(${literal(messages ?? prompt)}${options.join("")}).text)
`;
}

// Strings, numbers and lists of them are written in Python as in JSON; booleans are not.
function literal(value) {
  return typeof value === "boolean" ? (value ? "True" : "False") : JSON.stringify(value);
}

function quoted(text) {
  return `'${text.replaceAll("'", `'\\''`)}'`;
}
