// What every page loads: the places where the panel, the sidebar and the completion of folders appear. What they show is
// imported when one of them is seen for the first time.

import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";

const CATEGORY = "Lumina2";
const TRAIN_NODES = ["TrainLumina2LoRA", "TrainLumina2Full"];
const HIDDEN_WIDGETS = ["continue_token", "attempt"]; // a saved workflow carries them, nobody sets them by hand
const FOLDER_WIDGETS = { Lumina2LoadDataset: "folder" };
const PANEL_HEIGHT = 268; // also in lumina2.css: some frontends ask the widget, others the element
const PANEL_WIDTH = 360; // of a new node
const TAB = "lumina2-runs";
const SEEN = "lumina2.seen"; // also in sidebar.mjs
const RUNNING = new Set();
let ended = 0; // runs that ended while no page was open

// Frontends before ComfyUI_frontend #7214 drop the packs' texts of every language but English, so ours are put where
// later ones put them.
let texts = {};

const locale = () => app.extensionManager.setting.get("Comfy.Locale") ?? "en";

async function translateDefinitions(definitions) {
  if (locale() === "en") return;
  const answer = await api.fetchApi("/i18n");
  texts = (await answer.json())[locale()]?.nodeDefs ?? {};
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
  const { inputs = {}, outputs = {} } = texts[node.comfyClass] ?? {};
  for (const input of node.inputs ?? []) input.localized_name = inputs[input.name]?.name ?? input.localized_name;
  for (const [number, output] of (node.outputs ?? []).entries())
    output.localized_name = outputs[number]?.name ?? output.localized_name;
  for (const widget of node.widgets ?? []) widget.label = inputs[widget.name]?.name ?? widget.label;
}

function hideWidgets(node) {
  for (const widget of node.widgets ?? []) {
    if (!HIDDEN_WIDGETS.includes(widget.name)) continue;
    widget.hidden = true;
    (widget.options ??= {}).hidden = true; // in place: newer pages have taken the object already
    widget.computeSize = () => [0, -4]; // the gap that the layout puts behind each
  }
}

function whenSeen(element, show) {
  const seen = new IntersectionObserver((entries) => {
    if (!entries.some((entry) => entry.isIntersecting)) return;
    seen.disconnect();
    show();
  });
  seen.observe(element);
}

function addPanel(node) {
  const element = document.createElement("div");
  element.className = "lumina2-panel";
  element.style.minHeight = `${PANEL_HEIGHT}px`;
  const widget = node.addDOMWidget("lumina2_panel", "lumina2_panel", element, {
    serialize: false,
    hideOnZoom: false,
    getMinHeight: () => PANEL_HEIGHT,
  });
  widget.serialize = false; // what a workflow saves of widgets is told by position
  const [width, height] = node.computeSize();
  node.setSize([Math.max(node.size[0], width, PANEL_WIDTH), Math.max(node.size[1], height)]);
  let panel;
  whenSeen(element, async () => {
    panel = (await import("./panel.mjs")).mount(node, element);
  });
  const onRemoved = node.onRemoved;
  node.onRemoved = function (...given) {
    panel?.close();
    return onRemoved?.apply(this, given);
  };
}

// A text widget is drawn on the canvas and asks in a dialog, or is an input of its own in Nodes 2.0; both get the focus.
let clicked;

function rememberClicks(node) {
  const widget = node.widgets?.find((each) => each.name === FOLDER_WIDGETS[node.comfyClass]);
  const onClick = widget?.onClick;
  if (!onClick) return;
  widget.onClick = function (...given) {
    clicked = widget;
    return onClick.apply(this, given);
  };
}

async function completeFolders({ target }) {
  if (!(target instanceof HTMLInputElement) || target.dataset.lumina2) return;
  const shown = target.closest("[data-node-id]");
  const node = shown && app.canvas.graph?.getNodeById(shown.dataset.nodeId);
  const name = FOLDER_WIDGETS[node?.comfyClass];
  const widget = node?.widgets?.find((each) => each.name === name);
  const inDialog = clicked && target.closest(".graphdialog");
  if (!inDialog && !(widget && target.value === widget.value && target.type === "text")) return;
  clicked = undefined;
  target.dataset.lumina2 = "folder";
  (await import("./folders.mjs")).complete(target);
}

function badge() {
  const tabs = app.extensionManager.getSidebarTabs?.() ?? app.extensionManager.sidebarTab?.sidebarTabs ?? [];
  const tab = tabs.find((each) => each.id === TAB);
  if (tab) tab.iconBadge = RUNNING.size ? String(RUNNING.size) : ended ? "✓" : null;
}

const seenNow = () => localStorage.setItem(SEEN, String(Date.now() / 1000));

/** What ended while no page was open; asked for once the page is connected. */
async function lookBack() {
  const seen = localStorage.getItem(SEEN);
  if (!seen) return seenNow();
  const answer = await api.fetchApi(`/lumina2/ended?since=${Math.floor(Number(seen))}`);
  ended = (await answer.json()).ended ?? 0;
  badge();
}

/** A sentence about one of our nodes marks the widget that it names; a train node's panel does so itself. */
async function markWidget({ detail }) {
  if (TRAIN_NODES.includes(detail.node_type)) return;
  const { everyNode } = await import("./graph.mjs");
  const node = [...everyNode()].find(([id]) => id === String(detail.node_id))?.[1];
  if (node?.constructor.nodeData?.category !== CATEGORY) return;
  const { mark } = await import("./labels.mjs");
  mark(node, String(detail.exception_message ?? ""));
  api.addEventListener("execution_start", () => mark(node, ""), { once: true });
}

function noteRun({ detail }) {
  const runs = ["running", "paused"].includes(detail.status);
  if (runs === RUNNING.has(detail.run_id)) return;
  if (runs) RUNNING.add(detail.run_id);
  else if (RUNNING.delete(detail.run_id)) seenNow();
  badge();
}

app.registerExtension({
  name: "lumina2-trainer",

  addCustomNodeDefs: translateDefinitions,

  setup() {
    const title = locale().startsWith("zh") ? "Lumina2 训练任务" : "Lumina2 runs";
    let list;
    app.extensionManager.registerSidebarTab({
      id: TAB,
      icon: "pi pi-chart-line",
      title,
      label: "Lumina2",
      tooltip: title,
      type: "custom",
      render: async (element) => {
        list = (await import("./sidebar.mjs")).mount(element);
      },
      destroy: () => list?.close(),
    });
    api.addEventListener("lumina2.run", noteRun);
    api.addEventListener("execution_error", markWidget);
    api.addEventListener("status", lookBack, { once: true });
    addEventListener("lumina2-seen", () => ((ended = 0), badge()));
    api.addEventListener("execution_cached", async ({ detail }) => {
      if (detail.nodes?.length) (await import("./dataset.mjs")).showCached(detail.nodes.map(String));
    });
    document.addEventListener("focusin", completeFolders);
  },

  nodeCreated(node) {
    if (node.constructor.nodeData?.category === CATEGORY) translateNode(node);
    if (FOLDER_WIDGETS[node.comfyClass]) rememberClicks(node);
    if (!TRAIN_NODES.includes(node.comfyClass)) return;
    hideWidgets(node);
    addPanel(node);
  },

  beforeRegisterNodeDef(nodeType, nodeData) {
    if (nodeData.category !== CATEGORY) return;
    const train = TRAIN_NODES.includes(nodeData.name);
    const onExecuted = nodeType.prototype.onExecuted;
    nodeType.prototype.onExecuted = async function (...results) {
      onExecuted?.apply(this, results);
      if (train) app.refreshComboInNodes(); // a LoRA that was just trained appears in every loader's list
      const read = results[0]?.lumina2_dataset?.[0];
      if (read) (await import("./dataset.mjs")).show(this, read);
      const text = [results[0]?.text ?? []].flat().join("\n");
      if (text) (await import("./dataset.mjs")).tell(this, text);
    };
  },
});
