// Elements, made in one expression.

/** An element with these properties (not attributes) and children; a string among them becomes text. */
export function element(name, properties = {}, ...children) {
  const node = Object.assign(document.createElement(name), properties);
  node.append(...children);
  return node;
}
