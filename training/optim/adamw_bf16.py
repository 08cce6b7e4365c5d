"""AdamW whose states, and if they are so the weights, are bf16: 6 bytes a weight instead of 16.

What is rounded to bf16 is rounded up or down by chance, up the likelier the nearer that is. Steps that are smaller
than what bf16 can tell apart so have their effect on average, where rounding to the nearest would lose every one.

Source: Loshchilov & Hutter 2019, "Decoupled Weight Decay Regularization"; stochastic rounding of weights as in Zamirai
et al. 2020, "Revisiting BFloat16 Training".
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..errors import SettingError


class AdamWBF16(torch.optim.Optimizer):
    """Weights in bf16 or fp32 (those stay fp32), states in bf16, all arithmetic in fp32.

    The rounding noise is a function of ``seed``, of how many steps were tried, and of the parameter's name in its
    group's ``names``: copies of a model stay equal bit for bit, and a run that is continued goes on as it would have.
    A parameter that is a part of one says which by an attribute ``rows``, so that parts do not share their noise.

    With a 0-dimensional tensor ``found_inf`` as an attribute, a step changes nothing where that is 1, without the
    host having to know (which is how torch's fused optimisers do it).

    Args:
        params: groups with ``params`` and ``names``.

    Raises:
        SettingError: a weight is neither bf16 nor fp32.
    """

    found_inf: Tensor | None = None

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        seed: int = 0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "calls": 0})
        self.seed = seed
        for group in self.param_groups:
            for name, weight in zip(group["names"], group["params"], strict=True):
                if weight.dtype not in (torch.bfloat16, torch.float32):
                    raise SettingError(
                        f"The optimizer adamw_bf16 trains weights in bf16 or fp32, and {name} is {weight.dtype}. "
                        "Load the model in one of those, or choose another optimizer."
                    )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of every weight that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._step_group(group)
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        group["calls"] += 1
        named = [(n, w) for n, w in zip(group["names"], group["params"], strict=True) if w.grad is not None]
        if not named:
            return
        for _, weight in named:
            if not self.state[weight]:
                self.state[weight] = {
                    "step": torch.zeros((), device=weight.device),
                    "exp_avg": torch.zeros_like(weight, dtype=torch.bfloat16),
                    "exp_avg_sq": torch.zeros_like(weight, dtype=torch.bfloat16),
                }
        steps = [self.state[weight]["step"] for _, weight in named]
        tried = torch._foreach_add(steps, 1)
        corrections = [_bias_correction(beta, tried) for beta in group["betas"]]
        keep = None if self.found_inf is None else 1 - self.found_inf.to(steps[0].device)
        if keep is None:
            torch._foreach_copy_(steps, tried)
        else:
            torch._foreach_add_(steps, [keep] * len(steps))
        for (name, weight), correction1, correction2 in zip(named, *corrections, strict=True):
            generator = torch.Generator(weight.device)
            generator.manual_seed(noise_seed(self.seed, group["calls"], name + getattr(weight, "rows", "")))
            self._step_weight(group, weight, correction1, correction2, keep, generator)

    def _step_weight(
        self,
        group: dict[str, Any],
        weight: Tensor,
        correction1: Tensor,
        correction2: Tensor,
        keep: Tensor | None,
        generator: torch.Generator,
    ) -> None:
        """Where ``keep`` is 0, every line below leaves what it writes to as it was."""
        state, gradient = self.state[weight], weight.grad.float()  # type: ignore[union-attr]
        rate, part1, part2 = group["lr"], *(1 - beta for beta in group["betas"])
        if keep is not None:
            gradient = torch.where(keep > 0, gradient, 0.0)
            rate, part1, part2 = rate * keep, part1 * keep, part2 * keep
        mean = state["exp_avg"].float().lerp_(gradient, part1)
        square = state["exp_avg_sq"].float().lerp_(gradient.square(), part2)
        round_into(state["exp_avg"], mean, generator)
        round_into(state["exp_avg_sq"], square, generator)
        update = mean.div_(square.div_(correction2).sqrt_().add_(group["eps"])).mul_(rate / correction1)
        decayed = weight.float() * (1 - rate * group["weight_decay"])
        if weight.dtype == torch.float32:
            weight.copy_(decayed.sub_(update))
        else:
            round_into(weight, decayed.sub_(update), generator)


def _bias_correction(beta: float, steps: tuple[Tensor, ...] | list[Tensor]) -> list[Tensor]:
    """``1 − βᵗ`` of each step count, exact where β is near 1."""
    if beta == 0:
        return [torch.ones_like(step) for step in steps]
    exponents = torch._foreach_mul(steps, math.log(beta))
    torch._foreach_expm1_(exponents)
    torch._foreach_neg_(exponents)
    return list(exponents)


def round_into(target: Tensor, values: Tensor, generator: torch.Generator) -> None:
    """Round fp32 ``values`` by chance to the bf16 ``target``: what bf16 holds exactly stays, the mean is the value.

    bf16 is the upper half of an fp32 number. A random number of the size of the lower half is added to the bits, so
    that it carries over as often as the lower half is large; then the lower half is cut off.
    """
    noise = torch.empty_like(values, dtype=torch.int32).random_(0, 1 << 16, generator=generator)
    target.copy_(noise.add_(values.view(torch.int32)).bitwise_and_(-1 << 16).view(torch.float32))


def noise_seed(seed: int, step: int, name: str) -> int:
    """A generator's seed for one parameter in one step."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {step} {name}".encode(), digest_size=7).digest(), "big")
