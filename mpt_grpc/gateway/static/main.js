// The form and the requests that it starts, one for each stream.
import { completion, renderedPrompt } from "./api.js";
import { asCode } from "./code.js";
import { pollEngine } from "./engine.js";
import { Output } from "./output.js";
import { bodyOf, problems, settings, variants } from "./settings.js";

const form = document.getElementById("request");
const stopAll = document.getElementById("stop-all");
const clear = document.getElementById("clear");
const announcement = document.getElementById("announcement");
const list = document.getElementById("outputs");
const chat = document.getElementById("chat");
const code = document.getElementById("code");
const outputs = new Set();
const RENDER_DELAY_MS = 400;
let rendered = ""; // the messages whose prompt is shown, or is about to be

form.addEventListener("submit", (event) => {
  event.preventDefault();
  const fields = new FormData(form);
  const kind = fields.get("kind");
  document.getElementById("no-outputs").hidden = true;
  for (const variant of variants(fields).reverse()) {
    const output = new Output(kind === "text" ? fields.get("prompt") : "", variant.label);
    outputs.add(output);
    list.prepend(output.element);
    const body = bodyOf(fields, { ...settings(fields), ...variant.settings });
    output.run(completion(kind, body, output.signal)).then(refresh);
  }
  refresh();
});

form.elements.prompt.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
});
form.addEventListener("input", refreshForm);
for (const details of form.querySelectorAll("details")) details.addEventListener("toggle", refreshForm);
code.querySelector("button").addEventListener("click", copyCode);
stopAll.addEventListener("click", stop);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") stop();
});
clear.addEventListener("click", () => {
  for (const output of outputs) {
    if (output.running) continue;
    outputs.delete(output);
    output.element.remove();
  }
  refresh();
});

function stop() {
  for (const output of outputs) output.stop();
}

function refresh() {
  const running = [...outputs].filter((output) => output.running).length;
  stopAll.disabled = running === 0;
  clear.disabled = running === outputs.size;
  announcement.textContent = running ? `${running} running` : "all completed";
}

function refreshForm() {
  const fields = new FormData(form);
  for (const [name, problem] of Object.entries(problems(fields))) form.elements[name].setCustomValidity(problem);
  chat.hidden = fields.get("kind") !== "chat";
  if (code.open) showCode(fields);
  if (!chat.hidden && chat.querySelector("details").open) showRendered(bodyOf(fields, {}).messages);
}

// Shows the prompt that the server makes of the messages, once they have not changed for a while: it is computed for that.
async function showRendered(messages) {
  const key = JSON.stringify(messages);
  if (key === rendered) return;
  rendered = key;
  await new Promise((resolve) => setTimeout(resolve, RENDER_DELAY_MS));
  if (key !== rendered) return;
  const text = await renderedPrompt(messages).catch((error) => error.message);
  if (key === rendered) document.getElementById("rendered").textContent = text;
}

// Shows the request of the first stream.
function showCode(fields) {
  const problem = Object.values(problems(fields)).find((text) => text);
  code.querySelector("pre").textContent = problem ?? codeOf(fields);
  code.querySelector("[role=status]").textContent = "";
}

function codeOf(fields) {
  const [first] = variants(fields);
  const body = bodyOf(fields, { ...settings(fields), ...first.settings });
  return asCode(code.querySelector("select").value, fields.get("kind"), body);
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
refreshForm();
pollEngine();
