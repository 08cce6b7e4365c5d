"""Settings of the objective that make no sense are refused in a sentence that names them."""

import pytest

from training.config.adapter import FullSettings, LoRASettings, LyCORISSettings
from training.config.objective import ObjectiveSettings, ScheduledSamplingSettings
from training.config.settings import TrainSettings
from training.errors import SettingError


@pytest.mark.parametrize(
    "wrong",
    [
        {"flow_schedule_shift": 0},
        {"flow_schedule_shift": -3},
        {"flow_schedule_shift": float("nan")},
        {"flow_sigmoid_scale": 0},
        {"timestep_sampling_offset": float("inf")},
        {"flow_beta_schedule_alpha": 0},
        {"flow_beta_schedule_beta": -1},
        {"flow_cubic_schedule_weights": [0, 0]},
        {"flow_cubic_schedule_weights": [1, -1]},
        {"flow_custom_timesteps": [1001]},
        {"flow_timesteps_mode": "random"},
        {"flow_stratified": True, "flow_custom_timesteps": [0.5], "flow_timesteps_mode": "round-robin"},
        {"sigma_min": -0.1},
        {"sigma_min": 0.5, "sigma_max": 0.5},
        {"sigma_max": 1.1},
        {"loss_type": "l1"},
        {"huber_c": 0},
        {"huber_c": 2},
        {"huber_schedule": "cosine"},
        {"masked_loss_probability": 1.5},
        {"prior_loss_weight": -1},
        {"regularisation_target": "parents"},
        {"input_perturbation": -0.1},
        {"input_perturbation_steps": -1},
        {"caption_dropout_probability": 2},
        {"slider_negative": "sad"},
        {"slider_negative": "sad ", "slider_positive": "sad"},
        {"slider_scale": 0},
    ],
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(SettingError, match=rf"^{next(iter(wrong))} is .*; .+\.$"):
        ObjectiveSettings(**wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_step_offset": -1},
        {"max_step_offset": 1001},
        {"max_step_offset": 21, "grid_steps": 20},
        {"strategy": "late"},
        {"probability": 1.1},
        {"prob_start": -0.1},
        {"prob_end": float("nan")},
        {"ramp_steps": -1},
        {"start_step": -1},
        {"ramp_shape": "sine"},
        {"order": 3},
        {"grid_steps": -1},
        {"grid_shift": 0},
        {"reflexflow_alpha": -1},
        {"reflexflow_beta1": float("inf")},
        {"reflexflow_beta2": -1},
    ],
)
def test_scheduled_sampling_out_of_range_is_refused(wrong):
    with pytest.raises(SettingError, match=rf"^scheduled_sampling_{next(iter(wrong))} is .*; .+\.$"):
        ScheduledSamplingSettings(**wrong)


def test_contradictions_are_refused():
    with pytest.raises(SettingError, match="flow_use_uniform_schedule and flow_use_beta_schedule each choose"):
        ObjectiveSettings(flow_use_uniform_schedule=True, flow_use_beta_schedule=True)
    with pytest.raises(SettingError, match="flow_cubic_schedule_weights and flow_custom_timesteps"):
        ObjectiveSettings(flow_cubic_schedule_weights=[1, 2], flow_custom_timesteps=[0.5])
    with pytest.raises(
        SettingError, match=r"sigma_min 0\.5 and sigma_max 1\.0 have no meaning for flow_custom_timesteps"
    ):
        ObjectiveSettings(flow_custom_timesteps=[0.7], sigma_min=0.5)


def test_whole_numbers_and_lists_are_the_same_settings():
    assert ObjectiveSettings(flow_schedule_shift=6, flow_cubic_schedule_weights=[1, 2]) == ObjectiveSettings(
        flow_schedule_shift=6.0, flow_cubic_schedule_weights=(1.0, 2.0)
    )
    assert str(ObjectiveSettings(flow_schedule_shift=6).flow_schedule_shift) == "6.0"
    assert str(ScheduledSamplingSettings(prob_end=1).prob_end) == "1.0"
    assert ObjectiveSettings(huber_c=2, huber_schedule="constant").huber_c == 2
    assert ObjectiveSettings(flow_custom_timesteps=(0, 1)).custom_sigmas == (0, 1)
    assert ObjectiveSettings(flow_custom_timesteps=(0, 1, 500)).custom_sigmas == (0, 0.001, 0.5)


@pytest.mark.parametrize(
    "adapter", [FullSettings(), LoRASettings(use_dora=True), LyCORISSettings(algo="loha", dora_wd=True)]
)
def test_only_what_has_a_strength_becomes_a_slider(adapter):
    with pytest.raises(SettingError, match=r"^slider_positive is 'happy'; only what has a strength"):
        TrainSettings(adapter=adapter, objective=ObjectiveSettings(slider_positive="happy"))
