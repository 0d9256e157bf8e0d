// One output: its text as it is generated, with coloured tokens, its speed and how it ended.
import { ownerColour } from "./owners.js";
import { TokenText } from "./tokens.js";

const MAX_SHOWN_PROMPT = 200;

export class Output {
  constructor(prompt, label) {
    this.running = true;
    this.generated = "";
    this._label = label;
    this._abort = new AbortController();
    this.element = document.createElement("article");
    this.element.className = "output panel";
    this._status = document.createElement("span");
    this._button = document.createElement("button");
    this._button.type = "button";
    this._button.textContent = "Stop";
    this._button.addEventListener("click", () => this.stop());
    const header = document.createElement("header");
    header.append(this._status, this._button);
    this._error = document.createElement("p");
    this._error.className = "error";
    this._error.setAttribute("role", "alert");
    this._text = new TokenText(shortened(prompt), "Output");
    this.element.append(header, this._text.element, this._error);
    this._tokens = 0;
    this._showStatus("waiting");
  }

  get signal() {
    return this._abort.signal;
  }

  stop() {
    if (this.running) this._abort.abort();
  }

  // Adds a radio button of the group `name`, which chooses this output, and returns it.
  choice(name) {
    const button = document.createElement("input");
    Object.assign(button, { type: "radio", name });
    const label = document.createElement("label");
    label.append(button, "Continue with this reply");
    this.element.append(label);
    return button;
  }

  // Shows pieces until the last one. Never throws.
  async run(pieces) {
    const start = performance.now();
    let first = null;
    let state = "";
    try {
      for await (const piece of pieces) {
        this.element.style.setProperty("--owner", ownerColour(piece.requestId));
        if (piece.tokens.length) first ??= performance.now();
        this._tokens += piece.tokens.length;
        this._text.add(piece);
        this.generated += piece.text;
        state = piece.finish ?? state;
        this._showStatus(state || "running", first === null ? null : first - start, first);
      }
    } catch (error) {
      state = this.signal.aborted ? "stopped" : "failed";
      if (!this.signal.aborted) this._error.textContent = error.message;
      this._showStatus(state, first === null ? null : first - start, first);
    }
    this.running = false;
    this._button.remove();
  }

  _showStatus(state, ttftMs = null, first = null) {
    const parts = [state === "length" ? "token limit" : state];
    if (this._label) parts.unshift(this._label);
    if (this._tokens) parts.push(`${this._tokens} tokens`);
    if (ttftMs !== null) parts.push(`TTFT ${Math.round(ttftMs)} ms`);
    const decodeSeconds = (performance.now() - first) / 1000;
    if (first !== null && this._tokens > 1 && decodeSeconds > 0) parts.push(`${Math.round((this._tokens - 1) / decodeSeconds)} tokens/s`);
    this._status.textContent = parts.join(" · ");
  }
}

function shortened(prompt) {
  return prompt.length > MAX_SHOWN_PROMPT ? `…${prompt.slice(-MAX_SHOWN_PROMPT)}` : prompt;
}
