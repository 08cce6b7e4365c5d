// What a run that goes on is told, by the panel and by the sidebar: a prompt to draw, another learning rate, the end.

import { button, field, make, toast } from "./elements.mjs";
import { cancel } from "./graph.mjs";
import { post } from "./runs.mjs";
import { number, say } from "./words.mjs";

const refused = (error) => toast(error.message, "error");

async function told(name, body, done) {
  await post(name, body);
  done?.();
  toast(say("asked"));
}

/** Stop and keep, pause or go on, save now; `ask` opens what a prompt is typed into. */
export function buttons(runId, status, ask, where = refused) {
  const paused = status === "paused";
  const send = (name) => () => told(name, { run_id: runId });
  return [
    button(say("stop"), () => post("stop", { run_id: runId }), { tip: say("stop_tip"), kind: "primary", where }),
    button(say(paused ? "resume" : "pause"), () => post(paused ? "resume" : "pause", { run_id: runId }), { where }),
    button(say("sample"), ask, { tip: say("sample_tip"), where }),
    button(say("save"), send("save"), { tip: say("save_tip"), where }),
  ];
}

/** A prompt to draw. `readable`: there is a text encoder to read it; undefined: not known. */
export function drawing(runId, readable, done) {
  const draw = () => told("sample", { run_id: runId, prompt: prompt.value }, done);
  const prompt = field(say("sample_prompt"), {
    placeholder: readable === false ? say("no_clip") : say("sample_prompt"),
    onenter: () => draw().catch(refused),
    onescape: done,
  });
  prompt.disabled = readable === false;
  return make("div.row", {}, prompt, button(say("draw"), draw, { kind: "primary" }));
}

/** Another learning rate, and Cancel. */
export function rest(run, done) {
  const set = () => told("learning-rate", { run_id: run.runId, rate: typed.value }, done);
  const rate = run.curves?.lr.findLast?.((value) => value !== null);
  const typed = field(say("rate"), {
    value: rate === undefined ? "" : number(rate),
    onenter: () => set().catch(refused),
    onescape: done,
  });
  return [
    make("label.row", {}, say("rate"), typed, button(say("set"), set)),
    make(
      "div.row",
      {},
      make("span.grow.faint", {}, say("others_wait")),
      button(say("cancel"), () => cancel(run.live?.node_id), { tip: say("cancel_tip"), kind: "danger" }),
    ),
  ];
}
