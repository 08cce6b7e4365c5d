// Presets: values for a size of memory, or for what is to be learnt, put into the widgets of a train node and of the
// Training Settings behind it.

import { button, make, toast } from "./elements.mjs";
import { addNode, originOf, setWidget, widgetOf } from "./graph.mjs";
import { ask } from "./runs.mjs";
import { say } from "./words.mjs";

const SETTINGS = "Lumina2TrainingSettings";
const ADAPTER = "Lumina2LoRASettings";

let known;

/** A node's buttons, a row for each kind of preset. */
export async function rows(node, done) {
  known ??= await ask("presets");
  const subjects = { style: say("style"), character: say("character"), concept: say("concept") };
  const titles = { memory: say("preset_memory"), subject: say("preset_subject") };
  return Object.entries(known[node.comfyClass]).map(([kind, presets]) =>
    make(
      "div.row",
      { role: "group", "aria-label": titles[kind] },
      make("span.grow.faint", {}, titles[kind]),
      presets.map((preset) => {
        const name = subjects[preset.name] ?? `${preset.name} GB`;
        const act = () => {
          use(node, preset);
          toast(say("preset_set", { name, values: told(preset) }), "success");
          done();
        };
        return button(name, act, { tip: told(preset) });
      }),
    ),
  );
}

const told = ({ widgets, settings }) =>
  Object.entries({ ...widgets, ...settings })
    .map(([name, value]) => `${name} ${value}`)
    .join(", ");

function use(node, { widgets, settings }) {
  const adapter = originOf(node, "adapter");
  for (const [name, value] of Object.entries(widgets)) {
    setWidget(node, name, value);
    if (name === "rank" && adapter?.comfyClass === ADAPTER) setWidget(adapter, name, value); // it wins over the node
  }
  if (!Object.keys(settings).length) return;
  const behind = settingsOf(node);
  for (const [name, value] of Object.entries(settings))
    setWidget(behind, name, name === "more" ? merged(widgetOf(behind, name).value, value) : value);
}

function merged(own, more) {
  try {
    return JSON.stringify({ ...JSON.parse(own || "{}"), ...JSON.parse(more) });
  } catch {
    return more;
  }
}

/** The Training Settings that are wired to a train node; where none are, new ones between it and what was wired. */
function settingsOf(node) {
  const wired = originOf(node, "config");
  if (wired?.comfyClass === SETTINGS) return wired;
  const made = addNode(SETTINGS, {}, node, false); // the page's tools for what is selected would cover the buttons
  made.pos = [node.pos[0], node.pos[1] + node.size[1] + 60];
  if (wired) wired.connect(0, made, made.findInputSlot("config"));
  made.connect(0, node, node.findInputSlot("config"));
  return made;
}
