"""Loading a Lumina2 of any size from a folder in diffusers' layout, or a full fine-tune of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io

from ..training.errors import ModelError
from .places import ASSETS, SUBFOLDER

NANO = "lumina2-nano (bundled)"
NOT_TUNED = "none"


def model_folders() -> dict[str, Path]:
    """What the loader offers: every folder with a ``model_index.json`` under ``models/diffusers``, and the nano."""
    found = {NANO: ASSETS}
    for root in map(Path, folder_paths.get_folder_paths("diffusers")):
        for index in sorted(root.rglob("model_index.json")):
            found[index.parent.relative_to(root).as_posix()] = index.parent
    return found


def fine_tunes() -> list[str]:
    """What was trained in full, by its name under models/diffusion_models."""
    names = folder_paths.get_filename_list("diffusion_models")
    return [name for name in names if Path(name).parts[0] == SUBFOLDER and name.endswith(".safetensors")]


class Lumina2LoadDiffusers(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Lumina2LoadDiffusers",
            display_name="Load Lumina2 (Diffusers)",
            category="Lumina2",
            description="Loads a Lumina2 of any size from a folder in diffusers' layout.",
            inputs=[
                io.Combo.Input(
                    "folder",
                    options=list(model_folders()),
                    tooltip="A folder under models/diffusers, or the small model that comes with this plugin.",
                ),
                io.Combo.Input(
                    "dtype",
                    options=["auto", "bf16", "fp32"],
                    tooltip="Precision of the transformer. auto: bf16 where the device is fast at it; fp32 on a CPU.",
                ),
                io.Combo.Input(
                    "fine_tune",
                    options=[NOT_TUNED, *fine_tunes()],
                    default=NOT_TUNED,
                    optional=True,
                    tooltip="A full fine-tune of this model, from models/diffusion_models/lumina2.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The transformer, for training and drawing."),
                io.Clip.Output(tooltip="The text encoder, a Gemma2."),
                io.Vae.Output(tooltip="Pictures to latents and back."),
            ],
        )

    @classmethod
    def execute(cls, folder: str, dtype: str, fine_tune: str = NOT_TUNED) -> io.NodeOutput:
        from .bridge import load_pipeline

        model, clip, vae = load_pipeline(model_folders()[folder], dtype)
        if fine_tune != NOT_TUNED:
            model = _tuned(model_folders()[folder], dtype, fine_tune, model)
        return io.NodeOutput(model, clip, vae)


def _tuned(folder: Path, dtype: str, name: str, model: Any) -> Any:
    """A fresh MODEL of a folder with the weights of a fine-tune in the place of its own.

    Raises:
        ModelError: the file is gone, or the fine-tune is one of another model.
    """
    from safetensors.torch import load_file

    path = folder_paths.get_full_path("diffusion_models", name)
    if not path:
        raise ModelError(f"There is no {name!r} under models/diffusion_models. Refresh the page, and choose another.")
    weights, network = load_file(path), model.model.diffusion_model
    expected = network.state_dict()
    if "norm_final.weight" not in expected:  # only older cores have it, and no forward uses it
        weights.pop("norm_final.weight", None)
    wrong = sorted(weights.keys() ^ expected.keys()) or [n for n, w in weights.items() if w.shape != expected[n].shape]
    if wrong:
        raise ModelError(
            f"{name} is no fine-tune of {folder.name}: {wrong[0]!r} differs. Choose the model that it was trained from."
        )
    network.load_state_dict(weights)

    def again(*_: Any, **__: Any) -> Any:
        from .bridge import load_model

        return _tuned(folder, dtype, name, load_model(folder, dtype))

    model.cached_patcher_init = (again, ())  # newer cores make a patcher of their own kind anew from this
    return model
