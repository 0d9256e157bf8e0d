// Text in tokens: each coloured by its probability, with its alternatives where one points, walks or taps.
// The colours' borders, as the legend in index.html has them.
const LIKELY = [0.5, 0.2, 0.05, 0.01];
const box = document.getElementById("token");
const facts = new WeakMap();

export class TokenText {
  constructor(prompt) {
    this.element = document.createElement("div");
    this.element.className = "text";
    this.element.tabIndex = 0;
    this.element.setAttribute("role", "group");
    this.element.setAttribute("aria-label", "Output; the arrow keys go through its tokens");
    const given = document.createElement("span");
    given.className = "muted";
    given.textContent = prompt;
    this.element.append(given);
    this._decoder = new TextDecoder();
    this._waiting = [];
    this._last = null;
    this._unshown = 0;
    this._current = null;
    this._follows = true;
    this.element.addEventListener("scroll", () => {
      const { scrollHeight, scrollTop, clientHeight } = this.element;
      this._follows = scrollHeight - scrollTop - clientHeight < 8;
    });
    this.element.addEventListener("pointerover", (event) => this._point(event.target.closest(".token")));
    this.element.addEventListener("pointerleave", () => this._point(null));
    this.element.addEventListener("blur", () => this._point(null));
    this.element.addEventListener("keydown", (event) => this._walk(event));
  }

  // Text may come later than its tokens, and the last of them may have less text than they spell: a stop string is cut.
  add({ text, tokens, finish }) {
    for (const token of tokens) {
      const spelt = this._decoder.decode(token.bytes, { stream: true });
      if (spelt) this._waiting.push({ ...token, text: spelt });
      this._last = token;
    }
    const unfinished = finish && this._decoder.decode();
    if (unfinished) this._waiting.push({ ...this._last, text: unfinished });
    this._unshown += text.length;
    while (this._waiting.length && (this._waiting[0].text.length <= this._unshown || finish)) {
      const token = this._waiting.shift();
      const shown = token.text.slice(0, this._unshown);
      this._unshown -= shown.length;
      if (shown) this.element.append(tokenElement(token, shown));
    }
    if (this._follows) this.element.scrollTop = this.element.scrollHeight;
  }

  _walk(event) {
    const step = { ArrowRight: "nextElementSibling", ArrowLeft: "previousElementSibling" }[event.key];
    if (!step) return;
    event.preventDefault();
    const next = this._current ? this._current[step] : this.element.querySelector(".token");
    if (next?.classList.contains("token")) this._point(next);
    this._current?.scrollIntoView({ block: "nearest" });
  }

  _point(token) {
    this._current?.classList.remove("current");
    this._current = token;
    token?.classList.add("current");
    if (token) show(token);
    else box.hidden = true;
  }
}

function tokenElement(token, shown) {
  const element = document.createElement("span");
  const probability = Math.exp(token.logprob);
  const level = LIKELY.filter((limit) => probability < limit).length;
  element.className = level ? `token likely-${level}` : "token";
  element.textContent = shown;
  facts.set(element, token);
  return element;
}

function show(element) {
  const token = facts.get(element);
  const others = token.alternatives.filter((other) => other.text !== token.text);
  const rows = [{ text: token.text, logprob: token.logprob, chosen: true }, ...others];
  rows.sort((one, other) => other.logprob - one.logprob);
  const list = document.createElement("ol");
  list.append(...rows.map(row));
  box.replaceChildren(list);
  box.hidden = false;
  const at = element.getBoundingClientRect();
  const left = Math.min(at.left, document.documentElement.clientWidth - box.offsetWidth - 8);
  const below = at.bottom + box.offsetHeight + 8 < window.innerHeight;
  box.style.left = `${Math.max(8, left) + window.scrollX}px`;
  box.style.top = `${(below ? at.bottom + 4 : at.top - box.offsetHeight - 4) + window.scrollY}px`;
}

function row({ text, logprob, chosen = false }) {
  const probability = Math.exp(logprob);
  const item = document.createElement("li");
  item.className = chosen ? "chosen" : "";
  const name = document.createElement("code");
  name.textContent = text.replaceAll("\n", "↵").replaceAll(" ", "␣");
  const room = document.createElement("span");
  const bar = document.createElement("div");
  bar.className = "bar";
  bar.style.width = `${100 * probability}%`;
  room.append(bar);
  const number = document.createElement("span");
  number.className = "number";
  number.textContent = `${(100 * probability).toFixed(probability < 0.1 ? 2 : 1)} %`;
  item.append(name, room, number);
  return item;
}
