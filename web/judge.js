// Judge by Eye: a dialog that shows pairs of pictures, not saying which is which, and hands in what a person says.
//
// The server deals the order and the sides, and alone knows what is left and what is right.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { addButton, element } from "./elements.js";
import { t } from "./words.js";

const NODE = "DiffLensJudge";
const NAME = "DiffLens.judge"; // where the browser keeps the judge's name
const SIDES = { left: () => t("Left"), neither: () => t("No difference"), right: () => t("Right") };
const KEYS = { ArrowLeft: "left", "=": "neither", " ": "neither", ArrowRight: "right" };
const SHOWN = { left: () => "←", neither: () => t("= or space"), right: () => "→" };

const STYLE = `
.difflens-judge { width: 100vw; height: 100vh; max-width: none; max-height: none; margin: 0; border: 0; padding: 16px;
  box-sizing: border-box; overflow: auto; background: var(--comfy-menu-bg, #222); color: var(--fg-color, #eee);
  font: 15px/1.5 sans-serif; }
.difflens-judge[open] { display: flex; flex-direction: column; gap: 12px; }
.difflens-judge header, .difflens-judge .answers { display: flex; flex-wrap: wrap; gap: 8px; align-items: center;
  justify-content: center; }
.difflens-judge h1 { flex: 1; margin: 0; font-size: 20px; }
.difflens-judge progress { flex: 1; min-width: 80px; }
.difflens-judge main { flex: 1; display: flex; flex-direction: column; gap: 12px; outline: none; }
.difflens-judge .words { max-width: 640px; margin: auto; }
.difflens-judge .pictures { flex: 1 1 auto; min-height: 180px; height: 0; display: grid; gap: 16px;
  grid-template-columns: 1fr 1fr; }
.difflens-judge .pictures button { min-height: 0; padding: 4px; }
.difflens-judge img { width: 100%; height: 100%; object-fit: contain; display: block; }
.difflens-judge button, .difflens-judge input { font: inherit; color: var(--input-text, #ddd); padding: 6px 14px;
  background: var(--comfy-input-bg, #333); border: 2px solid var(--border-color, #555); border-radius: 6px; }
.difflens-judge button { cursor: pointer; }
.difflens-judge button[aria-pressed=true] { border-color: var(--p-primary-color, #2d8cf0);
  box-shadow: inset 0 0 0 1px var(--p-primary-color, #2d8cf0); }
.difflens-judge button:focus-visible, .difflens-judge input:focus-visible { outline: 2px solid var(--fg-color, #eee);
  outline-offset: 2px; }
.difflens-judge kbd { font: inherit; opacity: 0.7; }
.difflens-judge fieldset { border: 0; margin: 0; padding: 0; text-align: center; }
.difflens-judge legend { margin: 0 auto 6px; padding: 0; font-weight: bold; }
.difflens-judge [role=alert] { text-align: center; color: var(--error-text, #ff6b6b); min-height: 1.5em; }
`;

async function ask(run, options = {}, query = "") {
  const reply = await api.fetchApi(`/difflens/judging/${encodeURIComponent(run)}${query}`, options);
  const found = await reply.json();
  if (!reply.ok) throw new Error(found.error ?? t("The server answered {status}.", { status: reply.status }));
  return found;
}

class Judge {
  constructor(run) {
    this.run = run;
    this.dialog = element("dialog", { class: "difflens-judge", "aria-label": t("Judge by Eye") });
    this.alert = element("div", { role: "alert" });
    this.dialog.addEventListener("keydown", (event) => this.key(event));
    this.dialog.addEventListener("close", () => this.dialog.remove());
    document.body.append(this.dialog);
    this.dialog.showModal();
    this.start();
  }

  /** What the dialog shows: a line above, and the rest below. */
  show(above, ...below) {
    const close = element("button", { type: "button", onclick: () => this.dialog.close() }, t("Close"));
    this.main = element("main", { tabIndex: -1 }, ...below);
    this.alert.textContent = "";
    this.dialog.replaceChildren(element("style", {}, STYLE), element("header", {}, ...above, close), this.main, this.alert);
    this.main.focus();
  }

  start() {
    const name = element("input", { value: localStorage.getItem(NAME) ?? "", maxLength: 40, required: true });
    const begin = async (event) => {
      event.preventDefault();
      await this.attempt(async () => {
        Object.assign(this, await ask(this.run, {}, `?judge=${encodeURIComponent(name.value)}`));
        localStorage.setItem(NAME, this.judge);
        this.place = this.next(-1);
      });
    };
    this.pairs = null;
    if (!this.run) {
      const words = t("Run the graph first: then there are pictures to judge.");
      return this.show([element("h1", {}, t("Judge by Eye"))], element("p", { class: "words" }, words));
    }
    this.show(
      [element("h1", {}, t("Judge by Eye"))],
      element("form", { class: "words", onsubmit: begin },
        element("p", {},
          t("You will see pictures in pairs. Say of each pair which picture looks better, and what differs.")),
        element("p", {},
          t("Keys: ← → choose a picture, = or the space bar says that neither is better."), " ",
          t("The numbers say what differs."), " ", t("Enter goes on, Backspace goes back."), " ",
          t("Each pair is kept as soon as you go on."), " ",
          t("So you may stop at any time and take it up again under the same name.")),
        element("label", {}, t("Your name or initials, which the file and the report will show:"), " ", name), " ",
        element("button", {}, t("Begin"))),
    );
    name.focus();
  }

  /** Do something that may fail, which is then said. */
  async attempt(work) {
    if (this.busy) return;
    this.busy = true;
    try {
      await work();
    } catch (error) {
      this.alert.textContent = error.message;
      return;
    } finally {
      this.busy = false;
    }
    this.pair();
  }

  /** The first pair behind `place` that was not judged, or how many there are. */
  next(place) {
    const found = this.pairs.findIndex((pair, at) => at > place && !pair.said);
    return found < 0 ? this.pairs.length : found;
  }

  pair() {
    const total = this.pairs.length;
    const done = this.pairs.filter((pair) => pair.said).length;
    if (this.place >= total) return this.end(done);
    const pair = this.pairs[this.place];
    this.better = pair.said?.better;
    this.changed = new Set(pair.said?.changed);
    const pictures = ["left", "right"].map((side) => this.choice(side, this.picture(pair, side)));
    const answers = Object.keys(SIDES).map((side) =>
      this.choice(side, `${SIDES[side]()} `, element("kbd", {}, SHOWN[side]())));
    const kinds = this.kinds.map(([kind, name], key) => {
      const button = this.button(() => this.toggle(kind), element("kbd", {}, `${key} `), t(name));
      button.dataset.kind = kind;
      return button;
    });
    this.show(
      [element("span", { "aria-live": "polite" },
        t("Pair {place} of {total}, {done} judged", { place: this.place + 1, total, done })),
        element("progress", { max: total, value: done, "aria-label": t("judged") })],
      element("div", { class: "pictures" }, ...pictures),
      this.question(t("Which looks better?"), answers),
      this.question(t("What differs between them? Choose all that do."), kinds),
      element("div", { class: "answers" },
        this.button(() => this.back(), t("Back"), " ", element("kbd", {}, "Backspace")),
        this.button(() => this.save(), t("Next"), " ", element("kbd", {}, "Enter"))),
    );
    this.mark();
    const after = this.pairs[this.place + 1];
    if (after) for (const side of ["left", "right"]) new Image().src = this.address(after[side]);
  }

  address(filename) {
    return api.apiURL(`/view?${new URLSearchParams({ filename, subfolder: this.folder, type: "temp" })}`);
  }

  picture(pair, side) {
    const alt = t("{side} picture", { side: SIDES[side]() });
    const image = element("img", { src: this.address(pair[side]), alt, draggable: false });
    image.onload = () => { // as Compare Images does, small pictures are enlarged so that every pixel can be seen
      const large = Math.min(image.clientWidth / image.naturalWidth, image.clientHeight / image.naturalHeight);
      image.style.imageRendering = large >= 2 ? "pixelated" : "auto";
    };
    image.onerror = () => {
      this.alert.textContent = t("A picture is no longer there. Run the graph again, then go on.");
    };
    return image;
  }

  question(text, buttons) {
    return element("fieldset", {}, element("legend", {}, text), element("div", { class: "answers" }, ...buttons));
  }

  button(action, ...children) {
    const onclick = (event) => {
      action();
      if (event.detail) this.main.focus(); // by mouse: the keys go on to mean what they say
    };
    return element("button", { type: "button", onclick }, ...children);
  }

  choice(side, ...children) {
    const button = this.button(() => this.choose(side), ...children);
    button.dataset.side = side;
    return button;
  }

  choose(side) {
    this.better = side;
    this.mark();
  }

  toggle(kind) {
    const [nothing] = this.kinds[0];
    if (!this.changed.delete(kind)) {
      if (kind === nothing) this.changed.clear();
      else this.changed.delete(nothing);
      this.changed.add(kind);
    }
    this.mark();
  }

  /** Show what is chosen. */
  mark() {
    for (const button of this.main.querySelectorAll("button[data-side]"))
      button.ariaPressed = String(button.dataset.side === this.better);
    for (const button of this.main.querySelectorAll("button[data-kind]"))
      button.ariaPressed = String(this.changed.has(button.dataset.kind));
    this.alert.textContent = "";
  }

  async save() {
    const pair = this.pairs[this.place];
    if (!this.better) return void (this.alert.textContent = t("Say which looks better first: ← = →"));
    if (!this.changed.size) return void (this.alert.textContent = t("Say what differs first: 0 if nothing does"));
    const said = { better: this.better, changed: [...this.changed] };
    await this.attempt(async () => {
      const body = JSON.stringify({ judge: this.judge, pair: this.place, ...said });
      await ask(this.run, { method: "POST", headers: { "Content-Type": "application/json" }, body });
      const again = Boolean(pair.said); // somebody who went back goes on one by one
      pair.said = said;
      this.place = again ? this.place + 1 : this.next(this.place);
    });
  }

  back() {
    if (this.place > 0 && !this.busy) {
      this.place -= 1;
      this.pair();
    }
  }

  end(done) {
    const total = this.pairs.length;
    if (done < total) {
      this.place = this.next(-1);
      return this.pair();
    }
    this.show(
      [element("h1", { "aria-live": "polite" }, t("All {total} pairs judged", { total }))],
      element("div", { class: "words" },
        element("p", {},
          t("Thank you. Close this and run the graph again: the report then counts what you said.")),
        this.button(() => this.back(), t("Back"), " ", element("kbd", {}, "Backspace"))),
    );
  }

  key(event) {
    event.stopPropagation(); // the graph behind has keys of its own
    if (!this.pairs || event.ctrlKey || event.altKey || event.metaKey) return;
    const onButton = event.target.tagName === "BUTTON" && ["Enter", " "].includes(event.key);
    const action = onButton ? null : this.action(event.key);
    if (!action) return;
    event.preventDefault();
    if (!event.repeat) action();
  }

  action(key) {
    if (key === "Backspace") return () => this.back();
    if (this.place >= this.pairs.length) return null;
    if (key === "Enter") return () => this.save();
    if (key in KEYS) return () => this.choose(KEYS[key]);
    const kind = /^\d$/.test(key) && this.kinds[Number(key)];
    return kind ? () => this.toggle(kind[0]) : null;
  }
}

const runs = new Map(); // the last run of each node: a node is made anew when its tab is opened again

function nameOf(node) {
  return `${node.graph?.id} ${node.id}`;
}

app.registerExtension({
  name: "DiffLens.Judge",
  nodeCreated(node) {
    if (node.comfyClass !== NODE) return;
    const executed = node.onExecuted;
    node.onExecuted = function (output) {
      executed?.call(this, output);
      if (output?.judging) runs.set(nameOf(this), output.judging[0]);
    };
    addButton(node, t("Judge the pairs"), () => new Judge(runs.get(nameOf(node))));
  },
});
