"""Adapters of the LyCORIS family, through lycoris-lora: its weights, initial values and products.

Its own network class is not used: it rounds what is added to the base's dtype, needs that to be the input's, keeps its
targets in class attributes and patches ``forward``. Here each layer is a module like any other.

Over the fused weight of q, k and v stands one layer, or split one for each as on diffusers' model: ``SplitLinear``.

Sources: Yeh et al. 2023, "LyCORIS" (arXiv 2309.14859); Liu et al. 2022, "(IA)³" (arXiv 2205.05638); Valipour et al.
2022, "DyLoRA" (arXiv 2210.07558); Chavan et al. 2023, "GLoRA" (arXiv 2306.07967); Qiu et al. 2023, "OFT"
(arXiv 2306.07280); Liu et al. 2023, "BOFT" (arXiv 2311.06243).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config.adapter import LyCORISSettings
from ..errors import SettingError
from ..model.linear import Linear
from ..model.transformer import Lumina2Transformer
from .base import AdaptedLinear, LayerAdapter, Rows, dense_weight, put_layer, with_gain
from .formats.fuse import join_layers
from .formats.layers import FUSED, PARTS, Layer, change
from .formats.read import layer_of
from .formats.write import comfyui_parts
from .targets import linear_layers, lycoris_targets

Product = Callable[[Tensor], Tensor]  # what a frozen layer computes


class LyCORISLinear(AdaptedLinear):
    """A linear layer with weights of lycoris-lora beside it.

    Args:
        lycoris: lycoris-lora's module; only its weights and products are used.
    """

    def __init__(self, base: Linear | Rows, lycoris: nn.Module, settings: LyCORISSettings) -> None:
        super().__init__(base)
        self.lycoris: Any = lycoris
        self.settings = settings

    @property
    def multiplier(self) -> float:
        return self.settings.multiplier * self.strength

    def trained(self) -> dict[str, nn.Parameter]:
        return {f"{self.settings.algo}.{name}": weight for name, weight in self.lycoris.named_parameters()}

    def forward(self, x: Tensor) -> Tensor:
        return self.beside(x, self.base_layer) if self.on else self.base_layer(x)

    def beside(self, x: Tensor, base: Product) -> Tensor:
        """The layer's output; ``base`` computes what the base layer does."""
        if not self.settings.module_dropout or not self.training:
            return self.adapted(x, base)
        left_out = torch.rand(()) < self.settings.module_dropout
        if torch.compiler.is_compiling():  # whose graph cannot go two ways
            return torch.where(left_out.to(x.device), base(x), self.adapted(x, base))
        return base(x) if left_out else self.adapted(x, base)

    def adapted(self, x: Tensor, base: Product) -> Tensor:
        """The layer's output with the adapter in it."""
        raise NotImplementedError

    def _without_bias(self, out: Tensor) -> Tensor:
        """The base's output as rotations and gains act on it."""
        return out if self.bias is None else out - self.bias.to(out.dtype)

    def _with_bias(self, out: Tensor) -> Tensor:
        return out if self.bias is None else out + self.bias.to(out.dtype)


class Added(LyCORISLinear):
    """lora, loha, lokr: what is added to the weight is a product of small matrices; with DoRA where asked for."""

    def adapted(self, x: Tensor, base: Product) -> Tensor:
        beside = self.lycoris.bypass_forward_diff(x, scale=1 if self.lycoris.wd else self.multiplier)
        out = base(x) + beside.to(x.dtype)
        if not self.lycoris.wd:
            return out
        gain = self._gain()
        if self.settings.wd_on_output:
            return with_gain(out, gain[:, 0], self.bias)
        scaled = x * gain[0].to(x.dtype)
        return base(scaled) + self.lycoris.bypass_forward_diff(scaled, scale=1).to(x.dtype)

    def _factor(self) -> Tensor:
        """What the product of the matrices is multiplied with, the multiplier apart."""
        return self.lycoris.scale * self.lycoris.scalar.float()

    def delta(self) -> Tensor:
        """What is added to the weight (out, in) in fp32, the multiplier apart."""
        own = {name: weight.float() for name, weight in self.lycoris.named_parameters()}
        if "hada_w1_a" in own:
            product = (own["hada_w1_a"] @ own["hada_w1_b"]) * (own["hada_w2_a"] @ own["hada_w2_b"])
        elif "lora_up.weight" in own:
            product = own["lora_up.weight"] @ own["lora_down.weight"]
        else:
            first, second = (
                own[name] if name in own else own[f"{name}_a"] @ own[f"{name}_b"] for name in ("lokr_w1", "lokr_w2")
            )
            product = torch.kron(first, second)
        return product * self._factor()

    def _lengths(self) -> Tensor:
        """Of the rows (out, 1), or the columns (1, in), of the weight with what is added; taken as constant."""
        with torch.no_grad():
            weight = dense_weight(self.base_layer) + self.delta()
        return weight.norm(dim=1 if self.settings.wd_on_output else 0, keepdim=True)

    def _gain(self) -> Tensor:
        gain = self.lycoris.dora_scale.float() / self._lengths()
        return gain if self.multiplier == 1 else self.multiplier * (gain - 1) + 1

    def parts(self) -> dict[str, Tensor]:
        own: dict[str, Tensor] = dict(self.lycoris.named_parameters())
        names = {"lora_up.weight": "lora_B.weight", "lora_down.weight": "lora_A.weight"}
        parts = {names.get(n, n): w for n, w in own.items() if n not in ("dora_scale", "scalar")}
        scaled = next(n for n in ("lora_B.weight", "hada_w1_a", "lokr_w1", "lokr_w1_a") if n in parts)
        parts[scaled] = parts[scaled].float() * self._factor() * (1 if self.lycoris.wd else self.multiplier)
        if self.lycoris.wd:
            # ComfyUI divides by the base's lengths where it goes by rows, else by the adapted weight's.
            rows = self.settings.wd_on_output
            length = dense_weight(self.base_layer).norm(dim=1, keepdim=True) if rows else self._lengths()
            parts["dora_scale"] = self._gain() * length
        return parts


class DyLoRA(LyCORISLinear):
    """A LoRA that can be cut shorter: its rank is drawn anew each step, and the last block of those drawn learns.

    The scale is alpha over the rank in use.
    """

    def _factors(self, last: Tensor | int) -> tuple[Tensor, Tensor]:
        """A and B up to a block; the blocks before it are constant. Shapes do not hang on it, for compilers."""
        size, own = self.settings.block_size, self.lycoris
        down, up = torch.cat(list(own.down_list)), torch.cat(list(own.up_list), 1)
        block = torch.arange(len(down), device=down.device) // size
        scale = (self.settings.linear_alpha or len(down)) * self.multiplier / ((last + 1) * size)
        down = torch.where((block == last)[:, None], down, down.detach())
        return down, torch.where(block == last, up, up.detach()) * (block <= last) * scale

    def adapted(self, x: Tensor, base: Product) -> Tensor:
        count = len(self.lycoris.down_list)
        down, up = self._factors(torch.randint(count, ()).to(x.device) if self.training else count - 1)
        return base(x) + F.linear(F.linear(x, down.to(x.dtype)), up.to(x.dtype))

    def parts(self) -> dict[str, Tensor]:
        down, up = self._factors(len(self.lycoris.down_list) - 1)
        return {"lora_A.weight": down, "lora_B.weight": up}


class GLoRA(LyCORISLinear):
    """``W + W·A + B`` with A and B of low rank."""

    def _weights(self) -> dict[str, Tensor]:
        """The four matrices, all factors in the first of each pair."""
        own: dict[str, Tensor] = {name: getattr(self.lycoris, name).weight for name in ("a1", "a2", "b1", "b2")}
        factor = self.lycoris.scale * self.lycoris.scalar * self.multiplier
        return own | {name: own[name] * factor for name in ("a1", "b1")}

    def adapted(self, x: Tensor, base: Product) -> Tensor:
        own, drop = {name: weight.to(x.dtype) for name, weight in self._weights().items()}, self.lycoris.drop
        seen = x + drop(F.linear(F.linear(x, own["a2"]), own["a1"]))
        return base(seen) + drop(F.linear(F.linear(x, own["b2"]), own["b1"]))

    def parts(self) -> dict[str, Tensor]:
        own = self._weights()
        if self.in_features == self.out_features == len(own["a2"]):  # ComfyUI would take this for another layout
            weight = dense_weight(self.base_layer)
            return {"diff": weight @ own["a1"].float() @ own["a2"].float() + own["b1"].float() @ own["b2"].float()}
        return {f"{name}.weight": weight for name, weight in own.items()}


class Difference(LyCORISLinear):
    """full: every element of the weight, and of the bias, has its own difference."""

    def adapted(self, x: Tensor, base: Product) -> Tensor:
        own = {n: (w * self.multiplier).to(x.dtype) for n, w in self.lycoris.named_parameters()}
        return base(x) + F.linear(x, own["weight"], own.get("bias"))

    def parts(self) -> dict[str, Tensor]:
        names = {"weight": "diff", "bias": "diff_b"}
        return {names[n]: w.float() * self.multiplier for n, w in self.lycoris.named_parameters()}


class IA3(LyCORISLinear):
    """One gain for each row of the weight, or each column; the bias stays as it is."""

    def adapted(self, x: Tensor, base: Product) -> Tensor:
        gain = 1 + self.multiplier * self.lycoris.weight
        if self.settings.train_on_input:
            return base(x * gain.to(x.dtype))
        return with_gain(base(x), gain, self.bias)

    def parts(self) -> dict[str, Tensor]:
        more = self.lycoris.weight.float() * self.multiplier
        return {"diff": dense_weight(self.base_layer) * (more if self.settings.train_on_input else more[:, None])}


class Rotated(LyCORISLinear):
    """diag-oft, boft: the outputs are turned, in blocks or by butterflies, and with ``rescaled`` each has a gain."""

    def _turned_less(self, out: Tensor, dtype: torch.dtype) -> Tensor:
        """The change of outputs (…, out)."""
        from lycoris.functional import boft, diag_oft  # type: ignore[import-untyped]

        blocks, constraint = self.lycoris.oft_blocks.float(), self.lycoris.constraint
        rescale = self.lycoris.rescale.float() if self.settings.rescaled else None
        if self.settings.algo == "boft":
            change = boft.bypass_forward_diff(out, blocks, rescale, constraint=constraint, scale=self.multiplier)
        else:
            change = diag_oft.bypass_forward_diff(out, out, blocks, rescale, constraint=constraint) * self.multiplier
        return change.to(dtype)

    def adapted(self, x: Tensor, base: Product) -> Tensor:
        out = self._without_bias(base(x))
        return self._with_bias(out + self._turned_less(out.float(), out.dtype))

    def parts(self) -> dict[str, Tensor]:
        """The blocks as ComfyUI turns them; where it knows no ``rescale`` or no multiplier, the exact difference."""
        boft, rescaled = self.settings.algo == "boft", self.settings.rescaled
        if self.multiplier != 1 or (rescaled and not boft):
            weight = dense_weight(self.base_layer)
            return {"diff": self._turned_less(weight.T.contiguous(), torch.float32).T}
        blocks, constraint = self.lycoris.oft_blocks.float(), self.lycoris.constraint
        size = (blocks - blocks.transpose(-1, -2)).norm() + 1e-8
        if 0 < constraint < size:  # loaders disagree on its unit, so that it is folded into the blocks
            blocks = blocks * (constraint / size)
        parts = {"oft_blocks": blocks, "alpha": torch.zeros(())}
        return parts | ({"rescale": self.lycoris.rescale} if rescaled else {})


_LAYERS: dict[str, type[LyCORISLinear]] = {
    **dict.fromkeys(("lora", "locon", "loha", "lokr"), Added),
    "full": Difference,
    "ia3": IA3,
    "dylora": DyLoRA,
    "glora": GLoRA,
    "diag-oft": Rotated,
    "boft": Rotated,
}


class SplitLinear(AdaptedLinear):
    """A layer of its own for each of q, k and v, the rows of one frozen weight, whose product is computed once.

    Attributes:
        own: the layers, by "q", "k" and "v"; each stands on its ``Rows``.
    """

    base_layer: Linear
    own: Mapping[str, LyCORISLinear]

    def __init__(
        self, base: Linear, rows: Sequence[int], settings: LyCORISSettings, make: Callable[[Rows], LyCORISLinear]
    ) -> None:
        super().__init__(base)
        self.settings, self.sizes = settings, list(rows)
        ends = accumulate(rows)
        parts = {part: Rows(self, slice(end - n, end)) for part, n, end in zip(PARTS, rows, ends, strict=True)}
        self.own = nn.ModuleDict({part: make(own) for part, own in parts.items()})  # type: ignore[assignment]

    def act_at(self, strength: float) -> None:
        super().act_at(strength)
        for layer in self.own.values():
            layer.act_at(strength)

    def trained(self) -> dict[str, nn.Parameter]:
        return {f"{part}.{name}": w for part, layer in self.own.items() for name, w in layer.trained().items()}

    def forward(self, x: Tensor) -> Tensor:
        whole = self.base_layer(x)
        if not self.on:
            return whole

        def base(rows: LyCORISLinear, out: Tensor) -> Product:  # of another input it has to be computed anew
            return lambda seen: out if seen is x else rows.base_layer(seen)

        shares = zip(self.own.values(), whole.split(self.sizes, -1), strict=True)
        return torch.cat([layer.beside(x, base(layer, out)) for layer, out in shares], -1)

    def parts(self) -> dict[str, Tensor]:
        """One layer over all rows where its kind can be that, else the exact difference."""
        layers = {part: layer_of(layer.parts()) for part, layer in self.own.items()}
        whole = join_layers(layers, self.sizes)
        if whole is None:
            rows = {part: partial(layer.base_layer.read, torch.float32) for part, layer in self.own.items()}
            whole = Layer("diff", {"diff": torch.cat([change(layer, rows[part]) for part, layer in layers.items()])})
        return comfyui_parts(whole)


class LyCORIS(LayerAdapter):
    """LyCORIS layers on the transformer."""

    layers: dict[str, LyCORISLinear | SplitLinear]  # type: ignore[assignment]

    def __init__(
        self, layers: Mapping[str, LyCORISLinear | SplitLinear], settings: LyCORISSettings, note: str = ""
    ) -> None:
        super().__init__(layers)
        self.settings, self.note = settings, note
        each = [layer.settings for layer in layers.values()]
        self.draws = any(s.algo == "dylora" or s.dropout or s.rank_dropout or s.module_dropout for s in each)

    def metadata(self) -> dict[str, str]:
        return {
            "ss_network_module": "lycoris.kohya",
            "ss_network_dim": str(self.settings.linear_dim),
            "ss_network_alpha": str(self.settings.linear_alpha or self.settings.linear_dim),
            "ss_network_args": json.dumps(self.settings.as_json()),
        }

    def describe(self) -> str:
        algos = Counter(layer.settings.algo for layer in self.layers.values())
        return f"LyCORIS {', '.join(algos)} {self.size()}{self.note}"


def add_lycoris_layers(
    transformer: Lumina2Transformer, settings: LyCORISSettings, seed: int, dtype: torch.dtype = torch.float32
) -> dict[str, LyCORISLinear | SplitLinear]:
    """Put fresh LyCORIS layers in the place of the targets; initial values are drawn on the CPU.

    Raises:
        SettingError: nothing is chosen, or an option does not fit a layer.
    """
    linear, layers = linear_layers(transformer), dict[str, LyCORISLinear | SplitLinear]()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed % 2**63)
        for name, options in lycoris_targets(transformer, settings).items():
            fresh = partial(_fresh, name, options=options, dtype=dtype)
            if options.qkv == "split" and name.endswith(FUSED):
                layers[name] = SplitLinear(linear[name], transformer.config.qkv_rows, options, fresh)
            else:
                layers[name] = fresh(linear[name])
            put_layer(transformer, name, layers[name])
    return layers


def _fresh(name: str, base: Linear | Rows, options: LyCORISSettings, dtype: torch.dtype) -> LyCORISLinear:
    made = _lycoris_module(name, base, options).to(base.weight.device, dtype)
    return _LAYERS[options.algo](base, made, options)


def _lycoris_module(name: str, base: Linear | Rows, settings: LyCORISSettings) -> nn.Module:
    """lycoris-lora's module for a layer of this size, in fp32 on the CPU, holding no weight of the base."""
    try:
        from lycoris.wrapper import network_module_dict  # type: ignore[import-untyped]
    except ImportError as error:
        raise SettingError(
            f"LyCORIS needs the package lycoris-lora ({error}). Install it with: pip install lycoris-lora"
        ) from None

    like = nn.utils.skip_init(nn.Linear, base.in_features, base.out_features, base.bias is not None)
    with torch.no_grad():
        if settings.dora_wd:
            like.weight.copy_(dense_weight(base))
        try:
            made = network_module_dict[settings.algo](
                name,
                like,
                1.0,
                settings.linear_dim,
                settings.linear_alpha,
                settings.dropout,
                settings.rank_dropout,
                0.0,
                False,
                use_scalar=settings.use_scalar,
                decompose_both=settings.decompose_both,
                factor=settings.factor,
                rank_dropout_scale=settings.rank_dropout_scale,
                full_matrix=settings.full_matrix,
                rs_lora=settings.rs_lora,
                unbalanced_factorization=settings.unbalanced_factorization,
                weight_decompose=settings.dora_wd,
                wd_on_out=settings.wd_on_output,
                block_size=settings.block_size,
                constraint=settings.constraint,
                rescaled=settings.rescaled,
                train_on_input=settings.train_on_input,
            )
        except ValueError as error:
            raise SettingError(
                f"LyCORIS {settings.algo} does not fit {name}, {base.out_features} × {base.in_features}: {error} "
                "Choose another linear_dim, or other targets."
            ) from None
        if settings.init_lokr_norm:
            weight = dense_weight(base)
            made.lokr_w1.fill_(1)
            drawn = torch.randn(made.lokr_w2.shape)
            drawn = (drawn - drawn.mean()) / drawn.std() * weight.std().cpu() + weight.mean().cpu()
            made.lokr_w2.copy_(drawn * settings.init_lokr_norm)
    made.org_module = []
    made.org_forward = None
    if settings.algo == "full":
        made._org_weight = made.org_bias = None
        for parameter in made.parameters():
            nn.init.zeros_(parameter)
    return made.requires_grad_(True)
