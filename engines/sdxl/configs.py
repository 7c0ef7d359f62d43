"""The configs of a checkpoint that has none: sizes by its tensors' shapes, the rest by SDXL's conventions.

What shapes do not show: attention heads of 64 channels, norms over 32 groups, six sizes of 256 sines each, quick GELU
in CLIP-L and GELU in bigG, the VAE's scale 0.13025. With the shapes of sd_xl_base_1.0 the result is what its diffusers
folder states (stabilityai/stable-diffusion-xl-base-1.0).
"""
from __future__ import annotations

from collections.abc import Callable

from .tensors import CheckpointError

HEAD, GROUPS = 64, 32
SIZES, SINES = 6, 256       # original size, crop and target size, two numbers each; sines and cosines a number

Shapes = Callable[[str], "tuple[int, ...] | None"]      # of a parameter, by diffusers' name; None where there is none


def infer(part: str, shape: Shapes) -> dict:
    """The config of a part of which at least one tensor is there. CheckpointError, unfinished, if it is not SDXL's."""
    return _PARTS[part](shape)


def text_encoder(shape: Shapes) -> dict:
    return {"hidden_act": "quick_gelu", **_clip(shape, "first text encoder")}


def text_encoder_2(shape: Shapes) -> dict:
    config = _clip(shape, "second text encoder")
    return {"hidden_act": "gelu", **config,
            "projection_dim": _shape(shape, "text_projection.weight", "second text encoder", 2)[0]}


def _clip(shape: Shapes, title: str) -> dict:
    rows, width = _shape(shape, "text_model.embeddings.token_embedding.weight", title, 2)
    positions = _shape(shape, "text_model.embeddings.position_embedding.weight", title, 2)[0]
    inner = _shape(shape, "text_model.encoder.layers.0.mlp.fc1.weight", title, 2)[0]
    return {"vocab_size": rows, "hidden_size": width, "intermediate_size": inner, "projection_dim": width,
            "num_hidden_layers": _count(shape, "text_model.encoder.layers.{}.layer_norm1.weight"),
            "num_attention_heads": _heads(width, title), "max_position_embeddings": positions,
            # with 2 here transformers takes the row of the highest token id, which is END, as the pooled one
            "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1, "layer_norm_eps": 1e-5,
            "attention_dropout": 0.0, "initializer_factor": 1.0, "initializer_range": 0.02}


def unet(shape: Shapes) -> dict:
    widths = _levels(shape, "down_blocks.{}.resnets.0.conv1.weight", "U-Net")
    layers = _count(shape, "down_blocks.0.resnets.{}.conv1.weight")
    depths = [_count(shape, f"down_blocks.{level}.attentions.0.transformer_blocks.{{}}.norm1.weight")
              for level in range(len(widths))]
    looking = next((level for level, depth in enumerate(depths) if depth), None)
    if looking is None:
        raise CheckpointError("its U-Net does not look at the text, so it is no SDXL U-Net")
    context = _shape(shape, f"down_blocks.{looking}.attentions.0.transformer_blocks.0.attn2.to_k.weight", "U-Net", 2)[1]
    inputs = _shape(shape, "conv_in.weight", "U-Net")[1]
    outputs = _shape(shape, "conv_out.weight", "U-Net")[0]
    for level, width in enumerate(widths):
        if width % GROUPS or depths[level] and width % HEAD:
            raise CheckpointError(f"its U-Net is {width} wide at level {level}, which SDXL's {GROUPS} norm groups and heads "
                                  f"of {HEAD} channels do not divide")
    kinds = ["CrossAttn" if depth else "" for depth in depths]
    return {"in_channels": inputs, "out_channels": outputs, "sample_size": 128, "block_out_channels": widths,
            "down_block_types": [f"{kind}DownBlock2D" for kind in kinds],
            "up_block_types": [f"{kind}UpBlock2D" for kind in reversed(kinds)],
            "layers_per_block": layers, "transformer_layers_per_block": [max(1, depth) for depth in depths],
            "attention_head_dim": [max(1, width // HEAD) for width in widths],      # diffusers' name for the number of heads
            "cross_attention_dim": context, "use_linear_projection": True,
            "addition_embed_type": "text_time", "addition_time_embed_dim": SINES,
            "projection_class_embeddings_input_dim": _shape(shape, "add_embedding.linear_1.weight", "U-Net", 2)[1],
            "norm_num_groups": GROUPS, "norm_eps": 1e-5, "act_fn": "silu", "flip_sin_to_cos": True, "freq_shift": 0,
            "center_input_sample": False, "downsample_padding": 1, "mid_block_scale_factor": 1}


def vae(shape: Shapes) -> dict:
    widths = _levels(shape, "encoder.down_blocks.{}.resnets.0.conv1.weight", "VAE")
    levels = len(widths)
    for width in widths:
        if width % GROUPS:
            raise CheckpointError(f"its VAE is {width} wide at a level, which SDXL's {GROUPS} norm groups do not divide")
    return {"in_channels": 3, "out_channels": 3, "sample_size": 1024, "block_out_channels": widths,
            "down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels,
            "layers_per_block": _count(shape, "encoder.down_blocks.0.resnets.{}.conv1.weight"),
            "latent_channels": _shape(shape, "decoder.conv_in.weight", "VAE")[1],
            "norm_num_groups": GROUPS, "act_fn": "silu", "scaling_factor": 0.13025, "force_upcast": True}


_PARTS = {"text_encoder": text_encoder, "text_encoder_2": text_encoder_2, "unet": unet, "vae": vae}


def _shape(shape: Shapes, name: str, title: str, rank: int = 4) -> tuple[int, ...]:
    found = shape(name)
    if found is None or len(found) != rank:
        raise CheckpointError(f"its {title} is not SDXL's, or incomplete: it has no {name}")
    return found


def _count(shape: Shapes, pattern: str) -> int:
    count = 0
    while shape(pattern.format(count)) is not None:
        count += 1
    return count


def _levels(shape: Shapes, pattern: str, title: str) -> list[int]:
    count = _count(shape, pattern)
    if not count:
        raise CheckpointError(f"its {title} is not SDXL's, or incomplete: it has no {pattern.format(0)}")
    return [_shape(shape, pattern.format(level), title)[0] for level in range(count)]


def _heads(width: int, title: str) -> int:
    if width % HEAD:
        raise CheckpointError(f"its {title} is {width} wide, which SDXL's heads of {HEAD} channels do not divide")
    return width // HEAD
