// The page's side of the nodes: what a saved workflow carries but nobody sets by hand stays hidden, a LoRA that was
// just trained appears in every loader's list, and the nodes speak the page's language on every frontend.

import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";

const CATEGORY = "Lumina2";
const TRAIN_NODES = ["TrainLumina2LoRA"];
const HIDDEN_WIDGETS = ["continue_token", "attempt"];

// Frontends before ComfyUI_frontend #7214 drop the packs' texts of every language but English, so ours are put where
// later ones put them.
let texts = {};

async function translateDefinitions(definitions) {
  const locale = app.extensionManager.setting.get("Comfy.Locale");
  if (!locale || locale === "en") return;
  const answer = await api.fetchApi("/i18n");
  texts = (await answer.json())[locale]?.nodeDefs ?? {};
  for (const definition of Object.values(definitions)) {
    const text = texts[definition.name];
    if (definition.category !== CATEGORY || !text) continue;
    definition.display_name = text.display_name;
    definition.description = text.description;
    for (const inputs of [definition.input.required, definition.input.optional]) {
      for (const [name, specification] of Object.entries(inputs ?? {})) {
        const tooltip = text.inputs[name]?.tooltip;
        if (tooltip) specification[1] = { ...specification[1], tooltip };
      }
    }
  }
}

function translateNode(node) {
  const inputs = texts[node.comfyClass]?.inputs ?? {};
  for (const input of node.inputs ?? []) input.localized_name = inputs[input.name]?.name ?? input.localized_name;
  for (const widget of node.widgets ?? []) widget.label = inputs[widget.name]?.name ?? widget.label;
}

app.registerExtension({
  name: "lumina2-trainer",

  addCustomNodeDefs: translateDefinitions,

  nodeCreated(node) {
    if (node.constructor.nodeData?.category === CATEGORY) translateNode(node);
    if (!TRAIN_NODES.includes(node.comfyClass)) return;
    for (const widget of node.widgets ?? []) {
      if (!HIDDEN_WIDGETS.includes(widget.name)) continue;
      widget.hidden = true;
      widget.options = { ...widget.options, hidden: true };
    }
  },

  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!TRAIN_NODES.includes(nodeData.name)) return;
    const onExecuted = nodeType.prototype.onExecuted;
    nodeType.prototype.onExecuted = function (...results) {
      onExecuted?.apply(this, results);
      app.refreshComboInNodes();
    };
  },
});
