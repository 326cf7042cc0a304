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
