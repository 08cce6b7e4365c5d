// The page's side of the nodes: what a saved workflow carries but nobody sets by hand stays hidden, and a LoRA that
// was just trained appears in every loader's list.

import { app } from "/scripts/app.js";

const TRAIN_NODES = ["TrainLumina2LoRA"];
const HIDDEN_WIDGETS = ["continue_token", "attempt"];

app.registerExtension({
  name: "lumina2-trainer",

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
