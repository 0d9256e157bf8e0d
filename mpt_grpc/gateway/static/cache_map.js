// The map of the KV cache: a cell for each block, in the colour of the request that uses it.
import { ownerColour } from "./owners.js";

const canvas = document.getElementById("cache-map");
const summary = document.getElementById("cache-text");
const CELL_SIZES = [12, 9, 6, 4, 3];
const COMFORTABLE_HEIGHT = 200;

export function drawCache({ load, active_requests, cached_blocks }) {
  const owners = ownersOfBlocks(active_requests);
  const shared = [...owners.values()].filter((owner) => owner.sequences > 1).length;
  summary.textContent =
    `${owners.size} of ${load.num_blocks.toLocaleString()} blocks used` +
    `${shared ? `, ${shared} shared` : ""}, ${cached_blocks.length} cached`;
  paint(load.num_blocks, owners, new Set(cached_blocks));
}

// Maps each block to the first request that uses it and the number of sequences that do.
function ownersOfBlocks(requests) {
  const owners = new Map();
  for (const { request_id, sequences } of requests) {
    for (const block of sequences.flatMap((sequence) => sequence.blocks)) {
      const owner = owners.get(block);
      if (owner) owner.sequences++;
      else owners.set(block, { request: request_id, sequences: 1 });
    }
  }
  return owners;
}

function paint(numBlocks, owners, cached) {
  const width = canvas.parentElement.clientWidth;
  const rowsOf = (size) => Math.ceil(numBlocks / Math.floor(width / size));
  const size = CELL_SIZES.find((size) => rowsOf(size) * size <= COMFORTABLE_HEIGHT) ?? CELL_SIZES.at(-1);
  const columns = Math.floor(width / size);
  const height = rowsOf(size) * size;
  const scale = window.devicePixelRatio;
  canvas.width = width * scale;
  canvas.height = height * scale;
  canvas.style.height = `${height}px`;
  const context = canvas.getContext("2d");
  context.scale(scale, scale);
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(name.replace(/^var\((.*)\)$/, "$1"));
  const [free, cachedColour, ink] = [colour("--free"), colour("--cached"), colour("--ink")];
  for (let block = 0; block < numBlocks; block++) {
    const [x, y, side] = [(block % columns) * size, Math.floor(block / columns) * size, size - 1];
    const owner = owners.get(block);
    context.fillStyle = owner ? colour(ownerColour(owner.request)) : cached.has(block) ? cachedColour : free;
    context.fillRect(x, y, side, side);
    if (owner?.sequences > 1) {
      context.fillStyle = ink;
      context.fillRect(x + side / 4, y + side / 4, side / 2, side / 2);
    }
  }
}
