// What fires under the pointer: the features, how much, and where else in the same picture each of them fires.

import { drawLit, sharp } from "./drawings.js";
import { element, percent } from "../elements.js";
import { t } from "../words.js";

const SMALL = 56;
const LARGE = 150;

export class Lens {
  constructor(explorer) {
    this.explorer = explorer;
    this.pinned = false;
    this.seen = "";
    this.box = element("div", {
      class: "lens", hidden: true, role: "status", tabIndex: -1, onkeydown: (event) => this.key(event),
    });
  }

  follow(place, event) {
    if (this.pinned) return;
    if (!place) return this.leave();
    this.show(place);
    this.put(event.clientX, event.clientY);
  }

  leave() {
    if (!this.pinned) this.hide();
  }

  hide() {
    this.pinned = false;
    this.seen = "";
    this.box.hidden = true;
    this.box.classList.remove("pinned");
    this.explorer.mark([]);
  }

  /** Keep it open, so that its features can be clicked. */
  pin(place, event) {
    const same = this.pinned && this.seen === `${place?.picture} ${place?.cell}`;
    this.hide();
    if (!place || same) return;
    this.show(place);
    this.put(event.clientX, event.clientY);
    this.pinned = true;
    this.box.classList.add("pinned");
  }

  /** Open it where a feature fires most, for the keyboard. */
  openAt(card, article) {
    const heat = this.explorer.cards.topHeat(card, 0);
    const box = article.getBoundingClientRect();
    this.pin({ picture: card.top[0], cell: heat.indexOf(Math.max(...heat)) }, { clientX: box.right - 60, clientY: box.top });
    this.box.focus();
  }

  /** Arrows go from cell to cell. */
  key(event) {
    const [rows, columns] = this.explorer.cards.map;
    const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    const step = this.pinned && steps[event.key];
    if (!step) return;
    event.preventDefault();
    const row = Math.floor(this.place.cell / columns) + step[0];
    const column = (this.place.cell % columns) + step[1];
    if (row < 0 || column < 0 || row >= rows || column >= columns) return;
    this.show({ picture: this.place.picture, cell: row * columns + column });
    this.box.focus();
  }

  /** Fill it for one cell of one picture. */
  show({ picture, cell }) {
    if (this.seen === `${picture} ${cell}`) return;
    this.seen = `${picture} ${cell}`;
    this.place = { picture, cell };
    const { cards, choice } = this.explorer;
    const found = cards.at(picture, cell);
    const spot = new Uint8Array(cards.cells);
    spot[cell] = 255;
    const rows = found.map(({ card, share }) => {
      const now = choice.of(card);
      return element("button", { type: "button", class: now.on ? "" : "off", onclick: () => this.explorer.goTo(card) }, [
        this.miniature(picture, cards.heatIn(picture, card), SMALL),
        element("span", { class: "who" }, [now.name || `#${card.id}`]),
        element("span", { class: "much" }, [percent(share)]),
      ]);
    });
    this.box.replaceChildren(
      element("div", { class: "where" }, [
        this.miniature(picture, spot, LARGE),
        element("p", {}, [
          found.length ? t("Fires here, in % of the most that it ever does:") : t("None of them fires here."),
        ]),
      ]),
      element("div", { class: "firing" }, rows),
    );
    this.box.hidden = false;
    this.explorer.mark(found.map(({ card }) => card));
  }

  miniature(picture, heat, width) {
    const [w, h] = this.explorer.cards.thumbnail;
    const canvas = element("canvas", {});
    canvas.style.width = `${width}px`;
    const height = Math.round((width * h) / w);
    drawLit(sharp(canvas, width, height), this.explorer.cards, picture, heat, 0, 0, width, height);
    return canvas;
  }

  /** Beside the pointer, inside the window. */
  put(x, y) {
    const { offsetWidth: width, offsetHeight: height } = this.box;
    const left = x + 20 + width < innerWidth ? x + 20 : Math.max(4, x - 20 - width);
    const top = Math.max(4, Math.min(y - height / 3, innerHeight - height - 4));
    this.box.style.left = `${left}px`;
    this.box.style.top = `${top}px`;
  }
}
