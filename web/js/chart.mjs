// A line chart on a canvas: the raw values' range faint, the smoothed line bold, evaluations dotted. Values under the
// pointer are read out; colours are the page's own.

import { make } from "./elements.mjs";
import { duration, number, say } from "./words.mjs";

const LEFT = 46;
const RIGHT = 8;
const TOP = 8;
const BOTTOM = 17;
const OUTLIERS = 0.02; // of the values at either end that a clipped axis leaves out

/** Exponential mean whose reach is a share of the run, whatever the distance between points; gaps stay gaps. */
export function smoothed(xs, ys, smoothing) {
  const reach = smoothing ** 2 * 0.25 * (xs.at(-1) - xs[0]);
  if (!(reach > 0)) return ys;
  let mean = 0;
  let weight = 0;
  let before = xs[0];
  return ys.map((value, i) => {
    if (value === null || value === undefined) return null;
    const keep = Math.exp(-(xs[i] - before) / reach);
    const own = i ? 1 - Math.exp(-(xs[i] - xs[i - 1]) / reach) : 1e-3;
    mean = mean * keep + value * own;
    weight = weight * keep + own;
    before = xs[i];
    return weight ? mean / weight : value;
  });
}

/** A run's curves as lines of a chart. `name`: loss, grad_norm, lr, speed, memory or parts. */
export function linesOf(curves, name, { smoothing = 0.5, byTime = false, colours, label = "", forecast }) {
  if (!curves?.step.length) return [];
  const began = curves.time.find((time) => time !== null) ?? 0;
  const xs = byTime ? curves.time.map((time) => time - began) : curves.step;
  if (name === "loss" || name === "grad_norm") {
    const { min, max, mean } = curves[name];
    const line = { xs, ys: smoothed(xs, mean, smoothing), min, max, colour: colours[0], label: label || say(name) };
    if (name !== "loss" || !curves.eval.step.length || byTime) return [line];
    return [line, { xs: curves.eval.step, ys: curves.eval.loss, dotted: true, colour: colours[1], label: say("eval") }];
  }
  if (name === "parts")
    return Object.entries(curves.parts).map(([part, ys], i) => ({
      xs,
      ys: smoothed(xs, ys, smoothing),
      colour: `hsl(${(i * 67 + 210) % 360} 70% 55%)`,
      label: part,
    }));
  const ys = name === "memory" ? curves.memory.map((size) => (size === null ? null : size / 1e9)) : curves[name];
  const line = { xs, ys, colour: colours[0], label: label || say(name) };
  if (name !== "memory" || !forecast) return [line];
  const ends = [xs[0], xs.at(-1)];
  return [line, { xs: ends, ys: ends.map(() => forecast / 1e9), dotted: true, colour: colours[1], label: say("forecast") }];
}

const finite = (values) => values.filter((value) => Number.isFinite(value));

function ticks(low, high, most) {
  const span = high - low || Math.abs(high) || 1;
  const rough = span / most;
  const power = 10 ** Math.floor(Math.log10(rough));
  const unit = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= rough);
  const found = [];
  for (let at = Math.ceil(low / unit) * unit; at <= high + unit * 1e-9; at += unit) found.push(Math.abs(at) < unit * 1e-9 ? 0 : at);
  return found;
}

/** Short enough for the room beside an axis. */
const tick = (value) => (value && Math.abs(value) < 0.01 ? value.toExponential(2).replace(/\.?0+e/, "e") : number(value, 3));

function range(lines, clip, log) {
  let all = lines.flatMap((line) => finite([...line.ys, ...(line.min ?? []), ...(line.max ?? [])]));
  if (log) all = all.filter((value) => value > 0);
  if (!all.length) return [0, 1];
  all.sort((a, b) => a - b);
  const drop = clip ? Math.floor(all.length * OUTLIERS) : 0;
  let [low, high] = [all[drop], all[all.length - 1 - drop]];
  for (const line of lines) for (const y of finite(line.ys)) if (clip && !line.min) [low, high] = [Math.min(low, y), Math.max(high, y)];
  if (log) return [low, high > low ? high : low * 2];
  const room = Math.max((high - low) * 0.06, Math.abs(high) * 0.01) || 1; // what hardly changes is a flat line
  return [low - room, high + room];
}

export class Chart {
  constructor(label, { ontip } = {}) {
    this.canvas = make("canvas", { role: "img", "aria-label": label });
    this.element = make("div.chart", {}, this.canvas);
    this.lines = [];
    this.options = {};
    this.pointer = null;
    this.ontip = ontip;
    this.label = label;
    new ResizeObserver(() => this.draw()).observe(this.element);
    this.canvas.addEventListener("pointermove", (event) => {
      const box = this.canvas.getBoundingClientRect();
      this.pointer = ((event.clientX - box.left) / box.width) * this.canvas.clientWidth;
      this.draw();
    });
    this.canvas.addEventListener("pointerleave", () => {
      this.pointer = null;
      this.draw();
    });
  }

  /** `lines`: {xs, ys, colour, label, min, max, dotted}. `options`: log, clip, byTime. */
  show(lines, options = {}) {
    this.lines = lines;
    this.options = options;
    const said = lines.map((line) => `${line.label} ${number(finite(line.ys).at(-1))}`);
    this.canvas.setAttribute("aria-label", `${this.label}: ${said.join(", ")}`);
    this.draw();
  }

  draw() {
    const [width, height] = [this.canvas.clientWidth, this.canvas.clientHeight];
    if (!width || !height) return;
    const sharp = Math.max(2, window.devicePixelRatio); // the page may be zoomed in
    this.canvas.width = width * sharp;
    this.canvas.height = height * sharp;
    const on = this.canvas.getContext("2d");
    on.scale(sharp, sharp);
    const lines = this.lines.filter((line) => line.xs.length);
    if (!lines.length) return;
    const style = getComputedStyle(this.element);
    const ink = style.getPropertyValue("--l2-faint") || "#999";
    const { log, clip, byTime } = this.options;
    const xs = lines.flatMap((line) => [line.xs[0], line.xs.at(-1)]);
    const [x0, x1] = [Math.min(...xs), Math.max(...xs)];
    const [y0, y1] = range(lines, clip, log);
    const x = (value) => LEFT + ((value - x0) / (x1 - x0 || 1)) * (width - LEFT - RIGHT);
    const scale = log ? Math.log : (value) => value;
    const y = (value) =>
      height - BOTTOM - ((scale(value) - scale(y0)) / (scale(y1) - scale(y0) || 1)) * (height - TOP - BOTTOM);
    const spell = byTime ? (value) => duration(value) : (value) => number(value, 6);

    on.font = `10px ${style.fontFamily}`;
    on.fillStyle = ink;
    on.strokeStyle = ink;
    on.lineWidth = 1;
    on.textAlign = "right";
    on.textBaseline = "middle";
    const levels = log ? ticks(Math.log10(y0), Math.log10(y1), 3).map((power) => 10 ** power) : ticks(y0, y1, Math.max(2, Math.round(height / 32)));
    for (const level of levels) {
      on.globalAlpha = 0.18;
      on.beginPath();
      on.moveTo(LEFT, Math.round(y(level)) + 0.5);
      on.lineTo(width - RIGHT, Math.round(y(level)) + 0.5);
      on.stroke();
      on.globalAlpha = 1;
      on.fillText(tick(level), LEFT - 4, y(level));
    }
    on.textBaseline = "alphabetic";
    for (const [value, align] of [[x0, "left"], [x1, "right"]]) {
      on.textAlign = align;
      on.fillText(spell(value), x(value), height - 4);
    }

    on.save();
    on.beginPath();
    on.rect(LEFT, 0, width - LEFT - RIGHT + 1, height - BOTTOM + 1);
    on.clip();
    const colour = (line) => (line.colour.startsWith("--") ? style.getPropertyValue(line.colour) : line.colour);
    for (const line of lines) {
      on.strokeStyle = on.fillStyle = colour(line);
      if (line.min) this.band(on, line, x, y);
      this.line(on, line, x, y);
    }
    on.restore();
    if (this.pointer !== null) this.read(on, lines, { x, y, width, height, ink, colour, spell });
  }

  band(on, line, x, y) {
    on.globalAlpha = 0.45;
    on.lineWidth = 1;
    on.beginPath();
    let down = false;
    line.xs.forEach((at, i) => {
      const [low, high] = [line.min[i], line.max[i]];
      if (low === null || low === undefined) return (down = false);
      if (down) on.lineTo(x(at), y(low));
      else on.moveTo(x(at), y(low));
      if (high !== low) on.lineTo(x(at), y(high));
      down = true;
    });
    on.stroke();
    on.globalAlpha = 1;
  }

  line(on, line, x, y) {
    on.lineWidth = line.dotted ? 1.5 : 2;
    on.lineJoin = "round";
    on.setLineDash(line.dotted ? [2, 3] : []);
    on.beginPath();
    let down = false;
    line.xs.forEach((at, i) => {
      const value = line.ys[i];
      if (!Number.isFinite(value)) return (down = false);
      if (down) on.lineTo(x(at), y(value));
      else on.moveTo(x(at), y(value));
      down = true;
    });
    on.stroke();
    on.setLineDash([]);
    if (line.dotted || finite(line.ys).length === 1)
      line.xs.forEach((at, i) => {
        if (!Number.isFinite(line.ys[i])) return;
        on.beginPath();
        on.arc(x(at), y(line.ys[i]), 2.5, 0, 7);
        on.fill();
      });
  }

  read(on, lines, { x, y, width, height, ink, colour, spell }) {
    const nearest = (line) => {
      let best = 0;
      line.xs.forEach((at, i) => Math.abs(x(at) - this.pointer) < Math.abs(x(line.xs[best]) - this.pointer) && (best = i));
      return best;
    };
    const at = lines[0].xs[nearest(lines[0])];
    on.strokeStyle = ink;
    on.lineWidth = 1;
    on.beginPath();
    on.moveTo(x(at), TOP);
    on.lineTo(x(at), height - BOTTOM);
    on.stroke();
    const rows = [[spell(at), ink]];
    for (const line of lines) {
      const i = nearest(line);
      if (!Number.isFinite(line.ys[i])) continue;
      rows.push([`${line.label} ${number(line.ys[i])}`, colour(line)]);
      on.fillStyle = colour(line);
      on.beginPath();
      on.arc(x(line.xs[i]), y(line.ys[i]), 3, 0, 7);
      on.fill();
    }
    const wide = Math.max(...rows.map(([text]) => on.measureText(text).width)) + 12;
    const left = x(at) + 8 + wide > width ? x(at) - 8 - wide : x(at) + 8;
    on.fillStyle = getComputedStyle(this.element).getPropertyValue("--l2-back") || "#333";
    on.globalAlpha = 0.92;
    on.fillRect(left, TOP, wide, rows.length * 13 + 6);
    on.globalAlpha = 1;
    on.textAlign = "left";
    rows.forEach(([text, paint], i) => {
      on.fillStyle = paint;
      on.fillText(text, left + 6, TOP + 14 + i * 13);
    });
  }
}
