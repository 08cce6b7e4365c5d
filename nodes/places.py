"""Where things lie in ComfyUI's folders."""

from __future__ import annotations

from pathlib import Path

import folder_paths

from ..training.cache.store import Store
from ..training.errors import DataError, RunError, SettingError
from ..training.run.folder import RunStore

SUBFOLDER = "lumina2"  # of output and of models/loras
BUNDLED = {
    "bundled: nano-style": "style",
    "bundled: nano-style-heldout": "style_heldout",
    "bundled: nano-concept": "concept",
}
BUNDLED_CONFIG = "bundled: nano-simpletuner"
ASSETS = Path(__file__).resolve().parent.parent / "assets" / "nano"


def dataset_folder(named: str) -> Path:
    """A folder as written in the widget: bundled, absolute, or under ComfyUI's input folder.

    Raises:
        DataError: nothing is written there.
    """
    named = named.strip().strip('"')
    if not named:
        raise DataError("folder is empty. Write the folder that holds your pictures.")
    if named in BUNDLED:
        return ASSETS / BUNDLED[named]
    return Path(folder_paths.get_input_directory()) / Path(named).expanduser()


def config_file(named: str) -> Path:
    """A config.json as written in the widget: bundled, absolute, or under ComfyUI's input folder.

    Raises:
        SettingError: nothing is written there.
    """
    named = named.strip().strip('"')
    if not named:
        raise SettingError("file is empty. Write the path of a config.json.")
    if named == BUNDLED_CONFIG:
        return ASSETS / "simpletuner" / "config.json"
    return Path(folder_paths.get_input_directory()) / Path(named).expanduser()


def cache_root() -> Path:
    """Where caches, indices and pictures from the graph are kept."""
    return Path(folder_paths.get_output_directory(), SUBFOLDER, ".cache")


def cache(kind: str) -> Store:
    return Store(str(cache_root() / kind))


def runs() -> RunStore:
    loras, models = Path(folder_paths.get_folder_paths("loras")[0]), _models_folder()
    return RunStore(Path(folder_paths.get_output_directory(), SUBFOLDER), loras / SUBFOLDER, models / SUBFOLDER)


def _models_folder() -> Path:
    """``models/diffusion_models``; ComfyUI lists its old name, ``models/unet``, first."""
    folders = list(map(Path, folder_paths.get_folder_paths("diffusion_models")))
    return next((folder for folder in folders if folder.name == "diffusion_models"), folders[0])


def lora_file(name: str) -> Path:
    """A LoRA by its name under models/loras.

    Raises:
        RunError: there is none of this name.
    """
    path = folder_paths.get_full_path("loras", name)
    if not path:
        raise RunError(f"There is no LoRA {name!r} under models/loras. Choose one that a LoraLoader lists.")
    return Path(path)
