// Completion of a dataset's folder, under the field where it is typed.

import { make, style } from "./elements.mjs";
import { ask } from "./runs.mjs";

const USED = "lumina2.folders";
const REMEMBERED = 12;

const used = () => JSON.parse(localStorage.getItem(USED) ?? "[]");

function remember(folder) {
  if (!folder) return;
  localStorage.setItem(USED, JSON.stringify([folder, ...used().filter((each) => each !== folder)].slice(0, REMEMBERED)));
}

/** Offers folders under ComfyUI's input folder, the bundled datasets and those used before; any other path is typed. */
export function complete(field) {
  style();
  const list = make("ul.options", { role: "listbox", id: "lumina2-folders" });
  let chosen = -1;
  let latest = 0;

  const place = () => {
    const box = field.getBoundingClientRect();
    list.style.left = `${box.left}px`;
    list.style.top = `${box.bottom + 2}px`;
    list.style.minWidth = `${Math.max(box.width, 180)}px`;
  };
  const take = (folder) => {
    field.value = folder;
    field.dispatchEvent(new Event("input", { bubbles: true }));
    field.dispatchEvent(new Event("change", { bubbles: true }));
    offer();
    field.focus();
  };
  const mark = (index) => {
    const items = [...list.children];
    chosen = items.length ? (index + items.length) % items.length : -1;
    items.forEach((item, i) => item.setAttribute("aria-selected", String(i === chosen)));
    items[chosen]?.scrollIntoView({ block: "nearest" });
  };
  const offer = async (all = false) => {
    const number = ++latest;
    const typed = all ? "" : field.value;
    const { folders } = await ask("folders", { typed }).catch(() => ({ folders: [] }));
    if (number !== latest || !list.isConnected) return;
    const known = used().filter((folder) => folder.startsWith(typed));
    const names = [...new Set([...folders, ...known])].filter((folder) => folder !== field.value);
    list.replaceChildren(
      ...names.map((folder) =>
        make("li", { role: "option", onpointerdown: (event) => (event.preventDefault(), take(folder)) }, folder),
      ),
    );
    list.hidden = !names.length;
    chosen = -1;
    place();
  };
  const keys = (event) => {
    if (event.key === "ArrowDown") mark(chosen + 1);
    else if (event.key === "ArrowUp") mark(chosen - 1);
    else if (event.key === "Tab" && list.children.length) take(list.children[Math.max(chosen, 0)].textContent);
    else if (event.key === "Enter" && chosen >= 0) take(list.children[chosen].textContent);
    else return setTimeout(() => field.isConnected || end()); // Enter and Esc close the dialog that it stands in
    event.preventDefault();
    event.stopPropagation();
  };
  const typed = () => offer();
  const end = () => {
    remember(field.value.trim());
    list.remove();
    delete field.dataset.lumina2;
    field.removeEventListener("input", typed);
    field.removeEventListener("keydown", keys, true);
  };
  field.setAttribute("aria-controls", "lumina2-folders");
  field.addEventListener("input", typed);
  field.addEventListener("keydown", keys, true);
  field.addEventListener("blur", end, { once: true });
  document.body.append(list);
  offer(true);
}
