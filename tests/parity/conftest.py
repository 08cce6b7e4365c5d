"""A real ComfyUI in this process, and the plugin loaded into it as ComfyUI would."""

import asyncio
import importlib.util
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def plugin():
    """The plugin as the package ``lumina2_trainer``; fails where there is no ComfyUI."""
    comfyui = Path(os.environ["COMFYUI_PATH"])
    assert (comfyui / "main.py").exists(), "COMFYUI_PATH names no ComfyUI; scripts/test sets it"
    sys.path.insert(0, str(comfyui))
    arguments, sys.argv = sys.argv, ["main.py", "--cpu", "--use-pytorch-cross-attention"]
    try:
        import comfy.options

        comfy.options.enable_args_parsing()
        import comfy.model_management  # reads the arguments
    finally:
        sys.argv = arguments
    spec = importlib.util.spec_from_file_location(
        "lumina2_trainer", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["lumina2_trainer"] = module
    spec.loader.exec_module(module)
    asyncio.run(module.comfy_entrypoint())
    return module
