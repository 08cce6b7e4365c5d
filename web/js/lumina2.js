// The page's side of the nodes: what a saved workflow carries but nobody sets by hand stays hidden, a LoRA that was
// just trained appears in every loader's list, and the nodes speak the page's language on every frontend.

import { api } from "/scripts/api.js";
import { app } from "/scripts/app.js";

const CATEGORY = "Lumina2";
const TRAIN_NODES = ["TrainLumina2LoRA"];
const HIDDEN_WIDGETS = ["continue_token", "attempt"];

// Frontends before ComfyUI_frontend #7214 drop the packs' texts of every language but English. A definition that
// carries the texts itself is shown right by those and by later ones.
async function translate(definitions) {
  const locale = app.extensionManager.setting.get("Comfy.Locale");
  if (!locale || locale === "en") return;
  const answer = await api.fetchApi("/i18n");
  const texts = (await answer.json())[locale]?.nodeDefs ?? {};
  for (const definition of Object.values(definitions)) {
    const text = texts[definition.name];
    if (definition.category !== CATEGORY || !text) continue;
    definition.display_name = text.display_name;
    definition.description = text.description;
    for (const inputs of [definition.input.required, definition.input.optional]) {
      for (const [name, specification] of Object.entries(inputs ?? {})) {
        const { name: display_name, tooltip } = text.inputs[name] ?? {};
        if (display_name) specification[1] = { ...specification[1], display_name, tooltip };
      }
    }
  }
}

app.registerExtension({
  name: "lumina2-trainer",

  addCustomNodeDefs: translate,

  nodeCreated(node) {
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
