// What a dataset gave, on the node that read it: the first crops, counts, and what is wrong. And what any of our nodes
// tells in words.

import { make, style } from "./elements.mjs";
import { described, everyNode } from "./graph.mjs";
import { post } from "./runs.mjs";
import { say } from "./words.mjs";

const HEIGHT = 92; // also in lumina2.css
const WIDGET = "lumina2_dataset";
const DATASET_NODES = ["Lumina2LoadDataset", "Lumina2LoadDatasetConfig"];

/** An element of its own on a node, behind its widgets; nothing of it is saved. */
export function place(node, name) {
  style();
  const known = node.widgets?.find((widget) => widget.name === name);
  if (known) return known.element;
  const element = make("div.panel.dataset");
  const widget = node.addDOMWidget(name, name, element, {
    serialize: false,
    hideOnZoom: false,
    getMinHeight: () => HEIGHT,
  });
  widget.serialize = false;
  const [width, height] = node.computeSize();
  node.setSize([Math.max(node.size[0], width), Math.max(node.size[1], height)]);
  return element;
}

/** `read`: what the server's glimpse tells. */
export function show(node, read) {
  const element = place(node, WIDGET);
  const sizes = read.buckets.map(([width, height, count]) => `${width}×${height}: ${count}`).join(", ");
  const wrong = [
    ...read.problems,
    ...(read.more_problems ? [`+ ${read.more_problems}`] : []),
    ...(read.enlarged ? [say("enlarged", { n: read.enlarged })] : []),
  ];
  const counts = say("counts", { pictures: read.pictures, buckets: read.buckets.length });
  const problems = wrong.length
    ? make("button.memory", { type: "button", "data-fits": "no", title: wrong.join("\n"), onclick: () => open() }, say("problems", { n: wrong.length }))
    : make("span.faint", {}, say("problems", { n: 0 }));
  const open = () => {
    const drawn = element.querySelector(".lumina2-drawer");
    if (drawn) return drawn.remove();
    element.append(make("div.drawer", {}, wrong.map((sentence) => make("div", {}, sentence))));
  };
  element.replaceChildren(
    make("div.row", {}, make("span.grow", { title: sizes }, counts), problems),
    make("div.strip", {}, read.crops.map((src) => make("img.crop", { src, alt: "" }))),
  );
}

/** A node's report, as it is. */
export function tell(node, text) {
  place(node, "lumina2_report").replaceChildren(make("div.report", {}, text));
}

/** Of nodes that ComfyUI took from its cache it sends nothing; `ids`: those nodes. */
export async function showCached(ids) {
  const cached = [...everyNode()].filter(([id, node]) => ids.includes(id) && DATASET_NODES.includes(node.comfyClass));
  for (const [, node] of cached) {
    if (node.widgets?.some((widget) => widget.name === WIDGET)) continue;
    const read = await post("dataset", { node: described(node) }).catch(() => null); // only running tells
    if (read) show(node, read);
  }
}
