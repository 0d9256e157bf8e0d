// Assigns each request a colour, used in the outputs, the cache map and the waterfall.
const COLOURS = 8;
const MAX_REMEMBERED = 256;
const assigned = new Map();
let next = 0;

export function ownerColour(requestId) {
  const colour = assigned.get(requestId) ?? next++ % COLOURS;
  // A Map keeps its order of insertion, so the least recently used colour comes first and is forgotten first.
  assigned.delete(requestId);
  assigned.set(requestId, colour);
  if (assigned.size > MAX_REMEMBERED) assigned.delete(assigned.keys().next().value);
  return `var(--owner-${colour})`;
}
