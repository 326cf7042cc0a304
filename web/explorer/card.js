// One feature as a card.

import { classBars, colour, drawLit, sharp, stepLines } from "./drawings.js";
import { element, percent } from "../elements.js";
import { t } from "../words.js";

const COLUMNS = 3;
const TILE = 96; // CSS pixels of a picture's width on the canvas
const GAP = 3;

/** The empty card, which `fill` fills when it comes near the screen. */
export function makeCard(card, explorer) {
  const article = element("article", { class: "card", tabindex: "-1", "data-feature": String(card.id) });
  article.card = card;
  article.addEventListener("keydown", (event) => explorer.keyOnCard(event, card));
  article.addEventListener("focusin", () => explorer.remember(card));
  return article;
}

export function fill(article, card, explorer) {
  const { cards, choice } = explorer;
  const number = `#${card.id}`;
  const change = (what) => explorer.change([card], what);
  const tick = element("input", {
    type: "checkbox", "aria-label": t("Use feature {number}", { number }),
    onchange: () => change({ on: tick.checked }),
  });
  const name = element("input", {
    type: "text", class: "name", placeholder: t("name it"), maxLength: 80,
    "aria-label": t("Name of feature {number}", { number }),
    onchange: () => change({ name: name.value.trim() }),
    onkeydown: (event) => event.key === "Enter" && article.focus(),
  });
  const group = element("input", {
    type: "text", class: "group", placeholder: t("group"), maxLength: 80, list: explorer.groupList,
    "aria-label": t("Group of feature {number}", { number }),
    onchange: () => explorer.regroup([card], group.value.trim()),
    onkeydown: (event) => event.key === "Enter" && article.focus(),
  });
  const slider = element("input", {
    type: "range", min: String(Math.min(0, card.weight)), max: String(Math.max(2, card.weight)), step: "0.05",
    "aria-label": t("Weight of feature {number}", { number }),
    title: t("How much of its change it makes: 1 is all"),
    oninput: () => change({ weight: Number(slider.value) }),
    ondblclick: () => change({ weight: card.weight }),
  });
  const weight = element("output", {});
  article.replaceChildren(
    element("header", {}, [tick, element("span", { class: "number" }, [number]), name]),
    strip(card, explorer),
    element("div", { class: "figures" }, [
      cards.classes.length > 1 ? classBars(card, cards) : "",
      stepLines(card, cards.classes, cards.progress),
    ]),
    element("p", { class: "facts" }, facts(card, cards)),
    element("footer", {}, [slider, weight, group]),
  );
  article.show = () => {
    const now = choice.of(card);
    article.classList.toggle("off", !now.on);
    article.setAttribute("aria-label", `${now.name || number}, ${now.on ? t("ticked") : t("not ticked")}`);
    tick.checked = now.on;
    if (document.activeElement !== name) name.value = now.name;
    if (document.activeElement !== group) group.value = now.group;
    slider.value = String(now.weight);
    weight.value = now.weight.toFixed(2);
    weight.classList.toggle("changed", now.weight !== card.weight);
  };
  article.show();
  setTabStops(article, explorer.last === card);
}

/** Whether the tab key stops at what is in a card: only in the one that was last in focus. */
export function setTabStops(article, stop) {
  article.tabIndex = stop ? 0 : -1;
  for (const input of article.querySelectorAll("input")) input.tabIndex = stop ? 0 : -1;
}

/** The class that a feature tells best, and how well; null where it tells none, or there is one class only. */
export function speaksFor(card) {
  const score = Math.max(...card.tells);
  return score > 0.5 ? { best: card.tells.indexOf(score), score } : null;
}

function facts(card, cards) {
  const found = [];
  const speaks = speaksFor(card);
  if (speaks) {
    const badge = element("span", {
      class: "badge",
      title: t("How well it tells pictures of this class from the others: 1 is always, .5 is chance (AUC)"),
    }, [`${cards.classes[speaks.best]} ${speaks.score.toFixed(2)}`]);
    badge.style.setProperty("--own", colour(speaks.best));
    found.push(badge);
  }
  found.push(element("span", { title: t("Share of all places, steps and pictures") }, [
    t("fires at {share}", { share: percent(card.fires) }),
  ]));
  if (card.score !== null) {
    found.push(element("span", { title: t("Score in the recipe: {ranking}", { ranking: cards.ranking }) }, [
      t("score {score}", { score: card.score.toPrecision(2) }),
    ]));
  }
  return found;
}

/** The top pictures on one canvas, which tells what fires under the pointer. */
function strip(card, explorer) {
  const { cards } = explorer;
  const [w, h] = cards.thumbnail;
  const height = Math.round((TILE * h) / w);
  const rows = Math.ceil(card.top.length / COLUMNS);
  const whole = [COLUMNS * TILE + (COLUMNS - 1) * GAP, rows * height + (rows - 1) * GAP];
  const canvas = element("canvas", {
    class: "strip", role: "img",
    "aria-label": t("The {count} pictures in which feature {number} fires most, light where it does", {
      count: card.top.length, number: `#${card.id}`,
    }),
  });
  const context = sharp(canvas, ...whole);
  const place = (rank) => [(rank % COLUMNS) * (TILE + GAP), Math.floor(rank / COLUMNS) * (height + GAP)];
  card.top.forEach((picture, rank) => {
    drawLit(context, cards, picture, cards.topHeat(card, rank), ...place(rank), TILE, height);
  });
  /** Which picture, and which of its cells, lies under a pointer. */
  const under = (event) => {
    const box = canvas.getBoundingClientRect();
    const x = ((event.clientX - box.left) * whole[0]) / box.width;
    const y = ((event.clientY - box.top) * whole[1]) / box.height;
    const rank = Math.floor(y / (height + GAP)) * COLUMNS + Math.min(COLUMNS - 1, Math.floor(x / (TILE + GAP)));
    if (!(rank in card.top)) return null;
    const [left, top] = place(rank);
    const column = Math.floor(((x - left) / TILE) * cards.map[1]);
    const row = Math.floor(((y - top) / height) * cards.map[0]);
    if (column < 0 || row < 0 || column >= cards.map[1] || row >= cards.map[0]) return null;
    return { picture: card.top[rank], cell: row * cards.map[1] + column };
  };
  canvas.addEventListener("pointermove", (event) => explorer.lens.follow(under(event), event));
  canvas.addEventListener("pointerleave", () => explorer.lens.leave());
  canvas.addEventListener("click", (event) => explorer.lens.pin(under(event), event));
  return canvas;
}
