// Small pieces of the page: elements, buttons, a question before something goes, a line that tells what happened.

import { app } from "../../../scripts/app.js";
import { say } from "./words.mjs";

let styled;

/** The style sheet, once. */
export function style() {
  if (styled) return;
  styled = document.createElement("link");
  styled.rel = "stylesheet";
  styled.href = new URL("./lumina2.css", import.meta.url).href;
  document.head.append(styled);
}

/** An element with attributes (or properties, listeners for `on…`) and children; null ones are left out. */
export function make(tag, attributes = {}, ...children) {
  const [name, ...classes] = tag.split(".");
  const element = document.createElement(name);
  if (classes.length) element.className = classes.map((each) => `lumina2-${each}`).join(" ");
  for (const [key, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (key in element && key !== "list" && key !== "role") element[key] = value;
    else element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** A button that is busy until what it does is done, and shows on `where` what went wrong. */
export function button(label, act, { tip, kind, where, icon } = {}) {
  const element = make(
    kind ? `button.button.${kind}` : "button.button",
    {
      type: "button",
      title: tip ?? label,
      "aria-label": [label, tip].filter(Boolean).join(": "),
      async onclick(event) {
        event.stopPropagation();
        element.disabled = true;
        try {
          await act(event);
        } catch (error) {
          (where ?? toast)(error.message, "error");
        } finally {
          element.disabled = false;
        }
      },
    },
    icon ? make(`i`, { className: `pi pi-${icon}`, "aria-hidden": "true" }) : null,
    icon && !label ? null : label,
  );
  return element;
}

export function toast(text, severity = "info") {
  app.extensionManager.toast.add({ severity, summary: "Lumina2", detail: text, life: 6000 });
}

export async function copy(text) {
  await navigator.clipboard.writeText(text);
  toast(say("copied"), "success");
}

/** Asks once, inside `host`, naming what goes; true where the answer is yes. Esc keeps. */
export function confirmed(host, question, verb) {
  return new Promise((decide) => {
    const end = (answer) => {
      box.remove();
      decide(answer);
    };
    const no = make("button.button", { type: "button", onclick: () => end(false) }, say("keep"));
    const box = make(
      "div.confirm",
      { role: "alertdialog", "aria-label": question, onkeydown: (event) => event.key === "Escape" && end(false) },
      make("p", {}, question),
      make("div.row", {}, make("button.button.danger", { type: "button", onclick: () => end(true) }, verb), no),
    );
    host.append(box);
    no.focus();
  });
}

/** A text field whose keys stay its own; Enter acts, Esc leaves. */
export function field(label, { value = "", placeholder = "", onenter, onescape, type = "text" } = {}) {
  return make("input.field", {
    type,
    value,
    placeholder,
    "aria-label": label,
    onkeydown(event) {
      event.stopPropagation();
      if (event.key === "Enter") onenter?.(event.target.value);
      if (event.key === "Escape") onescape?.();
    },
  });
}
