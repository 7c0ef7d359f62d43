"""The demo's SDXL networks, as ordinary diffusers and transformers models.

Stage             input                                        output
text encoder 1    ids (B, 77), padded with END                 hidden[-2] (B, 77, 64)
text encoder 2    ids (B, 77), padded with 0                   hidden[-2] (B, 77, 96), pooled (B, 96)
U-Net             latent (B, 4, h, w), timestep,               predicted noise (B, 4, h, w)
                  context (B, 77, 160), pooled (B, 96),
                  sizes (B, 6)
VAE               as in demo.nets; its latent times 0.13025 is what the U-Net sees
All floats are float32. Text encoder 1 is the SD 1.x demo's with a last layer that nothing reads: SDXL takes the hidden
state before the last layer, without the final norm.
"""

from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from .. import nets
from ..nets import WIDTH
from ..vocabulary import CLIP_ROWS, END, PAD_2, START, TOKENS
from .build import TEXT_MODEL, parameters

LATENT_SCALE = 0.13025  # SDXL: what multiplies a VAE latent
WIDTH_2 = 96  # of text encoder 2, and of its pooled output
SIZE_WIDTH = 256  # sines a number of the six sizes, as in SDXL itself: ComfyUI computes them


def _config(width: int, layers: int, heads: int, rows: int, start: int, end: int, pad: int, act: str) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=rows,
        bos_token_id=start,
        eos_token_id=end,
        pad_token_id=pad,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=TOKENS,
        projection_dim=width,
        hidden_act=act,
        attn_implementation="eager",
    )


def build_text_encoder(rows: int = CLIP_ROWS, start: int = START, end: int = END) -> CLIPTextModel:
    return CLIPTextModel(_config(WIDTH, 3, 4, rows, start, end, end, "quick_gelu"))


def build_text_encoder_2(
    rows: int = CLIP_ROWS, start: int = START, end: int = END, pad: int = PAD_2
) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(_config(WIDTH_2, 3, 4, rows, start, end, pad, "gelu"))


def build_unet() -> UNet2DConditionModel:
    """SDXL's layout: three levels of two, no attention at the first, text and sizes added to the time embedding."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 64, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        transformer_layers_per_block=(1, 1, 1),
        norm_num_groups=4,  # as in the SD 1.x demo: many groups hurt flat colours
        cross_attention_dim=WIDTH + WIDTH_2,
        attention_head_dim=(4, 4, 4),  # the number of heads, whatever its name says
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=SIZE_WIDTH,
        projection_class_embeddings_input_dim=WIDTH_2 + 6 * SIZE_WIDTH,
    )


def load_text_encoder(folder: Path = nets.WEIGHTS) -> CLIPTextModel:
    weights = _tensors("text_encoder", folder)
    return nets.filled(build_text_encoder(), {key.removeprefix(TEXT_MODEL): value for key, value in weights.items()})


def load_text_encoder_2(folder: Path = nets.WEIGHTS) -> CLIPTextModelWithProjection:
    return nets.filled(build_text_encoder_2(), _tensors("text_encoder_2", folder))


def load_unet(folder: Path = nets.WEIGHTS) -> UNet2DConditionModel:
    return nets.filled(build_unet(), _tensors("unet", folder))


def _tensors(part: str, folder: Path) -> dict[str, torch.Tensor]:
    return {key: torch.from_numpy(value) for key, value in parameters(part, folder).items()}
