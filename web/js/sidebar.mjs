// The sidebar tab "Lumina2 runs": all runs, one of them in full, or two of them side by side.

import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { Chart, linesOf } from "./chart.mjs";
import * as commands from "./commands.mjs";
import { button, confirmed, copy, field, make, style, toast } from "./elements.mjs";
import { addLoader, goOn, nodeOf } from "./graph.mjs";
import { sideBySide, timeline } from "./pictures.mjs";
import { ask, checkpointUrl, post, watch } from "./runs.mjs";
import { copySettings, download } from "./settings.mjs";
import { ago, bytes, duration, number, rate, say } from "./words.mjs";

const TAB = "lumina2-runs";
const QUICK_START = { pack: "lumina2-trainer", name: "01_quickstart_nano" };
const LIST_AGAIN_MS = 4000;
const RUNNING = ["running", "paused"];
const PLOTS = ["loss", "lr", "grad_norm", "speed", "memory", "parts"];
const MARKS = { running: "●", paused: "❚❚", finished: "✓", stopped: "■", interrupted: "⚠", failed: "⚠" };
const FIRST = ["--l2-line", "--l2-eval"];
const SECOND = ["--l2-other", "--l2-eval"];
const TABS = ["curves", "samples", "checkpoints", "data", "settings", "log"];
const CAN_GO_ON = ["stopped", "interrupted", "failed"];
const SEEN = "lumina2.seen"; // when the list was looked at last, in seconds: what ended later is news
const SHOWN = "lumina2.curves"; // how curves are shown, kept for the next time

let sidebar;
let wanted;

export function mount(element) {
  sidebar = new Sidebar(element);
  if (wanted) sidebar.open(wanted);
  wanted = null;
  return sidebar;
}

/** Opens the tab with one run. */
export function show(runId) {
  const open = app.extensionManager.sidebarTab?.activeSidebarTabId === TAB;
  if (open && sidebar) return sidebar.open(runId);
  wanted = runId;
  (app.extensionManager.sidebarTab ?? app.extensionManager).toggleSidebarTab?.(TAB);
}

class Sidebar {
  constructor(element) {
    style();
    this.element = make("div.sidebar");
    element.replaceChildren(this.element);
    element.style.height = "100%";
    this.search = "";
    this.comparing = false;
    this.chosen = [];
    this.heard = () => this.listSoon();
    api.addEventListener("lumina2.run", this.heard);
    this.list();
  }

  close() {
    this.leave();
    clearTimeout(this.timer);
    api.removeEventListener("lumina2.run", this.heard);
  }

  leave() {
    for (const end of this.unwatch ?? []) end();
    this.unwatch = [];
    this.view = null;
  }

  // All runs.

  list() {
    this.leave();
    this.view = "list";
    const search = field(say("search"), { value: this.search, placeholder: `${say("search")}…` });
    search.addEventListener("input", () => {
      this.search = search.value;
      this.fill();
    });
    const compare = make("input", {
      type: "checkbox",
      checked: this.comparing,
      onchange: () => {
        this.comparing = compare.checked;
        this.chosen = [];
        this.fill();
      },
    });
    this.rows = make("div.body");
    this.element.replaceChildren(
      make("h2", {}, say("runs")),
      make("div.row", {}, search, make("label.row", {}, compare, say("compare"))),
      this.rows,
    );
    if (this.runs) this.fill();
    this.load();
  }

  async load() {
    try {
      this.runs = (await ask("runs")).runs;
      localStorage.setItem(SEEN, String(Date.now() / 1000));
      dispatchEvent(new Event("lumina2-seen"));
      if (this.view === "list") this.fill();
    } catch (error) {
      if (this.view === "list") this.rows.replaceChildren(make("div.error", { role: "alert" }, error.message));
    }
    if (this.view === "list" && this.runs?.some((each) => RUNNING.includes(each.status))) this.listSoon(LIST_AGAIN_MS);
  }

  listSoon(after = 1500) {
    if (this.view !== "list") return;
    this.timer ??= setTimeout(() => {
      this.timer = null;
      if (this.view === "list" && this.element.isConnected) this.load();
    }, after);
  }

  fill() {
    if (!this.runs.length) return this.rows.replaceChildren(this.emptyState());
    const found = this.runs.filter((each) => each.run_id.toLowerCase().includes(this.search.trim().toLowerCase()));
    const hint = this.comparing ? make("p.faint", {}, say("compare_two")) : null;
    const rows = found.map((each) => this.row(each));
    const kept = document.activeElement?.dataset?.run;
    this.rows.replaceChildren(...[hint, ...(rows.length ? rows : [make("div.empty", {}, say("no_match"))])].filter(Boolean));
    if (kept) [...this.rows.querySelectorAll("[data-run]")].find((each) => each.dataset.run === kept)?.focus();
  }

  row(each) {
    const failed = each.status === "failed" && each.message;
    const name = say(each.status === "interrupted" ? "interrupted" : each.status, { step: each.step });
    return make(
      "button.run",
      {
        type: "button",
        "data-run": each.run_id,
        "aria-pressed": this.comparing ? String(this.chosen.includes(each.run_id)) : undefined,
        "aria-label": `${each.run_id}, ${name}, ${each.step}/${each.target}`,
        onclick: () => (this.comparing ? this.choose(each.run_id) : this.open(each.run_id)),
      },
      make("span.dot", { "data-state": each.status, title: name }),
      make("b", {}, each.run_id),
      make("span.number", {}, number(each.loss, 3)),
      make(
        "small",
        {},
        make("span.grow", { title: each.message }, `${MARKS[each.status] ?? ""} ${each.step}/${each.target}${failed ? ` · ${each.message}` : ""}`),
        make("span.number", {}, ago(each.age_s)),
      ),
    );
  }

  emptyState() {
    return make(
      "div.empty",
      {},
      make("b", {}, say("no_runs")),
      say("no_runs_more"),
      button(say("quick_start"), quickStart, { kind: "primary" }),
    );
  }

  choose(runId) {
    this.chosen = this.chosen.includes(runId) ? this.chosen.filter((each) => each !== runId) : [...this.chosen, runId];
    if (this.chosen.length === 2) this.compare(...this.chosen);
    else this.fill();
  }

  back(...more) {
    return make("div.row", {}, button("", () => this.list(), { tip: say("back"), icon: "arrow-left" }), ...more);
  }

  // One run.

  open(runId, tab = "curves") {
    this.leave();
    this.view = runId;
    this.tab = tab;
    this.about = null;
    this.state = make("span.grow.faint", { role: "status" });
    this.body = make("div.body", { role: "tabpanel" });
    const remove = button("", () => this.remove(runId), { tip: say("delete"), icon: "trash" });
    const tabs = TABS.map((name) =>
      make(
        "button.tab",
        {
          type: "button",
          role: "tab",
          "aria-selected": String(name === tab),
          onclick: () => this.turn(name, tabs),
          onkeydown: (event) => {
            const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
            if (!by) return;
            const next = tabs[(tabs.indexOf(event.currentTarget) + by + tabs.length) % tabs.length];
            next.focus();
            next.click();
          },
        },
        say(name),
      ),
    );
    this.commands = make("div.buttons");
    this.commandsFor = null;
    this.drawer = make("div.rows", { hidden: true, onkeydown: (event) => event.key === "Escape" && this.toggle(null) });
    this.element.replaceChildren(
      this.back(make("h2.grow", { title: runId }, runId), remove),
      make("div.row", {}, this.state),
      this.commands,
      this.drawer,
      make("div.tabs", { role: "tablist" }, tabs),
      this.body,
    );
    this.unwatch = [watch(runId, (run) => this.update(run))];
    this.fillTab();
  }

  turn(name, tabs) {
    this.tab = name;
    for (const each of tabs) each.setAttribute("aria-selected", String(each.textContent === say(name)));
    this.body.replaceChildren();
    this.drawn = null;
    this.fillTab();
    if (this.run) this.update(this.run);
  }

  update(run) {
    this.run = run;
    if (run.error) {
      this.state.textContent = run.error;
      return;
    }
    const now = run.now;
    const parts = [say(now.status ?? "waiting", { step: now.step }), `${now.step}/${now.target}`];
    if (RUNNING.includes(now.status)) parts.push(rate(now.perSecond), now.left > 0 ? say("left", { t: duration(now.left) }) : "");
    else if (now.message) parts.push(now.message);
    this.state.textContent = parts.filter(Boolean).join(" · ");
    this.state.title = this.state.textContent;
    this.showCommands(now);
    if (this.tab === "curves") this.plots?.([run]);
    if (this.tab === "samples") this.showSamples();
  }

  showCommands(now) {
    const active = now.mine && RUNNING.includes(now.status);
    const key = `${active} ${now.status}`;
    if (this.commandsFor === key) return;
    this.commandsFor = key;
    const node = CAN_GO_ON.includes(now.status) && nodeOf(this.run.summary.name);
    this.toggle(null);
    this.commands.hidden = !active && !node;
    if (node) this.commands.replaceChildren(button(say("go_on"), () => goOn(node, this.run.summary), { kind: "primary" }));
    if (!active) return;
    const more = button("⋯", () => this.toggle("more"), { tip: say("more"), kind: "small" });
    this.commands.replaceChildren(...commands.buttons(this.view, now.status, () => this.toggle("sample"), toast), more);
  }

  /** A row under the buttons: a prompt to draw, or a learning rate and Cancel. */
  toggle(kind) {
    const again = this.drawer.dataset.kind === kind;
    const inside = this.drawer.contains(document.activeElement);
    const done = () => this.toggle(null);
    this.drawer.hidden = !kind || again;
    this.drawer.dataset.kind = this.drawer.hidden ? "" : kind;
    if (this.drawer.hidden) {
      this.drawer.replaceChildren();
      if (inside) this.opener?.focus();
      return;
    }
    this.opener = document.activeElement;
    this.drawer.replaceChildren(
      ...[kind === "sample" ? commands.drawing(this.view, undefined, done) : commands.rest(this.run, done)].flat(),
    );
    this.drawer.querySelector("input")?.focus();
  }

  async fillTab() {
    const tab = this.tab;
    if (tab === "curves") {
      this.plots = plots(this.body, [FIRST]);
      if (this.run?.runId === this.view) this.plots([this.run]);
      return;
    }
    if (tab === "samples") return this.showSamples();
    try {
      const about = await ask("run", { run_id: this.view });
      if (this.tab !== tab || about.run_id !== this.view) return;
      this.body.replaceChildren(...{ checkpoints: () => this.checkpoints(about), data: () => data(about), settings: () => this.settings(about), log: () => log(about) }[tab]());
    } catch (error) {
      this.body.replaceChildren(make("div.error", { role: "alert" }, error.message));
    }
  }

  showSamples() {
    const samples = this.run?.runId === this.view ? this.run.samples : null;
    if (!samples) return;
    const key = samples.rows.length;
    if (this.drawn === key) return;
    this.drawn = key;
    this.body.replaceChildren(timeline(this.view, samples));
  }

  checkpoints(about) {
    const use = (name) => addLoader(name, about.full).then(() => toast(say("added"), "success"));
    const rows = about.checkpoints.toReversed().map(({ step, bytes: size, lora }) => {
      const publish = async () => use((await post("publish", { run_id: this.view, step })).lora_name);
      const remove = async () => {
        if (!(await confirmed(this.element, say("delete_checkpoint", { step }), say("delete")))) return;
        await post("delete-checkpoint", { run_id: this.view, step });
        this.fillTab();
      };
      const score = about.eval[step];
      return make(
        "tr",
        {},
        make("td.number", {}, String(step)),
        make("td.number", {}, bytes(size)),
        make("td.number", { title: say("eval") }, score === undefined ? "" : number(score, 3)),
        make("td", {}, make("div.row", {}, lora ? button(say("use"), publish) : null, lora ? saving(about.run_id, step) : null, button("", remove, { tip: say("delete"), icon: "trash" }))),
      );
    });
    const file = about.lora_name
      ? make(
          "div.row",
          {},
          make("span.grow", { title: about.lora_name }, about.lora_name),
          make("span.number.faint", {}, bytes(about.file.bytes)),
          button(say("use"), () => use(about.lora_name), { kind: "primary" }),
          button("", () => copy(about.lora_name), { tip: say("copy_name"), icon: "copy" }),
        )
      : null;
    if (!rows.length) return [file, make("div.empty", {}, say("no_checkpoints"))].filter(Boolean);
    const head = make("tr", {}, [say("step"), say("size"), say("eval"), ""].map(heading));
    return [file, make("table.table", {}, make("thead", {}, head), make("tbody", {}, rows))].filter(Boolean);
  }

  settings(about) {
    const rows = (entries) =>
      make("table.table", {}, entries.map(([name, value, before]) => make("tr", { title: before === undefined ? "" : `≠ ${written(before)}` }, make("td", {}, name), make("td", {}, written(value)))));
    const changed = Object.entries(about.changed).map(([name, [value, before]]) => [name, value, before]);
    const others = Object.entries(about.settings).filter(([name]) => !(name in about.changed));
    return [
      make(
        "div.row",
        {},
        button(say("to_node"), () => copySettings(about), { kind: "primary" }),
        button(say("export"), () => download(about.run_id), { tip: say("export_tip") }),
      ),
      make("h3", {}, say("changed")),
      changed.length ? rows(changed) : make("p.faint", {}, "–"),
      make("h3", {}, say("others")),
      rows(others),
    ];
  }

  async remove(runId) {
    if (!(await confirmed(this.element, say("delete_run", { name: runId }), say("delete")))) return;
    const { deleted } = await post("delete", { run_id: runId });
    toast(say("deleted", { names: deleted.join(", ") }), "success");
    this.list();
  }

  // Two runs.

  compare(first, second) {
    this.leave();
    this.view = "compare";
    const body = make("div.body");
    const show = plots(body, [FIRST, SECOND]);
    const samples = make("div");
    const differ = make("div");
    body.append(make("h3", {}, say("samples")), samples, make("h3", {}, say("differ")), differ);
    this.element.replaceChildren(this.back(make("h2.grow", {}, `${first} ↔ ${second}`)), body);
    const both = [null, null];
    this.unwatch = [first, second].map((runId, i) =>
      watch(runId, (run) => {
        both[i] = run;
        show(both.filter(Boolean), runId);
        const key = both.map((each) => each?.samples.rows.length).join();
        if (!both.every(Boolean) || samples.dataset.key === key) return;
        samples.dataset.key = key;
        samples.replaceChildren(sideBySide(...both));
      }),
    );
    Promise.all([first, second].map((runId) => ask("run", { run_id: runId })))
      .then(([a, b]) => differ.replaceChildren(differences(a, b)))
      .catch((error) => differ.replaceChildren(make("div.error", {}, error.message)));
  }
}

/** Of a column; one without a name heads nothing. */
const heading = (text) => (text ? make("th", { scope: "col" }, text) : make("td"));

const written = (value) => (typeof value === "object" && value !== null ? JSON.stringify(value) : String(value));

function differences(a, b) {
  const names = [...new Set([...Object.keys(a.settings), ...Object.keys(b.settings)])];
  const rows = names.filter((name) => written(a.settings[name]) !== written(b.settings[name]));
  if (!rows.length) return make("p.faint", {}, say("same"));
  const head = make("tr", {}, ["", a.run_id, b.run_id].map(heading));
  return make(
    "table.table",
    {},
    make("thead", {}, head),
    make("tbody", {}, rows.map((name) => make("tr", {}, [name, written(a.settings[name]), written(b.settings[name])].map((text) => make("td", {}, text))))),
  );
}

const saving = (runId, step) =>
  make(
    "a.button",
    { href: checkpointUrl(runId, step), download: "", title: say("download"), "aria-label": say("download") },
    make("i", { className: "pi pi-download", "aria-hidden": "true" }),
  );

/** What the run was trained on, and what it was not. */
function data({ data: about }) {
  if (!about.datasets.length) return [make("div.empty", {}, say("none"))];
  const titles = [say("dataset"), say("pictures"), say("passes"), say("buckets")];
  const rows = about.datasets.map((each) => [
    each.regularisation ? `${each.id} (${say("regularisation")})` : each.id,
    String(each.pictures),
    String(each.repeats + 1),
    each.sizes.join(", "),
  ]);
  const cells = (row) => row.map((text, i) => make(i === 1 || i === 2 ? "td.number" : "td", {}, text));
  const list = (title, sentences) => [
    make("h3", {}, `${title}: ${sentences.length}`),
    ...sentences.map((sentence) => make("p.sentence", {}, sentence)),
  ];
  return [
    make(
      "table.table",
      {},
      make("thead", {}, make("tr", {}, titles.map(heading))),
      make("tbody", {}, rows.map((row) => make("tr", {}, cells(row)))),
    ),
    ...list(say("left_out"), about.left_out),
    ...list(say("cut"), about.cut),
  ];
}

function log(about) {
  if (!about.log.length) return [make("div.empty", {}, say("none"))];
  const line = (event) => {
    const { event: name, time, text, message, step, path, lr, loss } = event;
    const said = text ?? message ?? [lr, loss].filter((each) => each !== undefined).map((each) => number(each)).join(" ");
    return make(
      "tr",
      {},
      make("td.number.faint", {}, new Date(time * 1000).toLocaleTimeString()),
      make("td.number", {}, step === undefined ? "" : String(step)),
      make("td", {}, [name === "Said" ? "" : name, said, path?.split("/").at(-1)].filter(Boolean).join(" · ")),
    );
  };
  return [make("table.table", {}, about.log.toReversed().map(line))];
}

/** Charts with their controls; gives what shows the curves of one or two runs. */
function plots(host, colours) {
  const options = { smoothing: 0.5, log: false, clip: true, byTime: false, ...JSON.parse(localStorage.getItem(SHOWN) ?? "{}") };
  let runs = [];
  const changed = () => {
    localStorage.setItem(SHOWN, JSON.stringify(options));
    draw();
  };
  const check = (key, text) =>
    make("label.row", {}, make("input", { type: "checkbox", checked: options[key], onchange: (event) => ((options[key] = event.target.checked), changed()) }), text);
  const slider = make("input", { type: "range", min: 0, max: 1, step: 0.05, value: options.smoothing, "aria-label": say("smoothing"), oninput: (event) => ((options.smoothing = Number(event.target.value)), changed()) });
  slider.style.flex = "1";
  const charts = Object.fromEntries(PLOTS.map((name) => [name, new Chart(say(name))]));
  const boxes = Object.fromEntries(
    PLOTS.map((name) => [name, make("div.plot", { "data-name": name }, make("p", {}, say(name), make("span.grow"), make("span")), charts[name].element)]),
  );
  host.replaceChildren(
    make("label.row", {}, say("smoothing"), slider),
    make("div.row", {}, check("log", say("log_scale")), check("clip", say("clip")), check("byTime", say("by_time"))),
    ...Object.values(boxes),
  );
  const draw = () => {
    for (const name of PLOTS) {
      const lines = runs.flatMap((run, i) =>
        linesOf(run.curves, name, {
          ...options,
          colours: colours[i] ?? FIRST,
          label: runs.length > 1 ? run.runId : "",
          forecast: run.forecast,
        }),
      );
      const known = lines.some((line) => line.ys.some((value) => Number.isFinite(value)));
      boxes[name].hidden = !known && name !== "loss";
      charts[name].show(lines, { ...options, log: options.log && ["loss", "grad_norm", "parts"].includes(name), clip: options.clip && name !== "lr" });
      const keys = lines.length > 1 ? lines.filter((line) => !line.dotted || runs.length === 1) : [];
      boxes[name].querySelector("p > span:last-child").replaceChildren(
        ...keys.map((line) => {
          const key = make("span.key", {}, ` ${line.label} `);
          key.style.setProperty("--key", line.colour.startsWith("--") ? `var(${line.colour})` : line.colour);
          return key;
        }),
      );
    }
  };
  return (shown) => {
    runs = shown;
    draw();
  };
}

async function quickStart() {
  const answer = await api.fetchApi(`/workflow_templates/${QUICK_START.pack}/${QUICK_START.name}.json`);
  await app.loadGraphData(await answer.json(), true, true, QUICK_START.name);
}
