// Small helpers to make elements. Text is only ever put in as text.

const SVG = "http://www.w3.org/2000/svg";

/** An element with attributes, `on...` listeners and children: elements or text, or lists of them. */
export function element(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

/** The same for a drawing. */
export function drawing(tag, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

function filled(made, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name in made && !(made instanceof SVGElement) && typeof value !== "string") made[name] = value;
    else if (name === "value") made.value = value;
    else made.setAttribute(name, value);
  }
  made.append(...children.flat());
  return made;
}

/** A button on a node, which is neither in the workflow nor in what is sent to the server. */
export function addButton(node, label, action) {
  let pressed;
  const once = () => {
    if (!pressed) action();
    pressed = true;
    setTimeout(() => (pressed = false));
  };
  // ComfyUI's panel at the right drops the callback but binds the options to its button; a node's own button has both.
  node.addWidget("button", label, null, once, { serialize: false, onClick: once }).serialize = false;
}

/** A function that waits until it was not called for so many milliseconds. */
export function later(call, wait) {
  let timer;
  return (...given) => {
    clearTimeout(timer);
    timer = setTimeout(() => call(...given), wait);
  };
}

export function percent(share) {
  const shown = 100 * share;
  return `${shown.toFixed(shown < 10 ? 1 : 0)} %`;
}
