// Markdown of a model's answer as DOM nodes. Text only ever becomes text nodes, and no node gets an address that is not
// http(s) or mailto: nothing that a model writes can run or load.

const element = (name, ...children) => {
  const node = document.createElement(name);
  node.append(...children);
  return node;
};

export function render(text) {
  const fragment = document.createDocumentFragment();
  const lines = text.split("\n");
  for (let at = 0; at < lines.length; ) at = block(lines, at, fragment);
  return fragment;
}

function block(lines, at, into) {
  const line = lines[at];
  const fence = /^\s*(```+|~~~+)\s*([\w+#.-]*)/.exec(line);
  if (fence) {
    let end = at + 1;
    while (end < lines.length && !lines[end].trim().startsWith(fence[1])) end += 1;
    const code = element("code", lines.slice(at + 1, end).join("\n"));
    const pre = element("pre", code);
    pre.tabIndex = 0;
    if (fence[2]) pre.setAttribute("aria-label", `code, ${fence[2]}`);
    into.append(pre);
    return end + 1;
  }
  if (!line.trim()) return at + 1;
  const heading = /^(#{1,6})\s+(.*)/.exec(line);
  if (heading) {
    into.append(element("h3", ...inline(heading[2])));
    return at + 1;
  }
  if (/^\s*([-*_])(\s*\1){2,}\s*$/.test(line)) {
    into.append(element("hr"));
    return at + 1;
  }
  if (/^\s*>/.test(line)) return gather(lines, at, (each) => /^\s*>/.test(each), (found) => {
    into.append(element("blockquote", render(found.map((each) => each.replace(/^\s*>\s?/, "")).join("\n"))));
  });
  if (/^\s*\|.*\|\s*$/.test(line) && /^\s*\|[\s:|-]+\|\s*$/.test(lines[at + 1] ?? "")) return table(lines, at, into);
  const marker = /^\s*(?:[-*+]|(\d+)[.)])\s+/.exec(line);
  if (marker) {
    const list = element(marker[1] ? "ol" : "ul");
    if (marker[1]) list.start = Number(marker[1]);
    const next = gather(lines, at, (each) => /^\s*(?:[-*+]|\d+[.)])\s+/.test(each), (found) => {
      for (const each of found) list.append(element("li", ...inline(each.replace(/^\s*(?:[-*+]|\d+[.)])\s+/, ""))));
    });
    into.append(list);
    return next;
  }
  return gather(lines, at, (each, index) => index === at || (each.trim() && !/^\s*(```|~~~|#{1,6}\s|>|[-*+]\s|\d+[.)]\s)/.test(each)),
    (found) => into.append(element("p", ...inline(found.join("\n")))));
}

function gather(lines, at, belongs, use) {
  let end = at;
  while (end < lines.length && belongs(lines[end], end)) end += 1;
  use(lines.slice(at, end));
  return Math.max(end, at + 1);
}

function table(lines, at, into) {
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());
  const head = element("tr", ...cells(lines[at]).map((cell) => element("th", ...inline(cell))));
  const body = element("tbody");
  const next = gather(lines, at + 2, (each) => /^\s*\|.*\|\s*$/.test(each), (found) => {
    for (const line of found) body.append(element("tr", ...cells(line).map((cell) => element("td", ...inline(cell)))));
  });
  into.append(element("table", element("thead", head), body));
  return next;
}

const INLINE = /(`+)([^`]+?)\1|\*\*([^*]+)\*\*|__([^_]+)__|\*([^*\s][^*]*)\*|\[([^\]]+)\]\(([^)\s]+)\)/;

function inline(text) {
  const nodes = [];
  for (let rest = text; rest; ) {
    const found = INLINE.exec(rest);
    if (!found) {
      nodes.push(rest);
      break;
    }
    if (found.index) nodes.push(rest.slice(0, found.index));
    rest = rest.slice(found.index + found[0].length);
    if (found[2] !== undefined) nodes.push(element("code", found[2]));
    else if (found[3] ?? found[4]) nodes.push(element("strong", found[3] ?? found[4]));
    else if (found[5]) nodes.push(element("em", found[5]));
    else nodes.push(link(found[6], found[7], found[0]));
  }
  return nodes;
}

function link(text, address, written) {
  if (!/^(https?:\/\/|mailto:)/i.test(address)) return written;
  const node = element("a", text);
  node.href = address;
  node.target = "_blank";
  node.rel = "noopener noreferrer nofollow";
  return node;
}
