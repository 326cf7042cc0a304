// Runs of the graph from the dialog: a preview of what is ticked, before and now, and saving a copy.

import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";
import { viewURL } from "./data.js";
import { element, later } from "../elements.js";
import { imagesOf, previews } from "./graph.js";
import { t } from "../words.js";

const PAUSE = 800; // milliseconds without a change until a preview begins by itself

export class Runs {
  constructor(explorer) {
    this.explorer = explorer;
    this.before = new Map();
    this.now = new Map();
    this.running = null; // id of our run
    this.held = null; // what the server says while that is not known
    this.again = false; // whether to draw once more after it
    this.said = "";
    this.soon = later(() => this.preview(), PAUSE);
    this.build();
    this.listen();
    this.takePresent();
  }

  build() {
    this.button = element("button", { type: "button", class: "main", onclick: () => this.preview() }, [t("Preview")]);
    this.cancel = element("button", { type: "button", hidden: true, onclick: () => this.giveUp() }, [t("Cancel")]);
    this.live = element("input", { type: "checkbox", onchange: () => this.live.checked && this.preview() });
    this.bar = element("progress", { max: 1, value: 0, "aria-label": t("Progress") });
    this.bar.hidden = true;
    this.status = element("p", { class: "status", role: "status" });
    this.pictures = element("div", { class: "pictures" });
    this.keep = element("button", { type: "button", class: "quiet", onclick: () => this.keepAsBefore() }, [
      t("Compare with these from now on"),
    ]);
    this.name = element("input", {
      type: "text", placeholder: t("name, such as faces/soft"), "aria-label": t("Name of the copy"), spellcheck: false,
      onkeydown: (event) => event.key === "Enter" && this.save(),
    });
    this.box = element("aside", { class: "runs" }, [
      element("h3", {}, [t("Preview")]),
      element("div", { class: "line" }, [
        this.button, this.cancel,
        element("label", { title: t("Draw anew whenever something was changed") }, [this.live, ` ${t("as I change")}`]),
      ]),
      this.bar,
      this.status,
      this.pictures,
      this.keep,
      element("h3", {}, [t("Save a copy of the recipe")]),
      element("div", { class: "line" }, [
        this.name, element("button", { type: "button", onclick: () => this.save() }, [t("Save")]),
      ]),
      element("p", { class: "hint" }, [
        t("Goes into models/difflens_recipes, for Load Recipe. Nothing is replaced."),
      ]),
    ]);
  }

  listen() {
    this.ends = [];
    for (const [kind, call] of Object.entries({
      execution_start: () => this.begin(),
      progress: ({ value, max }) => this.progress(value, max),
      execution_success: () => this.end(""),
      execution_interrupted: () => this.end(t("Cancelled.")),
      execution_error: ({ exception_message }) => this.end(exception_message ?? t("It failed."), true),
    })) {
      this.on(kind, (detail) => this.hear(call, detail));
    }
    this.on("executed", ({ node, display_node, output }) => this.take(String(display_node ?? node), output ?? {}));
  }

  on(kind, call) {
    const listener = ({ detail }) => call(detail ?? {});
    api.addEventListener(kind, listener);
    this.ends.push(() => api.removeEventListener(kind, listener));
  }

  /** What the server says of our run; while its id is not known yet, that is kept for later. */
  hear(call, detail) {
    if (this.held) this.held.push([call, detail]);
    else if (detail.prompt_id === this.running) call(detail);
  }

  close() {
    this.ends.forEach((end) => end());
  }

  say(text, wrong = false) {
    this.status.textContent = text;
    this.status.classList.toggle("wrong", wrong);
  }

  /** What stands on the preview nodes when the dialog is opened is what later pictures are compared with. */
  takePresent() {
    for (const [id, node] of this.targets()) {
      const images = imagesOf(node);
      if (images) this.now.set(id, images);
    }
    this.before = new Map(this.now);
    this.draw();
  }

  targets() {
    return previews(this.explorer.node, this.explorer.id);
  }

  /** Queue the graph as it is, seeds included, for the sake of some nodes; `name`: to save a copy under. */
  async queue(ids, name = "") {
    this.cancel.hidden = false;
    this.bar.hidden = false;
    this.bar.removeAttribute("value");
    this.say(t("Waiting …"));
    this.held = [];
    try {
      const prompt = await app.graphToPrompt();
      if (name) prompt.output[this.explorer.id].inputs.save_as = name;
      const reply = await api.queuePrompt(0, prompt, { partialExecutionTargets: ids });
      this.running = reply.prompt_id;
      const held = this.held;
      this.held = null;
      held.forEach(([call, detail]) => this.hear(call, detail));
    } catch (error) {
      this.held = null;
      this.end(reason(error), true);
    }
  }

  async preview() {
    if (this.held || this.running) {
      this.again = true;
      this.stop();
      return;
    }
    const ids = [...this.targets().keys()];
    this.hint = ids.length ? "" : t("Nothing behind this node shows pictures: put Preview Image behind Steer.");
    await this.queue(ids.length ? ids : [this.explorer.id]);
  }

  /** Cancel, and draw no more. */
  giveUp() {
    this.again = false;
    this.stop();
  }

  /** Cancel our run, which may still wait for others. */
  async stop() {
    const id = this.running;
    if (!id) return;
    const { Pending: waiting = [] } = (await api.getQueue?.()) ?? {};
    await api.deleteItem("queue", id);
    await api.interrupt(id);
    if (waiting.some((job) => job.id === id) && this.running === id) this.end(t("Cancelled."));
  }

  begin() {
    this.say(t("Drawing …"));
  }

  progress(value, max) {
    this.bar.max = max;
    this.bar.value = value;
  }

  end(text, wrong = false) {
    this.running = null;
    if (document.activeElement === this.cancel) this.button.focus();
    this.cancel.hidden = true;
    this.bar.hidden = true;
    this.say([text || this.said, this.hint].filter(Boolean).join(" "), wrong);
    this.said = "";
    if (this.again) {
      this.again = false;
      this.preview();
    }
  }

  /** A node has put out. */
  take(id, output) {
    if (id === this.explorer.id) {
      const [saved] = output.difflens_saved ?? [];
      if (saved) {
        this.said = t("Saved as {name}.", { name: saved });
        app.refreshComboInNodes?.();
      }
      this.explorer.reload(output.difflens_features?.[0]);
    }
    if (output.images && this.targets().has(id)) {
      if (!this.before.has(id)) this.before.set(id, this.now.get(id) ?? output.images);
      this.now.set(id, output.images);
      this.draw();
    }
  }

  keepAsBefore() {
    this.before = new Map(this.now);
    this.draw();
  }

  draw() {
    const block = (title, images) =>
      element("figure", {}, [
        element("figcaption", {}, [title]),
        element("div", { class: "shots" }, images.map((image) =>
          element("img", { src: viewURL(image), alt: title, loading: "lazy", draggable: false }),
        )),
      ]);
    const same = [...this.now].every(([id, images]) => this.before.get(id) === images);
    const blocks = [...this.now].flatMap(([id, images]) =>
      same ? [block(t("Now"), images)] : [block(t("Before"), this.before.get(id) ?? []), block(t("Now"), images)],
    );
    this.pictures.replaceChildren(...blocks);
    this.keep.hidden = same;
    if (!blocks.length) {
      this.pictures.append(element("p", { class: "hint" }, [t("Pictures of what is ticked come here.")]));
    }
  }

  changed() {
    if (this.live.checked) this.soon();
  }

  /** Save a copy: the name goes into this one run, so that later ones write nothing. */
  async save() {
    const name = this.name.value.trim();
    if (!name) return this.say(t("Give the copy a name."), true);
    if (this.running || this.held) return this.say(t("Wait until the run has ended."), true);
    this.hint = "";
    await this.queue([this.explorer.id], name);
  }
}

/** Why the server did not take a graph. */
function reason(error) {
  const [fault] = Object.values(error?.response?.node_errors ?? {}).flatMap((node) => node.errors ?? []);
  return fault ? `${fault.message}: ${fault.details}` : String(error?.message ?? error);
}
