// A small plot over time: a line or dots, the highest value at its top, and the value at the pointer.
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

  // Times in seconds.
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
    const places = this._points.map(({ time, value }) => ({ x: x(time), y: y(value), value }));
    const drawn = [node("line", { class: "axis", x1: 0, x2: width, y1: base, y2: base })];
    if (places.length) {
      drawn.push(node("text", { x: 0, y: 10 }, `highest ${this._format(highest)}`));
      drawn.push(...(this._kind === "line" ? line(places, base) : dots(places)));
    }
    drawn.push(node("text", { x: 0, y: HEIGHT }, `${Math.round(to - from)} s ago`));
    drawn.push(node("text", { x: width, y: HEIGHT, "text-anchor": "end" }, "now"));
    const shown = this._pointer === null ? places.at(-1) : nearest(places, this._pointer);
    if (shown && this._pointer !== null) {
      drawn.push(node("line", { class: "pointer", x1: shown.x, x2: shown.x, y1: TOP, y2: base }));
    }
    this._value.textContent = shown ? this._format(shown.value) : "";
    this._svg.replaceChildren(...drawn);
  }
}

function line(places, base) {
  const path = places.map(({ x, y }) => `${x.toFixed(1)},${y.toFixed(1)}`).join(" L");
  const area = `M${places[0].x.toFixed(1)},${base} L${path} L${places.at(-1).x.toFixed(1)},${base}Z`;
  return [node("path", { class: "area", d: area }), node("path", { class: "line", d: `M${path}` })];
}

function dots(places) {
  return places.map(({ x, y }) => node("circle", { class: "dot", cx: x, cy: y, r: 2.5 }));
}

function nearest(places, x) {
  return places.reduce((best, place) => (Math.abs(place.x - x) < Math.abs(best.x - x) ? place : best), places[0]);
}

function node(name, attributes, text = "") {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.textContent = text;
  return element;
}
