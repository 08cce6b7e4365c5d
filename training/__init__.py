"""The training engine: pure torch, diffusers and peft; knows nothing of ComfyUI."""
