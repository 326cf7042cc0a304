/* Debias in ComfyUI's page. A graph from elsewhere may name a recipe that this machine lacks: the page then shows no
   mix, and would give the mix's value to the strength, which stands behind it. And the page's panel at the right keeps
   the widgets of the recipe that was chosen before. */

import { app } from "../../scripts/app.js"

const TYPE = "DiffLensDebias"

app.registerExtension({
  name: "DiffLens.Recipe",
  beforeConfigureGraph(graph) {
    const { required, optional } = LiteGraph.registered_node_types[TYPE].nodeData.input
    const recipes = { ...required, ...optional }.recipe[1].options
    for (const part of [graph, ...(graph.definitions?.subgraphs ?? [])])
      for (const node of part.nodes) if (node.type === TYPE) fit(node, recipes)
  },
  nodeCreated(node) {
    if (node.comfyClass !== TYPE) return
    const before = node.onSelected
    node.onSelected = function () {
      before?.call(this)
      watch(this)
    }
  },
})

/** Leave out the mix of a recipe that is not here, and put the first one where it was left out: recipe, mix, strength. */
function fit(node, recipes) {
  const values = node.widgets_values
  const here = recipes.find((recipe) => recipe.key === values?.[0])
  if (!here && values?.length > 2) node.widgets_values = [values[0], values.at(-1)]
  if (here && values.length === 2) node.widgets_values = [values[0], here.inputs.required.mix[1].options[0].key, values[1]]
}

/** Let the panel look at the node anew whenever a choice has brought other widgets. */
function watch(node) {
  for (const widget of node.widgets) {
    if (!["recipe", "recipe.mix"].includes(widget.name) || widget.watched) continue
    widget.watched = true
    const before = widget.callback
    widget.callback = function (...given) {
      before?.apply(this, given)
      watch(node)
      app.canvas.onSelectionChange?.(app.canvas.selected_nodes)
    }
  }
}
