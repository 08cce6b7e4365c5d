"""Adapter files in every format that Lumina2's loaders read, through one form that all of them are read into."""

FORMAT_NAMES = ("comfyui", "diffusers", "kohya", "lycoris")
DTYPE_NAMES = ("fp32", "bf16", "fp16")
