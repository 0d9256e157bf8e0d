// A small plot over time, as a line or dots. Shows the highest value and the value under the pointer.
const SVG = "http://www.w3.org/2000/svg";
const HEIGHT = 88;
const [TOP, BOTTOM] = [14, 12];

export class Plot {
  constructor(id, kind, format) {
    this._svg = document.getElementById(id);
    this._value = document.querySelector(`[data-value-of="${id}"]`);
    this._kind = kind;
    this._format = format;
    this._points = [];
    this._pointer = null;
    this._range = [0, 1];
    this._svg.addEventListener("pointermove", (event) => {
      this._pointer = event.offsetX;
      this._draw();
    });
    this._svg.addEventListener("pointerleave", () => {
      this._pointer = null;
      this._draw();
    });
  }

  // time: in seconds.
  add(time, value) {
    this._points.push({ time, value });
  }

  draw(from, to) {
    this._range = [from, to];
    this._points = this._points.filter(({ time }) => time >= from).sort((one, other) => one.time - other.time);
    this._draw();
  }

  _draw() {
    const [from, to] = this._range;
    const width = this._svg.clientWidth;
    const base = HEIGHT - BOTTOM;
    const highest = Math.max(...this._points.map(({ value }) => value), 1e-9);
    const x = (time) => ((time - from) / (to - from)) * width;
    const y = (value) => base - (value / highest) * (base - TOP);
    const positions = this._points.map(({ time, value }) => ({ x: x(time), y: y(value), value }));
    const drawn = [node("line", { class: "axis", x1: 0, x2: width, y1: base, y2: base })];
    if (positions.length) {
      drawn.push(node("text", { x: 0, y: 10 }, `max ${this._format(highest)}`));
      drawn.push(...(this._kind === "line" ? line(positions, base) : dots(positions)));
    }
    drawn.push(node("text", { x: 0, y: HEIGHT }, `${Math.round(to - from)} s ago`));
    drawn.push(node("text", { x: width, y: HEIGHT, "text-anchor": "end" }, "now"));
    const shown = this._pointer === null ? positions.at(-1) : nearest(positions, this._pointer);
    if (shown && this._pointer !== null) {
      drawn.push(node("line", { class: "pointer", x1: shown.x, x2: shown.x, y1: TOP, y2: base }));
    }
    this._value.textContent = shown ? this._format(shown.value) : "";
    this._svg.replaceChildren(...drawn);
  }
}

function line(positions, base) {
  const path = positions.map(({ x, y }) => `${x.toFixed(1)},${y.toFixed(1)}`).join(" L");
  const area = `M${positions[0].x.toFixed(1)},${base} L${path} L${positions.at(-1).x.toFixed(1)},${base}Z`;
  return [node("path", { class: "area", d: area }), node("path", { class: "line", d: `M${path}` })];
}

function dots(positions) {
  return positions.map(({ x, y }) => node("circle", { class: "dot", cx: x, cy: y, r: 2.5 }));
}

function nearest(positions, x) {
  const distance = (position) => Math.abs(position.x - x);
  return positions.reduce((best, position) => (distance(position) < distance(best) ? position : best), positions[0]);
}

function node(name, attributes, text = "") {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.textContent = text;
  return element;
}
