// A colour for each request, the same in the outputs, the cache's map and the waterfall.
const COLOURS = 8;
const REMEMBERED = 256;
const given = new Map();
let next = 0;

export function ownerColour(requestId) {
  const colour = given.get(requestId) ?? next++ % COLOURS;
  // The last one used is the last in order, and the first is forgotten.
  given.delete(requestId);
  given.set(requestId, colour);
  if (given.size > REMEMBERED) given.delete(given.keys().next().value);
  return `var(--owner-${colour})`;
}
