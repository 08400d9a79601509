// The engine at work: steps, requests, KV cache. Keeps the last minutes, which can be looked at while new ones come.

import { drawBlocks, drawLanes, drawSteps, readColors } from "./charts.js";
import { element, save } from "./dom.js";
import { Engine, KEEP_SECONDS } from "./recording.js";
import { traceFile } from "./trace.js";

const MAX_LANES = 40;

function legend(...entries) {
  return element("ul", { className: "legend" }, ...entries.map(([kind, text]) => element("li", {}, element("span", { className: `sw-${kind}` }), text)));
}

function latencies(known) {
  if (!known) return "";
  const parts = [["waited", known.queue], ["first token after", known.ttft], ["then each", known.tpot], ["in all", known.e2el]];
  return parts.filter(([, seconds]) => seconds !== null).map(([what, seconds]) => `, ${what} ${(seconds * 1000).toFixed(seconds < 0.1 ? 1 : 0)} ms`).join("");
}

export class Watch {
  constructor(root) {
    this.engines = new Map();
    this.models = new Map();
    this.held = new Set();
    this.marked = "";
    this.pausedAt = null;
    this.frame = 0;
    this.clockOffset = 0; // seconds from this computer's clock to the server's
    this.engine = element("select");
    this.engine.setAttribute("aria-label", "Engine");
    this.span = element("select");
    this.span.setAttribute("aria-label", "Seconds shown");
    for (const seconds of [10, 30, 60, 300]) this.span.append(element("option", { value: seconds, textContent: `${seconds} s` }));
    this.span.value = "30";
    this.pause = element("button", { type: "button", textContent: "Pause" });
    this.pause.setAttribute("aria-pressed", "false");
    this.scrub = element("input", { type: "range", min: -KEEP_SECONDS, max: 0, step: 0.5, value: 0, className: "grow" });
    this.scrub.setAttribute("aria-label", "Seconds back, of those that are kept");
    this.at = element("span", { className: "quiet at" });
    this.save = element("button", { type: "button", textContent: "Save trace", title: "The seconds shown, of all engines, for ui.perfetto.dev" });
    this.figures = element("dl", { className: "figures" });
    this.steps = element("canvas", { role: "img" });
    this.steps.setAttribute("aria-label", "Tokens of each step over time");
    this.lanes = element("canvas", { role: "img" });
    this.lanes.setAttribute("aria-label", "Requests over time");
    this.map = element("canvas", { role: "img" });
    this.map.setAttribute("aria-label", "KV cache blocks");
    this.mapText = element("p", { className: "quiet", textContent: "Point at a block or a request." });
    this.mapText.setAttribute("aria-live", "polite");
    this.facts = element("div");
    root.append(
      element("div", { className: "panel row" }, this.engine, this.span, this.pause, this.scrub, this.at, this.save),
      this.figures,
      element("div", { className: "panel" }, element("h2", { textContent: "Steps" }), this.steps,
        legend(["prefill", "prefill"], ["decode", "decode"], ["accepted", "drafts accepted"], ["refused", "drafts refused, or preempted (top)"])),
      element("div", { className: "panel" }, element("h2", { textContent: "Requests" }), this.lanes,
        legend(["queue", "waits"], ["prefill", "prompt"], ["decode", "tokens"], ["accepted", "tokens with drafts"])),
      element("div", { className: "panel" }, element("h2", { textContent: "KV cache" }), this.map,
        legend(["free", "free"], ["cached", "cached"], ["used", "in use"], ["shared", "shared"], ["marked", "of the request pointed at"]), this.mapText),
      element("div", { className: "panel" }, element("h2", { textContent: "Engine" }), this.facts),
    );
    this.pause.addEventListener("click", () => this.setPause(this.pausedAt === null));
    this.scrub.addEventListener("input", () => this.setPause(true));
    this.save.addEventListener("click", () => {
      const [from, to] = this.shownSpan();
      save(`pagoda-trace-${new Date(to * 1000).toISOString().slice(0, 19).replaceAll(":", "")}.json`, JSON.stringify(traceFile(this.engines, from, to)));
    });
    for (const control of [this.engine, this.span]) control.addEventListener("change", () => this.redraw());
    this.map.addEventListener("mousemove", (event) => this.pointAtBlock(event));
    this.lanes.addEventListener("mousemove", (event) => this.pointAtLane(event));
    for (const canvas of [this.map, this.lanes]) canvas.addEventListener("mouseleave", () => this.mark("", "Point at a block or a request."));
    new ResizeObserver(() => this.redraw()).observe(root);
    this.root = root;
  }

  opened() {
    readColors();
    this.redraw();
  }

  server(event) {
    this.models = new Map(event.models.map((model) => [model.name, model]));
    for (const [name, engine] of this.engines) {
      engine.blocks = [];
      if (!this.models.has(engine.model)) this.engines.delete(name);
    }
    for (const option of [...this.engine.options]) if (!this.engines.has(option.value)) option.remove();
  }

  event(event) {
    if (event.time) this.clockOffset = event.time - Date.now() / 1000;
    if (event.type === "health") this.models.set(event.model, { ...this.models.get(event.model), ...event });
    if (event.type === "trace") {
      const name = event.replica ? `${event.model}, replica ${event.replica}` : event.model;
      if (!this.engines.has(name)) {
        this.engines.set(name, Object.assign(new Engine(), { model: event.model }));
        this.engine.append(element("option", { value: name, textContent: name }));
      }
      this.engines.get(name).take(event);
    }
    if (event.type === "requests") for (const engine of this.engines.values()) if (engine.model === event.model) engine.takeEnded(event.requests);
    this.redraw();
  }

  setPause(isPaused) {
    this.pausedAt = isPaused ? this.pausedAt ?? this.now() : null;
    if (!isPaused) this.scrub.value = 0;
    this.pause.textContent = isPaused ? "Go on" : "Pause";
    this.pause.setAttribute("aria-pressed", String(isPaused));
    this.redraw();
  }

  now() {
    return Date.now() / 1000 + this.clockOffset;
  }

  redraw() {
    if (this.root.hidden || this.frame) return;
    this.frame = requestAnimationFrame(() => {
      this.frame = 0;
      readColors();
      this.draw();
    });
  }

  /** From and to, in seconds. */
  shownSpan() {
    const to = (this.pausedAt ?? this.now()) + Number(this.scrub.value);
    return [to - Number(this.span.value), to];
  }

  draw() {
    const engine = this.engines.get(this.engine.value) ?? this.engines.values().next().value ?? new Engine();
    const [from, to] = this.shownSpan();
    this.at.textContent = this.pausedAt === null ? "now" : new Date(to * 1000).toLocaleTimeString();
    const steps = engine.steps.filter((step) => step.time < to && step.time + step.seconds > from);
    drawSteps(this.steps, steps, from, to);
    this.shownLanes = [...engine.lanes.values()].filter((lane) => lane.last > from && lane.parts[0].begin < to).slice(-MAX_LANES);
    this.laneHeight = drawLanes(this.lanes, this.shownLanes, from, to, this.marked);
    this.drawn = engine.mapAt(this.pausedAt === null ? null : to);
    this.held = new Set(this.drawn.holders[this.marked] ?? []);
    this.grid = drawBlocks(this.map, this.drawn.blocks, this.held);
    this.drawFigures(engine, steps, from, to);
  }

  drawFigures(engine, steps, from, to) {
    const model = this.models.get(engine.model) ?? this.models.values().next().value;
    if (!model) return;
    const { stats, limits, health } = model;
    const sum = (of) => steps.reduce((total, step) => total + of(step), 0);
    const drafted = sum((step) => step.kinds.accepted + step.kinds.refused);
    const outputs = sum((step) => step.rows.reduce((total, row) => total + row[4], 0));
    const busy = sum((step) => step.seconds) / (to - from);
    const percent = (share) => `${(100 * share).toFixed(share < 0.1 ? 1 : 0)} %`;
    const isPast = this.pausedAt !== null; // of which only steps and blocks are known
    const last = steps.at(-1);
    const running = isPast ? last?.rows.length ?? 0 : stats.num_running;
    const used = isPast ? [...this.drawn.blocks].filter((state) => "us".includes(state)).length : stats.num_blocks_in_use;
    const tokens = sum((step) => step.total) / Math.max(1, steps.length);
    const entries = [
      ["Running", running + (limits ? ` of ${limits.max_num_seqs}` : "")],
      ["Waiting", isPast ? last?.waiting ?? 0 : stats.num_waiting],
      ["Output tokens/s", (outputs / (to - from)).toFixed(1)],
      ["Prompt tokens/s", (sum((step) => step.kinds.prefill) / (to - from)).toFixed(1)],
      ["Step, mean", steps.length ? `${((1000 * sum((step) => step.seconds)) / steps.length).toFixed(1)} ms` : "–"],
      ["Tokens a step, mean", tokens.toFixed(1) + (limits?.max_num_batched_tokens ? ` of ${limits.max_num_batched_tokens}` : "")],
      ["Busy", percent(Math.min(1, busy))],
      ["KV cache in use", stats.num_blocks ? percent(used / stats.num_blocks) : "–"],
      ["Prefix cache hits", stats.prefix_cache_queries ? percent(stats.prefix_cache_hits / stats.prefix_cache_queries) : "–"],
      ["Preempted", sum((step) => step.preempted)],
      ["Drafts accepted", drafted ? percent(sum((step) => step.kinds.accepted) / drafted) : "–"],
    ];
    this.figures.replaceChildren(...entries.map(([name, value]) => element("div", {}, element("dt", { textContent: name }), element("dd", { textContent: value }))));
    const table = element("table", {});
    const row = (...cells) => table.append(element("tr", {}, ...cells.map((cell, index) => element(index ? "td" : "th", { textContent: cell }))));
    row("State", `${health.state}${health.cause ? `: ${health.cause}` : ""}`);
    if (limits) {
      row("Model", `${model.model}, ${limits.dtype} on ${limits.device}, up to ${limits.max_model_len} tokens`);
      row("Memory", limits.kv_equation);
      row("Start", Object.entries(limits.phase_seconds).map(([phase, seconds]) => `${phase} ${seconds.toFixed(2)} s`).join(" · "));
    }
    for (const rank of health.ranks ?? []) row(`Rank ${rank.rank}`, `${rank.up ? "up" : "down"}, ${rank.host}, pid ${rank.pid}, step ${rank.step}`);
    for (const [index, replica] of (health.replicas ?? []).entries()) row(`Replica ${index}`, `${replica.state}${replica.cause ? `: ${replica.cause}` : ""}`);
    this.facts.replaceChildren(table);
  }

  mark(id, text) {
    this.marked = id;
    this.mapText.textContent = text;
    this.redraw();
  }

  pointAtLane(event) {
    const lane = this.shownLanes?.[Math.floor(event.offsetY / this.laneHeight)];
    if (lane) this.mark(lane.id, `${lane.id}: ${lane.computed} tokens${latencies(lane.latencies)}${lane.ended ? `, ended: ${lane.ended}` : ""}`);
  }

  pointAtBlock(event) {
    if (!this.grid || !this.drawn) return;
    const { per, size, columns } = this.grid;
    const first = (Math.floor(event.offsetY / size) * columns + Math.floor(event.offsetX / size)) * per;
    const state = this.drawn.blocks[first];
    if (state === undefined) return;
    const who = Object.entries(this.drawn.holders).filter(([, blocks]) => blocks.some((block) => block >= first && block < first + per)).map(([id]) => id);
    const what = { ".": "free", c: "cached", u: "in use", s: "shared" }[state];
    this.mark(who[0] ?? "", `Block ${first}${per > 1 ? ` to ${first + per - 1}` : ""}: ${what}${who.length ? `, held by ${who.join(", ")}` : ""}`);
  }
}
