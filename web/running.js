/* What stands on a node of ours while it runs and after. Of ComfyUI's page: it leaves the last text there when there is
   nothing more to say, in the classic canvas gives every text two lines, and in the Vue renderer goes on showing the
   last preview above the node's picture. */

import { app } from "../../scripts/app.js"
import { api } from "../../scripts/api.js"
import { nodeOf } from "./explorer/graph.js"

const WIDGET = "$$node-text-preview"
const FONT = 12, LINE = 16, MARGIN = 10, PADDING = { side: 16, top: 8 } // pixels, as ComfyUI draws the text
const LARGEST = 200 // pixels in height, from which on ComfyUI lets one scroll

const pencil = document.createElement("canvas").getContext("2d")

app.registerExtension({
  name: "DiffLens.Running",
  setup() {
    api.addEventListener("progress_text", ({ detail: { nodeId, text } }) =>
      setTimeout(() => fit(ours(nodeId), text)), // once the page itself has heard of it
    )
    api.addEventListener("executed", ({ detail: { display_node, output } }) => {
      if (output?.images && ours(display_node)) forgetPreview(display_node)
    })
  },
})

function ours(id) {
  const node = nodeOf(String(id))
  return node?.comfyClass?.startsWith("DiffLens") ? node : undefined
}

function fit(node, text) {
  const told = node?.widgets?.find((widget) => widget.name === WIDGET)
  if (!told) return
  if (text) told.options.getMinHeight = () => height(told.value, node.size[0])
  else node.removeWidget(told)
  node.setDirtyCanvas(true, true)
}

/** How high a text must be at a node's width, so that all of it is seen. */
function height(text, width) {
  pencil.font = `${FONT}px ${getComputedStyle(document.body).fontFamily}`
  const lines = Math.ceil((1.05 * pencil.measureText(text).width) / (width - 2 * (MARGIN + PADDING.side)))
  return Math.min(LARGEST, lines * LINE + 2 * PADDING.top) + 2 * MARGIN
}

/** The store of previews has no public name; where it is not found, the preview stays. */
function forgetPreview(id) {
  app.extensionManager._p?._s.get("nodeOutput")?.revokePreviewsByExecutionId?.(id)
}
