// Elements, made in one expression.

/** An element with these properties (not attributes) and children; a string among them becomes text. */
export function element(name, properties = {}, ...children) {
  const node = Object.assign(document.createElement(name), properties);
  node.append(...children);
  return node;
}

let fieldNumber = 0;

/** A control under its label. */
export function field(label, control) {
  control.id = `field-${(fieldNumber += 1)}`;
  const name = element("label", { textContent: label });
  name.htmlFor = control.id;
  return element("div", {}, name, control);
}

/** Have the browser save `text` as a file. */
export function save(name, text) {
  const address = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  element("a", { href: address, download: name }).click();
  URL.revokeObjectURL(address);
}
