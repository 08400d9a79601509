// What the page keeps of each engine, to be looked at while more comes.

import { kinds } from "./charts.js";

export const KEEP_SECONDS = 300;
const MAP_CHARACTERS = 16e6; // of a KV cache's past

/** What is known of one engine: its last minutes. */
export class Engine {
  constructor() {
    this.steps = [];
    this.lanes = new Map();
    this.blocks = [];
    this.holders = {};
    this.maps = []; // of the KV cache, one a second: {time, states, holders}
  }

  take(trace) {
    for (const [id, arrival] of trace.arrivals) this.lane(id, arrival);
    for (const step of trace.steps) {
      const sums = kinds(step);
      this.steps.push({ ...step, kinds: sums, total: sums.prefill + sums.decode + sums.accepted + sums.refused });
      for (const row of step.rows) this.takeRow(step, row);
      for (const [id, reason] of step.ended) {
        const lane = this.lanes.get(id);
        if (lane) lane.ended = reason;
      }
    }
    for (const id of trace.waiting) this.extend(this.lane(id, trace.time), "queue", trace.time, trace.time);
    const { first, states, holders } = trace.blocks;
    if (!first) this.holders = holders;
    for (let index = 0; index < states.length; index += 1) this.blocks[first + index] = states[index];
    this.keepMap(trace.time);
    const oldest = trace.time - KEEP_SECONDS;
    const keep = this.steps.findIndex((step) => step.time >= oldest);
    if (keep > 0) this.steps.splice(0, keep);
    for (const [id, lane] of this.lanes) if (lane.last < oldest) this.lanes.delete(id);
  }

  keepMap(time) {
    if (time - (this.maps.at(-1)?.time ?? 0) < 1) return;
    this.maps.push({ time, states: this.blocks.join(""), holders: this.holders });
    const most = Math.max(10, Math.min(KEEP_SECONDS, Math.floor(MAP_CHARACTERS / Math.max(1, this.blocks.length))));
    if (this.maps.length > most) this.maps.shift();
  }

  /** States of the KV cache's blocks and who held them at that time; null: now. */
  mapAt(time) {
    if (time === null) return this;
    const { states, holders } = this.maps.findLast((map) => map.time <= time) ?? this.maps[0] ?? { states: "", holders: {} };
    return { blocks: states, holders };
  }

  /** The lane of a request, which began then if there is none yet: it waits until its first step. */
  lane(id, begin) {
    if (!this.lanes.has(id)) this.lanes.set(id, { id, parts: [{ kind: "queue", begin, end: begin }], ended: "", last: begin, computed: 0 });
    return this.lanes.get(id);
  }

  extend(lane, kind, begin, end) {
    const part = lane.parts.at(-1);
    if (part.kind === "queue") part.end = Math.max(part.end, begin);
    if (part.kind === kind && begin - part.end < 0.25) part.end = end;
    else lane.parts.push({ kind, begin: kind === "queue" ? lane.last : begin, end }); // who waits again has waited since
    lane.last = end;
  }

  takeRow(step, [id, computed, tokens, drafts]) {
    const lane = this.lane(id, step.time);
    const kind = tokens - drafts > 1 ? "prefill" : drafts ? "accepted" : "decode";
    this.extend(lane, kind, step.time, step.time + step.seconds);
    lane.computed = computed + tokens;
  }

  /** Latencies of requests that have ended; their ids are without what the engine adds to them. */
  takeEnded(requests) {
    const known = new Map(requests.map((each) => [each.request, each]));
    for (const lane of this.lanes.values()) lane.latencies ??= known.get(lane.id.replace(/#\d+$/, ""));
  }
}
