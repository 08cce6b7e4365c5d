"""A full fine-tune over several processes: each keeps some rows of every block's weights, and all that belongs to them.

The transformer's parameters are DTensors of torch's FSDP2, put together block by block where they are needed. What is
trained, averaged over time and saved are the rows that lie in this process, as plain tensors on the same memory: so
every optimiser that looks at single numbers works as it is.

Source: Zhao et al. 2023, "PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter.full import Full
from ..config.settings import TrainSettings
from ..errors import RunError, SettingError
from ..model.transformer import Lumina2Transformer
from .processes import Processes

# Their step of a number depends on that number's own gradient and state; others measure whole tensors.
BY_NUMBER = (
    "adamw_bf16",
    "torch-adamw",
    "optimi-adamw",
    "optimi-lion",
    "optimi-adan",
    "optimi-radam",
    "optimi-ranger",
    "optimi-sgd",
    "adamw_schedulefree",
)


def check_together(settings: TrainSettings, processes: Processes) -> None:
    """Raises SettingError where a setting does not go with several processes."""
    if processes.count == 1:
        return
    if settings.optimizer.fused_backward:
        raise SettingError(
            "fused_backward steps before the gradients of several processes can be averaged. Switch it off: each of "
            f"the {processes.count} processes holds a part of the gradients only."
        )
    if not settings.full_fine_tune:
        return
    if settings.optimizer.optimizer not in BY_NUMBER:
        raise SettingError(
            f"{settings.optimizer.optimizer} measures whole weights, of which each process of a full fine-tune has "
            f"some rows only. Choose one of {', '.join(BY_NUMBER)}, or train with one process."
        )
    if settings.precision.torch_compile:
        raise SettingError(
            "torch_compile does not go with a full fine-tune on several processes, which puts weights together within "
            "each block. Switch it off."
        )


class Shards:
    """Spreads a transformer that is trained in full over the processes, in place.

    Attributes:
        rest: the trained weights that every process has whole, by name: the few outside of blocks.
    """

    def __init__(self, transformer: Lumina2Transformer, adapter: Full, processes: Processes) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        try:
            from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
        except ImportError:
            raise SettingError(
                "A full fine-tune on several processes needs torch 2.7 or newer. Train with one process, or a LoRA."
            ) from None
        assert processes.link is not None
        self._processes, self._link, self._adapter = processes, processes.link, adapter
        device = transformer.final_layer.linear.weight.device
        mesh = init_device_mesh(device.type, (processes.count,))
        caption_side = any(name.startswith(("cap_embedder.", "context_refiner.")) for name in adapter.weights)
        blocks = [*transformer.noise_refiner, *transformer.layers]
        if caption_side:  # else captions are refined once and kept, by each process for itself
            blocks += transformer.context_refiner
        for block in blocks:
            fully_shard(block, mesh=mesh)
        outside = {weight for weight in transformer.parameters() if not _is_sharded(weight)}
        fully_shard(transformer, mesh=mesh, ignored_params=outside)
        register_fsdp_forward_method(transformer, "predict")
        if caption_side:
            register_fsdp_forward_method(transformer, "refine")
        named = dict(transformer.named_parameters())
        self._whole: dict[str, Any] = {name: named[name] for name in adapter.weights if _is_sharded(named[name])}
        self.rest = [weight for name, weight in adapter.weights.items() if name not in self._whole]
        for name, whole in self._whole.items():
            rows = nn.Parameter(whole.to_local().detach())
            if processes.rank:
                rows.rows = f" part {processes.rank}"  # type: ignore[attr-defined]
            adapter.weights[name] = rows
        adapter.stored = self.stored

    def collect(self) -> list[nn.Parameter]:
        """Give each weight the gradient of its rows, which is the mean over the processes already.

        Returns:
            The weights whose gradients are not averaged yet.
        """
        for name, whole in self._whole.items():
            if whole.grad is not None:
                self._adapter.weights[name].grad = whole.grad.to_local()
                whole.grad = None
        return self.rest

    @torch.no_grad()
    def clip(self, largest: float, method: str) -> Tensor:
        """As ``clip_gradients``, of all processes' gradients together."""
        rows = [self._adapter.weights[name].grad for name in self._whole]
        everywhere = [weight.grad for weight in self.rest]
        squares = self._link.total(_sum_of_squares(rows, self._link.device))
        norm = (squares + _sum_of_squares(everywhere, self._link.device)).sqrt()
        gradients = [gradient for gradient in (*rows, *everywhere) if gradient is not None]
        if largest and method == "norm":
            factor = (largest / (norm + 1e-6)).clamp(max=1)
            for gradient in gradients:
                gradient.mul_(factor.to(gradient.dtype))
        elif largest:
            torch._foreach_clamp_max_(gradients, largest)
            torch._foreach_clamp_min_(gradients, -largest)
        return norm

    def stored(self) -> dict[str, Tensor]:
        """The transformer's whole weights by name, on the CPU; empty in all processes but the leader."""
        found = {}
        for name, weight in self._adapter.transformer.state_dict().items():
            sharded = _is_sharded(weight)
            whole = self._gathered(weight.to_local(), len(weight)) if sharded else weight.detach().cpu().clone()
            if whole is not None:
                found[name] = whole
        return found if self._processes.leads else {}

    def whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What a checkpoint holds, with rows put together: the same as of one process. Empty but in the leader.

        Args:
            tensors: whose names end with those of the weights that they belong to.
        """
        found = {}
        for key in sorted(tensors):
            weight, tensor = self._weight_of(key), tensors[key]
            mine = weight is not None and tensor.shape == weight.to_local().shape
            whole = self._gathered(tensor, len(weight)) if mine else tensor
            if whole is not None:
                found[key] = whole
        return found if self._processes.leads else {}

    def own(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This process's rows of what a checkpoint holds."""
        found = dict(tensors)
        for key, tensor in tensors.items():
            weight = self._weight_of(key)
            if weight is not None and tensor.shape == weight.shape:
                first = self._rows(len(weight)) * self._processes.rank
                found[key] = tensor[first : first + len(weight.to_local())].clone()
        return found

    def _rows(self, rows: int) -> int:
        """How many of a weight's rows a process has; the last ones have fewer, or none."""
        return -(-rows // self._processes.count)

    def _gathered(self, own: Tensor, rows: int) -> Tensor | None:
        if self._link.parted:
            raise RunError(
                "The weights of this full fine-tune lie in several processes, which are no longer together: what was "
                "trained since the last checkpoint is lost."
            )
        padded = torch.zeros(self._rows(rows), *own.shape[1:], dtype=own.dtype)
        padded[: len(own)] = own.detach()
        parts = self._link.gather(padded)
        return torch.cat(parts)[:rows].clone() if parts else None

    def _weight_of(self, key: str) -> Any:
        while key and key not in self._whole:
            key = key.partition(".")[2]
        return self._whole.get(key)


def _is_sharded(weight: Tensor) -> bool:
    from torch.distributed.tensor import DTensor

    return isinstance(weight, DTensor)


def _sum_of_squares(gradients: list[Tensor | None], device: torch.device) -> Tensor:
    norms = [torch.linalg.vector_norm(each, dtype=torch.float32) for each in gradients if each is not None]
    return torch.stack(norms).square().sum() if norms else torch.zeros((), device=device)
