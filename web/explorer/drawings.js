// What is drawn on a card: pictures that are lit where the feature fires, bars by class, lines over the steps.

import { drawing, element } from "../elements.js";
import { t } from "../words.js";

// As in the charts (Okabe & Ito 2008).
export const COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#8C8C8C", "#B39B00"];
const DIM = 0.6;
const GLOW = 0.3;
const AMBER = [255, 190, 60];

export const colour = (number) => COLOURS[number % COLOURS.length];

/** A map (a byte a cell) as a veil: dark where it is 0, a warm light where it is 255. */
function veil(heat, [rows, columns]) {
  const canvas = element("canvas", { width: columns, height: rows });
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(columns, rows);
  for (let i = 0; i < rows * columns; i++) {
    const share = heat[i] / 255;
    const kept = (1 - DIM * (1 - share)) * (1 - GLOW * share);
    const light = GLOW * share;
    // what lies on top as one colour with an opacity: picture * kept + AMBER * light
    for (let c = 0; c < 3; c++) pixels.data[4 * i + c] = kept < 1 ? (AMBER[c] * light) / (1 - kept) : 0;
    pixels.data[4 * i + 3] = 255 * (1 - kept);
  }
  context.putImageData(pixels, 0, 0);
  return canvas;
}

/** Draw a shown picture into a box of a canvas, lit by a map. */
export function drawLit(context, cards, picture, heat, x, y, width, height) {
  context.save();
  context.beginPath();
  context.rect(x, y, width, height);
  context.clip();
  context.imageSmoothingQuality = "high";
  cards.drawPicture(context, picture, x, y, width, height);
  if (heat) context.drawImage(veil(heat, cards.map), x, y, width, height);
  context.restore();
}

/** A canvas of so many CSS pixels, sharp at any zoom, and its context in CSS pixels. */
export function sharp(canvas, width, height) {
  const density = Math.min(3, window.devicePixelRatio || 1);
  canvas.width = Math.round(width * density);
  canvas.height = Math.round(height * density);
  canvas.style.aspectRatio = `${width} / ${height}`;
  const context = canvas.getContext("2d");
  context.scale(density, density);
  return context;
}

const mean = (numbers) => numbers.reduce((sum, number) => sum + number, 0) / numbers.length;

/** Bars: how active the feature is in each class, on average. */
export function classBars(card, { classes, pictures }) {
  const means = card.activity.map(mean);
  const largest = Math.max(...means, 1e-9);
  return element("div", { class: "bars" }, classes.map((name, number) => {
    const bar = element("span", { class: "bar" });
    bar.style.width = `${(100 * means[number]) / largest}%`;
    bar.style.background = colour(number);
    const much = means[number].toPrecision(2);
    const says = t("{name}: {much} on average of {count} pictures", { name, much, count: pictures[number] });
    return element("div", { class: "row", title: pictures[number] ? says : t("No picture shows {name}.", { name }) }, [
      element("span", { class: "label" }, [name]),
      pictures[number]
        ? element("span", { class: "track" }, [bar])
        : element("span", { class: "label" }, [t("no picture")]),
    ]);
  }));
}

/** Lines: how active it is at each step, a line a class. */
export function stepLines(card, classes, progress) {
  const largest = Math.max(...card.activity.flat(), 1e-9);
  const last = progress.at(-1) || 1;
  const lines = card.activity.map((values, number) => {
    const points = values.map((value, s) => `${(100 * progress[s]) / last},${29 - (27 * value) / largest}`);
    return drawing("polyline", { points: points.join(" "), stroke: colour(number) });
  });
  const title = drawing("title", {}, [
    t("How active over the steps, from noise (left) to picture (right), by class"),
  ]);
  return drawing("svg", { class: "steps", viewBox: "0 0 100 30", preserveAspectRatio: "none", role: "img" }, [
    title,
    drawing("line", { x1: 0, x2: 100, y1: 29.5, y2: 29.5, class: "axis" }),
    ...lines,
  ]);
}
