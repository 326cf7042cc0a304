// The feature explorer: a tab in the side bar and a button on Explore Features, which open its dialog.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { addButton, element } from "./elements.js";
import { openExplorer } from "./explorer/dialog.js";
import { dataOf, explorers, know, NODE } from "./explorer/graph.js";
import { t } from "./words.js";

const STYLE = new URL("./explorer.css", import.meta.url);

function open(id) {
  const found = explorers().find((own) => own.id === id);
  if (found) openExplorer(found.node, id);
}

/** The nodes of the graph as buttons; left alone while they are the same, so that a click meets its button. */
function listNodes(place) {
  const found = explorers().map(({ id, node }) => ({ id, title: node.title, seen: Boolean(dataOf(node)) }));
  const state = JSON.stringify(found);
  if (place.dataset.state === state) return;
  place.dataset.state = state;
  const rows = found.map(({ id, title, seen }) =>
    element("button", { class: "difflens-open", onclick: () => open(id) }, [
      element("strong", {}, [title]),
      element("span", {}, [seen ? t("Node {id}: look at its features", { id }) : t("Node {id}: not run yet", { id })]),
    ]),
  );
  const empty = element("p", {}, [
    t("No Explore Features node is in this graph."), " ",
    t("Put one between a recipe and Steer, with a capture and its pictures."),
  ]);
  place.replaceChildren(
    element("div", { class: "difflens-tab" }, [
      element("h3", {}, [t("Features")]),
      ...(rows.length ? rows : [empty, element("button", { onclick: addNode }, [t("Add Explore Features")])]),
    ]),
  );
}

function addNode() {
  const node = LiteGraph.createNode(NODE);
  const [x, y, width, height] = app.canvas.visible_area ?? [0, 0, 800, 600];
  node.pos = [x + width / 3, y + height / 3];
  app.graph.add(node);
}

let refresh = () => {};

app.registerExtension({
  name: "DiffLens.Explorer",

  async setup() {
    document.head.append(element("link", { rel: "stylesheet", href: STYLE.href }));
    app.extensionManager.registerSidebarTab({
      id: "difflens-features",
      icon: "pi pi-images",
      title: t("Features"),
      tooltip: t("Features: look at what Explore Features found"),
      type: "custom",
      render: (place) => {
        delete place.dataset.state;
        refresh = () => listNodes(place);
        refresh();
      },
      destroy: () => {
        refresh = () => {};
      },
    });
    for (const kind of ["executed", "graphChanged"]) {
      api.addEventListener(kind, () => setTimeout(() => refresh())); // once the page itself has heard of it
    }
  },

  loadedGraphNode: know,

  nodeCreated(node) {
    if (node.comfyClass !== NODE) return;
    addButton(node, t("Explore features…"), () => open(explorers().find((own) => own.node === node)?.id));
  },
});
