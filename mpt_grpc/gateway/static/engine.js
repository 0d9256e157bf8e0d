// The engine panel: fetches the state of the engine twice a second while the page is visible, and draws it, unless the server
// refuses that.
import { drawCache } from "./cache_map.js";
import { Plot } from "./plot.js";
import { drawWaterfall } from "./waterfall.js";

const INTERVAL_MS = 500;
const WINDOW_S = 120;
const FINAL = new Set([401, 403, 404]); // the caller may not see the state, or there are several servers
const numbers = Object.fromEntries(
  [...document.querySelectorAll("#numbers [data-of]")].map((element) => [element.dataset.of, element]),
);
const status = document.getElementById("engine-status");

export async function pollEngine() {
  const throughput = new Plot("throughput", "line", (value) => Math.round(value).toLocaleString());
  const ttft = new Plot("ttft", "dots", (value) => `${Math.round(value * 1000)} ms`);
  // The completed requests whose time to first token is plotted already.
  let measured = new Set();
  let previous = null;
  for (;;) {
    await pageVisible();
    try {
      const state = await fetchState();
      status.textContent = "";
      showNumbers(state, previous);
      drawCache(state);
      drawWaterfall(state);
      if (previous) throughput.add(state.time, tokensPerSecond(state, previous));
      for (const request of state.completed_requests) {
        if (measured.has(request.request_id)) continue;
        const ttftSeconds = request.timings.time_to_first_token;
        if (ttftSeconds !== null) ttft.add(request.arrival_time + ttftSeconds, ttftSeconds);
      }
      measured = new Set(state.completed_requests.map((request) => request.request_id));
      throughput.draw(state.time - WINDOW_S, state.time);
      ttft.draw(state.time - WINDOW_S, state.time);
      previous = state;
    } catch (error) {
      status.textContent = error.isFinal ? error.message : `not reachable: ${error.message}`;
      if (error.isFinal) return;
    }
    await new Promise((resolve) => setTimeout(resolve, INTERVAL_MS));
  }
}

async function pageVisible() {
  while (document.hidden) {
    await new Promise((resolve) => document.addEventListener("visibilitychange", resolve, { once: true }));
  }
}

async function fetchState() {
  const response = await fetch("debug/engine");
  const body = await response.json();
  if (!response.ok) throw Object.assign(new Error(body.error.message), { isFinal: FINAL.has(response.status) });
  return body;
}

function showNumbers({ load }, previous) {
  const steps = load.num_steps - (previous?.load.num_steps ?? load.num_steps);
  const batched = load.num_batched_sequences - (previous?.load.num_batched_sequences ?? 0);
  numbers.running.textContent = load.num_running_requests;
  numbers.waiting.textContent = load.num_waiting_requests;
  numbers.batch.textContent = steps > 0 ? (batched / steps).toFixed(1) : "–";
  numbers.cache.textContent = `${Math.round(100 * (1 - load.num_free_blocks / load.num_blocks))}%`;
}

function tokensPerSecond({ load, time }, previous) {
  return Math.max(0, load.num_output_tokens - previous.load.num_output_tokens) / Math.max(time - previous.time, 1e-3);
}
