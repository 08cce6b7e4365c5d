"""Loading a Lumina2 of any size from a folder in diffusers' layout."""

from __future__ import annotations

from pathlib import Path

import folder_paths
from comfy_api.latest import io

from .places import ASSETS

NANO = "lumina2-nano (bundled)"


def model_folders() -> dict[str, Path]:
    """What the loader offers: every folder with a ``model_index.json`` under ``models/diffusers``, and the nano."""
    found = {NANO: ASSETS}
    for root in map(Path, folder_paths.get_folder_paths("diffusers")):
        for index in sorted(root.rglob("model_index.json")):
            found[index.parent.relative_to(root).as_posix()] = index.parent
    return found


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
            ],
            outputs=[io.Model.Output(), io.Clip.Output(), io.Vae.Output()],
        )

    @classmethod
    def execute(cls, folder: str, dtype: str) -> io.NodeOutput:
        from .bridge import load_pipeline

        return io.NodeOutput(*load_pipeline(model_folders()[folder], dtype))
