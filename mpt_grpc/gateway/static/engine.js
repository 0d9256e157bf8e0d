// The engine's panel: asks for its state twice a second while the page is seen, and hands it on to be drawn.
import { drawCache } from "./cache_map.js";
import { Plot } from "./plot.js";
import { drawWaterfall } from "./waterfall.js";

const INTERVAL_MS = 500;
const WINDOW_S = 120;
const numbers = Object.fromEntries(
  [...document.querySelectorAll("#numbers [data-of]")].map((element) => [element.dataset.of, element]),
);
const status = document.getElementById("engine-status");

export async function watchEngine() {
  const throughput = new Plot("throughput", "line", (value) => Math.round(value).toLocaleString());
  const ttft = new Plot("ttft", "dots", (value) => `${Math.round(value * 1000)} ms`);
  let measured = new Set();
  let before = null;
  for (;;) {
    await seen();
    try {
      const state = await stateOfEngine();
      status.textContent = "";
      showNumbers(state, before);
      drawCache(state);
      drawWaterfall(state);
      if (before) throughput.add(state.time, tokensPerSecond(state, before));
      for (const request of state.completed_requests) {
        if (measured.has(request.request_id)) continue;
        const waited = request.timings.time_to_first_token;
        if (waited !== null) ttft.add(request.arrival_time + waited, waited);
      }
      measured = new Set(state.completed_requests.map((request) => request.request_id));
      throughput.draw(state.time - WINDOW_S, state.time);
      ttft.draw(state.time - WINDOW_S, state.time);
      before = state;
    } catch (error) {
      status.textContent = `not reached: ${error.message}`;
    }
    await new Promise((resolve) => setTimeout(resolve, INTERVAL_MS));
  }
}

async function seen() {
  while (document.hidden) {
    await new Promise((resolve) => document.addEventListener("visibilitychange", resolve, { once: true }));
  }
}

async function stateOfEngine() {
  const response = await fetch("debug/engine");
  const answer = await response.json();
  if (!response.ok) throw new Error(answer.error.message);
  return answer;
}

function showNumbers({ load }, before) {
  const steps = load.num_steps - (before?.load.num_steps ?? load.num_steps);
  const batched = load.num_batched_sequences - (before?.load.num_batched_sequences ?? 0);
  numbers.running.textContent = load.num_running_requests;
  numbers.waiting.textContent = load.num_waiting_requests;
  numbers.batch.textContent = steps > 0 ? (batched / steps).toFixed(1) : "–";
  numbers.cache.textContent = `${Math.round(100 * (1 - load.num_free_blocks / load.num_blocks))} %`;
}

function tokensPerSecond({ load, time }, before) {
  return Math.max(0, load.num_output_tokens - before.load.num_output_tokens) / Math.max(time - before.time, 1e-3);
}
