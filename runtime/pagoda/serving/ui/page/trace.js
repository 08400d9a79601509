// Steps and requests as a file for ui.perfetto.dev (Trace Event Format, times in microseconds); `pagoda trace` writes the like.

/** What the engines, by name, did between two times. */
export function traceFile(engines, from, to) {
  const events = [];
  const micro = (seconds) => Math.round(seconds * 1e6);
  let process = 0;
  for (const [name, engine] of engines) {
    const pid = (process += 1);
    const threads = new Map();
    const named = (kind, tid, text) => events.push({ name: kind, ph: "M", pid, tid, args: { name: text } });
    const thread = (id) => {
      if (!threads.has(id)) {
        threads.set(id, threads.size + 1);
        named("thread_name", threads.get(id), id);
      }
      return threads.get(id);
    };
    const part = (tid, what, begin, seconds, args) => events.push({ name: what, ph: "X", ts: micro(begin), dur: micro(seconds), pid, tid, args });
    const counter = (what, at, args) => events.push({ name: what, ph: "C", ts: micro(at), pid, args });
    named("process_name", 0, name);
    named("thread_name", 0, "steps");
    for (const step of engine.steps) {
      if (step.time > to || step.time + step.seconds < from) continue;
      const { time, seconds, rows, waiting, preempted, total } = step;
      part(0, `step: ${step.kinds.prefill ? "prefill" : "decode"}`, time, seconds, { step: step.step, rows: rows.length, tokens: total, waiting, preempted });
      counter("tokens a step", time, { tokens: total });
      counter("requests", time, { running: rows.length, waiting });
    }
    for (const lane of engine.lanes.values()) {
      const parts = lane.parts.filter(({ begin, end }) => begin <= to && end >= from && end > begin);
      for (const { kind, begin, end } of parts) part(thread(lane.id), kind === "accepted" ? "decode with drafts" : kind, begin, end - begin, { computed: lane.computed });
      if (parts.length && lane.ended && lane.last <= to) events.push({ name: `ended: ${lane.ended}`, ph: "i", s: "t", ts: micro(lane.last), pid, tid: thread(lane.id) });
    }
  }
  return { traceEvents: events, displayTimeUnit: "ms" };
}
