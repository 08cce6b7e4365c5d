"""Lumina2 Trainer: train Lumina-Image-2.0 inside ComfyUI.

Nothing is imported here at module level: ComfyUI starts fast, and pytest imports this file as a package.
"""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    from .nodes import Lumina2Extension

    return Lumina2Extension()
