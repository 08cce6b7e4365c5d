"""Our own socket types; each carries a frozen handle of ids and paths, never pixels or weights."""

from comfy_api.latest import io

DatasetSocket = io.Custom("LUMINA2_DATASET")
DatasetOptionsSocket = io.Custom("LUMINA2_DATASET_OPTIONS")
LatentsSocket = io.Custom("LUMINA2_LATENTS")
EmbedsSocket = io.Custom("LUMINA2_EMBEDS")
AdapterSocket = io.Custom("LUMINA2_ADAPTER")
ConfigSocket = io.Custom("LUMINA2_CONFIG")
ValidationSocket = io.Custom("LUMINA2_VALIDATION")
LoraModelSocket = io.Custom("LORA_MODEL")  # ComfyUI's own
LossMapSocket = io.Custom("LOSS_MAP")  # ComfyUI's own
