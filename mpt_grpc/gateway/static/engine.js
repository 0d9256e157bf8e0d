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
      if (before) throughput.add(state.time_s, tokensPerSecond(state, before));
      for (const request of state.ended) {
        if (measured.has(request.request_id)) continue;
        const waited = request.timings.time_to_first_token_s;
        if (waited !== null) ttft.add(request.arrival_time_s + waited, waited);
      }
      measured = new Set(state.ended.map((request) => request.request_id));
      throughput.draw(state.time_s - WINDOW_S, state.time_s);
      ttft.draw(state.time_s - WINDOW_S, state.time_s);
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
  const response = await fetch("engine");
  const answer = await response.json();
  if (!response.ok) throw new Error(answer.error.message);
  return answer;
}

function showNumbers({ load }, before) {
  const steps = load.steps - (before?.load.steps ?? load.steps);
  const batched = load.batched_sequences - (before?.load.batched_sequences ?? 0);
  numbers.running.textContent = load.running_requests;
  numbers.waiting.textContent = load.waiting_requests;
  numbers.batch.textContent = steps > 0 ? (batched / steps).toFixed(1) : "–";
  numbers.cache.textContent = `${Math.round(100 * (1 - load.free_blocks / load.total_blocks))} %`;
}

function tokensPerSecond({ load, time_s }, before) {
  return Math.max(0, load.generated_tokens - before.load.generated_tokens) / Math.max(time_s - before.time_s, 1e-3);
}
