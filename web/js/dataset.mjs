// What a dataset gave, on the node that read it: the first crops, counts, and what is wrong.

import { make, style } from "./elements.mjs";
import { described, everyNode } from "./graph.mjs";
import { post } from "./runs.mjs";
import { say } from "./words.mjs";

const HEIGHT = 92; // also in lumina2.css
const WIDGET = "lumina2_dataset";
const DATASET_NODES = ["Lumina2LoadDataset", "Lumina2LoadDatasetConfig"];

function place(node) {
  style();
  const known = node.widgets?.find((widget) => widget.name === WIDGET);
  if (known) return known.element;
  const element = make("div.panel.dataset");
  const widget = node.addDOMWidget(WIDGET, WIDGET, element, {
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
  const element = place(node);
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

/** Of nodes that ComfyUI took from its cache it sends nothing; `ids`: those nodes. */
export async function showCached(ids) {
  const cached = [...everyNode()].filter(([id, node]) => ids.includes(id) && DATASET_NODES.includes(node.comfyClass));
  for (const [, node] of cached) {
    if (node.widgets?.some((widget) => widget.name === WIDGET)) continue;
    const read = await post("dataset", { node: described(node) }).catch(() => null); // only running tells
    if (read) show(node, read);
  }
}
