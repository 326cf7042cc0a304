// The feature explorer: a tab in the side bar and a button on Explore Features, which open its dialog.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { element } from "./explorer/elements.js";
import { openExplorer } from "./explorer/dialog.js";
import { dataOf, explorers, NODE } from "./explorer/graph.js";

const STYLE = new URL("./explorer.css", import.meta.url);

function listNodes(place) {
  const found = explorers();
  const rows = found.map(({ id, node }) =>
    element("button", { class: "difflens-open", onclick: () => openExplorer(node, id) }, [
      element("strong", {}, [node.title]),
      element("span", {}, [dataOf(id) ? `Node ${id}: look at its features` : `Node ${id}: not run yet`]),
    ]),
  );
  const empty = element("p", {}, [
    "No Explore Features node is in this graph. Put one between a recipe and Steer, with a capture and its pictures.",
  ]);
  place.replaceChildren(
    element("div", { class: "difflens-tab" }, [
      element("h3", {}, ["Features"]),
      ...(rows.length ? rows : [empty, element("button", { onclick: addNode }, ["Add Explore Features"])]),
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
      title: "Features",
      tooltip: "Features: look at what Explore Features found",
      type: "custom",
      render: (place) => {
        refresh = () => listNodes(place);
        refresh();
      },
      destroy: () => {
        refresh = () => {};
      },
    });
    api.addEventListener("executed", () => refresh());
    api.addEventListener("graphChanged", () => refresh());
  },

  nodeCreated(node) {
    if (node.comfyClass !== NODE) return;
    const open = () => {
      const own = explorers().find((found) => found.node === node);
      openExplorer(node, own?.id ?? String(node.id));
    };
    const button = node.addWidget("button", "Explore features…", null, open);
    button.serialize = false;
  },
});
