/* A workflow of ours opens at its beginning and large enough to read. The page itself fits all of a template into
   the window, however large it is. */

import { app } from "../../scripts/app.js"

let opening = null // where to look, of the workflow that is being opened

app.registerExtension({
  name: "DiffLens.Opening",
  beforeConfigureGraph(graph) {
    opening = graph.extra?.difflens_opening ?? null
  },
  afterConfigureGraph() {
    delete app.rootGraph?.extra?.difflens_opening // from now on the view is the user's
    if (opening) whenDrawn(opening, 3)
  },
})

/** Look at `view` once the canvas has been on the screen for some frames: the page fits the graph in after that. */
function whenDrawn(view, frames) {
  if (view !== opening) return // another workflow was opened in the meantime
  if (app.canvasEl.width && frames-- === 0) {
    app.canvas.ds.scale = view.scale
    app.canvas.ds.offset = [...view.offset]
    app.canvas.setDirty(true, true)
    return
  }
  requestAnimationFrame(() => whenDrawn(view, frames))
}
