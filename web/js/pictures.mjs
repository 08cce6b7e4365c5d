// The samples of a run: a strip of the newest, a timeline of all, and one of them in full size beside the base model's.

import { make } from "./elements.mjs";
import { pictureUrl } from "./runs.mjs";
import { number, say } from "./words.mjs";

/** Every picture with its prompt and step, and the first one of the same prompt: the base model's. */
function listed(samples) {
  const first = new Map();
  const all = [];
  for (const row of samples.rows)
    for (const picture of row.pictures) {
      const key = `${picture.prompt} ${Boolean(picture.ema)}`;
      const shown = { ...picture, step: row.step, asked: row.asked, about: samples.prompts[picture.prompt] ?? {} };
      if (!first.has(key)) first.set(key, shown);
      shown.base = first.get(key) === shown || first.get(key).step !== 0 ? null : first.get(key);
      all.push(shown);
    }
  return all;
}

const caption = (picture) =>
  [`${say("step")} ${picture.step}`, picture.about.prompt, picture.score ? say("score", { n: number(picture.score, 3) }) : ""]
    .filter(Boolean)
    .join(" · ");

function thumbnail(runId, picture, all, size) {
  return make(
    "button.thumb",
    {
      type: "button",
      title: caption(picture),
      "aria-label": `${say("full_size")}: ${caption(picture)}`,
      onclick: (event) => {
        event.stopPropagation();
        view(runId, all, all.indexOf(picture));
      },
    },
    make("img", { src: pictureUrl(runId, picture.path, size), alt: caption(picture), loading: "lazy", draggable: false }),
  );
}

/** The base model's picture and the newest ones, as many as fit. */
export function strip(host, runId, samples) {
  const all = listed(samples);
  const key = all.map((each) => each.path).join("\n");
  if (host.dataset.key === key) return all.length;
  host.dataset.key = key;
  const steps = [...new Set(all.map((each) => each.step))];
  const newest = all.filter((each) => each.step === steps.at(-1));
  const earlier = newest[0] ? all.filter((each) => each.prompt === newest[0].prompt && each.step !== steps.at(-1)) : [];
  const base = newest[0]?.base;
  const shown = [base, ...newest.slice(0, 4), ...earlier.filter((each) => each !== base).reverse()].filter(Boolean).slice(0, 6);
  host.replaceChildren(
    ...shown.map((picture) =>
      make(
        "figure",
        {},
        thumbnail(runId, picture, all, 128),
        make("span.tag", {}, picture.step === 0 ? say("before") : String(picture.step)),
      ),
    ),
  );
  return all.length;
}

/** Rows are prompts, columns are steps. */
export function timeline(runId, samples) {
  const all = listed(samples);
  if (!all.length) return make("div.empty", {}, say("no_samples"));
  const head = make(
    "tr",
    {},
    make("th", { scope: "row" }),
    samples.rows.map((row) =>
      make("th", { scope: "col" }, row.step === 0 ? say("before") : String(row.step), row.asked ? ` (${say("now_asked")})` : ""),
    ),
  );
  const rows = samples.prompts.map((about, prompt) =>
    make(
      "tr",
      {},
      make("th", { scope: "row", title: `${about.prompt}\nseed ${about.seed}` }, about.name || about.prompt || "–"),
      samples.rows.map((row) => {
        const here = all.filter((each) => each.prompt === prompt && row.pictures.some((one) => one.path === each.path));
        return make(
          "td",
          {},
          here.map((picture) => [
            thumbnail(runId, picture, all, 192),
            picture.score ? make("small.faint", {}, say("score", { n: number(picture.score, 3) })) : null,
          ]).flat(),
        );
      }),
    ),
  );
  return make("div.timeline", {}, make("table", {}, make("thead", {}, head), make("tbody", {}, rows)));
}

/** Full size: arrow keys walk, the slider uncovers the base model's picture, Esc closes. */
function view(runId, all, at) {
  const before = document.activeElement;
  const text = make("span.grow", {});
  const over = make("img", { alt: "" });
  const under = make("img", { alt: "" });
  const edge = make("div.edge");
  over.classList.add("lumina2-over");
  const pair = make("div.pair", {}, under, over, edge);
  const slider = make("input", { type: "range", min: 0, max: 100, value: 50, "aria-label": say("before_after") });
  slider.addEventListener("input", () => pair.style.setProperty("--cut", `${slider.value}%`));
  under.addEventListener("load", () => pair.style.setProperty("--aspect", under.naturalWidth / under.naturalHeight));
  const compared = make("label.row", {}, say("before_after"), slider);
  const show = (index) => {
    at = (index + all.length) % all.length;
    const picture = all[at];
    under.src = pictureUrl(runId, picture.path);
    under.alt = caption(picture);
    const base = picture.base;
    over.hidden = edge.hidden = compared.hidden = !base;
    if (base) over.src = pictureUrl(runId, base.path);
    text.textContent = `${caption(picture)} · seed ${picture.about.seed}`;
  };
  const close = () => {
    document.removeEventListener("keydown", keys, true);
    box.remove();
    before?.focus?.();
  };
  const keys = (event) => {
    if (event.key === "Escape") close();
    else if (event.target === slider) return;
    else if (event.key === "ArrowRight") show(at + 1);
    else if (event.key === "ArrowLeft") show(at - 1);
    else return;
    event.stopPropagation();
    event.preventDefault();
  };
  const move = (by) => () => show(at + by);
  const quit = make("button.button", { type: "button", onclick: close }, say("close"));
  const box = make(
    "div.viewer",
    { role: "dialog", "aria-modal": "true", "aria-label": say("full_size") },
    make("div.stage", {}, pair),
    make(
      "div.caption",
      {},
      make("button.button", { type: "button", onclick: move(-1), "aria-label": say("previous") }, "←"),
      make("button.button", { type: "button", onclick: move(1), "aria-label": say("next") }, "→"),
      text,
      compared,
      quit,
    ),
  );
  document.addEventListener("keydown", keys, true);
  document.body.append(box);
  show(at);
  quit.focus();
}
