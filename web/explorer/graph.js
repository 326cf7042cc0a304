// Explore Features in the graph: which nodes there are, what they were told, and what lies behind them.

import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";

export const NODE = "DiffLensExplore";

const told = new Map(); // what each node last sent, by its id in a run

api.addEventListener("executed", ({ detail }) => {
  if (detail.output) told.set(String(detail.display_node ?? detail.node), detail.output);
});

/** What a node sent when it last ran, also before the page was opened on this workflow. */
export function outputOf(id) {
  return told.get(id) ?? app.nodeOutputs?.[id];
}

/** Where the cards of a node lie, if it was run. */
export function dataOf(id) {
  return outputOf(id)?.difflens_features?.[0];
}

/** All Explore Features nodes with their ids in a run, also those in subgraphs. */
export function explorers(graph = app.rootGraph ?? app.graph, prefix = "") {
  return (graph.nodes ?? []).flatMap((node) => {
    const id = `${prefix}${node.id}`;
    if (node.comfyClass === NODE) return [{ id, node }];
    return node.subgraph ? explorers(node.subgraph, `${id}:`) : [];
  });
}

/** Nodes that get something from this one, near or far, in the same graph. */
function behind(node) {
  const found = new Set();
  const waiting = [node];
  while (waiting.length) {
    for (const output of waiting.pop().outputs ?? []) {
      for (const number of output.links ?? []) {
        const link = node.graph.getLink?.(number) ?? node.graph.links[number];
        const next = link && node.graph.getNodeById(link.target_id);
        if (next && !found.has(next)) {
          found.add(next);
          waiting.push(next);
        }
      }
    }
  }
  return [...found];
}

const active = (node) => node.mode === 0 || node.mode === undefined;

/** Ids of the nodes behind this one that show pictures: Preview Image if there is one, else all that put out. */
export function previews(node, id) {
  const ends = behind(node).filter((found) => active(found) && found.constructor.nodeData?.output_node);
  const plain = ends.filter((found) => found.comfyClass === "PreviewImage");
  const prefix = id.slice(0, id.length - String(node.id).length);
  return (plain.length ? plain : ends).map((found) => `${prefix}${found.id}`);
}

export function widgetOf(node, name) {
  return node.widgets.find((widget) => widget.name === name);
}

export function setWidget(node, name, value) {
  const widget = widgetOf(node, name);
  widget.value = value;
  widget.callback?.(value, app.canvas, node);
  node.graph?.setDirtyCanvas?.(true, true);
}

/** Let ComfyUI notice that the workflow has changed: for undo, and for the mark on its tab. */
export function noteChange() {
  const tracker = app.extensionManager.workflow?.activeWorkflow?.changeTracker;
  if (tracker?.captureCanvasState) tracker.captureCanvasState();
  else tracker?.checkState?.();
}
