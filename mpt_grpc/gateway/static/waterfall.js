// The last requests as bars on one time axis: waiting, its prompt, its tokens.
import { ownerColour } from "./owners.js";

const ROWS = 14;
const WINDOW_S = 30;
const REASONS = { MAX_NEW_TOKENS: "token limit", EOS_TOKEN: "end mark" };
const list = document.getElementById("waterfall");

export function drawWaterfall({ time_s: now, in_flight, ended }) {
  const end = Math.max(...[...ended, ...in_flight].map((request) => request.end_time_s ?? now));
  const requests = [...ended, ...in_flight]
    .filter((request) => (request.end_time_s ?? now) > end - WINDOW_S)
    .sort((one, other) => other.arrival_time_s - one.arrival_time_s)
    .slice(0, ROWS);
  const begin = Math.max(end - WINDOW_S, Math.min(...requests.map((request) => request.arrival_time_s)));
  list.replaceChildren(...requests.map((request) => row(request, begin, end, now)));
}

function row(request, begin, end, now) {
  const item = document.createElement("li");
  item.style.setProperty("--owner", ownerColour(request.request_id));
  const dot = document.createElement("span");
  dot.className = "dot";
  const track = document.createElement("div");
  track.className = "track";
  let from = request.arrival_time_s;
  for (const [phase, seconds] of phases(request, now)) {
    const bar = document.createElement("span");
    bar.className = phase;
    const shownFrom = Math.max(from, begin);
    bar.style.left = `${(100 * (shownFrom - begin)) / (end - begin)}%`;
    bar.style.width = `${(100 * Math.max(0, from + seconds - shownFrom)) / (end - begin)}%`;
    track.append(bar);
    from += seconds;
  }
  const text = document.createElement("span");
  text.className = "row-text";
  text.textContent = summary(request);
  item.title = `${request.request_id}: ${phases(request, now)
    .map(([phase, seconds]) => `${phase} ${Math.round(1000 * seconds)} ms`)
    .join(", ")}`;
  item.append(dot, track, text);
  return item;
}

// What a phase has not told yet lasts until the end, or until now.
function phases({ arrival_time_s, end_time_s, timings }, now) {
  let left = (end_time_s ?? now) - arrival_time_s;
  const named = [
    ["queue", timings.queue_s],
    ["prefill", timings.prefill_s],
    ["decode", timings.decode_s],
  ];
  return named.map(([phase, seconds]) => {
    const lasted = Math.max(0, Math.min(left, seconds ?? left));
    left -= lasted;
    return [phase, lasted];
  });
}

function summary({ end_time_s, usage, sequences }) {
  const tokens = `${usage.num_prompt_tokens} + ${usage.num_output_tokens}`;
  const [reason] = sequences.map((sequence) => sequence.finish_reason).filter(Boolean);
  const named = REASONS[reason] ?? (reason ?? "cancelled").toLowerCase().replaceAll("_", " ");
  const ended = end_time_s === null ? "" : named;
  return [tokens, ended].filter(Boolean).join(" · ");
}
