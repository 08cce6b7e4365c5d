// The live panel of a train node: state, loss, samples, what Run will do and need, and the buttons of the run.

import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { Chart, linesOf } from "./chart.mjs";
import * as commands from "./commands.mjs";
import { button, copy, make, style, toast } from "./elements.mjs";
import { addLoader, cancel, described, everyNode, goOn, idsOf, newestOf, run, setWidget, widgetOf } from "./graph.mjs";
import { label, mark } from "./labels.mjs";
import { strip } from "./pictures.mjs";
import { rows as presets } from "./presets.mjs";
import { post, watch } from "./runs.mjs";
import { bytes, duration, number, rate, say } from "./words.mjs";

const LOOK_MS = 700; // how often the widgets are looked at
const RUNNING = ["running", "paused"];
const ENDED = ["finished", "stopped", "interrupted", "failed", "trained"];
const COLOURS = ["--l2-line", "--l2-eval"];

/** Puts the panel into an element of a node; gives an object with `close`. */
export function mount(node, element) {
  return new Panel(node, element);
}

class Panel {
  constructor(node, element) {
    style();
    this.node = node;
    this.element = element;
    this.state = "idle";
    this.error = "";
    this.prompt = { waits: false, stepped: false }; // of the prompt that runs now
    this.preparing = null;
    this.build();
    this.listen();
    this.look();
    this.looking = setInterval(() => this.look(), LOOK_MS);
    this.find();
  }

  build() {
    this.dot = make("span.dot");
    this.title = make("span.grow", { role: "status", "aria-live": "polite" });
    this.numbers = make("span.number.faint");
    this.memory = make("button.memory", { type: "button", onclick: () => this.toggle("memory") });
    this.fill = make("div");
    this.line = make("span.grow");
    this.next = make("span.number.faint");
    this.chart = new Chart(say("loss"));
    this.empty = make("div.chart-empty", {}, say("idle_more"));
    this.chart.element.append(this.empty);
    this.pictures = make("div.strip");
    this.buttons = make("div.buttons");
    this.element.replaceChildren(
      this.memory,
      make("div.row.state", {}, this.dot, this.title, this.numbers),
      make("div.bar", {}, this.fill),
      make("div.row.line", {}, this.line, this.next),
      this.chart.element,
      this.pictures,
      this.buttons,
    );
    this.showForecast(null);
  }

  close() {
    clearInterval(this.looking);
    this.unwatch?.();
    for (const [name, listener] of this.listeners) api.removeEventListener(name, listener);
  }

  listen() {
    const mine = (id) => id !== undefined && idsOf(this.node).includes(String(id));
    const heard = {
      execution_start: () => {
        this.error = "";
        this.prompt = { waits: true, stepped: false };
        this.loads = false;
        mark(this.node, "");
        this.show();
      },
      "lumina2.run": ({ detail }) => {
        if (!mine(detail.node_id)) return;
        this.prompt = { waits: false, stepped: this.prompt.stepped || detail.status === "running" };
        this.preparing = null;
        this.follow(detail.run_id);
        this.show();
      },
      progress_state: ({ detail }) => this.prepare(detail.nodes ?? {}),
      executed: ({ detail }) => {
        const shown = detail.output?.lumina2?.[0];
        if (!shown || !(mine(detail.node) || mine(detail.display_node))) return;
        this.prompt = { waits: false, stepped: this.prompt.stepped, done: true };
        this.follow(shown.run_id);
        this.run?.askSoon(0);
        this.plannedFor = null;
      },
      execution_error: ({ detail }) => {
        this.end();
        if (!mine(detail.node_id)) return this.show();
        this.error = String(detail.exception_message ?? "").trim();
        mark(this.node, this.error);
        this.show();
      },
      execution_interrupted: () => this.end(),
      execution_success: () => this.end(),
    };
    this.listeners = Object.entries(heard);
    for (const [name, listener] of this.listeners) api.addEventListener(name, listener);
  }

  end() {
    this.prompt = { ...this.prompt, waits: false };
    this.preparing = null;
    this.plannedFor = null;
    this.run?.askSoon(300);
    this.show();
  }

  /** Nodes that prepare pictures and captions before this one runs. */
  prepare(nodes) {
    if (!this.prompt.waits) return;
    const running = Object.values(nodes).find((each) => each.state === "running");
    const id = String(running?.display_node_id ?? running?.node_id ?? "");
    const node = [...everyNode()].find(([other]) => other === id)?.[1];
    this.loads = node === this.node;
    const caches = /^Lumina2(Cache|LoadDataset|Dataset)/.test(node?.comfyClass ?? "");
    const now = Date.now();
    if (!caches) this.preparing = null;
    else if (this.preparing?.id !== id) this.preparing = { id, began: now, from: running.value };
    if (this.preparing) Object.assign(this.preparing, { done: running.value, all: running.max, now });
    this.show();
  }

  /** The run that this node's name has on disk: after a reload, in a second tab. */
  async find() {
    const name = widgetOf(this.node, "run_name")?.value;
    this.named = name;
    if (!name) return this.show();
    try {
      const found = await newestOf(name.trim());
      if (this.named !== name) return;
      if (found) this.follow(found.run_id);
      else this.forget();
    } catch (error) {
      this.forget();
      this.line.textContent = error.message;
    }
  }

  forget() {
    this.unwatch?.();
    this.unwatch = this.run = this.runId = null;
    this.show();
  }

  follow(runId) {
    if (this.runId === runId) return;
    this.unwatch?.();
    this.runId = runId;
    this.unwatch = watch(runId, (run) => {
      const ran = this.active;
      this.run = run;
      this.active = RUNNING.includes(run.now.status);
      if (ran !== this.active) this.plannedFor = null; // what Run would do is another matter then
      if (this.active && !ran) this.showPlan();
      else this.show();
    });
  }

  // What Run will do and need, asked for when the widgets have changed and come to rest.

  look() {
    if (!this.element.isConnected) return;
    const sent = described(this.node);
    const text = JSON.stringify(sent);
    const rests = text === this.lookedAt;
    this.lookedAt = text;
    if (!rests || text === this.plannedFor || this.planning) return;
    this.planning = true;
    this.plan(sent, text).finally(() => (this.planning = false));
  }

  async plan(sent, text) {
    this.plannedFor = text;
    if (widgetOf(this.node, "run_name")?.value !== this.named && !this.prompt.waits) this.find();
    try {
      this.planned = await post("plan", { node: sent });
      if (!this.error) mark(this.node, "");
    } catch (error) {
      this.planned = { does: "refused", why: error.message, over: {} };
      mark(this.node, error.message);
    }
    this.showPlan();
    if (RUNNING.includes(this.run?.now.status) && this.forecast) return; // the training needs the processor
    try {
      this.showForecast(await post("forecast", { node: sent }));
    } catch (error) {
      this.showForecast({ known: false, why: error.message });
    }
  }

  showPlan() {
    if (!this.planned) return;
    const { does, folder, step, why, over, differs } = this.planned;
    const words = {
      new: ["plan_new", {}],
      continues: ["plan_continues", { step }],
      trained: ["plan_trained", {}],
      kept: ["plan_kept", { step }],
      changed: ["plan_changed", { folder }],
      "from checkpoint": ["plan_from", {}],
      unknown: ["plan_unknown", {}],
    }[does];
    const text = words && !RUNNING.includes(this.run?.now.status) ? `≈ ${say(...words)}` : "";
    this.next.textContent = text;
    this.next.title = differs?.length ? differs.join(", ") : (why ?? "");
    label(this.node, "run_name", text);
    const widgets = ["steps", "learning_rate", "rank", "batch_size", "seed"];
    for (const name of widgets) {
      const widget = widgetOf(this.node, name);
      if (!widget) continue;
      const value = over?.[name];
      widget.disabled = value !== undefined;
      label(this.node, name, value === undefined ? "" : say("from_config", { value: number(value, 6) }));
    }
    this.node.setDirtyCanvas?.(true, true);
    this.show();
  }

  showForecast(found) {
    this.forecast = found;
    this.showMemory();
  }

  /** What is needed; while it trains, what is used of it. */
  showMemory() {
    const found = this.forecast;
    const known = found?.known;
    const used = RUNNING.includes(this.run?.now.status) ? this.run.curves?.memory.at(-1) : null;
    const said = { need: known ? bytes(found.total) : "", free: known ? bytes(found.free) : "", used: bytes(used ?? 0) };
    let text = say(known ? "needs" : found ? "needs_unknown" : "needs_wait", said);
    if (used) text = say(known ? "uses_of" : "uses", said);
    this.memory.textContent = `▸ ${text}`;
    this.memory.title = known ? say("forecast") : (found?.why ?? text);
    this.memory.dataset.fits = known && !used && found.total > found.free ? "no" : "yes";
    if (this.run && known && RUNNING.includes(this.run.now.status)) this.run.forecast = found.total;
  }

  // What is seen.

  get current() {
    const now = this.run?.now;
    if (this.error) return "failed";
    if (this.preparing) return "caching";
    if (this.prompt.waits && !(now?.mine && RUNNING.includes(now.status))) return this.loads ? "loading" : "waiting";
    if (!now?.status) return "idle";
    if (now.status === "running" && ["validating", "saving"].includes(now.doing)) return now.doing;
    if (this.prompt.done && !this.prompt.stepped && now.status === "finished") return "trained";
    return now.status;
  }

  show() {
    const state = this.current;
    const now = this.run?.now ?? {};
    const active = RUNNING.includes(now.status) && !ENDED.includes(state);
    this.dot.dataset.state = state;
    this.title.textContent = this.sentence(state, now);
    this.numbers.textContent = now.target && state !== "idle" ? `${now.step}/${now.target}` : "";
    const done = state === "caching" ? this.preparing.done / this.preparing.all : now.step / now.target;
    this.fill.style.width = `${state === "idle" ? 0 : Math.min(done || 0, 1) * 100}%`;
    this.line.textContent = this.detail(state, now);
    this.line.title = this.line.textContent;
    if (active) this.next.textContent = now.left > 0 ? say("left", { t: duration(now.left) }) : "";
    if (active) this.showMemory();
    const curves = this.run?.curves;
    this.chart.show(linesOf(curves, "loss", { colours: COLOURS }));
    this.empty.hidden = Boolean(curves?.step.length);
    this.empty.textContent = say(this.run ? "no_chart" : "idle_more");
    const shown = this.run ? strip(this.pictures, this.runId, this.run.samples) : 0;
    if (!shown) {
      this.pictures.dataset.key = "";
      const drawn = this.node.inputs?.some((input) => input.name === "vae" && input.link != null);
      const why = say(drawn ? "no_samples_yet" : "no_samples");
      if (this.pictures.textContent !== why) this.pictures.replaceChildren(make("span.faint", {}, why));
    }
    this.showError(state === "failed" ? this.error || now.message : "");
    this.showButtons(state, now, active);
  }

  sentence(state, now) {
    if (state === "caching") return say("caching", { done: this.preparing.done, all: this.preparing.all });
    if (state === "interrupted") return say("interrupted", { step: now.step });
    if (state === "running" && now.status === "running") return say("running");
    return say(state);
  }

  detail(state, now) {
    if (state === "waiting" || state === "idle") {
      if (this.planned?.does === "refused") return this.planned.why;
      const rate = this.planned?.over?.learning_rate ?? widgetOf(this.node, "learning_rate")?.value;
      return rate ? `${say("lr")} ${number(rate)}` : ""; // Nodes 2.0 of 2025 writes 0.0001 as 0
    }
    if (state === "caching") {
      const { began, now: at, done, all, from } = this.preparing;
      const left = done > from ? ((at - began) / 1000 / (done - from)) * (all - done) : undefined;
      return [say("encoding"), left > 0 ? say("left", { t: duration(left) }) : ""].filter(Boolean).join(" · ");
    }
    if (["finished", "trained", "stopped"].includes(state)) {
      const folder = this.run?.summary?.full ? "diffusion_models" : "loras";
      return `models/${folder}/lumina2/${this.runId}.safetensors`;
    }
    const parts = [`${say("loss")} ${number(now.loss)}`];
    if (now.epoch) parts.push(say("epoch", { n: now.epoch.toFixed(1) }));
    if (RUNNING.includes(now.status) && now.perSecond) parts.push(rate(now.perSecond));
    return parts.join(" · ");
  }

  showError(sentence) {
    if (this.sentenceShown === sentence) return;
    this.sentenceShown = sentence;
    this.errorBox?.remove();
    this.errorBox = sentence ? make("div.error", { role: "alert" }, sentence) : null;
    if (this.errorBox) this.element.append(this.errorBox);
  }

  showButtons(state, now, active) {
    const key = [state === "failed", active, now.mine, state, this.error].join();
    if (this.buttonsFor === key) return;
    this.buttonsFor = key;
    this.toggle(null);
    const where = (sentence) => toast(sentence, "error");
    const open = button("", () => this.open(), { tip: say("open"), kind: "small", icon: "external-link", where });
    let shown = [];
    const preset = (kind) => button(kind ? "" : say("presets"), () => this.toggle("presets"), { tip: say("presets_tip"), kind, icon: kind && "sliders-h", where });
    if (active && now.mine) {
      const more = button("⋯", () => this.toggle("more"), { tip: say("more"), kind: "small", where });
      shown = [...commands.buttons(this.runId, now.status, () => this.toggle("sample"), where), more];
    } else if (["waiting", "caching", "loading"].includes(state)) {
      shown = [button(say("cancel"), () => cancel(...idsOf(this.node)), { tip: say("cancel_tip"), where })];
    } else if (state === "idle") {
      shown = [preset()];
    } else if (this.run && ENDED.includes(state)) {
      const file = `lumina2/${this.runId}.safetensors`;
      const full = this.run.summary?.full;
      const loader = () => addLoader(file, full, this.node).then(() => toast(say("added"), "success"));
      const trained = ["finished", "trained", "stopped"].includes(state);
      shown = [
        ["stopped", "interrupted", "failed"].includes(state)
          ? button(say("go_on"), () => goOn(this.node, this.run.summary), { kind: "primary", where })
          : null,
        state === "failed" ? button(say("copy"), () => copy(this.sentenceShown), { where }) : null,
        trained
          ? button(say("add_loader"), loader, {
              tip: say("add_loader_tip"),
              kind: state === "stopped" ? undefined : "primary",
              where,
            })
          : null,
        trained ? button("", () => copy(file), { tip: say("copy_name"), kind: "small", icon: "copy", where }) : null,
        button("", () => this.startOver(), { tip: `${say("again")}: ${say("again_tip")}`, kind: "small", icon: "replay", where }),
        preset("small"),
      ].filter(Boolean);
    } else if (state === "failed") shown = [button(say("copy"), () => copy(this.error), { where })];
    this.buttons.replaceChildren(...shown, open);
  }

  async startOver() {
    setWidget(this.node, "attempt", (widgetOf(this.node, "attempt")?.value ?? 0) + 1);
    await run();
  }

  async open() {
    const { show } = await import("./sidebar.mjs");
    show(this.runId);
  }

  /** A drawer over the samples: what memory goes to, presets, a prompt to draw, or the rest of the buttons. */
  async toggle(kind) {
    const again = this.drawer?.dataset.kind === kind;
    const inside = this.drawer?.contains(document.activeElement);
    const opening = (this.opening = {}); // another one may be asked for before this one's rows are there
    this.drawer?.remove();
    this.drawer = null;
    if (inside) this.opener?.focus();
    if (!kind || again) return;
    const done = () => this.toggle(null);
    const clip = this.node.inputs?.find((input) => input.name === "clip");
    const drawers = {
      memory: () => this.savings(),
      presets: () => presets(this.node, done),
      sample: () => commands.drawing(this.runId, clip && clip.link != null, done),
      more: () => commands.rest(this.run, done),
    };
    this.opener = document.activeElement;
    const rows = await drawers[kind]();
    if (this.opening !== opening) return;
    const close = (event) => event.key === "Escape" && done();
    this.drawer = make("div.drawer", { "data-kind": kind, role: "group", tabIndex: -1, onkeydown: close }, rows);
    this.element.append(this.drawer);
    (this.drawer.querySelector("input:enabled, button") ?? this.drawer).focus();
  }

  savings() {
    const found = this.forecast;
    if (!found?.known) return make("div", {}, found?.why ?? say("needs_wait"));
    const row = (name, size) => make("tr", {}, make("td", {}, name), make("td.number", {}, bytes(size)));
    const parts = Object.entries(found.parts).filter(([, size]) => size);
    const saved = Object.entries(found.savings);
    return make(
      "table.table",
      {},
      parts.map(([name, size]) => row(name, size)),
      make("tr", {}, make("th", { colSpan: 2 }, saved.length ? `${say("saves")}:` : say("fits"))),
      saved.map(([name, size]) => row(name, size)),
    );
  }
}
