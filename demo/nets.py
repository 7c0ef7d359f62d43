"""The demo's networks: Stable Diffusion 1.x in miniature, as ordinary diffusers and transformers models, and a judge.

Stage             input                                        output
text encoder      ids (B, 77) int64                            context (B, 77, 64)
U-Net             latent (B, 4, h, w), timestep, context       predicted noise (B, 4, h, w)
VAE encoder       picture (B, 3, 8h, 8w) in [-1, 1]            moments (B, 8, h, w)
VAE decoder       latent (B, 4, h, w) / 0.18215                picture (B, 3, 8h, 8w) in [-1, 1]
judge             picture (B, 3, 64, 64) in [-1, 1]            one row of logits per attribute
All floats are float32.
"""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from . import shapes
from .vocabulary import CLIP_ROWS, END, START, TOKEN_TABLE, TOKENS, Vocabulary

WIDTH = 64  # of the context
LATENT_SCALE = 0.18215  # Stable Diffusion 1.x: what multiplies a VAE latent to give it unit variance

WEIGHTS = Path(__file__).parent / "weights"


def build_text_encoder(rows: int = CLIP_ROWS, start: int = START, end: int = END) -> CLIPTextModel:
    """A CLIP text model with `rows` token vectors; its `last_hidden_state`, after the last norm, is the context."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=rows,
            bos_token_id=start,
            eos_token_id=end,
            pad_token_id=end,
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            projection_dim=WIDTH,
            attn_implementation="eager",
        )
    )


def build_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,  # 16 groups, SD's proportion, hurts flat colours
        cross_attention_dim=WIDTH,
        attention_head_dim=4,  # the number of heads, whatever its name says
    )


def build_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=1,
        latent_channels=4,
        sample_size=shapes.PIXELS,
        scaling_factor=LATENT_SCALE,
    )


class Judge(nn.Module):
    """Names the five attributes of a picture: a list of logits (B, number of values), in the order of shapes.VALUES."""

    def __init__(self):
        super().__init__()
        layers, channels = [], 3
        for width in (24, 32, 64, 64):
            layers += [nn.Conv2d(channels, width, 3, stride=2, padding=1), nn.GroupNorm(4, width), nn.SiLU()]
            layers += [nn.Conv2d(width, width, 3, padding=1), nn.SiLU()]
            channels = width
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * 16, 128), nn.SiLU())
        self.heads = nn.ModuleList(nn.Linear(128, len(values)) for values in shapes.VALUES.values())

    def forward(self, pictures: torch.Tensor) -> list[torch.Tensor]:
        features = self.body(pictures)
        return [head(features) for head in self.heads]


def tokenizer(folder: Path):
    """CLIP's own tokenizer, from a folder with its vocab.json and merges.txt (ComfyUI: comfy/sd1_tokenizer)."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(str(folder))


def save(module: nn.Module, path: Path, **tensors: torch.Tensor):
    """Writes a module's weights as float16, and `tensors` as they are."""
    weights = {k: v.detach().half().contiguous() for k, v in module.state_dict().items() if v.is_floating_point()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights | tensors, path)


def filled(module: nn.Module, weights: dict[str, torch.Tensor]) -> nn.Module:
    """`module` with these weights (float16 or float32), for inference. Raises ValueError if they do not fit."""
    missing, unexpected = module.load_state_dict({k: v.float() for k, v in weights.items()}, strict=False)
    if unexpected or [k for k in missing if not k.endswith("position_ids")]:
        raise ValueError(f"The weights do not fit: missing {missing}, unexpected {unexpected}. Train again.")
    return module.eval().requires_grad_(False)


def load_unet(folder: Path = WEIGHTS) -> UNet2DConditionModel:
    return filled(build_unet(), load_file(folder / "unet.safetensors"))


def load_vae(folder: Path = WEIGHTS) -> AutoencoderKL:
    return filled(build_vae(), load_file(folder / "vae.safetensors"))


def load_judge(folder: Path = WEIGHTS) -> Judge:
    return filled(Judge(), load_file(folder / "judge.safetensors"))


def load_text_encoder(folder: Path = WEIGHTS) -> CLIPTextModel:
    """With all 49408 token vectors, for ids as CLIP's tokenizer gives them."""
    weights = load_file(folder / "text_encoder.safetensors")
    vocabulary = Vocabulary(weights.pop("seen_tokens").tolist())
    weights[TOKEN_TABLE] = vocabulary.expand(weights[TOKEN_TABLE])
    return filled(build_text_encoder(), weights)
