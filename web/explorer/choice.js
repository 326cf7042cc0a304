// What is ticked, weighed, named and grouped: what the node's widget `choice` holds, beside what the recipe says.

import { setWidget, widgetOf } from "./graph.js";

export const KINDS = ["on", "weight", "name", "group"];

export class Choice {
  constructor(node, cards) {
    this.node = node;
    this.cards = new Map(cards.map((card) => [String(card.id), card]));
    this.broken = false;
    this.read();
  }

  /** Take what the widget holds. */
  read() {
    const text = widgetOf(this.node, "choice").value?.trim();
    this.wishes = {};
    this.broken = false;
    if (!text) return;
    try {
      this.wishes = { ...JSON.parse(text).features };
    } catch {
      this.broken = true;
    }
  }

  of(card) {
    return { on: card.on, weight: card.weight, name: card.name, group: card.group, ...this.wishes[card.id] };
  }

  /** Change something about some cards; what is as in the recipe is not written down. */
  set(cards, change) {
    for (const card of cards) {
      const wish = { ...this.wishes[card.id], ...change };
      for (const kind of KINDS) if (wish[kind] === undefined || wish[kind] === card[kind]) delete wish[kind];
      if (Object.keys(wish).length) this.wishes[card.id] = wish;
      else delete this.wishes[card.id];
    }
    this.write();
  }

  /** Everything as in the recipe. */
  clear() {
    this.wishes = {};
    this.write();
  }

  write() {
    const some = Object.keys(this.wishes).length > 0;
    this.broken = false;
    setWidget(this.node, "choice", some ? JSON.stringify({ features: this.wishes }) : "");
  }
}
