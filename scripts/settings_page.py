"""Writes docs/settings.md and docs/settings.zh.md from the table of options.

python -m scripts.settings_page
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from training.config.adapter import LyCORISSettings
from training.config.settings import TrainSettings
from training.config.simpletuner.imported import beside_defaults, own_kinds
from training.config.simpletuner.table import BY_HAND, NO_EFFECT, OPTIONS, OWN_BLOCK, SECTIONS, UNSUPPORTED

ROOT = Path(__file__).resolve().parents[1]
WORDS = Path(__file__).with_name("settings_words.txt")
PAGES = {"en": ROOT / "docs" / "settings.md", "zh": ROOT / "docs" / "settings.zh.md"}
_TITLES = {
    "run": ("The run", "训练任务"),
    "model": ("The model", "模型"),
    "adapter": ("LoRA and LyCORIS", "LoRA 与 LyCORIS"),
    "optimiser": ("Optimiser, learning rate, averages", "优化器、学习率与 EMA"),
    "objective": ("Noise levels and loss", "噪声等级与损失"),
    "memory": ("Precision and memory", "精度与显存"),
    "data": ("Data", "数据"),
    "validation": ("Validation samples and held-out loss", "验证样图与留出损失"),
    "report": ("Trackers, hub, webhooks", "跟踪器、hub 与 webhook"),
}
_TEXTS = {
    "en": {
        "title": "Settings",
        "other": "[中文](settings.zh.md)",
        "made": "Made by `python -m scripts.settings_page` from `training/config/simpletuner/table.py`; do not edit.",
        "intro": "Every option of SimpleTuner's `config.json` that has an effect here, with SimpleTuner's default and "
        "ours. An option that a file leaves out is as SimpleTuner has it, unless *adopt_our_defaults* "
        "(`--adopt-our-defaults`) is on. Names may begin with `--`; numbers and truth values may be texts.",
        "columns": ("option", "SimpleTuner's default", "ours", "what it does"),
        "old": "earlier",
        "own": "What SimpleTuner has no option for",
        "own_intro": f"These stand beside the others, or in a block `{OWN_BLOCK}`, which SimpleTuner skips: so a file "
        "stays one that both read. All other LyCORIS options are those of `lycoris_config`.",
        "silent": "Known, without effect on Lumina2 here",
        "missing": "Not available here",
        "missing_intro": "The report says so where a file asks for one, and what to do instead.",
        "none": "none",
    },
    "zh": {
        "title": "设置",
        "other": "[English](settings.md)",
        "made": "由 `python -m scripts.settings_page` 从 `training/config/simpletuner/table.py` 生成，请勿手改。",
        "intro": "SimpleTuner 的 `config.json` 中在此有效的每个选项，附 SimpleTuner 与本插件的默认值。"
        "文件未写的选项取 SimpleTuner 的默认值，除非打开 *adopt_our_defaults*（`--adopt-our-defaults`）。"
        "名称前可带 `--`；数字和布尔值可写成文本。",
        "columns": ("选项", "SimpleTuner 默认值", "本插件默认值", "作用"),
        "old": "旧名",
        "own": "SimpleTuner 没有的选项",
        "own_intro": f"可与其他选项并列，或写在 `{OWN_BLOCK}` 块中；SimpleTuner 会跳过这个块，文件两边都能读。"
        "其余 LyCORIS 选项写在 `lycoris_config` 中。",
        "silent": "已知，但对 Lumina2 不起作用",
        "missing": "在此不可用",
        "missing_intro": "文件用到时，报告会指出，并说明该怎么办（英文）。",
        "none": "无",
    },
}


def words() -> dict[str, tuple[str, str]]:
    """English and Chinese of each option, and of each reason with a ``=`` before it."""
    lines = [line for line in WORDS.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    found = {}
    for line in lines:
        parts = [part.strip() for part in line.split(" | ")]
        found[parts[0]] = (parts[0].removeprefix("="), parts[1]) if len(parts) == 2 else (parts[1], parts[2])
    return found


def page(language: str) -> str:
    """The whole page."""
    number = list(PAGES).index(language)
    said, texts = words(), _TEXTS[language]
    adapters = TrainSettings(adapter=LyCORISSettings()).written() | TrainSettings().written()
    ours = {**adapters, **beside_defaults()}
    lines = [f"# {texts['title']}", "", texts["other"], "", f"<!-- {texts['made']} -->", "", texts["intro"], ""]
    head = ["| " + " | ".join(texts["columns"]) + " |", "|---|---|---|---|"]
    for section in SECTIONS:
        lines += [f"## {_TITLES[section][number]}", "", *head]
        for name, option in OPTIONS.items():
            if option.section == section:
                own = ours.get(name if option.ours == BY_HAND else option.ours, "")
                old = f" ({texts['old']}: {', '.join(f'`{each}`' for each in option.old)})" if option.old else ""
                shown = [f"`{name}`{old}", _shown(option.default, texts), _shown(own, texts), said[name][number]]
                lines.append("| " + " | ".join(shown) + " |")
        lines.append("")
    lines += [f"## {texts['own']}", "", texts["own_intro"], ""]
    lines += ["| " + " | ".join((texts["columns"][0], *texts["columns"][2:])) + " |", "|---|---|---|"]
    for name in own_names():
        lines.append(f"| `{name}` | {_shown(ours.get(name, ''), texts)} | {said[name][number]} |")
    lines += ["", f"## {texts['silent']}", ""]
    for reason, names in NO_EFFECT.items():
        lines += [f"- **{said['=' + reason][number]}**: {', '.join(f'`{name}`' for name in names)}"]
    lines += ["", f"## {texts['missing']}", "", texts["missing_intro"], ""]
    lines += [f"- `{name}`: {missing.remedy}" for name, missing in UNSUPPORTED.items()]
    return "\n".join(lines) + "\n"


def own_names() -> list[str]:
    """Settings of ours that no option of SimpleTuner's stands for; those of ``lycoris_config`` are left out."""
    others = {option.ours for option in OPTIONS.values()} | set(OPTIONS)
    others |= {name for name in own_kinds() if name.startswith("lycoris_") and name != "lycoris_qkv"}
    return [name for name in own_kinds() if name not in others]


def _shown(value: Any, texts: dict[str, Any]) -> str:
    if value is None or value == ():
        return str(texts["none"])
    if isinstance(value, bool):
        return str(value).lower()
    return f"`{value}`" if value != "" else ""


def main() -> None:
    for language, path in PAGES.items():
        path.write_text(page(language), encoding="utf-8")


if __name__ == "__main__":
    main()
