// A colour for each request, the same in the outputs, the cache's map and the waterfall.
const COLOURS = 8;
const REMEMBERED = 256;
const given = new Map();
let next = 0;

export function ownerColour(requestId) {
  if (!given.has(requestId)) {
    given.set(requestId, next++ % COLOURS);
    if (given.size > REMEMBERED) given.delete(given.keys().next().value);
  }
  return `var(--owner-${given.get(requestId)})`;
}
