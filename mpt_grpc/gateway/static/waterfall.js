// The most recent requests as bars on one time axis: queue, prefill and decode.
import { ownerColour } from "./owners.js";

const ROWS = 14;
const WINDOW_S = 30;
const REASONS = { MAX_NEW_TOKENS: "token limit", EOS_TOKEN: "EOS token" };
const list = document.getElementById("waterfall");

export function drawWaterfall({ time: now, active_requests, completed_requests }) {
  const end = Math.max(...[...completed_requests, ...active_requests].map((request) => request.end_time ?? now));
  const requests = [...completed_requests, ...active_requests]
    .filter((request) => (request.end_time ?? now) > end - WINDOW_S)
    .sort((one, other) => other.arrival_time - one.arrival_time)
    .slice(0, ROWS);
  const begin = Math.max(end - WINDOW_S, Math.min(...requests.map((request) => request.arrival_time)));
  list.replaceChildren(...requests.map((request) => row(request, begin, end, now)));
}

function row(request, begin, end, now) {
  const item = document.createElement("li");
  item.style.setProperty("--owner", ownerColour(request.request_id));
  const dot = document.createElement("span");
  dot.className = "dot";
  const track = document.createElement("div");
  track.className = "track";
  let from = request.arrival_time;
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

// A phase without a reported duration lasts until the end of the request, or until now.
function phases({ arrival_time, end_time, timings }, now) {
  let left = (end_time ?? now) - arrival_time;
  const named = [
    ["queue", timings.queue_time],
    ["prefill", timings.prefill_time],
    ["decode", timings.decode_time],
  ];
  return named.map(([phase, seconds]) => {
    const duration = Math.max(0, Math.min(left, seconds ?? left));
    left -= duration;
    return [phase, duration];
  });
}

function summary({ end_time, usage, sequences }) {
  const tokens = `${usage.num_prompt_tokens} + ${usage.num_output_tokens}`;
  const [reason] = sequences.map((sequence) => sequence.finish_reason).filter(Boolean);
  const named = REASONS[reason] ?? (reason ?? "failed").toLowerCase().replaceAll("_", " ");
  const ended = end_time === null ? "" : named;
  return [tokens, ended].filter(Boolean).join(" · ");
}
