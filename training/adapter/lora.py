"""LoRA: frozen weights, and beside each target a product of two small matrices.

Every variant is one product ``scale · B·A`` with A (R, in) and B (out, R), made from what is trained:

* fused: A and B themselves; R is the rank.
* split: q, k and v, the rows of one fused weight, have an A and a B each; the A stacked, the B along a diagonal.
* started from the base's own directions (PiSSA, OLoRA): ``BA - B₀A₀``, written as ``B·(A - A₀) + (B - B₀)·A₀``. It is
  exactly zero at the start, so the base never changes, and no large terms cancel; R doubles.

DoRA then sets the length of each row of ``W + scale · B·A``.

Sources: Hu et al. 2021 (arXiv 2106.09685); Meng et al. 2024, "PiSSA" (arXiv 2404.02948); Büyükakyüz 2024, "OLoRA"
(arXiv 2406.01775); Liu et al. 2024, "DoRA" (arXiv 2402.09353); Hayou et al. 2024, "LoRA+" (arXiv 2402.12354).
"""

from __future__ import annotations

import base64
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config.adapter import LoRASettings
from ..errors import SettingError
from ..model.linear import Linear, lora_linear
from ..model.transformer import Lumina2Transformer
from .base import AdaptedLinear, LayerAdapter, dense_weight, put_layer, with_gain
from .targets import linear_layers, target_modules

Pair = tuple[Tensor, Tensor]  # A (rank, in) and B (rows, rank)
_EXACT_BELOW = 512  # of the smaller side: up to there the decomposition is exact and still quick


class LoRALinear(AdaptedLinear):
    """A linear layer with a low-rank product beside it.

    Args:
        pairs: the initial A and B, of the whole layer or of each part of its rows in their order.
        from_base: what the pairs say is taken off again, so that the layer starts as the base.
    """

    base_layer: Linear

    def __init__(
        self,
        base: Linear,
        pairs: Sequence[Pair],
        scale: float,
        dropout: float = 0.0,
        from_base: bool = False,
        use_dora: bool = False,
    ) -> None:
        super().__init__(base)
        self.scale, self.dropout, self.from_base = scale, dropout, from_base
        self.lora_A = nn.ParameterList(a for a, _ in pairs)
        self.lora_B = nn.ParameterList(b for _, b in pairs)
        if from_base:
            for number, (a, b) in enumerate(pairs):
                self.register_buffer(f"lora_A0_{number}", a.detach().clone())
                self.register_buffer(f"lora_B0_{number}", b.detach().clone())
        self.lora_magnitude = nn.Parameter(dense_weight(base).norm(dim=1)) if use_dora else None

    @torch.no_grad()
    def start_with(self, lengths: Tensor) -> None:
        """DoRA's m, where it is not that of the base's rows."""
        assert self.lora_magnitude is not None
        self.lora_magnitude.copy_(lengths)

    def _named(self, letter: str, tensors: Sequence[Tensor]) -> dict[str, Any]:
        parts = ("",) if len(tensors) == 1 else ("q.", "k.", "v.")
        return {f"{part}lora_{letter}.weight": tensor for part, tensor in zip(parts, tensors, strict=True)}

    def _start(self, letter: str) -> list[Tensor]:
        return [getattr(self, f"lora_{letter}0_{number}") for number in range(len(self.lora_A))]

    def trained(self) -> dict[str, nn.Parameter]:
        magnitude = {} if self.lora_magnitude is None else {"lora_magnitude_vector": self.lora_magnitude}
        return self._named("A", list(self.lora_A)) | self._named("B", list(self.lora_B)) | magnitude

    def fixed(self) -> dict[str, Tensor]:
        return self._named("A0", self._start("A")) | self._named("B0", self._start("B")) if self.from_base else {}

    def factors(self) -> Pair:
        """A (R, in) and B (out, R)."""
        pairs = list(zip(self.lora_A, self.lora_B, strict=True))
        if self.from_base:
            starts = zip(pairs, self._start("A"), self._start("B"), strict=True)
            pairs = [(torch.cat((a - a0, a0)), torch.cat((b, b - b0), 1)) for (a, b), a0, b0 in starts]
        if len(pairs) == 1:
            return pairs[0]
        return torch.cat([a for a, _ in pairs]), torch.block_diag(*(b for _, b in pairs))

    def forward(self, x: Tensor) -> Tensor:
        if not self.on:
            return self.base_layer(x)
        a, b = self.factors()
        scale, dropping = self.scale * self.strength, self.dropout > 0 and self.training
        if dropping or torch.compiler.is_compiling():
            inner = F.linear(F.dropout(x, self.dropout) if dropping else x, a.to(x.dtype))
            out = self.base_layer(x) + F.linear(inner, b.to(x.dtype)) * scale
        else:
            out = lora_linear(x.flatten(0, -2), self.base_layer, a, b, scale).unflatten(0, x.shape[:-1])
        if self.lora_magnitude is None:
            return out
        return with_gain(out, self.lora_magnitude / self._row_norms(a, b), self.bias)

    @torch.no_grad()
    def _row_norms(self, a: Tensor, b: Tensor) -> Tensor:
        """Lengths (out,) of the rows of ``W + scale · B·A``; taken as constant, as DoRA's section 4.3 does."""
        return torch.addmm(dense_weight(self.base_layer), b.float(), a.float(), alpha=self.scale).norm(dim=1)

    def parts(self) -> dict[str, Tensor]:
        """A and B with the scale inside B, so that no alpha is needed, which some loaders ignore.

        ComfyUI multiplies the rows of ``W + ΔW`` with ``dora_scale / ‖W‖``, hence ``m·‖W‖ / ‖W + ΔW‖``.
        """
        a, b = self.factors()
        parts = {"lora_A.weight": a, "lora_B.weight": b.float() * self.scale}
        if self.lora_magnitude is not None:
            length = dense_weight(self.base_layer).norm(dim=1)
            parts["dora_scale"] = (self.lora_magnitude.float() * length / self._row_norms(a, b))[:, None]
        return parts


class LoRA(LayerAdapter):
    """A LoRA on the transformer; see the module's docstring."""

    layers: dict[str, LoRALinear]  # type: ignore[assignment]

    def __init__(self, layers: Mapping[str, LoRALinear], settings: LoRASettings, note: str = "") -> None:
        super().__init__(layers)
        self.settings, self.note = settings, note
        self.draws = settings.dropout > 0

    def groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """One group, or for LoRA+ two: B learns faster than A."""
        ratio = self.settings.loraplus_lr_ratio
        if ratio == 1:
            return super().groups(learning_rate)
        fast = [weight for name, weight in self.weights.items() if ".lora_B." in name]
        slow = [weight for name, weight in self.weights.items() if ".lora_B." not in name]
        return [{"params": slow, "lr": learning_rate}, {"params": fast, "lr": learning_rate * ratio}]

    def metadata(self) -> dict[str, str]:
        """The field's own keys; DoRA's lengths m in base64 of fp32, since the file holds them divided."""
        settings = self.settings
        metadata = {
            "ss_network_module": "networks.lora",
            "ss_network_dim": str(settings.rank),
            "ss_network_alpha": str(settings.alpha or settings.rank),
        }
        if settings.use_dora:
            lengths = {n: m.detach().float().cpu().numpy() for n, m in self.weights.items() if "lora_magnitude" in n}
            metadata["lumina2_trainer.magnitudes"] = json.dumps(
                {name: base64.b64encode(values.tobytes()).decode() for name, values in lengths.items()}
            )
        return metadata

    def describe(self) -> str:
        settings = self.settings
        kind = "DoRA" if settings.use_dora else "LoRA"
        ranks = Counter(a.shape[0] for layer in self.layers.values() for a in layer.lora_A)
        rank = ", ".join(map(str, sorted(ranks)))
        return f"{kind} of rank {rank} (scale {settings.scale:g}) {self.size()}{self.note}"


def add_lora_layers(
    transformer: Lumina2Transformer,
    settings: LoRASettings,
    seed: int,
    dtype: torch.dtype = torch.float32,
    start: Mapping[str, Sequence[Pair]] | None = None,
    lengths: Mapping[str, Tensor] | None = None,
) -> dict[str, LoRALinear]:
    """Put fresh LoRA layers in the place of the targets.

    Args:
        seed: of the initial values, which are drawn on the CPU, so that every device starts from the same.
        start: A and B of layers that begin somewhere else: of the whole layer, or of its parts where it is split.
        lengths: DoRA's m of such layers.

    Raises:
        SettingError: nothing is chosen, or the rank is larger than a layer that it starts from.
    """
    generator = torch.Generator().manual_seed(seed % 2**63)
    linear, layers = linear_layers(transformer), {}
    for name in target_modules(transformer, settings.targets, settings.blocks):
        base = linear[name]
        split = settings.qkv == "split" and name.endswith("attention.qkv")
        rows = transformer.config.qkv_rows if split else (base.out_features,)
        pairs = start.get(name) if start else None
        scale = settings.scale_of(max(a.shape[0] for a, _ in pairs)) if pairs else settings.scale
        if pairs:
            pairs = [(a, b / scale) for a, b in pairs]
        else:
            pairs = list(_initial_pairs(name, base, rows, settings, generator))
        device = base.weight.device
        trained = [
            (nn.Parameter(a.to(device, dtype).contiguous()), nn.Parameter(b.to(device, dtype).contiguous()))
            for a, b in pairs
        ]
        from_base = settings.init in ("pissa", "olora")
        layers[name] = LoRALinear(base, trained, scale, settings.dropout, from_base, settings.use_dora)
        if lengths and name in lengths:
            layers[name].start_with(lengths[name])
        put_layer(transformer, name, layers[name])
    return layers


def _initial_pairs(
    name: str, base: Linear, rows: Sequence[int], settings: LoRASettings, generator: torch.Generator
) -> Iterator[Pair]:
    """A and B of each part of the rows, in fp32 on the CPU.

    ``default``: A uniform as in ``nn.Linear``, B zero. ``gaussian``: A normal with a deviation of 1 / rank, B zero.
    ``pissa``: ``scale · BA`` is the largest part of the weight. ``olora``: A and B from its QR decomposition.
    """
    rank, width = settings.rank, base.in_features
    if settings.init in ("default", "gaussian"):
        for height in rows:
            if settings.init == "default":
                bound = 1 / math.sqrt(width)  # kaiming_uniform with a = √5
                a = torch.rand((rank, width), generator=generator) * (2 * bound) - bound
            else:
                a = torch.randn((rank, width), generator=generator) / rank
            yield a, torch.zeros(height, rank)
        return
    if rank > min(width, *rows):
        raise SettingError(
            f"init {settings.init} takes its {rank} directions from the weight of {name}, whose parts have "
            f"{min(width, *rows)}; choose a smaller rank, or init default."
        )
    for weight in dense_weight(base).cpu().split(list(rows)):
        if settings.init == "olora":
            b = torch.linalg.qr(weight[:, :rank])[0]  # Q of the whole weight begins with that of its first columns
            yield b.T @ weight, b
            continue
        left, sizes, right = _largest(weight, rank, generator)
        root = (sizes / settings.scale).sqrt()
        yield root[:, None] * right.T, left * root


def _largest(weight: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """The largest singular values (rank,) and their vectors (out, rank) and (in, rank); of large weights nearly so."""
    if min(weight.shape) <= _EXACT_BELOW:
        left, sizes, right = torch.linalg.svd(weight, full_matrices=False)
        return left[:, :rank], sizes[:rank], right[:rank].T
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        left, sizes, right = torch.svd_lowrank(weight, q=min(rank + 8, *weight.shape), niter=8)
    return left[:, :rank], sizes[:rank], right[:, :rank]


def add_lora(transformer: Lumina2Transformer, settings: LoRASettings, seed: int) -> dict[str, nn.Parameter]:
    """The weights of a fresh LoRA, by name, which is put into the transformer; see ``add_adapter`` for all else."""
    transformer.requires_grad_(False)
    return LoRA(add_lora_layers(transformer, settings, seed), settings).weights
