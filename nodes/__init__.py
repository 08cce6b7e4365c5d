"""The nodes, thin adapters between ComfyUI and the engine: the only Python here that imports ComfyUI."""

from comfy_api.latest import ComfyExtension, io

from .loader import Lumina2LoadDiffusers


class Lumina2Extension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [Lumina2LoadDiffusers]
