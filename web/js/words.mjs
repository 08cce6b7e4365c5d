// Everything that the panel and the sidebar say, in English and Chinese, and how numbers are written.

import { app } from "../../../scripts/app.js";

const WORDS = {
  waiting: ["Waiting for its turn", "等待运行"],
  caching: ["Preparing {done}/{all}", "正在准备 {done}/{all}"],
  encoding: ["Preparing pictures and captions", "正在准备图片和标注文本"],
  running: ["Training", "训练中"],
  others_wait: ["Other prompts wait until training ends", "其他任务要等训练结束"],
  paused: ["Paused", "已暂停"],
  validating: ["Drawing samples", "正在生成验证样图"],
  saving: ["Saving", "正在保存"],
  loading: ["Loading the model", "正在载入模型"],
  stopped: ["Stopped and kept", "已停止并保留"],
  interrupted: ["Interrupted; Run goes on from step {step}", "已中断；再次运行将从第 {step} 步继续"],
  finished: ["Finished", "已完成"],
  trained: ["Already trained: nothing to do", "已训练过：无需再训练"],
  failed: ["Failed", "失败"],
  idle: ["Not trained yet", "尚未训练"],
  idle_more: ["Press Run: the loss and the samples appear here", "点击“运行”：损失曲线和样图将显示在这里"],
  no_samples: ["Samples appear here when a VAE is wired in", "接入 VAE 后，样图将显示在这里"],
  no_samples_yet: [
    "No samples yet: press Sample now, or wire Validation Settings in",
    "还没有样图：点击“立即出图”，或接入验证设置",
  ],
  no_chart: ["No steps yet", "还没有训练步"],

  stop: ["Stop & keep", "停止并保留"],
  stop_tip: ["End after this step; the graph goes on with what was trained", "在本步后结束，工作流使用已训练的结果继续"],
  pause: ["Pause", "暂停"],
  resume: ["Go on", "恢复"],
  sample: ["Sample now", "立即出图"],
  sample_tip: ["Draw samples of this moment", "用当前权重生成样图"],
  sample_prompt: ["Prompt; empty: those of the settings", "提示词；留空则使用设置中的提示词"],
  no_clip: ["Wire a CLIP into the node to type a prompt", "将 CLIP 接入节点后可输入提示词"],
  draw: ["Draw", "生成"],
  save: ["Save now", "立即保存"],
  save_tip: ["A checkpoint, and a LoRA of this step", "保存检查点和当前步的 LoRA"],
  more: ["More", "更多"],
  cancel: ["Cancel", "取消"],
  cancel_tip: ["End this prompt; a checkpoint is kept", "结束本次任务，并保留检查点"],
  rate: ["Learning rate", "学习率"],
  set: ["Set", "设定"],
  go_on: ["Continue training", "继续训练"],
  again: ["Start over", "重新训练"],
  again_tip: ["Train the same settings once more, as a run of its own", "用相同设置再训练一次，作为新的训练任务"],
  add_loader: ["Add LoRA loader", "添加 LoRA 加载器"],
  add_loader_tip: ["Puts a LoRA loader with this file beside the node", "在节点旁添加已选好此文件的 LoRA 加载器"],
  copy_name: ["Copy name", "复制名称"],
  copy: ["Copy", "复制"],
  copied: ["Copied", "已复制"],
  open: ["Open in the sidebar", "在侧边栏中打开"],
  asked: ["Asked for; it happens before the next step", "已发送，将在下一步之前执行"],

  needs: ["Needs ≈ {need} ({free} free)", "约需 {need}（可用 {free}）"],
  uses: ["Uses {used}", "已用 {used}"],
  uses_of: ["Uses {used} (forecast {need})", "已用 {used}（预估 {need}）"],
  needs_unknown: ["Memory: run once to know", "显存：运行一次后可知"],
  needs_wait: ["Memory: being worked out…", "显存：正在估算…"],
  saves: ["would save", "可节省"],
  fits: ["Nothing more to save", "没有更多可节省的选项"],
  forecast: ["Memory forecast", "显存预估"],
  plan_new: ["new", "新任务"],
  plan_continues: ["continues at {step}", "从第 {step} 步继续"],
  plan_trained: ["already trained", "已训练过"],
  plan_kept: ["kept at {step}", "已保留在第 {step} 步"],
  plan_changed: ["settings changed: will be {folder}", "设置已更改：将保存为 {folder}"],
  plan_from: ["from a checkpoint", "从检查点开始"],
  plan_unknown: ["run once to know", "运行一次后可知"],
  presets: ["Presets", "预设"],
  presets_tip: ["Values for a size of memory, or for what is to be learnt", "按显存大小或训练目标选用一组参数"],
  preset_memory: ["GPU memory", "显存"],
  preset_subject: ["To be learnt", "训练目标"],
  preset_set: ["{name}: {values}", "{name}：{values}"],
  style: ["Style", "风格"],
  character: ["Character", "角色"],
  concept: ["Concept", "概念"],
  from_config: ["from config: {value}", "来自配置：{value}"],

  step: ["step", "步"],
  steps: ["steps", "步"],
  epoch: ["epoch {n}", "第 {n} 轮"],
  its: ["{n} it/s", "{n} 步/秒"],
  s_it: ["{n} s/it", "{n} 秒/步"],
  left: ["{t} left", "剩余 {t}"],
  loss: ["loss", "损失"],
  eval: ["held-out loss", "验证损失"],
  lr: ["learning rate", "学习率"],
  grad_norm: ["gradient norm", "梯度范数"],
  speed: ["steps per second", "每秒步数"],
  memory: ["memory (GB)", "显存（GB）"],
  parts: ["loss by part", "分项损失"],
  before: ["base", "底模"],
  before_after: ["Before | after", "训练前 | 训练后"],
  score: ["CLIP {n}", "CLIP {n}"],

  counts: ["pictures: {pictures} · buckets: {buckets}", "图片：{pictures} · 分桶：{buckets}"],
  problems: ["problems: {n}", "问题：{n}"],
  enlarged: [
    "{n} pictures are smaller than the resolution and are enlarged. Choose a lower resolution, or larger pictures.",
    "{n} 张图片小于训练分辨率，会被放大。请降低分辨率，或使用更大的图片。",
  ],

  runs: ["Lumina2 runs", "Lumina2 训练任务"],
  data: ["Data", "数据"],
  dataset: ["dataset", "数据集"],
  pictures: ["pictures", "图片"],
  passes: ["passes", "遍数"],
  buckets: ["buckets", "分桶"],
  regularisation: ["regularisation data", "正则化数据"],
  left_out: ["Left out", "未使用"],
  cut: ["Captions that were cut", "被截断的标注文本"],
  download: ["Download", "下载"],
  export: ["Export for SimpleTuner", "导出为 SimpleTuner 配置"],
  export_tip: ["The settings as a config.json", "将设置保存为 config.json"],
  search: ["Search", "搜索"],
  compare: ["Compare", "比较"],
  compare_two: ["Choose two runs to compare", "选择两个训练任务进行比较"],
  no_runs: ["No training runs yet", "还没有训练任务"],
  no_runs_more: [
    "The quick start trains a small model on this machine in about a minute.",
    "快速入门会在本机上用约一分钟训练一个小模型。",
  ],
  quick_start: ["Open the quick start", "打开快速入门"],
  no_match: ["No run has this name", "没有同名的训练任务"],
  back: ["All runs", "全部任务"],
  curves: ["Curves", "曲线"],
  samples: ["Samples", "样图"],
  checkpoints: ["Checkpoints", "检查点"],
  settings: ["Settings", "设置"],
  log: ["Log", "日志"],
  smoothing: ["Smoothing", "平滑"],
  log_scale: ["Log", "对数"],
  clip: ["Clip outliers", "裁剪离群值"],
  by_time: ["By time", "按时间"],
  size: ["size", "大小"],
  use: ["Use in graph", "用于工作流"],
  delete: ["Delete", "删除"],
  delete_run: [
    "Delete the training run {name}? Its folder with all checkpoints and samples goes, and its LoRA files.",
    "删除训练任务 {name}？其文件夹（含全部检查点和样图）以及它的 LoRA 文件都会被删除。",
  ],
  delete_checkpoint: ["Delete the checkpoint of step {step}?", "删除第 {step} 步的检查点？"],
  keep: ["Keep it", "保留"],
  deleted: ["Deleted: {names}", "已删除：{names}"],
  no_checkpoints: ["No checkpoints: one is written every some hundred steps and at the end", "没有检查点：训练中每隔数百步及结束时各保存一个"],
  changed: ["Different from the defaults", "与默认值不同"],
  others: ["All others", "其他设置"],
  to_node: ["Copy to a new node", "复制到新节点"],
  differ: ["Settings that differ", "不同的设置"],
  same: ["All settings are the same", "所有设置都相同"],
  none: ["Nothing here yet", "暂无内容"],
  just_now: ["just now", "刚刚"],
  minutes_ago: ["{n} min ago", "{n} 分钟前"],
  hours_ago: ["{n} h ago", "{n} 小时前"],
  days_ago: ["{n} d ago", "{n} 天前"],
  close: ["Close", "关闭"],
  previous: ["Previous", "上一张"],
  next: ["Next", "下一张"],
  full_size: ["Show in full size", "查看原图"],
  no_server: ["The server does not answer: {why}", "服务器没有响应：{why}"],
  added: ["Added to the graph", "已添加到工作流"],
  now_asked: ["asked for", "手动"],
};

const chinese = () => String(app.extensionManager.setting.get("Comfy.Locale") ?? "en").startsWith("zh");

/** A text in the page's language, with what stands in {braces} filled in. */
export function say(key, values = {}) {
  const text = WORDS[key]?.[chinese() ? 1 : 0] ?? key;
  return text.replace(/\{(\w+)\}/g, (_, name) => values[name] ?? "");
}

export function duration(seconds) {
  if (!Number.isFinite(seconds)) return "";
  const zh = chinese();
  const [s, min, h] = zh ? ["秒", "分", "小时"] : ["s", "min", "h"];
  const join = zh ? "" : " ";
  const minutes = Math.round(seconds / 60);
  if (seconds < 90) return `${Math.max(Math.round(seconds), 0)}${join}${s}`;
  if (minutes < 90) return `${minutes}${join}${min}`;
  return `${Math.floor(minutes / 60)}${join}${h} ${minutes % 60}${join}${min}`;
}

export function ago(seconds) {
  if (seconds < 90) return say("just_now");
  if (seconds < 5400) return say("minutes_ago", { n: Math.round(seconds / 60) });
  if (seconds < 129600) return say("hours_ago", { n: Math.round(seconds / 3600) });
  return say("days_ago", { n: Math.round(seconds / 86400) });
}

export function bytes(count) {
  if (count >= 1e8) return `${(count / 1e9).toFixed(count >= 1e10 ? 0 : 1)} GB`;
  return count >= 1e5 ? `${(count / 1e6).toFixed(1)} MB` : `${Math.round(count / 1e3)} kB`;
}

export function rate(perSecond) {
  if (!Number.isFinite(perSecond) || perSecond <= 0) return "";
  return perSecond >= 1 ? say("its", { n: perSecond.toFixed(1) }) : say("s_it", { n: (1 / perSecond).toFixed(1) });
}

export function number(value, digits = 4) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size && (size < 1e-4 || size >= 1e6)) return value.toExponential(2).replace(/\.?0+e/, "e");
  return Number(value.toPrecision(digits)).toString();
}
