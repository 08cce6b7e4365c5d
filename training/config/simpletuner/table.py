"""Every option of SimpleTuner's ``config.json`` that a Lumina2 configuration may carry, and what becomes of it here.

Names and defaults are those of SimpleTuner 2026-08. ``docs/settings.md`` is made from this table.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from typing import Any

OWN_BLOCK = "lumina2_trainer"  # settings that SimpleTuner has no option for; it skips a block that it does not know
BY_HAND = "*"  # what becomes of it depends on other options, too


@dataclass(frozen=True)
class Option:
    """One option that has an effect here."""

    name: str  # SimpleTuner's
    kind: str  # of its value: see ``values.KINDS``
    default: Any  # SimpleTuner's
    ours: str  # the name of our setting, or BY_HAND
    section: str
    old: tuple[str, ...] = ()  # what earlier versions called it


# name, kind, SimpleTuner's default, our name ("=": the same, "*": read together with others), earlier names
_USED = {
    "run": """
data_backend_config                     text    ''                       =
output_dir                              text    'simpletuner-results'    =
resume_from_checkpoint                  text    'latest'                 =
max_train_steps                         int     0                        *
num_train_epochs                        int     1                        *
train_batch_size                        int     4                        batch_size
gradient_accumulation_steps             int     1                        =
seed                                    int     None                     *
checkpoint_step_interval                int     500                      =    checkpointing_steps
checkpoints_total_limit                 int     5                        =    save_total_limit
""",
    "model": """
model_family                            text    'lumina2'                *
model_flavour                           text    '2.0'                    *    model_flavor
model_type                              text    'full'                   *
pretrained_model_name_or_path           text    ''                       =
pretrained_transformer_model_name_or_path text  ''                       =
pretrained_vae_model_name_or_path       text    ''                       =    vae_path
revision                                text    ''                       =
tokenizer_max_length                    int     256                      =
""",
    "adapter": """
lora_type                               text    'standard'               *
lora_rank                               int     16                       =
lora_alpha                              float   None                     =
lora_dropout                            float   0.1                      =
lora_init_type                          text    'default'                lora_init    lora_initialisation_style
use_dora                                bool    False                    lora_use_dora
init_lora                               text    ''                       lora_init_lora
peft_lora_target_modules                names   ()                       *
fuse_qkv_projections                    bool    False                    *    fused_qkv_projections
lycoris_config                          block   None                     *
init_lokr_norm                          float   None                     *
""",
    "optimiser": """
optimizer                               text    'adamw_bf16'             *
learning_rate                           float   4e-07                    *
optimizer_config                        text    ''                       =
optimizer_beta1                         float   None                     =
optimizer_beta2                         float   None                     =
max_grad_norm                           float   2.0                      *
grad_clip_method                        text    'value'                  =
fuse_optimizer                          bool    False                    fused_backward    optimizer_release_gradients
lr_scheduler                            text    'constant_with_warmup'   =
lr_warmup_steps                         int     0                        =
lr_num_cycles                           int     1                        =
lr_power                                float   0.8                      =
lr_end                                  float   4e-07                    =
lr_scale                                bool    False                    *
lr_scale_sqrt                           bool    False                    *
use_ema                                 bool    False                    =
ema_decay                               float   0.995                    =
ema_update_interval                     int     1                        =
ema_warmup_steps                        int     0                        =
ema_device                              text    'cpu'                    =
""",
    "objective": """
flow_schedule_auto_shift                bool    False                    =    flux_schedule_auto_shift
flow_schedule_shift                     float   3.0                      =    flux_schedule_shift
flow_sigmoid_scale                      float   1.0                      =    flow_matching_sigmoid_scale
flow_use_uniform_schedule               bool    False                    =    flux_use_uniform_schedule
flow_use_beta_schedule                  bool    False                    =    flux_use_beta_schedule
flow_beta_schedule_alpha                float   2.0                      =    flux_beta_schedule_alpha
flow_beta_schedule_beta                 float   2.0                      =    flux_beta_schedule_beta
flow_cubic_schedule_weights             numbers ()                       =
flow_custom_timesteps                   numbers ()                       =
flow_timesteps_mode                     text    'fixed-list'             =
loss_type                               text    'l2'                     =
huber_c                                 float   0.1                      =
huber_schedule                          text    'snr'                    =
masked_loss_probability                 float   1.0                      =
input_perturbation                      float   0.0                      =
input_perturbation_steps                int     0                        =
caption_dropout_probability             float   0.1                      =
scheduled_sampling_max_step_offset      int     0                        =
scheduled_sampling_strategy             text    'uniform'                =
scheduled_sampling_probability          float   0.0                      =
scheduled_sampling_prob_start           float   0.0                      *
scheduled_sampling_prob_end             float   0.5                      =
scheduled_sampling_ramp_steps           int     0                        =
scheduled_sampling_start_step           int     0                        =
scheduled_sampling_ramp_shape           text    'linear'                 =
scheduled_sampling_order                int     1                        =
scheduled_sampling_reflexflow           bool    True                     =
scheduled_sampling_reflexflow_alpha     float   1.0                      =
scheduled_sampling_reflexflow_beta1     float   10.0                     =
scheduled_sampling_reflexflow_beta2     float   1.0                      =
""",
    "memory": """
mixed_precision                         text    'bf16'                   =
base_model_precision                    text    'no_change'              *
quantize_via                            text    'accelerator'            =
gradient_checkpointing                  bool    True                     =
gradient_checkpointing_interval         int     1                        =
gradient_checkpointing_backend          text    'torch'                  =
musubi_blocks_to_swap                   int     0                        =
dynamo_backend                          text    'no'                     *
""",
    "data": """
resolution                              float   1024                     =
resolution_type                         text    'pixel_area'             =
minimum_image_size                      float   None                     =
maximum_image_size                      float   None                     =
target_downsample_size                  float   None                     =
aspect_bucket_alignment                 int     64                       =
aspect_bucket_rounding                  int     2                        =
caption_strategy                        text    'filename'               =
instance_prompt                         text    ''                       =
prepend_instance_prompt                 bool    False                    =
only_instance_prompt                    bool    False                    =
vae_batch_size                          int     4                        =
write_batch_size                        int     128                      =
vae_cache_disable                       bool    False                    =
vae_cache_clear_each_epoch              bool    None                     =
cache_dir_text                          text    ''                       =
cache_dir_vae                           text    ''                       =
aws_max_pool_connections                int     128                      =
data_backend_sampling                   text    'auto-weighting'         =
disable_bucket_pruning                  bool    False                    =
""",
    "validation": """
validation_prompt                       text    ''                       =
validation_prompt_library               bool    False                    =
user_prompt_library                     text    ''                       =
validation_negative_prompt              text    'blurry, cropped, ugly'  =
validation_disable_unconditional        bool    False                    =
validation_step_interval                int     100                      *    validation_steps
validation_disable                      bool    False                    *
disable_benchmark                       bool    False                    =
validation_guidance                     float   7.5                      *
validation_guidance_rescale             float   0.0                      =
validation_num_inference_steps          int     30                       =
validation_resolution                   text    '256'                    =
validation_seed                         int     None                     *
num_validation_images                   int     1                        =
ema_validation                          text    'comparison'             =
evaluation_type                         text    'none'                   =
pretrained_evaluation_model_name_or_path text   'openai/clip-vit-large-patch14-336' =
eval_steps_interval                     int     None                     *
eval_loss_disable                       bool    False                    *
eval_timesteps                          int     28                       =
num_eval_images                         int     4                        =
""",
    "report": """
report_to                               commas  'none'                   =
tracker_project_name                    text    'simpletuner'            =
tracker_run_name                        text    ''                       =
push_to_hub                             bool    False                    =
push_checkpoints_to_hub                 bool    False                    =
push_to_hub_background                  bool    False                    =
hub_model_id                            text    ''                       =
model_card_private                      bool    True                     =
model_card_note                         text    ''                       =
model_card_safe_for_work                bool    False                    =
webhook_config                          block   None                     =
webhook_reporting_interval              int     None                     =
""",
}


def _rows(section: str, lines: str) -> list[Option]:
    rows = []
    for line in lines.strip().splitlines():
        name, kind, rest = line.split(None, 2)
        quoted = rest.rindex("'") + 1 if rest.startswith("'") else rest.index(" ")
        default, (ours, *old) = ast.literal_eval(rest[:quoted]), rest[quoted:].split()
        rows.append(Option(name, kind, default, name if ours == "=" else ours, section, tuple(old)))
    return rows


OPTIONS: dict[str, Option] = {row.name: row for section, lines in _USED.items() for row in _rows(section, lines)}
SECTIONS = tuple(_USED)
OLD_NAMES = {old: option.name for option in OPTIONS.values() for old in option.old}

# SimpleTuner's values -> ours; where a value is stored otherwise here, the report says so.
PRECISIONS = {
    "nf4-bnb": "nf4",
    "int8-quanto": "int8-torchao",
    "int8-sdnq": "int8-torchao",
    "uint8-sdnq": "int8-torchao",
    "int4-quanto": "int4-torchao",
    "uint4-sdnq": "int4-torchao",
    "fp8-quanto": "fp8-torchao",
    "fp8uz-quanto": "fp8-torchao",
    "fp8wo-torchao": "fp8-torchao",
    "fp8-native": "fp8-torchao",
    "fp8-sdnq": "fp8-torchao",
}
SAME_PRECISION = ("nf4-bnb",)  # the same under another name: nothing to say
OPTIMIZER_SUFFIXES = ("-paged", "+aggressive", "+no_kahan")  # of optimisers that are here without them
CLIP_THEMSELVES = ("optimi-stableadamw", "prodigy")  # SimpleTuner clips no gradient for them
FLAVOURS = {"2.0": "Alpha-VLLM/Lumina-Image-2.0", "neta-lumina": "terminusresearch/neta-lumina-v1"}


@dataclass(frozen=True)
class Missing:
    """An option that cannot be had here."""

    default: Any  # SimpleTuner's, which asks for nothing
    remedy: str  # what to do instead


# Known, and without effect on Lumina2 here, by the reason.
NO_EFFECT: dict[str, tuple[str, ...]] = {
    reason: tuple(names.split())
    for reason, names in {
        "flow matching has no noise schedule of this kind": """
snr_gamma use_soft_min_snr soft_min_snr_sigma_data snr_weight offset_noise noise_offset noise_offset_probability
prediction_type rescale_betas_zero_snr disable_segmented_timestep_sampling timestep_bias_strategy timestep_bias_begin
timestep_bias_end timestep_bias_multiplier timestep_bias_portion training_scheduler_timestep_spacing
inference_scheduler_timestep_spacing flux_fast_schedule scheduled_sampling_sampler refiner_training
refiner_training_invert_schedule refiner_training_strength flux_guidance_mode flux_guidance_value
flux_attention_masked_training""",
        "it is for another kind of model": """
t5_padding freeze_encoder_before freeze_encoder_after freeze_encoder_strategy layer_freeze_strategy freeze_encoder
text_encoder_limit data_aesthetic_score unet_attention_slice pretrained_unet_model_name_or_path
pretrained_unet_subfolder pretrained_t5_model_name_or_path pretrained_gemma_model_name_or_path
qwen_text_encoder_model_name_or_path max_grounding_entities pretrained_grounding_model_name_or_path
audio_flow_schedule_shift audio_max_duration_seconds audio_min_duration_seconds audio_channels audio_duration_interval
audio_truncation_mode framerate validation_num_video_frames vae_enable_temporal_roll fully_unload_text_encoder
save_text_encoder flux_lora_target controlnet_custom_config controlnet_model_name_or_path lora_format
validation_guidance_skip_layers validation_guidance_skip_layers_start validation_guidance_skip_layers_stop
validation_guidance_skip_scale validation_guidance_real validation_no_cfg_until_timestep skip_guidance_layers""",
        "it is decided here by itself": """
variant vae_dtype base_model_default_dtype attention_mechanism sla_config sageattention_usage disable_tf32 allow_tf32
set_grads_to_none gradient_precision quantize_activations trust_remote_code pretrained_transformer_subfolder
keep_vae_loaded vae_enable_slicing vae_enable_tiling vae_enable_patch_conv offload_during_startup
delete_model_after_load accelerator_cache_clear_interval ema_cpu_only ema_foreach_disable
gradient_checkpointing_segment_stride gradient_checkpointing_offload_attention
gradient_checkpointing_offload_pin_memory_max_buckets
gradient_checkpointing_offload_prefetch musubi_block_swap_device text_encoder_1_precision text_encoder_2_precision
text_encoder_3_precision text_encoder_4_precision dynamo_mode dynamo_fullgraph dynamo_dynamic
dynamo_use_regional_compilation validation_torch_compile validation_torch_compile_mode
enable_xformers_memory_efficient_attention prodigy_steps adam_beta1 adam_beta2 adam_weight_decay adam_epsilon
adam_bfloat16 seed_for_each_device i_know_what_i_am_doing offload_during_save offload_param_path strict_epoch_limit
ignore_final_epochs optimizer_offload_gradients validation_noise_scheduler validation_seed_source validation_multigpu
validation_image_format validation_image_quality validation_preview validation_preview_steps validation_on_startup
validation_using_datasets eval_dataset_pooling eval_dataset_id conditioning_multidataset_sampling
validation_stitch_input_location validation_method""",
        "the caches here need no such choice": """
cache_dir cache_file_suffix compress_disk_cache text_cache_ondemand text_cache_disable text_encoder_batch_size
text_embed_full_cache vae_cache_ondemand vae_cache_preprocess vae_cache_scan_behaviour aspect_bucket_disable_rebuild
skip_file_discovery preserve_data_backend_cache override_dataset_config image_processing_batch_size read_batch_size
enable_multiprocessing max_workers torch_num_threads dataloader_prefetch dataloader_prefetch_qlen
aspect_bucket_worker_count metadata_update_interval ignore_missing_files allow_dataset_oversubscription""",
        "it is an option of a dataset: set it in multidatabackend.json": """
max_upscale_threshold disable_multiline_split parquet_caption_column parquet_filename_column crop crop_aspect
crop_style repeats aspect_ratio_bucketing aspect_ratio_bucket_min aspect_ratio_bucket_max caption_filter_list
instance_data_dir""",
        "no picture is ever deleted here": """
delete_unwanted_images delete_problematic_images enable_nsfw_check nsfw_check_models nsfw_check_min_votes
nsfw_check_backend_types nsfw_check_sample_types delete_nsfw_images nsfw_check_video_frame_count
nsfw_check_video_frame_selection nsfw_check_video_min_flagged_frames""",
        "processes and machines are chosen by accelerate launch": """
accelerate_config accelerate_extra_args num_processes num_machines main_process_ip main_process_port machine_rank
same_network local_rank find_unused_parameters fsdp_version fsdp_reshard_after_forward fsdp_state_dict_type
fsdp_cpu_ram_efficient_loading fsdp_auto_wrap_policy fsdp_limit_all_gathers fsdp_cpu_offload
fsdp_activation_checkpointing fsdp_transformer_layer_cls_to_wrap context_parallel_comm_strategy""",
        "a run keeps its files and its log in its own folder": """
logging_dir configs_dir checkpointing_use_tempdir delete_invalid_checkpoints merge_environment_config
print_filenames print_sampler_statistics debug_aspect_buckets debug_dataset_loader enable_watermark
tracker_image_layout custom_tracker modelspec_comment disk_low_threshold disk_low_action disk_low_script
checkpoints_rolling_total_limit ez_model_type __active_tab__ __disabled_fields__""",
    }.items()
}

_SDNQ = ("sdnq_weights_dtype", "sdnq_quantized_matmul_dtype", "sdnq_group_size", "sdnq_use_quantized_matmul")
_OFFLOADING = "set base_model_precision to int8-torchao, or musubi_blocks_to_swap to a number of blocks"
UNSUPPORTED: dict[str, Missing] = {
    "controlnet": Missing(False, "Lumina2 has no ControlNet; take it out"),
    "control": Missing(False, "Lumina2 has no ControlNet; take it out"),
    "validation_input": Missing(None, "Lumina2 draws from text alone; take it out"),
    "train_text_encoder": Missing(False, "only the transformer is trained; take it out"),
    "text_encoder_lr": Missing(None, "only the transformer is trained; take it out"),
    "slider_lora_target": Missing(False, "set slider_positive and slider_negative in the block lumina2_trainer"),
    "peft_lora_mode": Missing("standard", "take it out, or set lora_type to lycoris"),
    "singlora_ramp_up_steps": Missing(0, "take it out"),
    "init_lora_step": Missing(None, "a run counts its own steps from 0; name a checkpoint to go on from one"),
    "init_lora_ema": Missing("", "name the averaged file in init_lora"),
    "assistant_lora_path": Missing("", "merge it into the model first"),
    "assistant_lora_strength": Missing(1.0, "merge the LoRA into the model first"),
    "assistant_lora_inference_strength": Missing(0.0, "merge the LoRA into the model first"),
    "disable_assistant_lora": Missing(False, "take it out"),
    "quantization_config": Missing(None, "set base_model_precision"),
    **{name: Missing(None, "set base_model_precision to int8-torchao") for name in _SDNQ},
    "sdnq_compile_mode": Missing("auto", "set base_model_precision to int8-torchao"),
    "mixflow_enabled": Missing(False, "flow_use_beta_schedule with alpha 2 and beta 1 leans to noise as well"),
    "mixflow_gamma": Missing(0.8, "take it out"),
    "optimizer_cpu_offload_method": Missing(None, "choose ao-adamw8bit, whose states are small"),
    "enable_group_offload": Missing(False, _OFFLOADING),
    "group_offload_type": Missing("block_level", _OFFLOADING),
    "ramtorch": Missing(False, _OFFLOADING),
    "deepspeed_config": Missing(None, "use accelerate launch with FSDP for a full fine-tune"),
    "fsdp_enable": Missing(False, "choose FSDP in accelerate's own configuration"),
    "context_parallel_size": Missing(1, "choose more processes instead"),
    "checkpoint_epoch_interval": Missing(None, "set checkpoint_step_interval"),
    "checkpointing_rolling_steps": Missing(0, "set checkpoint_step_interval and checkpoints_total_limit"),
    "validation_epoch_interval": Missing(None, "set validation_step_interval"),
    "validation_epochs": Missing(None, "set validation_step_interval"),
    "validation_randomize": Missing(False, "samples keep their seed, so that they can be compared"),
    "validation_lycoris_strength": Missing(1.0, "compare strengths with Validate Sample, or the command validate"),
    "eval_epoch_interval": Missing(None, "set eval_steps_interval"),
    "validate_after_step": Missing(None, "set validation_step_interval"),
    "validate_after_epoch": Missing(None, "set validation_step_interval"),
    "validation_external_script": Missing(None, "start it by yourself; each sample lies in the run's folder"),
    "validation_external_background": Missing(False, "take it out"),
    "validation_adapter_path": Missing("", "compare files with Validate Sample, or the command validate"),
    "validation_adapter_name": Missing("", "compare files with Validate Sample, or the command validate"),
    "validation_adapter_strength": Missing(1.0, "compare files with Validate Sample, or the command validate"),
    "validation_adapter_mode": Missing("adapter_only", "compare files with Validate Sample, or the command validate"),
    "validation_adapter_config": Missing(None, "compare files with Validate Sample, or the command validate"),
    "publishing_config": Missing(None, "the hub is the only place that files are sent to"),
    "post_checkpoint_script": Missing("", "a webhook tells of each checkpoint: set webhook_config"),
    "post_upload_script": Missing("", "a webhook tells of each checkpoint: set webhook_config"),
    "diffusion_blocks_config": Missing(None, "choose blocks by lora_blocks"),
}
# Groups of options that one switch turns on; without it they ask for nothing.
_FAMILIES = {
    "nextlat_": "nextlat_enabled",
    "irepa_": "irepa_enabled",
    "crepa_": "crepa_enabled",
    "urepa_": "urepa_enabled",
    "xm_": "xm_enabled",
    "twinflow_": "twinflow_enabled",
    "internal_guidance_": "internal_guidance_enabled",
    "validation_internal_guidance_": "internal_guidance_enabled",
    "layersync_": "layersync_enabled",
    "diff2flow_": "diff2flow_enabled",
    "distillation_": "distillation_method",
    "tread_": "tread_config",
    "ramtorch_": "ramtorch",
    "group_offload_": "enable_group_offload",
}
UNSUPPORTED |= {switch: Missing(False, "take it out") for switch in _FAMILIES.values() if switch not in UNSUPPORTED}


def without_effect(name: str) -> str | None:
    """Why a known option does nothing here."""
    switch = next((switch for start, switch in _FAMILIES.items() if name.startswith(start) and name != switch), None)
    if switch:
        return f"it belongs to {switch}, which is not available here"
    return next((reason for reason, names in NO_EFFECT.items() if name in names), None)


def known_names() -> set[str]:
    """Every name that SimpleTuner's file may carry."""
    silent = {name for names in NO_EFFECT.values() for name in names}
    return {*OPTIONS, *OLD_NAMES, *silent, *UNSUPPORTED}
