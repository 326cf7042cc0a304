/* Sockets and links of our own types have a colour each, as ComfyUI's have. */

import { app } from "../../scripts/app.js"

const COLOURS = {
  DIFFLENS_ACTIVATIONS: "#c78f3a",
  DIFFLENS_SAE: "#3aa6a0",
  DIFFLENS_CLASSIFIER: "#d0708c",
  DIFFLENS_LABELS: "#9a8fe0",
  DIFFLENS_PROBES: "#6f9fd8",
  DIFFLENS_RECIPE: "#7cae4e",
  DIFFLENS_TARGETS: "#d8664b",
  DIFFLENS_JUDGEMENTS: "#b0a35a",
}

app.registerExtension({
  name: "DiffLens.Colours",
  setup() {
    const rules = Object.entries(COLOURS).map(([type, colour]) => `--color-datatype-${type}: ${colour};`)
    const sheet = document.createElement("style") // for the Vue renderer
    sheet.textContent = `:root { ${rules.join(" ")} }`
    document.head.append(sheet)
    for (const known of [app.canvas.default_connection_color_byType, app.canvas.constructor.link_type_colors]) {
      for (const [type, colour] of Object.entries(COLOURS)) {
        // ComfyUI's palettes, when one is chosen, set types that they do not know to no colour.
        Object.defineProperty(known, type, { get: () => colour, set() {}, enumerable: true, configurable: true })
      }
    }
    app.canvas.setDirty(true, true)
  },
})
