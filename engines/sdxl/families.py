"""Which model a file is that is not SDXL's base: told by names and shapes, so that the refusal can say it."""
from __future__ import annotations

import re

from .tensors import Tensor

# What a name in the file gives away, most telling first. SDXL's own names match none of these.
_BY_NAME = (
    (r"lora_unet_|lora_te\d?_|.*\.(lora_(up|down|A|B)(\.\w+)*\.weight|lora\.(up|down)\.weight|hada_w1_a|lokr_w1)", "a LoRA"),
    (r"(control_model|controlnet_cond_embedding|input_hint_block|zero_convs)\.|.*\.zero_convs\.", "a ControlNet"),
    (r"clip_[lg]$|emb_params$|string_to_param", "a textual inversion embedding"),
    (r"(.*\.)?double_blocks\.0\.img_attn\.", "a Flux model or one of its relatives"),
    (r"(.*\.)?joint_blocks\.0\.|.*\.joint_transformer_blocks\.", "a Stable Diffusion 3 model"),
    (r"(transformer\.)?(single_)?transformer_blocks\.\d+\.", "a transformer model such as Stable Diffusion 3 or Flux"),
    (r"(down_blocks|input_blocks|text_model|encoder\.(down|layers|conv_in)|decoder\.(up|conv_in))[._]",
     "one part of a model by itself"),
    (r".*\.time_stack\.|.*\.time_mixer$", "a video model"),
    (r"(model\.diffusion_model\.)?(down_levels|clip_txt_mapper)", "a Stable Cascade model"),
    (r"conditioner\.embedders\.0\.model\.transformer\.", "the SDXL refiner"),
    (r"cond_stage_model\.model\.transformer\.", "a Stable Diffusion 2.x model"),
    (r"cond_stage_model\.transformer\.", "a Stable Diffusion 1.x model"),
)
_CONTEXT = "model.diffusion_model.input_blocks.{}.1.transformer_blocks.0.attn2.to_k.weight"
_BY_CONTEXT = {768: "a Stable Diffusion 1.x model", 1024: "a Stable Diffusion 2.x model", 1280: "the SDXL refiner"}

# Tensors by which a checkpoint says that its network predicts something else than noise.
_PREDICTIONS = {"v_pred": "velocity", "edm_mean": "what EDM predicts", "edm_vpred.sigma_max": "velocity on EDM's scale"}


def other_family(tensors: dict[str, Tensor]) -> str:
    """What the file is instead of SDXL's base, such as "a Stable Diffusion 1.x model"; empty if nothing says so."""
    for pattern, family in _BY_NAME:
        match = re.compile(pattern).match
        if any(match(name) for name in tensors):
            return family
    for block in (1, 4):
        context = tensors.get(_CONTEXT.format(block))
        if context and len(context.shape) == 2 and "model.diffusion_model.label_emb.0.0.weight" not in tensors:
            return _BY_CONTEXT.get(context.shape[1], "")
        if context and len(context.shape) == 2 and context.shape[1] == 1280:
            return _BY_CONTEXT[1280]
    return ""


def other_prediction(names: dict[str, Tensor]) -> str:
    """What the U-Net predicts, where the file says that it is not noise; else empty."""
    return next((what for name, what in _PREDICTIONS.items() if name in names), "")
