// The KV cache as a map: a cell for each block, in the colour of the request that holds it.
import { ownerColour } from "./owners.js";

const canvas = document.getElementById("cache-map");
const text = document.getElementById("cache-text");
const CELL_SIZES = [12, 9, 6, 4, 3];
const ROOMY_HEIGHT = 200;

export function drawCache({ load, active_requests, cached_blocks }) {
  const owners = ownersOfBlocks(active_requests);
  const shared = [...owners.values()].filter((of) => of.sequences > 1).length;
  text.textContent =
    `${owners.size} of ${load.num_blocks.toLocaleString()} blocks in use` +
    `${shared ? `, ${shared} shared` : ""}, ${cached_blocks.length} cached`;
  paint(load.num_blocks, owners, new Set(cached_blocks));
}

// Block -> its first owner, and how many sequences hold it.
function ownersOfBlocks(requests) {
  const owners = new Map();
  for (const { request_id, sequences } of requests) {
    for (const block of sequences.flatMap((sequence) => sequence.blocks)) {
      const of = owners.get(block);
      if (of) of.sequences++;
      else owners.set(block, { request: request_id, sequences: 1 });
    }
  }
  return owners;
}

function paint(blocks, owners, kept) {
  const width = canvas.parentElement.clientWidth;
  const rowsOf = (size) => Math.ceil(blocks / Math.floor(width / size));
  const size = CELL_SIZES.find((size) => rowsOf(size) * size <= ROOMY_HEIGHT) ?? CELL_SIZES.at(-1);
  const columns = Math.floor(width / size);
  const height = rowsOf(size) * size;
  const scale = window.devicePixelRatio;
  canvas.width = width * scale;
  canvas.height = height * scale;
  canvas.style.height = `${height}px`;
  const draw = canvas.getContext("2d");
  draw.scale(scale, scale);
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(name.replace(/^var\((.*)\)$/, "$1"));
  const [free, keptColour, ink] = [colour("--free"), colour("--kept"), colour("--ink")];
  for (let block = 0; block < blocks; block++) {
    const [x, y, side] = [(block % columns) * size, Math.floor(block / columns) * size, size - 1];
    const owner = owners.get(block);
    draw.fillStyle = owner ? colour(ownerColour(owner.request)) : kept.has(block) ? keptColour : free;
    draw.fillRect(x, y, side, side);
    if (owner?.sequences > 1) {
      draw.fillStyle = ink;
      draw.fillRect(x + side / 4, y + side / 4, side / 2, side / 2);
    }
  }
}
