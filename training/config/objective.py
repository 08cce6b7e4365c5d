"""What the network is taught: at which noise levels, with which loss, on whose latents. SimpleTuner's names."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from ..errors import SettingError
from .checks import one_of, require

LOSS_TYPES = ("l2", "huber", "smooth_l1")
HUBER_SCHEDULES = ("snr", "constant", "exponential")
TIMESTEPS_MODES = ("fixed-list", "round-robin")
REGULARISATION_TARGETS = ("teacher", "pictures")
STRATEGIES = ("uniform", "biased_early", "biased_late")
RAMP_SHAPES = ("linear", "cosine")


def _as_floats(settings: Any) -> None:
    """3 and 3.0 are the same setting."""
    for field in fields(settings):
        value = getattr(settings, field.name)
        if field.type.startswith("tuple[float"):
            object.__setattr__(settings, field.name, tuple(float(each) for each in value))
        elif field.type.startswith("float") and value is not None:
            object.__setattr__(settings, field.name, float(value))


@dataclass(frozen=True)
class ScheduledSamplingSettings:
    """Training on latents that the network has denoised itself. Options are called ``scheduled_sampling_…``.

    Raises:
        SettingError: a value is out of range.
    """

    max_step_offset: int = 0  # from how many steps above its noise level a sample is denoised at most; 0: off
    strategy: str = "uniform"  # the offset up to that: even, rather small ("biased_early") or rather large
    probability: float = 0.0  # of a sample to be denoised by the network, where there is no ramp
    prob_start: float = 0.0  # with ramp_steps: from this …
    prob_end: float = 0.5  # … to this
    ramp_steps: int = 0  # training steps from start_step on; 0: no ramp
    start_step: int = 0  # training steps before it see none of this
    ramp_shape: str = "linear"
    order: int = 1  # 1: Euler; 2: Heun, with two forward passes a step
    grid_steps: int = 0  # an offset counts steps of an inference with so many steps; 0: thousandths of sigma
    grid_shift: float = 6.0  # the shift of that inference
    reflexflow: bool = True  # ReflexFlow's loss on such samples
    reflexflow_alpha: float = 1.0  # how much more where the own error is large
    reflexflow_beta1: float = 10.0  # weight of the direction to the picture
    reflexflow_beta2: float = 1.0  # weight of the loss itself

    def __post_init__(self) -> None:
        _as_floats(self)

        def check(name: str, holds: bool, remedy: str) -> None:
            require(holds, f"scheduled_sampling_{name}", getattr(self, name), remedy)

        for name, choices in (("strategy", STRATEGIES), ("ramp_shape", RAMP_SHAPES)):
            one_of(f"scheduled_sampling_{name}", getattr(self, name), choices)
        for name in ("probability", "prob_start", "prob_end"):
            check(name, 0 <= getattr(self, name) <= 1, "choose 0 to 1")
        for name in ("ramp_steps", "start_step"):
            check(name, getattr(self, name) >= 0, "choose a number of training steps, or 0")
        for name in ("reflexflow_alpha", "reflexflow_beta1", "reflexflow_beta2"):
            check(name, 0 <= getattr(self, name) < math.inf, "choose 0 or more")
        check("order", self.order in (1, 2), "choose 1 for Euler or 2 for Heun")
        check("grid_steps", 0 <= self.grid_steps <= 1000, "choose 1 to 1000 inference steps, or 0 for thousandths")
        check("grid_shift", 0 < self.grid_shift < math.inf, "choose the shift of the inference, 6 for Lumina2")
        longest = self.grid_steps or 1000
        check("max_step_offset", 0 <= self.max_step_offset <= longest, f"choose 0 (off) to {longest} steps")


@dataclass(frozen=True)
class ObjectiveSettings:
    """Noise levels and the loss. Parameters of a distribution, loss or schedule that is not chosen have no effect.

    Raises:
        SettingError: a value is out of range, or two settings contradict each other.
    """

    # Noise levels: a distribution, then the shift, then the range.
    flow_schedule_auto_shift: bool = True  # by the size of the picture; wins over flow_schedule_shift
    flow_schedule_shift: float | None = 3.0  # None: no shift
    flow_sigmoid_scale: float = 1.0  # of the logit-normal distribution, which is used where no other is chosen
    timestep_sampling_offset: float = 0.0  # of its normal draws: above 0 towards noise
    flow_use_uniform_schedule: bool = False
    flow_use_beta_schedule: bool = False
    flow_beta_schedule_alpha: float = 2.0
    flow_beta_schedule_beta: float = 2.0
    flow_cubic_schedule_weights: tuple[float, ...] = ()  # the density at as many levels, evenly from 0 to 1
    flow_custom_timesteps: tuple[float, ...] = ()  # sigmas where none is above 1, else timesteps of 1000; no shift
    flow_timesteps_mode: str = "fixed-list"  # one of them by chance, or in turn ("round-robin")
    flow_stratified: bool = False  # the levels of a batch are spread evenly over the distribution
    sigma_min: float = 0.0  # only levels from here, after the shift …
    sigma_max: float = 1.0  # … to here, as likely to each other as without the range
    # Loss
    loss_type: str = "l2"
    huber_c: float = 0.1
    huber_schedule: str = "snr"
    sigma_squared_weighting: bool = False  # the error of the picture that is foreseen, as ComfyUI's own trainer
    masked_loss_probability: float = 1.0  # of a sample that has a mask to be weighted with it
    prior_loss_weight: float = 1.0  # of regularisation data
    regularisation_target: str = "teacher"  # what the base model says of them, or the pictures themselves
    # What the network sees
    input_perturbation: float = 0.0  # more noise in what it sees, not in what it has to say
    input_perturbation_steps: int = 0  # it falls to 0 over so many training steps; 0: it stays
    caption_dropout_probability: float = 0.1  # the share of samples whose caption is the empty text
    # A slider: not the pictures are learned, but on them the way between two prompts
    slider_positive: str = ""  # where the adapter leads at strength 1; empty: no slider
    slider_negative: str = ""  # where it leads at strength -1
    slider_scale: float = 1.0  # so many times the way from the negative prompt to the positive one
    scheduled_sampling: ScheduledSamplingSettings = ScheduledSamplingSettings()

    def __post_init__(self) -> None:
        _as_floats(self)

        def check(name: str, holds: bool, remedy: str) -> None:
            require(holds, name, getattr(self, name), remedy)

        one_of("flow_timesteps_mode", self.flow_timesteps_mode, TIMESTEPS_MODES)
        one_of("loss_type", self.loss_type, LOSS_TYPES)
        one_of("huber_schedule", self.huber_schedule, HUBER_SCHEDULES)
        one_of("regularisation_target", self.regularisation_target, REGULARISATION_TARGETS)
        chosen = [
            name
            for name in (
                "flow_use_uniform_schedule",
                "flow_use_beta_schedule",
                "flow_cubic_schedule_weights",
                "flow_custom_timesteps",
            )
            if getattr(self, name)
        ]
        if len(chosen) > 1:
            raise SettingError(f"{' and '.join(chosen)} each choose the noise levels; leave all but one out.")
        shift = self.flow_schedule_shift
        check("flow_schedule_shift", shift is None or 0 < shift < math.inf, "choose a number above 0, or none")
        for name in ("flow_sigmoid_scale", "flow_beta_schedule_alpha", "flow_beta_schedule_beta"):
            check(name, 0 < getattr(self, name) < math.inf, "choose a number above 0")
        check("timestep_sampling_offset", math.isfinite(self.timestep_sampling_offset), "choose about -1 to 1")
        weights = self.flow_cubic_schedule_weights
        good = all(0 <= weight < math.inf for weight in weights) and (not weights or sum(weights) > 0)
        check("flow_cubic_schedule_weights", good, "choose numbers from 0 on, one of them above 0")
        good = all(0 <= each <= 1000 for each in self.flow_custom_timesteps)
        check("flow_custom_timesteps", good, "choose sigmas from 0 to 1, or timesteps up to 1000")
        in_turn = bool(self.flow_custom_timesteps) and self.flow_timesteps_mode == "round-robin"
        check("flow_stratified", not (self.flow_stratified and in_turn), "timesteps in turn are spread already: off")
        check("sigma_min", 0 <= self.sigma_min < self.sigma_max, f"choose 0 to below sigma_max ({self.sigma_max})")
        check("sigma_max", self.sigma_max <= 1, "choose at most 1, which is pure noise")
        if self.flow_custom_timesteps and (self.sigma_min > 0 or self.sigma_max < 1):
            raise SettingError(
                f"sigma_min {self.sigma_min} and sigma_max {self.sigma_max} have no meaning for "
                "flow_custom_timesteps; leave them at 0 and 1 and list the timesteps that you want."
            )
        largest = 1000 if self.huber_schedule == "constant" else 1
        check("huber_c", 0 < self.huber_c <= largest, f"choose above 0 to {largest}, such as 0.1")
        for name in ("masked_loss_probability", "caption_dropout_probability"):
            check(name, 0 <= getattr(self, name) <= 1, "choose 0 to 1")
        for name in ("prior_loss_weight", "input_perturbation", "input_perturbation_steps"):
            check(name, 0 <= getattr(self, name) < math.inf, "choose 0 or more")
        for name in ("slider_positive", "slider_negative"):
            object.__setattr__(self, name, getattr(self, name).strip())
        remedy = "a slider needs a slider_positive that is another prompt"
        check("slider_negative", not self.slider_negative or bool(self.slider_positive), remedy)
        check("slider_negative", not self.slider or self.slider_positive != self.slider_negative, remedy)
        check("slider_scale", 0 < self.slider_scale < math.inf, "choose a number above 0, such as 1")

    @property
    def slider(self) -> tuple[str, str] | None:
        """Its positive and its negative prompt."""
        return (self.slider_positive, self.slider_negative) if self.slider_positive else None

    @property
    def custom_sigmas(self) -> tuple[float, ...]:
        """``flow_custom_timesteps`` as noise levels."""
        unit = 1 if max(self.flow_custom_timesteps, default=0) <= 1 else 1000
        return tuple(each / unit for each in self.flow_custom_timesteps)
