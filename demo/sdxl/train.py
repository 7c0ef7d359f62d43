"""Trains what the SDXL demo has of its own: text encoder 2 and the U-Net, on a CPU. Needs demo.train's results.

    python -m demo.sdxl.train --tokenizer path/to/ComfyUI/comfy/sd1_tokenizer

Each stage leaves its result in the work folder and is skipped when that file exists, as in demo.train.
"""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from .. import shapes, train
from ..nets import load_vae, save, tokenizer
from ..train import EMPTY_CAPTIONS, Data, Fit, Prompts, alphas_cumprod, latents_of, some_left_open
from ..vocabulary import TOKEN_TABLE, Vocabulary2
from . import nets
from .nets import LATENT_SCALE, WIDTH_2

STEPS = {"sdxl_text_2": 1500, "sdxl_unet": 2500, "sdxl_unet2": 2500, "sdxl_unet3": 2500}
UNET_ROUNDS = {"sdxl_unet": 1.2e-3, "sdxl_unet2": 1e-3, "sdxl_unet3": 1e-3}  # at 2e-3 training fell apart
SIZES = (64, 128, 256, 512, 768, 1024)  # the numbers people give; the demo's pictures are the same for all of them
CAPTIONS_EACH = 2


class Prompts2(Prompts):
    """Captions as rows of text encoder 2's table."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer)
        self.vocabulary = Vocabulary2(self.vocabulary.seen)


def train_text_encoder_2(prompts: Prompts2, steps: int) -> nn.Module:
    """Taught to name the attributes: from its pooled output, and from END and every pad of the hidden state."""
    rng = np.random.default_rng(2)
    encoder = nets.build_text_encoder_2(len(prompts.vocabulary), start=0, end=1, pad=prompts.vocabulary.PAD).train()
    kinds = [len(values) + 1 for values in shapes.VALUES.values()]  # + 1: left open
    places = ("pooled", "hidden")
    heads = nn.ModuleDict({place: nn.ModuleList(nn.Linear(WIDTH_2, n) for n in kinds) for place in places})
    model = nn.ModuleDict({"encoder": encoder, "heads": heads})
    fit = Fit("text 2", model, steps, rate=1e-3)
    for _ in fit:
        rows, labels = [], []
        for _ in range(96):
            a = shapes.OPEN if rng.random() < EMPTY_CAPTIONS else some_left_open(shapes.choose(rng), rng)
            rows.append(prompts.empty(rng) if a is shapes.OPEN else prompts.caption(a, rng))
            labels.append(a.labels())
        rows, labels = torch.tensor(rows), torch.tensor(labels)
        out = encoder(rows, output_hidden_states=True)
        batch, place = torch.nonzero((rows == 1) | (rows == prompts.vocabulary.PAD), as_tuple=True)
        found = {"pooled": (out.text_embeds, labels), "hidden": (out.hidden_states[-2][batch, place], labels[batch])}
        fit.step(
            sum(
                F.cross_entropy(head(features), wanted[:, i])
                for name, (features, wanted) in found.items()
                for i, head in enumerate(heads[name])
            )
        )
    return in_unit_scale(fit.averaged["encoder"], rows)


@torch.no_grad()
def in_unit_scale(encoder: nn.Module, rows: torch.Tensor) -> nn.Module:
    """The same encoder with hidden states and pooled output of about unit deviation, which U-Nets learn from best.

    Every layer norms what it reads, so scaling all that is ever added to the hidden state changes little else (norms have
    an epsilon).
    """
    out = encoder(rows, output_hidden_states=True)
    hidden, pooled = 1 / out.hidden_states[-2].std(), 1 / out.text_embeds.std()
    for name, weights in encoder.named_parameters():
        if any(part in name for part in ("embeddings.", "out_proj.", "fc2.")):
            weights.mul_(hidden)
    encoder.text_projection.weight.mul_(pooled)
    return encoder


class Conditions:
    """What SDXL's U-Net is told of many captions: contexts (N, 77, 160) and pooled (N, 96), float16 to fit in memory."""

    @torch.no_grad()
    def __init__(self, encoder: nn.Module, encoder_2: nn.Module, rows: list[list[int]], rows_2: list[list[int]]):
        contexts, pooled = [], []
        for part, part_2 in zip(torch.tensor(rows).split(256), torch.tensor(rows_2).split(256), strict=True):
            out, out_2 = encoder(part, output_hidden_states=True), encoder_2(part_2, output_hidden_states=True)
            contexts.append(torch.cat([out.hidden_states[-2], out_2.hidden_states[-2]], -1).half())
            pooled.append(out_2.text_embeds.half())
        self.context, self.pooled = torch.cat(contexts), torch.cat(pooled)


def encoder_1(folder, rows: int) -> nn.Module:
    """Text encoder 1 on the small table that Prompts counts in."""
    full = nets.load_text_encoder(folder)
    small = nets.build_text_encoder(rows, start=0, end=1)
    state = full.state_dict()
    table = next(key for key in state if key.endswith(TOKEN_TABLE))
    state[table] = nets.nets.load_file(folder / "text_encoder.safetensors")[TOKEN_TABLE].float()
    small.load_state_dict(state)
    return small.eval()


def random_sizes(rng: np.random.Generator, count: int) -> torch.Tensor:
    """(count, 6): original height and width, crop top and left, target height and width; their values mean nothing."""
    sizes = rng.choice(SIZES, (count, 6))
    odd = rng.random(count) < 0.2
    sizes[odd] = rng.integers(8, 1537, (odd.sum(), 6))
    sizes[:, 2:4] *= rng.random((count, 1)) < 0.2
    square = rng.random(count) < 0.7
    sizes[square, 1], sizes[square, 5] = sizes[square, 0], sizes[square, 4]
    same = rng.random(count) < 0.5
    sizes[same, 4:] = sizes[same, :2]
    return torch.from_numpy(sizes).float()


def train_unet(unet: nn.Module, rate: float, vae, encoder, encoder_2, prompts, prompts_2, data: Data, steps: int):
    """As demo.train's: predicts the noise, min-SNR weights. Half of the empty captions are zeros, as SDXL's were."""
    rng = np.random.default_rng([5, steps])
    batch = 64
    latents = latents_of(vae, data) * LATENT_SCALE
    print(f"unet: latent mean {latents.mean():.3f}, deviation {latents.std((0, 2, 3)).tolist()}", flush=True)

    def conditions(write, things):
        seeds = rng.integers(1 << 31, size=len(things))
        rows, rows_2 = (
            [write(p, thing, np.random.default_rng(seed)) for thing, seed in zip(things, seeds, strict=True)]
            for p in (prompts, prompts_2)
        )
        return Conditions(encoder, encoder_2, rows, rows_2)

    def described(p, a, own):
        return p.caption(some_left_open(a, own), own)

    captions = [conditions(described, data.attributes) for _ in range(CAPTIONS_EACH)]
    empty = conditions(lambda p, _, own: p.empty(own), range(2000))
    empty.context[:1000], empty.pooled[:1000] = 0, 0

    signal = alphas_cumprod()
    unet = unet.train().to(memory_format=torch.channels_last)
    fit = Fit("unet", unet, steps, rate)
    for _ in fit:
        index = rng.integers(len(latents), size=batch)
        told = captions[rng.integers(CAPTIONS_EACH)]
        context, pooled = told.context[index].float(), told.pooled[index].float()
        blank = torch.from_numpy(rng.random(batch) < EMPTY_CAPTIONS)
        nothing = rng.integers(len(empty.context), size=int(blank.sum()))
        context[blank], pooled[blank] = empty.context[nothing].float(), empty.pooled[nothing].float()
        timestep = ((torch.arange(batch) + torch.rand(batch)) * (1000 / batch)).long().clamp(max=999)  # one a stretch
        a = signal[timestep][:, None, None, None]
        noise = torch.randn(batch, 4, 8, 8)
        noisy = (a.sqrt() * latents[index] + (1 - a).sqrt() * noise).contiguous(memory_format=torch.channels_last)
        added = {"text_embeds": pooled, "time_ids": random_sizes(rng, batch)}
        made = unet(noisy, timestep, context, added_cond_kwargs=added).sample
        snr = signal[timestep] / (1 - signal[timestep])
        fit.step(((made - noise).square().mean((1, 2, 3)) * snr.clamp(max=5) / snr).mean())
    return fit.averaged


def main():
    args = train.arguments(__doc__)
    clip = tokenizer(args.tokenizer)
    prompts, prompts_2 = Prompts(clip), Prompts2(clip)
    data = Data(max(4000, int(train.PICTURES * min(1.0, args.effort))))
    vae = load_vae().to(memory_format=torch.channels_last)
    encoder = encoder_1(nets.nets.WEIGHTS, len(prompts.vocabulary))

    stages = train.Stages(args, STEPS)
    encoder_2 = nets.build_text_encoder_2(len(prompts_2.vocabulary), start=0, end=1, pad=prompts_2.vocabulary.PAD)
    encoder_2 = stages.run("sdxl_text_2", encoder_2, lambda steps: train_text_encoder_2(prompts_2, steps))
    unet = nets.build_unet()
    told = (vae, encoder, encoder_2, prompts, prompts_2, data)
    for name, rate in UNET_ROUNDS.items():
        unet = stages.run(name, unet, lambda steps, start=unet, rate=rate: train_unet(start, rate, *told, steps))
        seen = torch.tensor(prompts_2.vocabulary.seen, dtype=torch.int32)
        save(encoder_2, args.out / "sdxl_text_encoder_2.safetensors", seen_tokens=seen)
        save(unet, args.out / "sdxl_unet.safetensors")
        print(f"written to {args.out}", flush=True)


if __name__ == "__main__":
    main()
