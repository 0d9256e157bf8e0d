// One output: its text as it comes, its tokens' colours, how fast it is, and how it ended.
import { ownerColour } from "./owners.js";
import { TokenText } from "./tokens.js";

const SHOWN_PROMPT = 200;

export class Output {
  constructor(prompt) {
    this.requestId = `page-${crypto.getRandomValues(new Uint32Array(2)).join("-")}`;
    this.running = true;
    this._abort = new AbortController();
    this.element = document.createElement("article");
    this.element.className = "output panel";
    this.element.style.setProperty("--owner", ownerColour(this.requestId));
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
    this._text = new TokenText(shortened(prompt));
    this.element.append(header, this._text.element, this._error);
    this._tokens = 0;
    this._say("waiting");
  }

  get signal() {
    return this._abort.signal;
  }

  stop() {
    if (this.running) this._abort.abort();
  }

  // Shows the pieces until the last one; never throws.
  async run(pieces) {
    const asked = performance.now();
    let first = null;
    let how = "";
    try {
      for await (const piece of pieces) {
        if (piece.tokens.length) first ??= performance.now();
        this._tokens += piece.tokens.length;
        this._text.add(piece);
        how = piece.finish ?? how;
        this._say(how || "running", first === null ? null : first - asked, first);
      }
    } catch (error) {
      how = this.signal.aborted ? "stopped" : "failed";
      if (!this.signal.aborted) this._error.textContent = error.message;
      this._say(how, first === null ? null : first - asked, first);
    }
    this.running = false;
    this._button.remove();
  }

  _say(how, waitedMs = null, first = null) {
    const parts = [how === "length" ? "token limit" : how];
    if (this._tokens) parts.push(`${this._tokens} tokens`);
    if (waitedMs !== null) parts.push(`first after ${Math.round(waitedMs)} ms`);
    const seconds = (performance.now() - first) / 1000;
    if (first !== null && this._tokens > 1 && seconds > 0) parts.push(`${Math.round((this._tokens - 1) / seconds)}/s`);
    this._status.textContent = parts.join(" · ");
  }
}

function shortened(prompt) {
  return prompt.length > SHOWN_PROMPT ? `…${prompt.slice(-SHOWN_PROMPT)}` : prompt;
}
