// The form and the requests that it starts, one for each stream.
import { completion } from "./api.js";
import { pollEngine } from "./engine.js";
import { Output } from "./output.js";

const form = document.getElementById("request");
const stopAll = document.getElementById("stop-all");
const clear = document.getElementById("clear");
const announcement = document.getElementById("announcement");
const list = document.getElementById("outputs");
const outputs = new Set();

form.addEventListener("submit", (event) => {
  event.preventDefault();
  const fields = new FormData(form);
  const kind = fields.get("kind");
  const count = Number(fields.get("streams"));
  document.getElementById("no-outputs").hidden = true;
  for (let number = count - 1; number >= 0; number--) {
    const output = new Output(kind === "text" ? fields.get("prompt") : "");
    outputs.add(output);
    list.prepend(output.element);
    output.run(completion(kind, settings(fields, number), output.signal)).then(refresh);
  }
  refresh();
});

form.elements.prompt.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
});
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

// Fields left empty take the server's defaults. Each stream has its own seed: the given one plus its number.
function settings(fields, number) {
  const body = { prompt: fields.get("prompt") };
  for (const name of ["max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed"]) {
    if (fields.get(name)) body[name] = Number(fields.get(name));
  }
  if (body.seed !== undefined) body.seed += number;
  if (fields.get("stop")) body.stop = fields.get("stop").replaceAll("\\n", "\n");
  if (fields.get("ignore_eos")) Object.assign(body, { ignore_eos: true, skip_special_tokens: false });
  return body;
}

fetch("v1/models")
  .then((response) => response.json())
  .then(({ data: [model] }) => {
    document.getElementById("model").textContent =
      `${model.id} · up to ${model.max_model_len.toLocaleString()} tokens per request`;
  })
  .catch(() => {}); // The engine panel reports that the server is not reachable.
pollEngine();
