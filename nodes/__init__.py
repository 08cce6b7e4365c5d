"""The nodes, thin adapters between ComfyUI and the engine: the only Python here that imports ComfyUI."""

from comfy_api.latest import ComfyExtension, io

from .cache import Lumina2CacheLatents, Lumina2CacheTextEmbeds
from .config import Lumina2LoadConfig, Lumina2SaveConfig
from .dataset import Lumina2DatasetOptions, Lumina2LoadDataset, Lumina2LoadDatasetConfig
from .given import Lumina2DatasetFromImages, Lumina2DatasetFromLatents, Lumina2SaveCaptions
from .hub import Lumina2PushToHub, Lumina2ReportSettings
from .loader import Lumina2LoadDiffusers
from .lora import Lumina2ConvertLoRA, Lumina2LoadLoRA, Lumina2SaveLoRA
from .lora_tools import Lumina2ExtractLoRA, Lumina2MergeLoRA, Lumina2ResizeLoRA
from .preview import Lumina2PreviewDataset
from .routes import add_routes
from .runs import Lumina2LoadRun
from .settings import Lumina2LoRASettings, Lumina2LyCORISSettings, Lumina2TrainingSettings
from .slider import Lumina2SliderSettings
from .train import TrainLumina2Full, TrainLumina2LoRA
from .validate import Lumina2ValidateSample
from .validation import Lumina2ValidationSettings


class Lumina2Extension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        add_routes()  # ComfyUI 0.3.75 calls no on_load
        return [
            Lumina2LoadDiffusers,
            Lumina2LoadDataset,
            Lumina2DatasetOptions,
            Lumina2LoadDatasetConfig,
            Lumina2DatasetFromImages,
            Lumina2DatasetFromLatents,
            Lumina2SaveCaptions,
            Lumina2PreviewDataset,
            Lumina2CacheLatents,
            Lumina2CacheTextEmbeds,
            Lumina2LoRASettings,
            Lumina2LyCORISSettings,
            Lumina2TrainingSettings,
            Lumina2SliderSettings,
            Lumina2LoadConfig,
            Lumina2SaveConfig,
            Lumina2ReportSettings,
            TrainLumina2LoRA,
            TrainLumina2Full,
            Lumina2LoadRun,
            Lumina2ValidateSample,
            Lumina2ValidationSettings,
            Lumina2PushToHub,
            Lumina2LoadLoRA,
            Lumina2SaveLoRA,
            Lumina2ConvertLoRA,
            Lumina2MergeLoRA,
            Lumina2ExtractLoRA,
            Lumina2ResizeLoRA,
        ]
