// A run's settings taken elsewhere: onto a new train node, or into SimpleTuner's files.

import { make, toast } from "./elements.mjs";
import { addNode, setWidget, widgetOf } from "./graph.mjs";
import { ask } from "./runs.mjs";
import { say } from "./words.mjs";

const WIDGETS = ["batch_size", "learning_rate", "seed", "steps"]; // of the train node, named as the settings are
const LORA_WIDGETS = { lora_qkv: "lora_qkv" }; // all others are named without the kind before them
// Widgets of Training Settings that mean more than the setting of their name; what `more` says wins over them.
const MEAN_MORE = ["flow_schedule_shift", "gradient_checkpointing", "weight_decay"];
const SHIFT = ["flow_schedule_shift", "flow_schedule_auto_shift"];
const LYCORIS = "lycoris_config.json";
const LEFT_PX = 60;
const BELOW_PX = 420;

/** A train node with a run's settings: in its widgets, and the others in settings nodes wired to it. */
export async function copySettings(about) {
  const changed = Object.fromEntries(Object.entries(about.changed).map(([name, [value]]) => [name, value]));
  const kind = (name) => /^(lora|lycoris|full)_/.exec(name)?.[1] ?? "";
  const of = (wanted) => Object.entries(changed).filter(([name]) => kind(name) === wanted);
  const lycoris = Object.keys(about.settings).some((name) => kind(name) === "lycoris");
  const files = lycoris ? (await ask("simpletuner", { run_id: about.run_id })).files : {};

  const own = { run_name: about.name, steps: about.target };
  for (const name of WIDGETS) if (name in changed) own[name] = changed[name];
  if ("lora_rank" in changed) own.rank = changed.lora_rank;
  for (const [name, value] of of("full")) own[name.slice("full_".length)] = value;
  const node = addNode(about.full ? "TrainLumina2Full" : "TrainLumina2LoRA", own);
  const behind = (type, values, input, below) => {
    const made = addNode(type, {});
    made.pos = [node.pos[0] - made.size[0] - LEFT_PX, node.pos[1] + below];
    const rest = fill(made, values);
    if (Object.keys(rest).length) setWidget(made, "more", JSON.stringify(rest, null, 2));
    made.connect(0, node, node.findInputSlot(input));
  };

  const lora = of("lora").filter(([name]) => name !== "lora_rank");
  if (lora.length) {
    const named = lora.map(([name, value]) => [LORA_WIDGETS[name] ?? name.slice("lora_".length), value]);
    behind("Lumina2LoRASettings", { rank: about.settings.lora_rank, ...Object.fromEntries(named) }, "adapter", 0);
  }
  if (lycoris) behind("Lumina2LyCORISSettings", { lycoris_config: JSON.stringify(files[LYCORIS], null, 2) }, "adapter", 0);
  const more = of("").filter(([name]) => !WIDGETS.includes(name));
  if (more.length) {
    const shift = SHIFT.map((name) => [name, about.settings[name]]);
    behind("Lumina2TrainingSettings", Object.fromEntries([...more, ...shift]), "config", BELOW_PX);
  }
  toast(say("added"), "success");
}

/** Puts values into the widgets that take them as they are; gives the others. */
function fill(node, values) {
  const rest = {};
  for (const [name, value] of Object.entries(values)) {
    const widget = widgetOf(node, name);
    const choices = widget?.options?.values;
    const takes = widget && !MEAN_MORE.includes(name) && typeof widget.value === typeof value && (!Array.isArray(choices) || choices.includes(value));
    if (takes) setWidget(node, name, value);
    else rest[name] = value;
  }
  return rest;
}

/** SimpleTuner's files, downloaded. */
export async function download(runId) {
  const { files } = await ask("simpletuner", { run_id: runId });
  for (const [name, content] of Object.entries(files)) {
    const blob = new Blob([`${JSON.stringify(content, null, 2)}\n`], { type: "application/json" });
    const link = make("a", { href: URL.createObjectURL(blob), download: name });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
  }
}
