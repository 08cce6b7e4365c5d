// What the page knows of runs: asked for from the server, which reads it from the runs' folders, so that a reload and a
// second tab show the same. Messages of a running training only say when to ask.

import { api } from "../../../scripts/api.js";
import { say } from "./words.mjs";

const ASK_AGAIN_MS = 1000; // at most, while messages arrive
const UNHEARD_MS = 3000; // between questions while a run goes on elsewhere
const MOST_POINTS = 2000; // a curve that grew longer is asked for anew, and comes in fewer points

async function answered(path, options) {
  let answer;
  try {
    answer = await api.fetchApi(`/lumina2/${path}`, options);
  } catch (error) {
    throw new Error(say("no_server", { why: error.message }));
  }
  const content = await answer.json().catch(() => ({ error: say("no_server", { why: answer.status }) }));
  if (content.error) throw new Error(content.error);
  return content;
}

/** Asks; raises an Error with the server's sentence. */
export const ask = (name, query = {}) => answered(`${name}?${new URLSearchParams(query)}`);

/** Asks with a body, or changes something; raises an Error with the server's sentence. */
export const post = (name, body) =>
  answered(name, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });

export function pictureUrl(runId, path, size) {
  const query = new URLSearchParams({ run_id: runId, path });
  if (size) query.set("size", size);
  return api.apiURL(`/lumina2/sample?${query}`);
}

export const checkpointUrl = (runId, step) =>
  api.apiURL(`/lumina2/checkpoint?${new URLSearchParams({ run_id: runId, step })}`);

const SPREAD = ["loss", "grad_norm"];
const PLAIN = ["step", "time", "speed", "lr", "memory"];

function cut(curves, behind) {
  const keep = curves.step.filter((step) => step <= behind).length;
  for (const name of PLAIN) curves[name].length = keep;
  for (const name of SPREAD) for (const kind of ["min", "max", "mean"]) curves[name][kind].length = keep;
  for (const values of Object.values(curves.parts)) values.length = Math.min(values.length, keep);
  const evals = curves.eval.step.filter((step) => step <= behind).length;
  curves.eval.step.length = curves.eval.loss.length = evals;
}

function extend(curves, more) {
  if (more.from !== null) cut(curves, more.from);
  const [step, time] = [curves.step.at(-1), curves.time.at(-1)];
  if (more.step.length && step !== undefined && more.time[0] > time) // only here it is known what came before
    more.speed[0] = (more.step[0] - step) / (more.time[0] - time);
  for (const name of Object.keys(more.parts)) curves.parts[name] ??= curves.step.map(() => null);
  for (const [name, values] of Object.entries(curves.parts))
    values.push(...(more.parts[name] ?? more.step.map(() => null)));
  for (const name of PLAIN) curves[name].push(...more[name]);
  for (const name of SPREAD) for (const kind of ["min", "max", "mean"]) curves[name][kind].push(...more[name][kind]);
  curves.eval.step.push(...more.eval.step);
  curves.eval.loss.push(...more.eval.loss);
  curves.next = more.next;
}

/** One run, kept up to date for as long as somebody watches it. */
class Watched {
  constructor(runId) {
    this.runId = runId;
    this.summary = null;
    this.curves = null;
    this.samples = { prompts: [], rows: [] };
    this.live = null; // the last message
    this.forecast = null; // bytes that a panel's forecast says it needs
    this.error = null;
    this.watchers = new Set();
    this.timer = null;
    this.asking = false;
  }

  tell() {
    for (const watcher of this.watchers) watcher(this);
  }

  hear(message) {
    this.live = message;
    this.heardAt = Date.now();
    this.tell();
    const drawn = message.events?.includes("Validated");
    this.askSoon(message.status === "running" ? ASK_AGAIN_MS : 150, drawn);
  }

  askSoon(after, samples = false) {
    this.samplesToo ||= samples;
    this.timer ??= setTimeout(() => {
      this.timer = null;
      this.ask();
    }, after);
  }

  async ask() {
    if (this.asking) return this.askSoon(ASK_AGAIN_MS);
    this.asking = true;
    const query = { run_id: this.runId };
    try {
      const after = this.curves && this.curves.step.length < MOST_POINTS ? this.curves.next : 0;
      const [summary, curves] = await Promise.all([ask("summary", query), ask("curves", { ...query, after })]);
      const drawn = summary.samples !== this.summary?.samples || this.samplesToo;
      this.samplesToo = false;
      if (drawn) this.samples = await ask("samples", query);
      this.summary = summary;
      if (after && curves.next >= after) extend(this.curves, curves);
      else this.curves = curves;
      this.error = null;
    } catch (error) {
      this.error = error.message;
    }
    this.asking = false;
    this.tell();
    if (!this.watchers.size) return;
    const runs = ["running", "paused"].includes(this.summary?.status);
    if (runs && !this.error) this.askSoon(UNHEARD_MS);
  }

  /** What is shown of its progress: the newest of message and answer. */
  get now() {
    const live = this.live && Date.now() - this.heardAt < 10000 ? this.live : null;
    const known = this.summary ?? {};
    const curves = this.curves;
    const last = curves?.speed.findLast?.((value) => value !== null);
    const status = live && live.status !== "waiting" ? live.status : known.status;
    const step = live?.step ?? known.step;
    const target = live?.target ?? known.target;
    const perSecond = live?.steps_per_second ?? last;
    return {
      status: status === "running" && live?.doing === "paused" ? "paused" : status,
      doing: live?.doing,
      step,
      target,
      loss: live?.loss ?? known.loss,
      perSecond,
      left: live?.seconds_left ?? (perSecond ? (target - step) / perSecond : undefined),
      epoch: live?.epoch,
      message: known.message ?? "",
      mine: known.mine || Boolean(live && ["running", "paused"].includes(live.status)),
    };
  }
}

const watched = new Map();

/** Calls `watcher` with the run whenever something changed; gives a function that ends it. */
export function watch(runId, watcher) {
  if (!watched.has(runId)) watched.set(runId, new Watched(runId));
  const run = watched.get(runId);
  run.watchers.add(watcher);
  run.askSoon(0);
  if (run.summary) watcher(run);
  return () => {
    run.watchers.delete(watcher);
    if (run.watchers.size) return;
    clearTimeout(run.timer);
    watched.delete(runId);
  };
}

api.addEventListener("lumina2.run", ({ detail }) => watched.get(detail.run_id)?.hear(detail));
