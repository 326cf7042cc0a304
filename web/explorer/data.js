// The cards that the node wrote, as the page uses them.

import { api } from "../../../scripts/api.js";
import { t } from "../words.js";

export function viewURL({ filename, subfolder = "", type = "output" }) {
  return api.apiURL(`/view?${new URLSearchParams({ filename, subfolder, type })}`);
}

function bytes(text) {
  return Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
}

function picture(address) {
  return new Promise((done, failed) => {
    const image = new Image();
    image.onload = () => done(image);
    image.onerror = () => failed(new Error(t("the small pictures could not be read")));
    image.src = address;
  });
}

/** Read the cards; `reference` says where they lie. */
export async function readCards(reference) {
  const reply = await fetch(viewURL(reference));
  if (!reply.ok) throw new Error(t("its cards are gone, as ComfyUI was started anew"));
  const data = await reply.json();
  const sheets = await Promise.all(data.sheets.map((sheet) => picture(viewURL(sheet))));
  return new Cards(data, sheets);
}

export class Cards {
  constructor(data, sheets) {
    Object.assign(this, data);
    this.images = sheets;
    this.heat = bytes(data.heat);
    const pairs = bytes(data.places);
    this.places = new Uint16Array(pairs.buffer, 0, pairs.length / 2);
    this.strength = bytes(data.strength);
    this.features.forEach((card, row) => Object.assign(card, { row }));
  }

  get cells() {
    return this.map[0] * this.map[1];
  }

  /** Draw a picture, by its place among the shown ones. */
  drawPicture(context, at, x, y, width, height) {
    const [w, h] = this.thumbnail;
    const sheet = this.images[Math.floor(at / 256)];
    const place = at % 256;
    context.drawImage(sheet, (place % 16) * w, Math.floor(place / 16) * h, w, h, x, y, width, height);
  }

  /** Where a feature fires in its top picture number `rank`: a byte a cell. */
  topHeat(card, rank) {
    const first = (card.row * card.top.length + rank) * this.cells;
    return this.heat.subarray(first, first + this.cells);
  }

  /** The features that fire at a cell of a shown picture: [{card, share}], the largest share first. */
  at(picture, cell) {
    const first = (picture * this.cells + cell) * this.rivals;
    const found = [];
    for (let i = first; i < first + this.rivals; i++) {
      if (this.strength[i]) found.push({ card: this.features[this.places[i]], share: this.strength[i] / 255 });
    }
    return found.sort((a, b) => b.share - a.share);
  }

  /** Where a feature fires in a shown picture, as far as it is among the strongest there: a byte a cell. */
  heatIn(picture, card) {
    const found = new Uint8Array(this.cells);
    const first = picture * this.cells * this.rivals;
    for (let i = 0; i < this.cells * this.rivals; i++) {
      if (this.places[first + i] === card.row) found[Math.floor(i / this.rivals)] = this.strength[first + i];
    }
    return found;
  }
}
