// The form and the requests that it starts, one for each stream: outputs of a text, or replies in a conversation.
import { completion, needsToken, renderedPrompt } from "./api.js";
import { asCode } from "./code.js";
import { Conversation } from "./conversation.js";
import { pollEngine } from "./engine.js";
import { Output } from "./output.js";
import { bodyOf, problems, settings, variants } from "./settings.js";
import { TokenText } from "./tokens.js";

const form = document.getElementById("request");
const stopAll = document.getElementById("stop-all");
const clear = document.getElementById("clear");
const announcement = document.getElementById("announcement");
const results = document.getElementById("results");
const list = document.getElementById("outputs");
const code = document.getElementById("code");
const rendered = document.getElementById("rendered");
const { text, chat, prompt, message, streams } = form.elements;
const RENDER_DELAY_MS = 400;
const outputs = new Set(); // of the text
const conversation = new Conversation(document.getElementById("turns"), {
  chosen: refresh,
  retried: (content) => {
    const draft = message.value;
    message.value = content;
    form.requestSubmit();
    // If a setting is not valid, the browser says so, and the message is still there to be sent.
    message.value ||= draft;
  },
  edited: (content) => {
    message.value = content;
    refresh();
    message.focus();
  },
});
let withToken = false; // whether requests as code have an access token
let renderedMessages = ""; // those whose prompt is shown, or is about to be

form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (isChat() && conversation.running) return;
  const fields = new FormData(form);
  if (isChat()) {
    message.value = "";
    message.focus();
  }
  generate(fields);
});

prompt.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
});
message.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  form.requestSubmit();
});
form.addEventListener("input", refreshForm);
for (const details of form.querySelectorAll("details")) details.addEventListener("toggle", refreshForm);
code.addEventListener("toggle", async () => {
  withToken = await needsToken().catch(() => false);
  refreshForm();
}, { once: true });
code.querySelector("button").addEventListener("click", copyCode);
stopAll.addEventListener("click", stop);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") stop();
});
clear.addEventListener("click", () => {
  if (isChat()) conversation.clear();
  else for (const output of outputs) {
    if (output.running) continue;
    outputs.delete(output);
    output.element.remove();
  }
  refresh();
});

function isChat() {
  return form.elements.kind.value === "chat";
}

function generate(fields) {
  document.getElementById("no-outputs").hidden = true;
  const started = variants(fields).map((variant) => {
    const output = new Output(fields.get("prompt") ?? "", variant.label);
    const body = bodyOf(fields, conversation.messages, { ...settings(fields), ...variant.settings });
    output.run(completion(fields.get("kind"), body, output.signal)).then(refresh);
    return output;
  });
  if (isChat()) {
    conversation.add(fields.get("message"), started);
  } else {
    list.prepend(...started.map((output) => output.element));
    for (const output of started) outputs.add(output);
  }
  refresh();
}

function stop() {
  for (const output of [...outputs, ...conversation.replies]) output.stop();
}

// Shows what is running.
function refresh() {
  const running = [...outputs, ...conversation.replies].filter((output) => output.running).length;
  stopAll.disabled = running === 0;
  clear.disabled = isChat() ? conversation.replies.length === 0 : [...outputs].every((output) => output.running);
  form.querySelector("[type=submit]").disabled = isChat() && conversation.running;
  announcement.textContent = running ? `${running} running` : isChat() ? conversation.lastReply : "all completed";
  refreshForm();
}

// Shows the fields of the selected kind, and what is made of them.
function refreshForm() {
  const fields = new FormData(form);
  for (const [name, problem] of Object.entries(problems(fields))) form.elements[name].setCustomValidity(problem);
  if (code.open) showCode(fields);
  if (isChat() && chat.querySelector("details").open) showRendered(bodyOf(fields, conversation.messages, {}).messages);
}

// A conversation is above its next message, and the outputs of a text are below it.
function showKind() {
  for (const [field, hidden] of [[text, isChat()], [chat, !isChat()], [streams, isChat()]]) field.disabled = hidden;
  document.documentElement.dataset.kind = form.elements.kind.value;
  document.getElementById("outputs-title").textContent = isChat() ? "Conversation" : "Outputs";
  if (isChat()) form.before(results);
  else form.after(results);
  refresh();
}

// Shows the prompt that the server makes of the messages, once they have not changed for a while: it is computed for that.
async function showRendered(messages) {
  const key = JSON.stringify(messages);
  if (key === renderedMessages) return;
  renderedMessages = key;
  await new Promise((resolve) => setTimeout(resolve, RENDER_DELAY_MS));
  if (key !== renderedMessages) return;
  const prompt = await renderedPrompt(messages).catch((error) => error);
  if (key !== renderedMessages) return;
  rendered.textContent = prompt.message ?? "";
  document.getElementById("rendered-count").textContent = prompt.tokens ? `(${prompt.tokens.length} tokens)` : "";
  if (!prompt.tokens) return;
  const shown = new TokenText("", "Prompt");
  shown.add({ ...prompt, finish: "length" });
  rendered.append(shown.element);
}

// Shows the request of the first stream.
function showCode(fields) {
  const problem = Object.values(problems(fields)).find((text) => text);
  code.querySelector("pre").textContent = problem ?? codeOf(fields);
  code.querySelector("[role=status]").textContent = "";
}

function codeOf(fields) {
  const [first] = variants(fields);
  const body = bodyOf(fields, conversation.messages, { ...settings(fields), ...first.settings });
  return asCode(code.querySelector("select").value, fields.get("kind"), body, withToken);
}

// The clipboard needs TLS or localhost; elsewhere the code is selected, to be copied by hand.
async function copyCode() {
  const shown = code.querySelector("pre");
  getSelection().selectAllChildren(shown);
  await navigator.clipboard?.writeText(shown.textContent);
  code.querySelector("[role=status]").textContent = navigator.clipboard ? "copied" : "selected";
}

fetch("v1/models")
  .then((response) => response.json())
  .then(({ data: [model] }) => {
    document.getElementById("model").textContent =
      `${model.id} · up to ${model.max_model_len.toLocaleString()} tokens per request`;
  })
  .catch(() => {}); // The engine panel reports that the server is not reachable.
for (const kind of form.elements.kind) kind.addEventListener("change", showKind);
showKind();
pollEngine();
