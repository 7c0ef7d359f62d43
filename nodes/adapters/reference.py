"""A Stable Diffusion 1.x checkpoint of any width as stock torch MODEL, CLIP and VAE in float32: what compiled ones are
compared with.

ComfyUI's own loader takes SD 1.x in its one width, and in half precision where the device has it. This one takes the
widths from the file, and what shapes do not show (heads, groups of the norms) from its metadata or else SD 1.x's
conventions. The networks are ComfyUI's.
"""
from __future__ import annotations

import re
from pathlib import Path

import comfy.model_detection
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.supported_models
import comfy.utils
import torch
from comfy.ldm.models.autoencoder import AutoencoderKL

from ...compiler.checkpoint import METADATA, Checkpoint
from ...compiler.errors import CompilerError
from ...engines.errors import EngineError
from .vae import without_warnings

SD1_CHANNELS = 320                             # of the first block of SD 1.x's U-Net
UNET, VAE = "model.diffusion_model.", "first_stage_model."
TEXT = "clip_l.transformer.text_model."        # as ComfyUI calls the text encoder once it is loaded
CONVENTIONS = {"text_encoder": {"heads": 12}, "unet": {"heads": 8, "groups": 32}, "vae": {"groups": 32}}


def load_reference(path: Path, embedding_directory: list[str]):
    """(MODEL, CLIP, VAE) of a .safetensors file with all three. Raises EngineError, one sentence."""
    try:
        checkpoint = Checkpoint(path)
        for part in CONVENTIONS:
            checkpoint.part(part)              # refuses what is missing, damaged or of another family
    except CompilerError as error:
        raise EngineError(str(error)) from error
    said = {part: {**known, **checkpoint.conventions.get(part, {})} for part, known in CONVENTIONS.items()}
    weights = comfy.utils.load_torch_file(str(path))
    try:
        config = comfy.supported_models.SD15(comfy.model_detection.detect_unet_config(weights, UNET))
        if config.unet_config["model_channels"] != SD1_CHANNELS and not checkpoint.conventions.get("unet"):
            raise ValueError(f"its U-Net is {config.unet_config['model_channels']} wide rather than {SD1_CHANNELS}, and no "
                             f"metadata '{METADATA}' tells its heads and groups")
        vae = _vae(_part(weights, VAE), **said["vae"])
        clip = _clip(config, weights, embedding_directory, **said["text_encoder"])
        return _model(config, weights, **said["unet"]), clip, vae
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        told = str(error).partition("\n")[0][:200]
        raise EngineError(f"'{path.name}' does not hold the networks of SD 1.x: {told}; pick a whole SD 1.x "
                          "checkpoint.") from error


def _model(config, weights: dict[str, torch.Tensor], heads: int, groups: int) -> comfy.model_patcher.ModelPatcher:
    config.unet_config.update(num_heads=heads, num_head_channels=-1, dtype=torch.float32)
    config.custom_operations = _operations(groups)
    model = config.get_model(weights, UNET, device=torch.device("cpu"))
    _refuse_gaps(model.diffusion_model, set(_part(weights, UNET)), "U-Net")
    model.load_model_weights(weights, UNET)
    return comfy.model_patcher.ModelPatcher(model, comfy.model_management.get_torch_device(),
                                            comfy.model_management.unet_offload_device())


def _operations(groups: int):
    """ComfyUI's layers, with `groups` in every group norm, where its U-Net asks for 32."""

    class Operations(comfy.ops.disable_weight_init):
        class GroupNorm(comfy.ops.disable_weight_init.GroupNorm):
            def __init__(self, num_groups, num_channels, **options):
                super().__init__(groups, num_channels, **options)

    return Operations


def _clip(config, weights: dict[str, torch.Tensor], embedding_directory: list[str], heads: int) -> comfy.sd.CLIP:
    weights = config.process_clip_state_dict(weights)
    table = weights[f"{TEXT}embeddings.token_embedding.weight"]
    layers = re.compile(rf"{re.escape(TEXT)}encoder\.layers\.(\d+)\.")
    shape = {"hidden_size": table.shape[1], "vocab_size": table.shape[0], "num_attention_heads": heads,
             "intermediate_size": weights[f"{TEXT}encoder.layers.0.mlp.fc1.weight"].shape[0],
             "num_hidden_layers": 1 + max(int(found[1]) for name in weights if (found := layers.match(name)))}
    clip = comfy.sd.CLIP(config.clip_target(), embedding_directory=embedding_directory,
                         model_options={"clip_l_model_config": shape, "dtype": torch.float32})
    _refuse_gaps(clip.cond_stage_model.clip_l.transformer.text_model, set(_part(weights, TEXT)), "text encoder")
    clip.load_sd(weights, full_model=True)
    return clip


def _vae(weights: dict[str, torch.Tensor], groups: int) -> comfy.sd.VAE:
    levels = 1 + max(int(found[1]) for name in weights if (found := re.match(r"encoder\.down\.(\d+)\.", name)))
    blocks = 1 + max(int(found[1]) for name in weights if (found := re.match(r"encoder\.down\.0\.block\.(\d+)\.", name)))
    widths = [weights[f"encoder.down.{level}.block.0.conv1.weight"].shape[0] for level in range(levels)]
    if any(width % widths[0] for width in widths):
        raise ValueError(f"the VAE's widths {widths} are no multiples of the first")
    # ComfyUI's VAE has 32 groups in its constructor, and torch refuses fewer channels than groups. So it is built 32 times
    # as wide, without memory, and then given weights and groups: its forward asks for no width.
    shape = {"double_z": True, "z_channels": weights["decoder.conv_in.weight"].shape[1], "resolution": 256,
             "in_channels": 3, "out_ch": 3, "ch": 32 * widths[0], "ch_mult": [width // widths[0] for width in widths],
             "num_res_blocks": blocks, "attn_resolutions": [], "dropout": 0.0}
    with torch.device("meta"):
        network = AutoencoderKL(ddconfig=shape, embed_dim=weights["post_quant_conv.weight"].shape[1])
    _refuse_gaps(network, set(weights), "VAE")
    for name, module in network.named_modules():
        for kind in dict(module.named_parameters(recurse=False)):
            value = weights[f"{name}.{kind}"].to(torch.float32)
            setattr(module, kind, torch.nn.Parameter(value, requires_grad=False))
        if isinstance(module, torch.nn.GroupNorm):
            module.num_groups, module.num_channels = groups, module.weight.shape[0]
            if module.num_channels % groups:
                raise ValueError(f"the VAE's {module.num_channels} channels do not make {groups} groups")
    with without_warnings():
        vae = comfy.sd.VAE(sd={})              # its defaults for SD's VAE: 8x, 4 channels, [-1,1]
    vae.first_stage_model, vae.vae_dtype = network.eval(), torch.float32
    vae.device, vae.output_device = comfy.model_management.vae_device(), comfy.model_management.intermediate_device()
    vae.patcher = comfy.model_patcher.ModelPatcher(network, vae.device, comfy.model_management.vae_offload_device())
    return vae


def _part(weights: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}


def _refuse_gaps(network: torch.nn.Module, names: set[str], title: str) -> None:
    missing = sorted({name for name, _ in network.named_parameters()} - names)
    if missing:
        raise ValueError(f"the {title} lacks {missing[0]}" + (f" and {len(missing) - 1} more" if len(missing) > 1 else ""))
