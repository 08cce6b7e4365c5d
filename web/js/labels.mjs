// What is said behind a widget's name: what Run will do, a config's value, or a sign where a sentence names the widget.

const owns = new WeakMap(); // by node: the labels that its widgets have of themselves
const marks = new WeakMap(); // by node: the name of the widget that is marked

/** Something behind a widget's name; empty: its own name alone. A widget that is marked stays so. */
export function label(node, name, text, over = false) {
  const widget = node.widgets?.find((each) => each.name === name);
  if (!widget || (!over && marks.get(node) === name)) return;
  if (!owns.has(node)) owns.set(node, new Map());
  const known = owns.get(node);
  if (!known.has(name)) known.set(name, widget.label);
  const own = known.get(name);
  widget.label = text ? `${own ?? name} · ${text}` : own;
}

/** Marks the widget that a sentence names first; without a sentence, or where it names none, no widget is marked. */
export function mark(node, sentence) {
  const before = marks.get(node);
  if (before) label(node, before, "", true);
  const named = (node.widgets ?? []).filter((widget) => sentence && widget.name && !widget.hidden);
  const places = named.map((widget) => [sentence.search(new RegExp(`\\b${widget.name.replaceAll("_", "[_ ]")}\\b`)), widget.name]);
  const first = places.filter(([at]) => at >= 0).sort((a, b) => a[0] - b[0])[0]?.[1];
  if (first) label(node, first, "⚠", true);
  if (first) marks.set(node, first);
  else marks.delete(node);
  node.setDirtyCanvas?.(true, true);
}
