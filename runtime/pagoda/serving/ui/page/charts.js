// Canvases of the engine at work. All of them show one span of time, or the KV cache's blocks.

const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/** Resolve a light-dark() colour by letting the browser do so. */
function resolved(name) {
  const probe = document.createElement("span");
  probe.style.color = color(name);
  document.body.append(probe);
  const value = getComputedStyle(probe).color;
  probe.remove();
  return value;
}

let colors = {};
export function readColors() {
  colors = Object.fromEntries(
    ["queue", "prefill", "decode", "accepted", "refused", "free", "cached", "accent", "quiet", "line", "text", "bad"].map((name) => [name, resolved(`--${name}`)]),
  );
}

/** The context of a canvas in CSS pixels, cleared. */
function clear(canvas, height) {
  const width = canvas.clientWidth;
  const ratio = devicePixelRatio || 1;
  if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    canvas.style.height = `${height}px`;
  }
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  context.font = "11px system-ui, sans-serif";
  return { context, width };
}

/** What a step did, by kind of token. */
export function kinds(step) {
  const sum = { prefill: 0, decode: 0, accepted: 0, refused: 0 };
  for (const [, , tokens, drafts, fresh] of step.rows) {
    const accepted = drafts ? Math.max(0, fresh - 1) : 0;
    const own = tokens - drafts;
    if (own > 1) sum.prefill += own;
    else sum.decode += own;
    sum.accepted += accepted;
    sum.refused += drafts - accepted;
  }
  return sum;
}

/** Tokens of each step as a stacked bar as wide as it took; log scale, for a prompt is a thousand times a token. */
export function drawSteps(canvas, steps, from, to) {
  const height = 150;
  const { context, width } = clear(canvas, height);
  const x = (time) => ((time - from) / (to - from)) * width;
  const most = Math.max(8, ...steps.map((step) => step.total));
  const y = (tokens) => (Math.log2(1 + tokens) / Math.log2(1 + most)) * (height - 18);
  for (const step of steps) {
    const left = x(step.time);
    const wide = Math.max(1, x(step.time + step.seconds) - left - 0.5);
    let base = 0;
    for (const kind of ["decode", "accepted", "refused", "prefill"]) {
      if (!step.kinds[kind]) continue;
      const low = y(base);
      base += step.kinds[kind];
      context.fillStyle = colors[kind];
      context.fillRect(left, height - 14 - y(base), wide, y(base) - low);
    }
    if (step.preempted) {
      context.fillStyle = colors.bad;
      context.fillRect(left, 0, Math.max(2, wide), 6);
    }
  }
  context.fillStyle = colors.quiet;
  context.fillText(`${most} tokens`, 2, 10);
  axis(context, width, height, from, to);
}

function axis(context, width, height, from, to) {
  const span = to - from;
  const every = [1, 2, 5, 10, 15, 30, 60].find((seconds) => span / seconds <= 12) ?? 60;
  context.fillStyle = colors.quiet;
  for (let time = Math.ceil(from / every) * every; time < to; time += every) {
    const at = ((time - from) / span) * width;
    context.fillRect(at, height - 13, 1, 4);
    context.fillText(new Date(time * 1000).toTimeString().slice(0, 8), Math.min(at + 2, width - 48), height - 2);
  }
}

/** A lane for each request: where it waited, its prompt, its tokens. `lanes` in order; returns what lies where. */
export function drawLanes(canvas, lanes, from, to, marked) {
  const high = 14;
  const { context, width } = clear(canvas, Math.max(2, lanes.length) * high + 16);
  const x = (time) => ((time - from) / (to - from)) * width;
  lanes.forEach((lane, index) => {
    const top = index * high;
    if (lane.id === marked) {
      context.fillStyle = colors.line;
      context.fillRect(0, top, width, high);
    }
    for (const part of lane.parts) {
      if (part.end < from || part.begin > to || part.end === part.begin) continue;
      context.fillStyle = colors[part.kind];
      context.fillRect(x(part.begin), top + 3, Math.max(1, x(part.end) - x(part.begin)), high - 6);
    }
    context.fillStyle = colors.text;
    context.fillText(lane.id.slice(0, 28), 4, top + 11);
    if (lane.ended) context.fillText(lane.ended, Math.min(width - 60, x(lane.last) + 4), top + 11);
  });
  axis(context, width, Math.max(2, lanes.length) * high + 16, from, to);
  return high;
}

/** A square for each block, or for several where there are more than fit. Returns blocks by square, for the pointer. */
export function drawBlocks(canvas, states, held) {
  const width = canvas.clientWidth || 300;
  const most = 6000;
  const per = Math.max(1, Math.ceil(states.length / most));
  const count = Math.ceil(states.length / per);
  const size = Math.max(3, Math.min(12, Math.floor(Math.sqrt((width * 160) / Math.max(1, count)))));
  const columns = Math.max(1, Math.floor(width / size));
  const { context } = clear(canvas, Math.max(size, Math.ceil(count / columns) * size));
  const rank = { ".": 0, c: 1, u: 2, s: 3 };
  const names = ["free", "cached", "decode", "accepted"];
  for (let square = 0; square < count; square += 1) {
    let state = 0;
    let isHeld = false;
    for (let block = square * per; block < Math.min(states.length, (square + 1) * per); block += 1) {
      state = Math.max(state, rank[states[block]] ?? 0);
      isHeld ||= held.has(block);
    }
    context.fillStyle = isHeld ? colors.accent : colors[names[state]];
    context.fillRect((square % columns) * size, Math.floor(square / columns) * size, size - 1, size - 1);
  }
  return { per, size, columns };
}
