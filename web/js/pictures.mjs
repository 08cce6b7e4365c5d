// The samples of a run: a strip of the newest, a timeline of all, and one of them in full size beside the base model's.

import { make } from "./elements.mjs";
import { pictureUrl } from "./runs.mjs";
import { number, say } from "./words.mjs";

/** Every picture with its prompt and step, and the first one of the same prompt: the base model's. */
function listed(runId, samples) {
  const first = new Map();
  const all = [];
  for (const row of samples.rows)
    for (const picture of row.pictures) {
      const key = `${picture.prompt} ${Boolean(picture.ema)}`;
      const shown = { ...picture, runId, step: row.step, asked: row.asked, about: samples.prompts[picture.prompt] ?? {} };
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

function thumbnail(picture, all, size) {
  return make(
    "button.thumb",
    {
      type: "button",
      title: caption(picture),
      "aria-label": `${say("full_size")}: ${caption(picture)}`,
      onclick: (event) => {
        event.stopPropagation();
        view(all, all.indexOf(picture));
      },
    },
    make("img", { src: pictureUrl(picture.runId, picture.path, size), alt: caption(picture), loading: "lazy", draggable: false }),
  );
}

/** The base model's picture and the newest ones, as many as fit. */
export function strip(host, runId, samples) {
  const all = listed(runId, samples);
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
        thumbnail(picture, all, 128),
        make("span.tag", {}, picture.step === 0 ? say("before") : String(picture.step)),
      ),
    ),
  );
  return all.length;
}

/** Rows are prompts, columns are steps. */
export function timeline(runId, samples) {
  const all = listed(runId, samples);
  if (!all.length) return make("div.empty", {}, say("no_samples"));
  const head = make(
    "tr",
    {},
    make("td"),
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
            thumbnail(picture, all, 192),
            picture.score ? make("small.faint", {}, say("score", { n: number(picture.score, 3) })) : null,
          ]).flat(),
        );
      }),
    ),
  );
  return make("div.timeline", {}, make("table", {}, make("thead", {}, head), make("tbody", {}, rows)));
}

/** Two runs' newest pictures of the same prompts beside each other; in full size the slider goes from one to the other. */
export function sideBySide(...runs) {
  const newest = runs.map(({ runId, samples }) => {
    const all = listed(runId, samples).filter((picture) => !picture.ema);
    return new Map(all.map((picture) => [`${picture.about.seed} ${picture.about.prompt}`, picture]));
  });
  const prompts = [...new Set(newest.flatMap((each) => [...each.keys()]))];
  if (!prompts.length) return make("div.empty", {}, say("no_samples"));
  const [left, right] = newest;
  const all = [];
  for (const prompt of prompts) {
    const [one, other] = [left.get(prompt), right.get(prompt)].map((picture) => picture && { ...picture, base: null });
    if (one && other) other.base = one;
    all.push(...[one, other].filter(Boolean));
  }
  const cell = (prompt, run) => {
    const picture = all.find((each) => each.runId === run.runId && `${each.about.seed} ${each.about.prompt}` === prompt);
    return make("td", {}, picture ? [thumbnail(picture, all, 192), make("small.faint", {}, `${say("step")} ${picture.step}`)] : "–");
  };
  const named = (prompt) => all.find((each) => `${each.about.seed} ${each.about.prompt}` === prompt).about;
  return make(
    "div.timeline",
    {},
    make(
      "table",
      {},
      make("thead", {}, make("tr", {}, make("td"), runs.map(({ runId }) => make("th", { scope: "col" }, runId)))),
      make(
        "tbody",
        {},
        prompts.map((prompt) => {
          const about = named(prompt);
          const head = make("th", { scope: "row", title: `${about.prompt}\nseed ${about.seed}` }, about.name || about.prompt || "–");
          return make("tr", {}, head, runs.map((run) => cell(prompt, run)));
        }),
      ),
    ),
  );
}

/** Full size: arrow keys walk, the slider uncovers the base model's picture, Esc closes. */
function view(all, at) {
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
    under.src = pictureUrl(picture.runId, picture.path);
    under.alt = caption(picture);
    const base = picture.base;
    over.hidden = edge.hidden = compared.hidden = !base;
    if (base) over.src = pictureUrl(base.runId, base.path);
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
