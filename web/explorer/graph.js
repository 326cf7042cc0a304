// Explore Features in the graph: which nodes there are, what they were told, and what lies behind them.

import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";

export const NODE = "DiffLensExplore";

const root = () => app.rootGraph ?? app.graph;

/** The node of an id in a run, such as 8, or 5:3 in a subgraph. */
export function nodeOf(id) {
  let node;
  for (const part of id.split(":")) node = (node ? node.subgraph : root())?.getNodeById(part);
  return node;
}

// Nodes whose outputs are their own. A graph in API format that is dropped onto the page leaves those of the last one
// under the same numbers.
const known = new WeakSet();
export const know = (node) => node && known.add(node);
api.addEventListener("executed", ({ detail }) => know(nodeOf(String(detail.display_node ?? detail.node))));

/** What a node put out when it last ran, in this workflow. */
function outputOf(node) {
  if (!known.has(node)) return undefined;
  return app.nodeOutputs?.[node.graph === root() ? String(node.id) : `${node.graph.id}:${node.id}`];
}

/** Where the cards of a node lie, if it was run. */
export function dataOf(node) {
  return outputOf(node)?.difflens_features?.[0];
}

/** All Explore Features nodes with their ids in a run, also those in subgraphs. */
export function explorers(graph = root(), prefix = "") {
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

/** Nodes behind this one that show pictures, by their ids in a run: Preview Image, or if there is none all that put out. */
export function previews(node, id) {
  const ends = behind(node).filter((found) => active(found) && found.constructor.nodeData?.output_node);
  const plain = ends.filter((found) => found.comfyClass === "PreviewImage");
  const prefix = id.slice(0, id.length - String(node.id).length);
  return new Map((plain.length ? plain : ends).map((found) => [`${prefix}${found.id}`, found]));
}

/** The pictures that stand on a node. */
export function imagesOf(node) {
  return outputOf(node)?.images;
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
