// Text as tokens, each coloured by its probability. The mouse, the arrow keys or a tap show the alternatives of a token.

// The limits of the colours, which the legend in index.html lists.
const PROBABILITY_LIMITS = [0.5, 0.2, 0.05, 0.01];
const tooltip = document.getElementById("token");
const tokenOf = new WeakMap();

export class TokenText {
  constructor(prompt, label) {
    this.element = document.createElement("div");
    this.element.className = "text";
    this.element.tabIndex = 0;
    this.element.setAttribute("role", "group");
    this.element.setAttribute("aria-label", `${label}; use the arrow keys to move through its tokens`);
    const promptText = document.createElement("span");
    promptText.className = "muted";
    promptText.textContent = prompt;
    this.element.append(promptText);
    this._decoder = new TextDecoder();
    this._pending = [];
    this._last = null;
    this._unshownLength = 0;
    this._current = null;
    this._scrollsAlong = true;
    this.element.addEventListener("scroll", () => {
      const { scrollHeight, scrollTop, clientHeight } = this.element;
      this._scrollsAlong = scrollHeight - scrollTop - clientHeight < 8;
    });
    this.element.addEventListener("pointerover", (event) => this._select(event.target.closest(".token")));
    this.element.addEventListener("pointerleave", () => this._select(null));
    this.element.addEventListener("blur", () => this._select(null));
    this.element.addEventListener("keydown", (event) => this._move(event));
  }

  // Text may arrive later than its tokens, and the last tokens may have less text than they decode to: a stop string is cut.
  add({ text, tokens, finish }) {
    for (const token of tokens) {
      const decoded = this._decoder.decode(token.bytes, { stream: true });
      if (decoded) this._pending.push({ ...token, text: decoded });
      this._last = token;
    }
    const unfinished = finish && this._decoder.decode();
    if (unfinished) this._pending.push({ ...this._last, text: unfinished });
    this._unshownLength += text.length;
    while (this._pending.length && (this._pending[0].text.length <= this._unshownLength || finish)) {
      const token = this._pending.shift();
      const shown = token.text.slice(0, this._unshownLength);
      this._unshownLength -= shown.length;
      if (shown) this.element.append(tokenElement(token, shown));
    }
    if (this._scrollsAlong) this.element.scrollTop = this.element.scrollHeight;
  }

  _move(event) {
    const step = { ArrowRight: "nextElementSibling", ArrowLeft: "previousElementSibling" }[event.key];
    if (!step) return;
    event.preventDefault();
    const next = this._current ? this._current[step] : this.element.querySelector(".token");
    if (next?.classList.contains("token")) this._select(next);
    this._current?.scrollIntoView({ block: "nearest" });
  }

  _select(token) {
    this._current?.classList.remove("current");
    this._current = token;
    token?.classList.add("current");
    if (token) show(token);
    else tooltip.hidden = true;
  }
}

function tokenElement(token, shown) {
  const element = document.createElement("span");
  const level = token.logprob === null ? 0 : PROBABILITY_LIMITS.filter((limit) => Math.exp(token.logprob) < limit).length;
  element.className = level ? `token unlikely-${level}` : "token";
  element.textContent = shown;
  tokenOf.set(element, token);
  return element;
}

function show(element) {
  const token = tokenOf.get(element);
  const others = token.alternatives.filter((other) => other.text !== token.text);
  const rows = [{ text: token.text, logprob: token.logprob, chosen: true }, ...others];
  rows.sort((one, other) => other.logprob - one.logprob);
  const list = document.createElement("ol");
  list.append(...rows.map(row));
  tooltip.replaceChildren(list);
  tooltip.hidden = false;
  const at = element.getBoundingClientRect();
  const left = Math.min(at.left, document.documentElement.clientWidth - tooltip.offsetWidth - 8);
  const below = at.bottom + tooltip.offsetHeight + 8 < window.innerHeight;
  tooltip.style.left = `${Math.max(8, left) + window.scrollX}px`;
  tooltip.style.top = `${(below ? at.bottom + 4 : at.top - tooltip.offsetHeight - 4) + window.scrollY}px`;
}

function row({ text, logprob, chosen = false }) {
  const probability = logprob === null ? 0 : Math.exp(logprob);
  const item = document.createElement("li");
  item.className = chosen ? "chosen" : "";
  const name = document.createElement("code");
  name.textContent = text.replaceAll("\n", "↵").replaceAll(" ", "␣");
  const track = document.createElement("span");
  const bar = document.createElement("div");
  bar.className = "bar";
  bar.style.width = `${100 * probability}%`;
  track.append(bar);
  const number = document.createElement("span");
  number.className = "number";
  number.textContent = logprob === null ? "first" : `${(100 * probability).toFixed(probability < 0.1 ? 2 : 1)}%`;
  item.append(name, track, number);
  return item;
}
