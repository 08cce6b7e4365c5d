"""SimpleTuner's ``config.json``: read as its users write it, refused in one sentence, and written back the same."""

import json
import re
import string
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from scripts import settings_page
from training.config.adapter import FullSettings, LoRASettings, LyCORISSettings
from training.config.databackend.keys import GLOBAL
from training.config.objective import ObjectiveSettings, ScheduledSamplingSettings
from training.config.optim import OptimizerSettings
from training.config.precision import PrecisionSettings
from training.config.report import ReportSettings
from training.config.settings import TrainSettings
from training.config.simpletuner.imported import Places
from training.config.simpletuner.read import _OF_DATASETS, parse_config, read_config
from training.config.simpletuner.table import (
    BY_HAND,
    NO_EFFECT,
    OLD_NAMES,
    OPTIONS,
    OWN_BLOCK,
    UNSUPPORTED,
    known_names,
)
from training.config.simpletuner.write import from_settings, with_lycoris, write_config
from training.config.validation import ValidationSettings
from training.errors import SettingError

SAMPLE = json.loads((Path(__file__).parents[1] / "simpletuner" / "config.json").read_text())
LORA = {"model_type": "lora", "max_train_steps": 100, "learning_rate": 1e-4}
LOKR = {"algo": "lokr", "multiplier": 1.0, "linear_dim": 10000, "linear_alpha": 1, "factor": 16, "full_matrix": True,
        "apply_preset": {"target_module": ["Attention"], "module_algo_map": {"Attention": {"factor": 16}}}}  # fmt: skip


def lora(**options):
    return parse_config({**LORA, **options})


def test_the_sample_means_what_it_means_to_simpletuner(tmp_path):
    path = tmp_path / "config" / "lumina2" / "config.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(SAMPLE), encoding="utf-8")
    read = read_config(path)
    assert read.settings() == TrainSettings(
        steps=400_000,
        batch_size=4,
        adapter=LoRASettings(
            16, 16.0, 0.1, "attention", "layers,noise_refiner,context_refiner", qkv="split"
        ),  # SimpleTuner's dropout and targets
        objective=ObjectiveSettings(flow_schedule_auto_shift=True),
        optimizer=OptimizerSettings(
            "adamw_bf16", 1e-4, max_grad_norm=2.0, grad_clip_method="value", use_ema=True, ema_device="cpu"
        ),
        precision=PrecisionSettings("bf16", "int8-torchao", "cpu", gradient_checkpointing=True),
        checkpoint_step_interval=50,
    )
    assert read.places == Places(
        run_name="lumina2-lora",
        output_dir="output/lumina2",
        data_backend_config="config/lumina2/multidatabackend.json",
        pretrained_model_name_or_path="Alpha-VLLM/Lumina-Image-2.0",
    )
    drawn = read.config.validation
    assert (drawn.validation_step_interval, drawn.validation_guidance, drawn.eval_steps_interval) == (50, 4.0, 50)
    assert drawn.cfg_normalization, "diffusers' default, which SimpleTuner draws with"
    assert read.config.report.push_checkpoints_to_hub
    assert read.dataset_defaults == {"vae_batch_size": 1, "seed": 42}
    (line,) = read.report
    assert "lora_dropout 0.1 (ours 0.0); max_grad_norm 2.0 (ours 1.0); grad_clip_method value (ours norm)" in line
    ours = read_config(path, adopt_our_defaults=True)
    assert ours.settings().optimizer.max_grad_norm == 1.0
    assert ours.adapter == LoRASettings(16, 16.0)
    assert not any("adopt_our_defaults" in line for line in ours.report)


# As people write them: what they say, and what has to come of it (by our names) or stand in the report.
WRITTEN = {
    "LoRA": (LORA, {"lora_rank": 16, "lora_dropout": 0.1, "steps": 100}, ""),
    "dashes and texts": (
        {"--model_type": "lora", "--max_train_steps": "100", "--learning_rate": "1e-4", "--use_ema": "true",
         "--lora_alpha": "8.5", "--gradient_checkpointing": "False", "--validation_guidance_rescale": "0.0"},
        {"use_ema": True, "lora_alpha": 8.5, "gradient_checkpointing": False}, "",
    ),
    "LoKr": (
        {**LORA, "lora_type": "lycoris", "lycoris_config": LOKR, "init_lokr_norm": "1e-3"},
        {"lycoris_factor": 16, "lycoris_full_matrix": True, "lycoris_init_lokr_norm": 1e-3}, "",
    ),
    "full": ({"model_type": "full", "max_train_steps": 5, "fuse_optimizer": True, "optimizer": "ao-adamw8bit"},
             {"fused_backward": True, "full_targets": "", "optimizer": "ao-adamw8bit"}, ""),
    "full by default": ({"max_train_steps": 5, "lora_rank": 8}, {"full_blocks": ""}, "no effect: lora_rank"),
    "EMA": ({**LORA, "use_ema": 1, "ema_decay": 0.999, "ema_update_interval": 10, "ema_device": "accelerator",
             "ema_foreach_disable": True},
            {"ema_decay": 0.999, "ema_update_interval": 10}, "No effect on Lumina2 .*ema_foreach_disable"),
    "old names": ({**LORA, "validation_steps": 20, "checkpointing_steps": 30, "save_total_limit": 2,
                   "lora_initialisation_style": "gaussian"},
                  {"validation_step_interval": 20, "checkpoint_step_interval": 30, "checkpoints_total_limit": 2,
                   "lora_init": "gaussian"}, "validation_steps is called validation_step_interval now"),
    "names of flux": ({**LORA, "flux_schedule_shift": 2, "flow_matching_sigmoid_scale": 0.5},
                      {"flow_schedule_shift": 2.0, "flow_sigmoid_scale": 0.5}, "flux_schedule_shift is called"),
    "no shift": ({**LORA, "flow_schedule_shift": 0}, {"flow_schedule_shift": None}, ""),
    "epochs": ({"model_type": "lora", "num_train_epochs": 3, "max_train_steps": 0}, {"batch_size": 4}, "3 epochs"),
    "epochs by default": ({"model_type": "lora"}, {"learning_rate": 4e-7}, "1 epoch:"),
    "both lengths": ({**LORA, "num_train_epochs": 3}, {"steps": 100}, ""),
    "quanto": ({**LORA, "base_model_precision": "int8-quanto"}, {"base_model_precision": "int8-torchao"},
               "int8-quanto is int8-torchao here"),
    "nf4": ({**LORA, "base_model_precision": "nf4-bnb"}, {"base_model_precision": "nf4"}, ""),
    "paged": ({**LORA, "optimizer": "bnb-adamw8bit-paged"}, {"optimizer": "bnb-adamw8bit"}, 'without "-paged"'),
    "stable": ({**LORA, "optimizer": "optimi-stableadamw", "optimizer_config": "weight_decay=0.1"},
               {"max_grad_norm": 0.0, "optimizer_config": "weight_decay=0.1"}, "clips nothing"),
    "cosine": ({**LORA, "lr_scheduler": "cosine_with_warmup", "lr_warmup_steps": 10},
               {"lr_scheduler": "cosine", "lr_warmup_steps": 10}, "goes over the whole run"),
    "scaled rate": ({**LORA, "lr_scale": True, "lr_scale_sqrt": True, "gradient_accumulation_steps": 4},
                    {"learning_rate": 4e-4}, "4 times as written"),
    "compiled": ({**LORA, "dynamo_backend": "inductor"}, {"torch_compile": True}, ""),
    "SNR and the like": ({**LORA, "snr_gamma": 5, "offset_noise": True, "noise_offset": 0.1}, {"loss_type": "l2"},
                         "No effect on Lumina2 .*snr_gamma, offset_noise, noise_offset"),
    "targets": ({**LORA, "peft_lora_target_modules": ["to_k", "to_q", "to_v", "to_out.0", "linear_1", "linear_2",
                                                      "linear_3"]}, {"lora_targets": "attention+ff"}, ""),
    "own targets": ({**LORA, "peft_lora_target_modules": "to_q,attn.to_out.0"},
                    {"lora_targets": r"regex:(.+\.)?(attention\.qkv|attention\.out)"}, "are trained together"),
    "scheduled sampling": (
        {**LORA, "scheduled_sampling_max_step_offset": 10, "scheduled_sampling_probability": 0.3,
         "scheduled_sampling_ramp_steps": 50, "scheduled_sampling_sampler": "unipc"},
        {"scheduled_sampling_prob_start": 0.3}, "scheduled_sampling_sampler"),
    "what is not here": ({**LORA, "mixflow_enabled": True, "controlnet": False, "crepa_lambda": 0.5},
                         {"lora_rank": 16}, "mixflow_enabled is not available here"),
    "the web page's": ({"_metadata": {"name": "x"}, "config": {**{f"--{k}": v for k, v in LORA.items()}}},
                       {"steps": 100}, ""),
    "ours": ({**LORA, "flow_stratified": True, OWN_BLOCK: {"lora_use_rslora": True, "weight_decay": 0.1}},
             {"flow_stratified": True, "lora_use_rslora": True, "weight_decay": 0.1}, ""),
    "validation off": ({**LORA, "validation_disable": "true", "eval_loss_disable": True, "eval_steps_interval": 5},
                       {"validation_step_interval": 0, "disable_benchmark": True, "eval_steps_interval": 0}, ""),
    "nulls": ({**LORA, "lora_alpha": None, "revision": None, "init_lora": "None", "optimizer_config": ""},
              {"lora_alpha": 0.0, "lora_init_lora": ""}, ""),
    "trackers": ({**LORA, "report_to": ["wandb", "tensorboard"], "tracker_run_name": "me/run one"},
                 {"report_to": "wandb,tensorboard", "tracker_run_name": "run one"}, ""),
    "hub": ({**LORA, "hub_model_id": "me/my-lora", "push_to_hub": "true"},
            {"tracker_run_name": "my-lora", "push_to_hub": True}, ""),
}  # fmt: skip


@pytest.mark.parametrize("name", WRITTEN)
def test_as_people_write_them(name):
    options, expected, said = WRITTEN[name]
    read = parse_config(options)
    assert {key: read.values[key] for key in expected} == pytest.approx(expected)
    report = "\n".join(read.report)
    if said:
        assert re.search(said, report), report
    assert ("steps" in read.values) == (read.epochs == 0)


# What is wrong, and what the sentence has to name beside the file: the option and the remedy.
BROKEN = {
    "unknown": ({**LORA, "learning_rat": 1}, 'no option "learning_rat"; did you mean "learning_rate"'),
    "unknown of ours": ({**LORA, OWN_BLOCK: {"flow_stratifed": 1}}, 'did you mean "flow_stratified"'),
    "nonsense": ({**LORA, "xyzzy": 1}, 'no option "xyzzy"; take it out'),
    "text for a number": ({**LORA, "learning_rate": "fast"}, "learning_rate is 'fast'; a number is wanted"),
    "half a step": ({**LORA, "max_train_steps": 10.5}, "max_train_steps is 10.5; a whole number is wanted"),
    "truth": ({**LORA, "use_ema": "maybe"}, "use_ema is 'maybe'; true or false is wanted"),
    "rank": ({**LORA, "lora_rank": 0}, "lora_rank is 0; choose at least 1"),
    "alpha": ({**LORA, "lora_alpha": -1}, "lora_alpha is -1.0; choose a positive number"),
    "dropout": ({**LORA, "lora_dropout": 1}, "lora_dropout is 1.0; choose at least 0 and less than 1"),
    "loftq": ({**LORA, "lora_init_type": "loftq"}, "lora_init_type is loftq.*pissa is the nearest"),
    "optimiser": ({**LORA, "optimizer": "adamw8bit"}, "optimizer is 'adamw8bit'; do you mean ao-adamw8bit"),
    "soap": ({**LORA, "optimizer": "soap"}, "optimizer is 'soap'; do you mean"),
    "one beta": ({**LORA, "optimizer_beta1": 0.9}, "optimizer_beta1 is 0.9 and .*both or neither"),
    "scheduler": ({**LORA, "lr_scheduler": "exponential"}, "lr_scheduler is 'exponential'; choose one of constant"),
    "warm-up": ({**LORA, "lr_warmup_steps": 500}, "lr_warmup_steps is 500; the run has 100 optimiser steps"),
    "no length": ({**LORA, "max_train_steps": 0, "num_train_epochs": 0}, "max_train_steps and num_train_epochs are"),
    "family": ({**LORA, "model_family": "flux"}, "model_family is 'flux', and only lumina2"),
    "flavour": ({**LORA, "model_flavour": "3.0"}, "model_flavour is '3.0'; choose one of 2.0, neta-lumina"),
    "kind": ({**LORA, "model_type": "embedding"}, "model_type is 'embedding'; choose one of lora, full"),
    "kind of LoRA": ({**LORA, "lora_type": "loha"}, "lora_type is 'loha'; choose one of standard, lycoris"),
    "no LyCORIS file": ({**LORA, "lora_type": "lycoris"}, "lycoris_config is 'config/lycoris_config.json', which"),
    "LyCORIS option": ({**LORA, "lora_type": "lycoris", "lycoris_config": {**LOKR, "factr": 1}},
                       "no key 'factr'; did you mean 'factor'"),
    "targets": ({**LORA, "peft_lora_target_modules": ["to_qq"]}, "peft_lora_target_modules has 'to_qq'"),
    "precision": ({**LORA, "base_model_precision": "int2-quanto"}, "base_model_precision is 'int2-quanto'; choose"),
    "quantised full": ({"max_train_steps": 5, "base_model_precision": "int8-torchao"},
                       "base_model_precision is int8-torchao in a full fine-tune"),
    "mixed": ({**LORA, "mixed_precision": "fp8"}, "mixed_precision is 'fp8'; choose one of auto, bf16"),
    "two schedules": ({**LORA, "flow_use_beta_schedule": True, "flow_use_uniform_schedule": True},
                      "flow_use_uniform_schedule and flow_use_beta_schedule"),
    "loss": ({**LORA, "loss_type": "l1"}, "loss_type is 'l1'; choose one of l2, huber"),
    "list": ({**LORA, "flow_cubic_schedule_weights": "1,a"}, "flow_cubic_schedule_weights is .*a list of numbers"),
    "tracker": ({**LORA, "report_to": "swanlab"}, "report_to is 'swanlab'; choose one of simpletuner"),
    "run name": ({**LORA, "tracker_run_name": "a:b"}, "tracker_run_name: The run name 'a:b' cannot be a folder"),
    "environment": ({**LORA, "output_dir": "{env:NO_SUCH_VARIABLE}/x"}, "NO_SUCH_VARIABLE is not set; set it"),
    "twice": ({**LORA, "seed": 1, "--seed": 2}, "seed is there twice, as 1 and 2; keep one"),
    "size": ({**LORA, "validation_resolution": "big"}, "validation_resolution is 'big'; write sizes"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_one_sentence_names_file_option_and_remedy(name):
    options, sentence = BROKEN[name]
    with pytest.raises(SettingError, match=sentence) as error:
        parse_config(options, "my/config.json")
    assert str(error.value).count("my/config.json") == 1
    assert re.search(r"; (?:\w|$)|\. [A-Z]|, and ", str(error.value)), "a remedy behind what is wrong"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b'{"seed": 1\n"x": 2}', "config.json, line 2, is not JSON"),
        (b"\xff\xfe{", "cannot be read .* UTF-8"),
        (b"[1]", "has to hold one block"),
        (None, "does not exist; name a config.json"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, content, sentence):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(SettingError, match=sentence):
        read_config(tmp_path / "config.json")


def test_comments_variables_overrides_and_neighbouring_files(tmp_path, monkeypatch):
    monkeypatch.setenv("OUT", "/data")
    (tmp_path / "lokr.json").write_text(json.dumps(LOKR) + "// as recommended", encoding="utf-8")
    (tmp_path / "prompts.json").write_text('{"cat": "a cat"}', encoding="utf-8")
    (tmp_path / "start.safetensors").touch()
    path = tmp_path / "config.json"
    path.write_text(
        '{"model_type": "lora", # what\n"output_dir": "{env:OUT}/x", /* where */ "lora_type": "lycoris",'
        '"lycoris_config": "lokr.json", "user_prompt_library": "prompts.json", "max_train_steps": 7,}'
    )
    read = read_config(path)
    assert (read.places.output_dir, read.adapter.factor) == ("/data/x", 16)
    assert read.config.validation.prompts()[1].text == "a cat"
    assert read.places.run_name == tmp_path.name, "else the folder's name"
    changed = read_config(path, overrides={"learning_rate": "1e-5", "lora_type": "standard", "seed": 3,
                                           "init_lora": "start.safetensors"})  # fmt: skip
    assert (changed.values["learning_rate"], changed.values["seed"]) == (1e-5, 3)
    assert changed.adapter.init_lora == str(tmp_path / "start.safetensors")
    with pytest.raises(SettingError, match="learning_rat"):
        read_config(path, overrides={"learning_rat": 1})


def test_webhooks_keep_their_secret(monkeypatch):
    monkeypatch.setenv("HOOK_SECRET", "1234")
    hook = {"webhook_type": "raw", "callback_url": "https://example.com/{env:HOOK_SECRET}"}
    read = lora(webhook_config=hook)
    assert read.values["webhook_config"] == hook, "the secret is filled in where it is used, and written nowhere"
    assert write_config(read).config["webhook_config"] == hook
    written = write_config(lora(webhook_config=[{**hook, "callback_url": "https://example.com/1234"}]))
    assert "1234" not in json.dumps(written.config)
    assert "webhook_config is left out" in written.notes[-1]


# Every option acts: another value than SimpleTuner's own changes what is understood.
OTHER = {"text": "x", "commas": "tensorboard", "int": 3, "float": 0.25, "names": ["to_q"], "numbers": [0.5, 0.25]}
OTHER_OF = {
    "resume_from_checkpoint": "checkpoint-5",
    "model_family": None,  # there is one
    "model_flavour": "neta-lumina",
    "model_type": "lora",
    "lora_type": ("lycoris", {"lycoris_config": LOKR}),
    "lora_init_type": "gaussian",
    "lycoris_config": ({**LOKR, "factor": 4}, {"lora_type": "lycoris"}),
    "init_lokr_norm": (1e-3, {"lora_type": "lycoris", "lycoris_config": LOKR}),
    "optimizer": "prodigy",
    "optimizer_config": "eps=1e-5",
    "optimizer_beta1": (0.8, {"optimizer_beta2": 0.9}),
    "optimizer_beta2": (0.8, {"optimizer_beta1": 0.9}),
    "grad_clip_method": "norm",
    "fuse_optimizer": (True, {"model_type": "full"}),
    "lr_scheduler": "cosine",
    "lr_end": 1e-6,
    "lr_scale": True,
    "lr_scale_sqrt": (True, {"lr_scale": True}),
    "ema_device": "accelerator",
    "flow_timesteps_mode": "round-robin",
    "loss_type": "huber",
    "huber_schedule": "constant",
    "scheduled_sampling_strategy": "biased_late",
    "scheduled_sampling_ramp_shape": "cosine",
    "scheduled_sampling_order": 2,
    "mixed_precision": "no",
    "base_model_precision": "int8-torchao",
    "quantize_via": "cpu",
    "gradient_checkpointing_backend": "unsloth",
    "dynamo_backend": "inductor",
    "resolution_type": "area",
    "data_backend_sampling": "uniform",
    "validation_guidance": 3.0,
    "validation_resolution": "512",
    "ema_validation": "none",
    "evaluation_type": "clip",
    "eval_loss_disable": (True, {"eval_steps_interval": 5}),
    "validation_disable": True,
    "max_train_steps": (3, {}),
    "num_train_epochs": (3, {"max_train_steps": 0}),
    "learning_rate": (0.25, {}),
    "webhook_config": {"webhook_type": "raw", "callback_url": "https://example.com"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_acts(name):
    option = OPTIONS[name]
    other = OTHER_OF.get(name, (not option.default) if option.kind == "bool" else OTHER.get(option.kind))
    if other is None:
        pytest.skip("it has one value only")
    other, also = other if isinstance(other, tuple) else (other, {})
    before = {key: value for key, value in {**LORA, "optimizer": "torch-adamw", **also}.items() if key != name}
    if name == "optimizer":
        before["learning_rate"] = 0.5
    if name.startswith("optimizer_beta"):
        before[name] = 0.5
    if name == "lycoris_config":
        before[name] = LOKR
    read = parse_config({**before, name: other})
    assert read != parse_config(before)
    if name != "webhook_config":  # whose address is written nowhere
        again = parse_config(json.loads(json.dumps(with_lycoris(write_config(read)))))
        assert (again.settings(7), again.places, again.epochs) == (read.settings(7), read.places, read.epochs)
        assert (again.config.validation, again.config.report) == (read.config.validation, read.config.report)
        assert again.datasets == read.datasets


# Every option that SimpleTuner's own documents name for Lumina2, by what it is about.
NAMED = """
model_family model_flavour model_type pretrained_model_name_or_path pretrained_transformer_model_name_or_path
pretrained_vae_model_name_or_path revision tokenizer_max_length vae_dtype vae_batch_size vae_cache_disable
vae_cache_ondemand vae_cache_clear_each_epoch vae_cache_scan_behaviour lora_type lora_rank lora_alpha lora_dropout
lora_init_type lora_format use_dora init_lora init_lora_step peft_lora_target_modules lycoris_config init_lokr_norm
fuse_qkv_projections flow_schedule_shift flow_schedule_auto_shift flow_sigmoid_scale flow_use_uniform_schedule
flow_use_beta_schedule flow_beta_schedule_alpha flow_beta_schedule_beta flow_cubic_schedule_weights
flow_custom_timesteps flow_timesteps_mode mixflow_enabled mixflow_gamma snr_gamma use_soft_min_snr snr_weight
offset_noise prediction_type disable_segmented_timestep_sampling input_perturbation input_perturbation_steps loss_type
huber_c huber_schedule masked_loss_probability caption_dropout_probability optimizer optimizer_config optimizer_beta1
optimizer_beta2 optimizer_release_gradients optimizer_cpu_offload_method learning_rate lr_scheduler lr_warmup_steps
lr_num_cycles lr_power lr_end lr_scale lr_scale_sqrt max_grad_norm grad_clip_method use_ema ema_decay
ema_update_interval ema_device ema_cpu_only ema_foreach_disable ema_warmup_steps ema_validation base_model_precision
quantize_via quantization_config i_know_what_i_am_doing base_model_default_dtype mixed_precision
gradient_checkpointing gradient_checkpointing_interval gradient_checkpointing_backend
gradient_checkpointing_segment_stride musubi_blocks_to_swap ramtorch validation_step_interval validation_steps
validation_epoch_interval validate_after_step validate_after_epoch validation_disable disable_benchmark
validation_disable_unconditional validation_prompt_library user_prompt_library validation_prompt
validation_negative_prompt validation_noise_scheduler validation_guidance validation_guidance_rescale
validation_num_inference_steps validation_lycoris_strength validation_seed validation_seed_source validation_randomize
num_validation_images validation_resolution validation_adapter_path validation_adapter_name
validation_adapter_strength validation_adapter_mode validation_adapter_config evaluation_type eval_steps_interval
eval_epoch_interval num_eval_images eval_timesteps eval_dataset_pooling eval_loss_disable num_train_epochs
max_train_steps strict_epoch_limit train_batch_size gradient_accumulation_steps seed checkpoint_step_interval
checkpointing_steps checkpoint_epoch_interval checkpoints_total_limit checkpointing_rolling_steps
resume_from_checkpoint disable_bucket_pruning report_to tracker_project_name tracker_run_name push_to_hub
push_checkpoints_to_hub push_to_hub_background hub_model_id model_card_private webhook_config publishing_config
post_checkpoint_script post_upload_script validation_external_script disk_low_threshold data_backend_config
data_backend_sampling output_dir write_batch_size text_encoder_batch_size text_cache_ondemand text_cache_disable
override_dataset_config skip_file_discovery preserve_data_backend_cache resolution resolution_type minimum_image_size
maximum_image_size target_downsample_size aspect_bucket_rounding delete_unwanted_images max_upscale_threshold
caption_strategy instance_prompt prepend_instance_prompt only_instance_prompt allow_dataset_oversubscription
cache_dir_text cache_dir_vae controlnet twinflow_enabled deepspeed_config fsdp_enable
scheduled_sampling_max_step_offset scheduled_sampling_strategy scheduled_sampling_probability
scheduled_sampling_prob_start scheduled_sampling_prob_end scheduled_sampling_ramp_steps scheduled_sampling_start_step
scheduled_sampling_ramp_shape scheduled_sampling_sampler scheduled_sampling_order scheduled_sampling_reflexflow
scheduled_sampling_reflexflow_alpha scheduled_sampling_reflexflow_beta1 scheduled_sampling_reflexflow_beta2
"""


def test_every_named_option_is_in_the_table():
    assert sorted(set(NAMED.split()) - known_names()) == []


def test_there_are_enough_of_both():
    assert len(WRITTEN) >= 25
    assert len(BROKEN) >= 30


def test_the_table_is_whole():
    silent = [name for names in NO_EFFECT.values() for name in names]
    names = [*OPTIONS, *OLD_NAMES, *silent, *UNSUPPORTED]
    assert len(names) == len(set(names)) == len(known_names() | set(names)), "no name stands twice"
    everything = TrainSettings().written().keys() | {"batch_size"} | vars(Places()).keys()
    everything |= vars(ValidationSettings()).keys() | vars(ReportSettings()).keys() | _OF_DATASETS
    assert {o.ours for o in OPTIONS.values()} - everything - {BY_HAND} == set()
    by_hand = {name for name, option in OPTIONS.items() if option.ours == BY_HAND}
    assert by_hand.isdisjoint(o.ours for o in OPTIONS.values())
    assert _OF_DATASETS == GLOBAL, "what config.json may tell of datasets"


# And back


def some(**kinds):
    return st.fixed_dictionaries({}, optional=kinds)


def numbers(low, high):
    return st.floats(low, high, allow_nan=False).map(lambda value: float(f"{value:.4g}"))


loras = some(
    rank=st.integers(1, 64), alpha=numbers(0, 64), dropout=numbers(0, 0.9), use_rslora=st.booleans(),
    targets=st.sampled_from(["attention", "attention+ff", "blocks", "all", "regex:layers.+"]),
    blocks=st.sampled_from(["", "0-3", "layers,noise_refiner,context_refiner"]),
    qkv=st.sampled_from(["fused", "split"]), init=st.sampled_from(["default", "gaussian", "pissa"]),
    use_dora=st.booleans(), loraplus_lr_ratio=numbers(0.5, 16),
).map(lambda values: LoRASettings(**values))  # fmt: skip
lycoris = st.sampled_from(
    [LyCORISSettings(), LyCORISSettings("loha", linear_dim=8, dropout=0.1, qkv="split"),
     LyCORISSettings("lokr", full_matrix=True, init_lokr_norm=0.001, apply_preset=LOKR["apply_preset"])]
)  # fmt: skip
objectives = some(
    flow_schedule_auto_shift=st.booleans(), flow_schedule_shift=st.none() | numbers(0.5, 8),
    flow_use_uniform_schedule=st.booleans(), flow_stratified=st.booleans(), sigma_min=numbers(0, 0.4),
    flow_sigmoid_scale=numbers(0.1, 3), loss_type=st.sampled_from(["l2", "huber"]), huber_c=numbers(0.01, 1),
    prior_loss_weight=numbers(0, 2), input_perturbation=numbers(0, 1), caption_dropout_probability=numbers(0, 1),
    scheduled_sampling=some(
        max_step_offset=st.integers(0, 9), probability=numbers(0, 1), prob_start=numbers(0, 1),
        ramp_steps=st.integers(0, 9), order=st.sampled_from([1, 2]), grid_steps=st.integers(10, 30),
        reflexflow=st.booleans(),
    ).map(lambda values: ScheduledSamplingSettings(**values)),
).map(lambda values: ObjectiveSettings(**values))  # fmt: skip
optimisers = some(
    optimizer=st.sampled_from(["adamw_bf16", "torch-adamw", "adafactor", "optimi-stableadamw", "bnb-lion8bit"]),
    learning_rate=numbers(1e-5, 1e-2), weight_decay=st.none() | numbers(0, 1), max_grad_norm=numbers(0, 4),
    grad_clip_method=st.sampled_from(["norm", "value"]), gradient_accumulation_steps=st.integers(1, 4),
    lr_scheduler=st.sampled_from(["constant", "cosine", "polynomial"]), lr_warmup_steps=st.integers(0, 5),
    use_ema=st.booleans(), ema_decay=numbers(0, 0.99), ema_device=st.sampled_from(["cpu", "accelerator"]),
    optimizer_config=st.sampled_from(["", "eps=1e-06"]),
).map(lambda values: OptimizerSettings(**values))  # fmt: skip
precisions = some(
    mixed_precision=st.sampled_from(["auto", "bf16", "no"]), torch_compile=st.booleans(),
    base_model_precision=st.sampled_from(["no_change", "int8wo", "int8-torchao", "nf4"]),
    gradient_checkpointing=st.sampled_from([None, True, False]), quantize_via=st.sampled_from(["cpu", "accelerator"]),
).map(lambda values: PrecisionSettings(**values))  # fmt: skip
runs = some(
    steps=st.integers(10, 10**6), batch_size=st.integers(1, 64), seed=st.integers(0, 2**63), objective=objectives,
    optimizer=optimisers, precision=precisions, disable_bucket_pruning=st.booleans(),
    checkpoint_step_interval=st.integers(1, 1000), checkpoints_total_limit=st.integers(1, 9),
)  # fmt: skip
nothing = ("", "None", "null")  # as SimpleTuner writes them
names = st.text(string.ascii_letters + "- _", min_size=1, max_size=12).map(str.strip).filter(lambda n: n not in nothing)


@settings(max_examples=100, deadline=None, phases=(Phase.explicit, Phase.generate))
@given(
    runs,
    loras | lycoris | st.just(FullSettings("attention", "0-3")),
    names,
    st.sampled_from(["superior", "none"]),
)
def test_what_is_written_is_read_back(values, adapter, name, system_prompt):
    if isinstance(adapter, FullSettings):
        values = {**values, "precision": PrecisionSettings()}
    chosen = TrainSettings(**values, adapter=adapter)
    places = Places(name, "out/x", "data.json", system_prompt=system_prompt, tokenizer_max_length=200,
                    pretrained_model_name_or_path="models/nano")  # fmt: skip
    others = vars(ValidationSettings(validation_prompt="a cat", keep_best=False)) | {"report_to": "tensorboard"}
    written = write_config(from_settings(chosen, others, places))
    plain = json.loads(json.dumps(with_lycoris(written)))
    read = parse_config(plain)
    assert read.settings() == chosen
    assert read.places == places
    assert read.config.validation == ValidationSettings(validation_prompt="a cat")
    assert read.config.report == ReportSettings(report_to="tensorboard", tracker_run_name=name)
    again = write_config(read)
    assert again.config == written.config
    assert parse_config(with_lycoris(again)) == read


@pytest.mark.parametrize("name", WRITTEN)
def test_what_was_read_is_written_back(name):
    read = parse_config(WRITTEN[name][0])
    written = write_config(read)
    again = parse_config(json.loads(json.dumps(with_lycoris(written))))
    assert replace(again, values={}) == replace(read, values={})
    assert again.values == read.values | {n: v for n, v in again.values.items() if n not in read.values}
    assert set(written.config) <= set(OPTIONS) | {OWN_BLOCK}, "nothing at the top that SimpleTuner does not know"


def test_simpletuner_is_told_what_it_would_not_do():
    chosen = TrainSettings(optimizer=OptimizerSettings("adafactor"), objective=ObjectiveSettings(sigma_min=0.1))
    notes = write_config(from_settings(chosen)).notes
    assert len(notes) == 3
    assert "adamw_bf16 there" in notes[0]
    assert "query, key and value apart" in notes[1]
    assert "skips it: lora_blocks, sigma_min" in notes[2]


@pytest.mark.parametrize("language", settings_page.PAGES)
def test_the_page_of_settings_is_the_tables(language):
    """Where it is not: python -m scripts.settings_page"""
    told = settings_page.words()
    reasons = {f"={reason}" for reason in NO_EFFECT}
    assert set(told) == set(OPTIONS) | set(settings_page.own_names()) | reasons, "each option is described once"
    assert all(english and chinese for english, chinese in told.values())
    assert settings_page.PAGES[language].read_text(encoding="utf-8") == settings_page.page(language)


def test_defaults_that_differ_are_written_out():
    config = write_config(from_settings(TrainSettings())).config
    assert (config["lora_dropout"], config["max_grad_norm"], config["grad_clip_method"]) == (0, 1, "norm")
    assert Path(config.get("output_dir", "")) == Path()
