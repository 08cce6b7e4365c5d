// What the panel and the sidebar do with the graph: read the nodes behind a train node, add one beside it, run it.

import { app } from "../../../scripts/app.js";
import { ask } from "./runs.mjs";

const CHAIN = 24; // nodes that are followed
const MUTED = 2;
const BYPASSED = 4;
const SUBGRAPH_INPUT = -10; // where a wire begins that comes from outside of its subgraph
const LOADER = "LoraLoaderModelOnly";
export const TRAIN_NODES = ["TrainLumina2LoRA", "TrainLumina2Full"];

const root = () => app.rootGraph ?? app.graph.rootGraph ?? app.graph;

/** Ids as the server knows them, such as 5:2 for node 2 in the subgraph of node 5, each with its node. */
export function* everyNode(graph = root(), before = "") {
  for (const node of graph.nodes ?? graph._nodes ?? []) {
    yield [`${before}${node.id}`, node];
    if (node.subgraph) yield* everyNode(node.subgraph, `${before}${node.id}:`);
  }
}

/** The ids under which a node runs; several where its subgraph is used several times. */
export const idsOf = (node) => [...everyNode()].filter(([, each]) => each === node).map(([id]) => id);

function origin(node, slot) {
  const graph = node.graph;
  const id = node.inputs[slot]?.link;
  const link = id == null ? null : (graph.getLink?.(id) ?? graph.links?.get?.(id) ?? graph.links?.[id]);
  if (link?.origin_id === SUBGRAPH_INPUT) {
    const around = [...everyNode()].find(([, each]) => each.subgraph === graph)?.[1];
    return around ? origin(around, link.origin_slot) : null;
  }
  const found = link && graph.getNodeById(link.origin_id);
  return found?.type === "Reroute" ? origin(found, 0) : (found ?? null);
}

/** The node behind an input, by its name; nothing where none is wired, or the wire can't be followed. */
export function originOf(node, name) {
  const slot = node.inputs?.findIndex((input) => input.name === name) ?? -1;
  return slot < 0 ? null : origin(node, slot);
}

/** A node as the server wants it: type, widgets, and the nodes behind its inputs; null where a wire can't be followed. */
export function described(node, depth = CHAIN) {
  if (!node || !depth || node.subgraph || [MUTED, BYPASSED].includes(node.mode)) return null;
  const widgets = {};
  const inputs = {};
  for (const widget of node.widgets ?? []) if (widget.serialize !== false) widgets[widget.name] = widget.value;
  for (const [slot, input] of (node.inputs ?? []).entries()) {
    if (input.link === null || input.link === undefined) continue;
    inputs[input.name] = described(origin(node, slot), depth - 1);
    delete widgets[input.name];
  }
  return { type: node.comfyClass ?? node.type, widgets, inputs };
}

export const widgetOf = (node, name) => node.widgets?.find((widget) => widget.name === name);

export function setWidget(node, name, value) {
  const widget = widgetOf(node, name);
  if (!widget) return;
  widget.value = value;
  widget.callback?.(value, app.canvas, node);
  node.graph?.setDirtyCanvas?.(true, true);
}

/** A new node with values in its widgets, beside another node or in the middle of what is seen; `chosen`: selected. */
export function addNode(type, values, beside, chosen = true) {
  const node = LiteGraph.createNode(type);
  if (!node) throw new Error(`${type}?`);
  const graph = beside?.graph ?? app.canvas.graph ?? app.graph;
  const [x, y, width, height] = app.canvas.ds.visible_area;
  node.pos = beside ? [beside.pos[0] + beside.size[0] + 60, beside.pos[1]] : [x + width / 2 - 150, y + height / 2 - 80];
  graph.add(node);
  for (const [name, value] of Object.entries(values)) setWidget(node, name, value);
  if (chosen) app.canvas.selectNode?.(node);
  return node;
}

/** A loader with a LoRA or a model that was trained; the lists are read anew first, so that it is among them. */
export async function addLoader(name, full, beside) {
  await app.refreshComboInNodes();
  return full ? addNode("UNETLoader", { unet_name: name }, beside) : addNode(LOADER, { lora_name: name }, beside);
}

export const run = () => app.queuePrompt(0, 1);

/** Trains on: Run alone would hand out what was stopped and kept. `summary`: what the server tells of the run. */
export async function goOn(node, summary) {
  const token = Math.max(summary?.continue_token ?? 0, widgetOf(node, "continue_token")?.value ?? 0);
  setWidget(node, "continue_token", token + 1);
  await run();
}

/** Ends the prompt that runs one of these nodes, and no other; without any: the one that trains. */
export async function cancel(...ids) {
  const { api } = app;
  const queue = await (await api.fetchApi("/queue")).json();
  const trains = (prompt, id) => TRAIN_NODES.includes(prompt[id]?.class_type);
  const wanted = ids.filter((id) => id !== undefined && id !== null);
  const mine = queue.queue_running.find(([, , prompt]) =>
    (wanted.length ? wanted : Object.keys(prompt)).some((id) => trains(prompt, id)),
  );
  if (mine) await api.interrupt(mine[1]);
}

/** The train node of a run, found by the name in its widget. */
export function nodeOf(name) {
  return [...everyNode()].find(
    ([, node]) => TRAIN_NODES.includes(node.comfyClass) && String(widgetOf(node, "run_name")?.value).trim() === name,
  )?.[1];
}

/** The newest run of a name, one that goes on before all others; undefined where there is none. */
export async function newestOf(name) {
  const { runs } = await ask("runs", { name });
  return runs.find((each) => ["running", "paused"].includes(each.status)) ?? runs[0];
}
