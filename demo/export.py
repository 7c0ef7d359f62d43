"""The demo's weights as ONNX files: the reference runtime's input, and the compiler's.

    python -m demo.export [--out FOLDER] [--latent 8]

Fixed shapes, opset 17, plain tensors in and out. The graphs hold no Einsum, and the timestep comes in at full length,
one per picture, rather than being expanded inside: what compilers for accelerators want.
"""

import argparse
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

from . import nets, shapes

OUT = Path(__file__).parent / "models" / "shapes-onnx"


@dataclass(frozen=True)
class Stage:
    """One network with inputs to trace and to compare it by; its outputs are a tuple of tensors."""

    name: str
    module: nn.Module
    inputs: dict[str, torch.Tensor]
    outputs: tuple[str, ...]

    def __call__(self) -> tuple[torch.Tensor, ...]:
        with torch.no_grad():
            return self.module(*self.inputs.values())


def plain_attention(model: nn.Module) -> nn.Module:
    """Matrix products instead of torch's fused attention.

    Exported, the latter takes roots of shapes and scales queries and keys each; compiled for the BM1684X in bfloat16,
    that U-Net gave NaN.
    """
    model.set_attn_processor(AttnProcessor())
    return model


class TextEncoder(nn.Module):
    """ids (1, 77) -> context (1, 77, 64) and, as CLIP's pooled output, its row at the first END (1, 64).

    Everything after the first END is END, so it is the one whose left neighbour is something else: a product with a
    one-hot row, where gathering at a computed index would ask more of a compiler.
    """

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder
        # whether an id is END is looked up: compared as 16-bit floats, START and END are the same number
        self.register_buffer("is_end", (torch.arange(nets.CLIP_ROWS)[:, None] == nets.END).float())
        # a constant mask: left to itself the model computes one in the graph; -10000 rather than -inf suits 16 bits
        self.register_buffer("mask", torch.full((1, 1, nets.TOKENS, nets.TOKENS), -1e4).triu(1))

    def forward(self, ids):
        context = self.encoder(ids, attention_mask=self.mask).last_hidden_state
        ends = functional.embedding(ids, self.is_end)
        first = ends[:, 1:] - ends[:, :-1]
        return context, (first.transpose(1, 2) @ context[:, 1:])[:, 0]


class UNet(nn.Module):
    def __init__(self, unet: nn.Module):
        super().__init__()
        self.unet = unet
        plain_attention(unet)
        # the timestep's sines are looked up: bfloat16 rounds 601 to 600 before it computes them
        self.register_buffer("sines", unet.time_proj(torch.arange(1000)))
        unet.get_time_embed = lambda sample, timestep: functional.embedding(timestep, self.sines)

    def forward(self, latent, timestep, context):
        return self.unet(latent, timestep, context, return_dict=False)


class Decoder(nn.Module):
    def __init__(self, vae: nn.Module):
        super().__init__()
        self.body = nn.Sequential(vae.post_quant_conv, vae.decoder)

    def forward(self, latent):
        return (self.body(latent),)


class Encoder(nn.Module):
    def __init__(self, vae: nn.Module):
        super().__init__()
        self.body = nn.Sequential(vae.encoder, vae.quant_conv)

    def forward(self, picture):
        return (self.body(picture),)


def prompt_ids(weights: Path = nets.WEIGHTS) -> torch.Tensor:
    """Ids (1, 77) of a prompt of ten taught words, to trace and compare with."""
    seen = load_file(weights / "text_encoder.safetensors")["seen_tokens"].tolist()
    ids = [nets.START, *seen[::5][:10], nets.END]
    return torch.tensor([ids + [nets.END] * (nets.TOKENS - len(ids))])


def stages(weights: Path = nets.WEIGHTS, latent: int = 8) -> Iterator[Stage]:
    """The four stages for latents of `latent` x `latent`; other sizes than 8 say so in their names.

    The text encoder knows no size and comes with 8 alone.
    """
    suffix = "" if latent == 8 else f"_{latent}x{latent}"
    text = Stage(
        "text_encoder",
        TextEncoder(nets.load_text_encoder(weights)),
        {"input_ids": prompt_ids(weights)},
        ("last_hidden_state", "pooled"),
    )
    if latent == 8:
        yield text
    context = text()[0]
    context = torch.cat([context.roll(1, 1), context])  # two that differ, or a mix-up of the pair would go unseen
    noise = torch.randn(2, 4, latent, latent, generator=torch.Generator().manual_seed(0))
    inputs = {"latent": noise, "timestep": torch.tensor([601, 601]), "context": context}
    yield Stage(f"unet{suffix}", UNet(nets.load_unet(weights)), inputs, ("prediction",))

    drawn = shapes.draw(shapes.Attributes("star", "red", "yellow", "large", "center"), np.random.default_rng(0))
    picture = torch.tensor(drawn).permute(2, 0, 1)[None].float() / 127.5 - 1
    vae, picture = plain_attention(nets.load_vae(weights)), picture.repeat(1, 1, latent // 8, latent // 8)
    encoder = Stage(f"vae_encoder{suffix}", Encoder(vae), {"picture": picture}, ("moments",))
    yield encoder
    yield Stage(f"vae_decoder{suffix}", Decoder(vae), {"latent": encoder()[0][:, :4]}, ("picture",))


def export(out: Path = OUT, weights: Path = nets.WEIGHTS, latent: int = 8) -> list[Path]:
    """Writes one ONNX file a stage; they appear whole or not at all."""
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    for stage in stages(weights, latent):
        part, path = out / f"{stage.name}.part", out / f"{stage.name}.onnx"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the tracer's remarks on fixed shapes, which are the intention
            torch.onnx.export(
                stage.module,
                tuple(stage.inputs.values()),
                part,
                input_names=list(stage.inputs),
                output_names=list(stage.outputs),
                opset_version=17,
                dynamo=False,
            )
        paths.append(part.replace(path))
    return paths


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--weights", type=Path, default=nets.WEIGHTS)
    parser.add_argument("--latent", type=int, default=8, help="side of the latents, a multiple of 8")
    args = parser.parse_args()
    for path in export(args.out, args.weights, args.latent):
        print(path)


if __name__ == "__main__":
    main()
