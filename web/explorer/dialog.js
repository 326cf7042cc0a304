// The dialog: all features of a node as cards in groups, with what is done to them beside.

import { fill, makeCard, setTabStops, speaksFor } from "./card.js";
import { Choice } from "./choice.js";
import { readCards } from "./data.js";
import { element, later } from "../elements.js";
import { dataOf, noteChange } from "./graph.js";
import { Lens } from "./lens.js";
import { Runs } from "./run.js";
import { t } from "../words.js";

const ORDERS = {
  tells: { said: () => t("tells a class best"), key: (card) => -Math.max(...card.tells) },
  score: { said: () => t("score in the recipe"), key: (card) => -(card.score ?? -Infinity) },
  most: { said: () => t("fires most"), key: (card) => -card.fires },
  least: { said: () => t("fires least"), key: (card) => card.fires },
  active: { said: () => t("most active"), key: (card) => -card.peak[0] },
  number: { said: () => t("number"), key: (card) => card.id },
};
const SPEAKS = "speaks for "; // begin of the filter for a class

/** What each key does. */
function keys() {
  return [
    [t("Arrows"), t("from card to card")],
    [t("Space"), t("tick or untick")],
    ["+ −", t("weight")],
    ["Enter", t("name it, and back")],
    ["F", t("what else fires there; arrows move")],
    ["Ctrl Enter", t("preview")],
    ["Esc", t("close")],
  ];
}

export function openExplorer(node, id) {
  const explorer = new Explorer(node, id);
  explorer.open();
  return explorer;
}

class Explorer {
  constructor(node, id) {
    this.node = node;
    this.id = id;
    this.groupList = `difflens-groups-${id.replaceAll(":", "-")}`;
    this.articles = new Map();
    this.noteSoon = later(noteChange, 400);
    this.lens = new Lens(this);
    this.near = new IntersectionObserver((seen) => this.fillNear(seen), { scrollMargin: "600px" });
    this.build();
    this.runs = new Runs(this);
    this.body.append(this.runs.box);
  }

  build() {
    this.title = element("h2", {}, [this.node.title]);
    this.count = element("span", { class: "count", role: "status" });
    this.search = element("input", {
      type: "search", placeholder: t("Search name, number or group"), "aria-label": t("Search"),
      oninput: () => this.arrange(),
    });
    this.order = element("select", { "aria-label": t("Order"), onchange: () => this.arrange() },
      Object.entries(ORDERS).map(([value, { said }]) => element("option", { value }, [said()])));
    this.filter = element("select", { "aria-label": t("Which to show"), onchange: () => this.arrange() });
    this.list = element("datalist", { id: this.groupList });
    this.grid = element("div", { class: "grid" });
    this.body = element("div", { class: "body" }, [this.grid]);
    const button = (text, title, call) => element("button", { type: "button", title, onclick: call }, [text]);
    const forAll = [
      button(t("Tick"), t("Tick all that are shown"), () => this.change(this.shown, { on: true })),
      button(t("Untick"), t("Untick all that are shown"), () => this.change(this.shown, { on: false })),
      button(t("Reset"), t("Everything as in the recipe"), () => this.reset()),
    ];
    this.tools = [this.search, this.order, this.filter, ...forAll];
    for (const tool of this.tools) tool.disabled = true; // until there are cards
    this.dialog = element("dialog", { class: "difflens-explorer", "aria-label": t("Feature explorer") }, [
      element("div", { class: "head" }, [
        this.title,
        this.count,
        this.search,
        element("label", {}, [`${t("Order")} `, this.order]),
        element("label", {}, [`${t("Show")} `, this.filter]),
        ...forAll,
        element("details", { class: "keys" }, [
          element("summary", {}, [t("Keys")]),
          element("dl", {}, keys().flatMap(([key, does]) => [element("dt", {}, [key]), element("dd", {}, [does])])),
        ]),
        element("button", {
          type: "button", class: "close", "aria-label": t("Close"), onclick: () => this.dialog.close(),
        }, ["✕"]),
      ]),
      this.body,
      this.list,
      this.lens.box,
    ]);
    this.dialog.addEventListener("keydown", (event) => this.key(event));
    this.dialog.addEventListener("close", () => this.close());
    this.dialog.addEventListener("cancel", (event) => {
      if (!this.lens.pinned) return;
      event.preventDefault();
      this.lens.hide();
      this.articles.get(this.last)?.focus();
    });
  }

  async open() {
    document.body.append(this.dialog);
    this.dialog.showModal();
    await this.load(dataOf(this.node));
  }

  close() {
    this.near.disconnect();
    this.runs.close();
    this.dialog.remove();
    noteChange();
  }

  /** Read the cards that lie at `reference` and show them. */
  async load(reference) {
    this.reference = reference;
    if (!reference) return this.tellToRun(t("This node has not been run yet."));
    this.tell(t("Reading the features …"));
    try {
      this.cards = await readCards(reference);
    } catch (error) {
      return this.tellToRun(t("There is nothing to show: {why}.", { why: error.message }));
    }
    const { attribute, site, classes } = this.cards;
    this.title.textContent = t("{attribute} at {site}", { attribute: attribute.replaceAll("_", " "), site });
    this.choice = new Choice(this.node, this.cards.features);
    for (const tool of this.tools) tool.disabled = false;
    this.articles = new Map(this.cards.features.map((card) => [card, makeCard(card, this)]));
    const shows = { all: t("all"), ticked: t("ticked"), "not ticked": t("not ticked"), named: t("named") };
    if (classes.length > 1) for (const name of classes) shows[SPEAKS + name] = t("speaks for {name}", { name });
    this.filter.replaceChildren(...Object.entries(shows).map(([value, said]) => element("option", { value }, [said])));
    if (this.cards.features.some((card) => card.score !== null)) this.order.value = "score";
    this.arrange();
    if (this.choice.broken) {
      this.runs.say(t("The node's choice cannot be read. What you change here replaces it."), true);
    }
    this.focusCard(this.shown[0]);
  }

  /** The node was run again: show new cards, if there are any. */
  reload(reference) {
    if (reference && reference.filename !== this.reference?.filename) this.load(reference);
  }

  tell(...text) {
    this.grid.replaceChildren(element("div", { class: "note" }, text));
  }

  tellToRun(text) {
    const run = element("button", { type: "button", class: "main", onclick: () => this.runs.queue([this.id]) }, [
      t("Run it now"),
    ]);
    this.tell(element("p", {}, [text]), run);
    run.focus();
  }

  // --- which cards, in which order ---

  matches(card) {
    const now = this.choice.of(card);
    const words = `#${card.id} ${now.name} ${now.group}`.toLowerCase();
    if (!words.includes(this.search.value.trim().toLowerCase())) return false;
    const show = this.filter.value;
    if (show === "ticked" || show === "not ticked") return now.on === (show === "ticked");
    if (show === "named") return Boolean(now.name);
    const speaks = speaksFor(card);
    return !show.startsWith(SPEAKS) || (speaks && show === SPEAKS + this.cards.classes[speaks.best]);
  }

  /** Groups as [title, hand-made or not, cards]: those made by hand first, then those that fire together. */
  groups() {
    const { key } = ORDERS[this.order.value];
    const kept = this.cards.features.filter((card) => this.matches(card)).sort((a, b) => key(a) - key(b));
    const byHand = new Map();
    const together = new Map();
    for (const card of kept) {
      const own = this.choice.of(card).group;
      const [groups, name] = own ? [byHand, own] : [together, card.together];
      groups.set(name, [...(groups.get(name) ?? []), card]);
    }
    const alone = together.get(0);
    together.delete(0);
    return [
      ...[...byHand].sort(([a], [b]) => a.localeCompare(b)).map(([name, cards]) => ({ name, cards })),
      ...[...together].map(([, cards]) => ({ name: "", title: t("Fire together"), cards })),
      ...(alone ? [{ name: "", title: t("On their own"), cards: alone }] : []),
    ];
  }

  /** Put the cards that match into their groups. */
  arrange() {
    if (!this.cards) return;
    this.lens.hide();
    this.near.disconnect();
    const groups = this.groups();
    this.shown = groups.flatMap(({ cards }) => cards);
    this.sections = groups.map((group) => this.section(group));
    this.grid.replaceChildren(...this.sections);
    if (!this.shown.length) this.tell(t("No feature is like that."));
    for (const card of this.shown) this.near.observe(this.articles.get(card));
    const names = [...new Set(this.cards.features.map((card) => this.choice.of(card).group).filter(Boolean))];
    this.list.replaceChildren(...names.map((name) => element("option", { value: name })));
    this.show();
  }

  section({ name, title, cards }) {
    const tick = element("input", {
      type: "checkbox", "aria-label": t("Use all of {name}", { name: name || title }),
      title: t("Tick or untick the group"),
      onchange: () => this.change(cards, { on: tick.checked }),
    });
    const named = element("input", {
      type: "text", class: "title", value: name, placeholder: title ?? t("group"), maxLength: 80,
      "aria-label": t("Name of the group"), title: t("Write a name to make it a group of your own"),
      onchange: () => this.regroup(cards, named.value.trim()),
    });
    const many = cards.length > 1 ? t("{count} features", { count: cards.length }) : t("1 feature");
    const made = element("section", {}, [
      element("h3", {}, [tick, named, element("span", {}, [many])]),
      element("div", { class: "cards" }, cards.map((card) => this.articles.get(card))),
    ]);
    made.show = () => {
      const on = cards.filter((card) => this.choice.of(card).on).length;
      tick.checked = on === cards.length;
      tick.indeterminate = on > 0 && on < cards.length;
    };
    return made;
  }

  fillNear(seen) {
    for (const { target, isIntersecting } of seen) {
      if (!isIntersecting) continue;
      this.near.unobserve(target);
      if (!target.show) fill(target, target.card, this);
    }
  }

  // --- what is chosen ---

  change(cards, what) {
    this.choice.set(cards, what);
    this.changed(cards);
  }

  regroup(cards, group) {
    this.choice.set(cards, { group });
    this.changed(cards);
    this.arrange();
    // what was in focus may have moved; whoever clicked elsewhere stays there
    setTimeout(() => document.activeElement === document.body && this.focusCard(cards[0]));
  }

  reset() {
    this.choice.clear();
    this.changed(this.cards.features);
    this.arrange();
  }

  changed(cards) {
    for (const card of cards) this.articles.get(card).show?.();
    this.show();
    this.noteSoon();
    this.runs.changed();
  }

  /** Counts and group ticks. */
  show() {
    const on = this.cards.features.filter((card) => this.choice.of(card).on).length;
    const all = this.cards.features.length;
    const shown = this.shown.length;
    this.count.textContent =
      shown < all
        ? t("{on} of {all} ticked, {shown} shown", { on, all, shown })
        : t("{on} of {all} ticked", { on, all });
    for (const section of this.sections) section.show();
  }

  /** Mark the cards of some features. */
  mark(cards) {
    const marked = new Set(cards);
    for (const [card, article] of this.articles) article.classList.toggle("marked", marked.has(card));
  }

  // --- keys ---

  remember(card) {
    if (this.last === card) return;
    const before = this.articles.get(this.last);
    if (before) setTabStops(before, false);
    this.last = card;
    setTabStops(this.articles.get(card), true);
  }

  focusCard(card) {
    const article = card && this.articles.get(card);
    if (!article?.isConnected) return;
    this.remember(card);
    article.focus({ preventScroll: true });
    article.scrollIntoView({ block: "nearest" });
  }

  goTo(card) {
    this.lens.hide();
    if (!this.shown.includes(card)) {
      this.search.value = "";
      this.filter.value = "all";
      this.arrange();
    }
    this.focusCard(card);
  }

  key(event) {
    event.stopPropagation(); // the page has keys of its own
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) this.runs.preview();
  }

  keyOnCard(event, card) {
    const article = this.articles.get(card);
    if (event.target !== article || event.ctrlKey || event.metaKey || event.altKey) return;
    const now = this.choice.of(card);
    const nudge = (by) => this.change([card], { weight: Math.round(100 * (now.weight + by)) / 100 });
    const does = {
      " ": () => this.change([card], { on: !now.on }),
      Enter: () => article.querySelector(".name")?.focus(),
      f: () => this.lens.openAt(card, article),
      "+": () => nudge(0.1),
      "-": () => nudge(-0.1),
      Home: () => this.focusCard(this.shown[0]),
      End: () => this.focusCard(this.shown.at(-1)),
      ArrowRight: () => this.focusCard(this.shown[this.shown.indexOf(card) + 1]),
      ArrowLeft: () => this.focusCard(this.shown[this.shown.indexOf(card) - 1]),
      ArrowDown: () => this.focusCard(this.beside(card, 1)),
      ArrowUp: () => this.focusCard(this.beside(card, -1)),
    }[event.key];
    if (!does) return;
    event.preventDefault();
    does();
  }

  /** The card in the next row below (1) or above (-1), nearest to this one. */
  beside(card, way) {
    const place = (of) => this.articles.get(of).getBoundingClientRect();
    const here = place(card);
    const from = this.shown.indexOf(card);
    let best = null;
    for (let i = from + way; i in this.shown; i += way) {
      const there = place(this.shown[i]);
      if (way * (there.top - here.top) < 1) continue;
      if (best && Math.abs(there.top - best.top) > 1) break;
      const off = Math.abs(there.left - here.left);
      if (!best || off < best.off) best = { card: this.shown[i], top: there.top, off };
    }
    return best?.card;
  }
}
