"""The model card: what was trained, on what, how it looks, and how to use it; README.md as the hub reads it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path, PurePath, PureWindowsPath
from typing import Any

from ..cache.facts import DatasetFacts
from ..config.report import ReportSettings
from ..errors import ModelError
from ..run.history import changed_settings
from .story import About, Story

BASE = "Alpha-VLLM/Lumina-Image-2.0"
BASE_WIDTH = 2304  # of its layers
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
SAMPLES = 8  # pictures on a card


def card_pictures(story: Story) -> list[str]:
    """The pictures that a card shows, relative to the run's folder."""
    found: dict[str, None] = {}
    for sample in story.newest_samples()[:SAMPLES]:
        base = story.base_sample(sample)
        found |= {each["path"]: None for each in (sample, base) if each}
    return list(found)


def model_card(story: Story, about: About, settings: ReportSettings, repo: str, lora: Path) -> str:
    """README.md of a run.

    Args:
        repo: the repository's name, for the example in Python.
        lora: a trained file, if it is there; a LoRA's width tells whether it is of Lumina-Image-2.0.
    """
    base = about.base_model or (BASE if _width(lora) == BASE_WIDTH else "")
    run, full = story.run, story.full
    kind = "model, fine-tuned in full" if full else "LyCORIS adapter" if _lycoris(run.settings) else "LoRA"
    title = settings.tracker_run_name or run.folder
    progress = f"{story.step} steps" if story.status != "running" else f"{story.step} of {run.target} steps so far"
    parts = [
        _front_matter(story, about, settings, base),
        f"# {_text(title)}",
        settings.model_card_note.strip(),
        f"A {kind} for {f'[{base}](https://huggingface.co/{base})' if base else 'Lumina2'}, trained for {progress}.",
        f"Trigger: `{about.trigger}`" if about.trigger else "",
        _samples(story, about),
        _use_in_comfyui(f"{run.folder}.safetensors", full, about),
        _use_in_diffusers(story, about, base, repo),
        _training(story),
        _evaluation(story),
        _datasets(about.datasets),
        _licence(about, base),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def file_card(path: Path, note: str = "") -> str:
    """README.md of a LoRA file that is no run's, from what the file says of itself.

    Raises:
        ModelError: it is not in safetensors.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} cannot be read as safetensors ({error}).") from None
    base = BASE if _width(path) == BASE_WIDTH else ""
    head: dict[str, Any] = {"pipeline_tag": "text-to-image", "tags": ["lumina2", "text-to-image", "lora", "comfyui"]}
    if base:
        head = {"license": "apache-2.0", "base_model": base, "base_model_relation": "adapter", **head}
    rows = {
        key: value for key, value in metadata.items() if not key.startswith("lumina2_trainer.") and len(value) < 200
    }
    parts = [
        _yaml(head),
        f"# {_text(metadata.get('modelspec.title') or path.stem)}",
        note.strip(),
        f"A LoRA for {f'[{base}](https://huggingface.co/{base})' if base else 'Lumina2'}.",
        _use_in_comfyui(path.name, False, About()),
        "## Details\n\n" + _table(("", ""), [(key, f"`{_cell(value)}`") for key, value in rows.items()])
        if rows
        else "",
        _licence(About(), base),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(story: Story, about: About, settings: ReportSettings, base: str) -> str:
    full = story.full
    tags = ["lumina2", "text-to-image", "comfyui", *(["full-finetune"] if full else ["lora", "template:sd-lora"])]
    if not settings.model_card_safe_for_work:
        tags.append("not-for-all-audiences")
    head: dict[str, Any] = {"license": about.licence or ("apache-2.0" if base == BASE else "")}
    head |= {"base_model": base, "base_model_relation": ("finetune" if full else "adapter") if base else ""}
    head |= {"library_name": "diffusers" if _for_diffusers(story) or full else "", "pipeline_tag": "text-to-image"}
    head |= {"instance_prompt": about.trigger, "tags": tags}
    widget = [
        {"text": sample["prompt"] or "unconditional", "output": {"url": sample["path"]}}
        for sample in story.newest_samples()[:SAMPLES]
    ]
    return _yaml({key: value for key, value in {**head, "widget": widget}.items() if value})


def _samples(story: Story, about: About) -> str:
    rows = []
    for sample in story.newest_samples()[:SAMPLES]:
        base, score = story.base_sample(sample), sample.get("score")
        prompt = _cell(sample["prompt"]) + (f"<br>CLIP {score:.1f}" if score is not None else "")
        rows.append((prompt, sample.get("seed", ""), _picture(base), _picture(sample)))
    if not rows:
        return ""
    said = ", ".join(f"{_cell(key)} {_cell(value)}" for key, value in about.sampling.items() if value not in (None, ""))
    return (
        f"## Samples\n\n{_table(('prompt', 'seed', 'before', 'after'), rows)}"
        + (f"\n\nDrawn with {said}." if said else "")
        + "\n\nBoth pictures of a row start from the same noise."
    )


def _use_in_comfyui(name: str, full: bool, about: About) -> str:
    if full:
        how = f"Put `{name}` into `models/diffusion_models`, and load it with *Load Diffusion Model*."
    else:
        how = f"Put `{name}` into `models/loras`, and load it with *Load LoRA* at a strength of 1."
    return f"## Use in ComfyUI\n\n{how}" + (f" Write `{about.trigger}` in the prompt." if about.trigger else "")


def _use_in_diffusers(story: Story, about: About, base: str, repo: str) -> str:
    base, run = base or "the base model's folder", story.run
    sample = next(iter(story.newest_samples()), {"prompt": about.trigger or "a photo of a cat", "seed": 42})
    prompt = json.dumps(sample["prompt"], ensure_ascii=False)
    weights = DIFFUSERS_FILE if _for_diffusers(story) else f"{run.folder}.safetensors"
    lines = ["import torch"]
    if _lycoris(run.settings) and not _for_diffusers(story):
        return "## Use in diffusers\n\nDiffusers does not read this kind of adapter; use ComfyUI."
    if story.full:
        lines += [
            "from diffusers import Lumina2Pipeline, Lumina2Transformer2DModel",
            "from huggingface_hub import hf_hub_download",
            "",
            f'file = hf_hub_download("{repo}", "{run.folder}.safetensors")',
            "transformer = Lumina2Transformer2DModel.from_single_file(",
            f'    file, config="{base}", subfolder="transformer", torch_dtype=torch.bfloat16',
            ")",
            f'pipe = Lumina2Pipeline.from_pretrained("{base}", transformer=transformer, torch_dtype=torch.bfloat16)',
        ]
    else:
        lines += [
            "from diffusers import Lumina2Pipeline",
            "",
            f'pipe = Lumina2Pipeline.from_pretrained("{base}", torch_dtype=torch.bfloat16)',
            f'pipe.load_lora_weights("{repo}", weight_name="{weights}")',
        ]
    asked = about.sampling.get("system_prompt")
    arguments = [
        prompt,
        f"num_inference_steps={about.sampling.get('steps', 30)}",
        f"guidance_scale={about.sampling.get('guidance', 4.0)}",
        *([f"system_prompt={json.dumps(asked, ensure_ascii=False)}"] if asked else []),
        f"generator=torch.Generator().manual_seed({sample.get('seed', 42)})",
    ]
    lines += ['pipe.to("cuda")', "image = pipe(", *(f"    {each}," for each in arguments), ").images[0]"]
    return "## Use in diffusers\n\n```python\n" + "\n".join(lines) + "\n```"


def _training(story: Story) -> str:
    run = story.run
    changed = [(name, f"`{_shown(value)}`") for name, (value, _) in sorted(changed_settings(run).items())]
    everything = [(name, f"`{_shown(value)}`") for name, value in sorted(run.settings.items())]
    rest = f"<details><summary>All settings</summary>\n\n{_table(('setting', 'value'), everything)}\n\n</details>"
    return (
        "## Training\n\nWhat differs from the defaults of Lumina2 Trainer:\n\n"
        + (_table(("setting", "value"), changed) if changed else "Nothing.")
        + (f"\n\n{rest}" if everything else "")
    )


def _evaluation(story: Story) -> str:
    best = min((e for e in story.evaluations if e.get("loss") is not None), key=lambda e: e["loss"], default=None)
    if best is None:
        return ""
    last = story.evaluations[-1]
    now = f"{last['loss']:.4g}" if last.get("loss") is not None else "not a number"
    return (
        f"## Held-out loss\n\n{now} at step {last['step']}; the lowest was {best['loss']:.4g} at step {best['step']}."
    )


def _datasets(datasets: tuple[DatasetFacts, ...]) -> str:
    if not datasets:
        return ""
    rows = [
        (_cell(d.id), d.pictures, d.repeats, ", ".join(d.sizes), "regularisation" if d.regularisation else "training")
        for d in datasets
    ]
    return "## Data\n\n" + _table(("dataset", "pictures", "repeats", "sizes in pixels", "for"), rows)


def _licence(about: About, base: str) -> str:
    if about.licence or base == BASE:
        text = f"{about.licence or 'Apache 2.0, as the base model'}."
    else:
        text = "That of the base model it was trained on; name it above before you share this."
    return f"## Licence\n\n{text} Trained with Lumina2 Trainer for ComfyUI."


def _for_diffusers(story: Story) -> bool:
    return (story.folder / DIFFUSERS_FILE).exists()


def _lycoris(settings: Mapping[str, Any]) -> bool:
    return any(name.startswith("lycoris_") for name in settings)


def _width(path: Path) -> int:
    """The size of what an adapter of attention takes in; 0 where the file does not tell."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                if "attention.qkv" in key and key.endswith(("lora_A.weight", "hada_w1_b", "qkv.weight")):
                    return int(file.get_slice(key).get_shape()[1])
    except (OSError, SafetensorError):
        pass
    return 0


def _shown(value: Any) -> str:
    """A setting as others may see it: of a path only its last name."""
    text = str(value)
    if isinstance(value, str) and (PurePath(text).is_absolute() or PureWindowsPath(text).is_absolute()):
        return PureWindowsPath(text).name
    return _cell(text)


def _picture(sample: Mapping[str, Any] | None) -> str:
    return f"![]({sample['path'].replace(' ', '%20')})" if sample else ""


def _table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _cell(value: Any) -> str:
    return _text(" ".join(str(value).split())).replace("|", "\\|").replace("`", "'")


def _text(value: str) -> str:
    return value.replace("<", "&lt;")


def _yaml(head: Mapping[str, Any]) -> str:
    import yaml  # type: ignore[import-untyped]

    return f"---\n{yaml.safe_dump(dict(head), allow_unicode=True, sort_keys=False, width=1000)}---"
