"""Samples pictures for random prompts with the SDXL demo in torch and says how many obey in every attribute.

    python -m demo.sdxl.score --tokenizer path/to/ComfyUI/comfy/sd1_tokenizer [--steps 8] [--cfg 3] [--unconditional zeros]
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from .. import score, shapes
from ..nets import WEIGHTS, load_vae, tokenizer
from ..score import Score, euler, ids_of, pixels
from . import nets
from .nets import LATENT_SCALE, PAD_2

ENCODE, ZEROS = "encode", "zeros"  # what stands for no prompt: the empty text, or nothing at all as the reference code has
BATCH = 32


@dataclass(frozen=True)
class Networks:
    text_encoder: nn.Module
    text_encoder_2: nn.Module
    unet: nn.Module
    vae: nn.Module

    @classmethod
    def load(cls, folder: Path = WEIGHTS) -> "Networks":
        """`folder` may hold only what training has written so far; text encoder 1 and the VAE are the SD 1.x demo's."""
        return cls(nets.load_text_encoder(), nets.load_text_encoder_2(folder), nets.load_unet(folder), load_vae())

    def condition(self, clip, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Contexts (N, 77, 160) and pooled (N, 96) of some prompts."""
        ids, ids_2 = (torch.from_numpy(np.concatenate(rows)) for rows in zip(
            *((ids_of(clip, text), ids_of(clip, text, PAD_2)) for text in texts), strict=True))
        hidden = self.text_encoder(ids, output_hidden_states=True).hidden_states[-2]
        out = self.text_encoder_2(ids_2, output_hidden_states=True)
        return torch.cat([hidden, out.hidden_states[-2]], -1), out.text_embeds


@torch.no_grad()
def sample(
    networks: Networks,
    clip,
    texts: list[str],
    seeds: range,
    steps: int,
    cfg: float,
    negative: str = "",
    unconditional: str = ENCODE,
    size: int = 1024,
) -> np.ndarray:
    """Pictures uint8 (N, 64, 64, 3). `size` is what the model is told of the picture's height and width."""
    conditions = networks.condition(clip, [negative]), networks.condition(clip, texts)
    if unconditional == ZEROS:
        conditions = [torch.zeros_like(part) for part in conditions[0]], conditions[1]
    context, pooled = (torch.cat([without.expand_as(along), along]) for without, along in zip(*conditions, strict=True))
    told = torch.tensor([[size, size, 0, 0, size, size]]).expand(len(pooled), -1)

    def predict(latent: np.ndarray, timestep: int) -> np.ndarray:
        both = torch.from_numpy(latent).repeat(2, 1, 1, 1)
        made = networks.unet(both, timestep, context, added_cond_kwargs={"text_embeds": pooled, "time_ids": told}).sample
        without, along = made.chunk(2)
        return (without + cfg * (along - without)).numpy()

    latent = torch.from_numpy(euler(predict, seeds, steps) / LATENT_SCALE).float()
    return pixels(networks.vae.decode(latent).sample.numpy())


def scored(networks: Networks, clip, prompts: list[tuple[str, shapes.Attributes]], *args, **choices) -> Score:
    """Samples every prompt once; the seed is its place in the list. The other arguments are those of `sample`."""
    texts = [text for text, _ in prompts]
    pictures = [
        sample(networks, clip, texts[first : first + BATCH], range(len(texts))[first : first + BATCH], *args, **choices)
        for first in range(0, len(texts), BATCH)
    ]
    return Score.of(prompts, np.concatenate(pictures))


def main():
    options = score.parser(__doc__)
    options.add_argument("--weights", type=Path, default=WEIGHTS, help="folder of text encoder 2 and the U-Net")
    options.add_argument("--unconditional", choices=(ENCODE, ZEROS), default=ENCODE)
    options.add_argument("--size", type=int, default=1024, help="what the model is told of the picture's size")
    args = options.parse_args()
    prompts = score.random_prompts(args.prompts, args.set)
    choices = args.steps, args.cfg, args.negative, args.unconditional, args.size
    scored(Networks.load(args.weights), tokenizer(args.tokenizer), prompts, *choices).report(args.grid)


if __name__ == "__main__":
    main()
