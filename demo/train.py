"""Trains the whole demo on a CPU: text encoder, VAE, U-Net, decoder again, judge.

    python -m demo.train --tokenizer path/to/ComfyUI/comfy/sd1_tokenizer

Each stage leaves its result in the work folder and is skipped when that file exists, so a rerun goes on where the last
one stopped; delete a stage's file (and those after it) to train it again. The last step writes demo/weights as float16.
"""

import argparse
import copy
import math
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from . import nets, shapes
from .nets import LATENT_SCALE, WIDTH

PICTURES = 40_000
GUIDED = 8_000  # of them are also sampled, to teach the decoder a sampler's errors
STEPS = {
    "text": 1400,
    "vae": 4400,
    "unet": 5200,
    "unet2": 3600,
    "unet3": 3000,
    "decoder": 6500,
    "decoder2": 4500,
    "judge": 1800,
}
# Later rounds are warm restarts (https://arxiv.org/abs/1608.03983) from a lower rate: what makes small stars stars.
UNET_ROUNDS = {"unet": 2e-3, "unet2": 1.2e-3, "unet3": 1.2e-3}
UNSEEN_WORDS = 0.3  # the share of captions with words nobody taught
EMPTY_CAPTIONS = 0.2  # the share of U-Net examples without a caption: what classifier-free guidance needs
OPEN_ATTRIBUTE = 0.05  # the share of captions without a shape, and without a colour


class Data:
    """The pictures, uint8 (PICTURES, 64, 64, 3), and what they show. The same every time."""

    def __init__(self, count: int):
        rng = np.random.default_rng(1)
        self.attributes = [shapes.choose(rng) for _ in range(count)]
        self.pictures = np.stack([shapes.draw(a, rng) for a in self.attributes])
        self.labels = torch.tensor([a.labels() for a in self.attributes])

    def batch(self, index: np.ndarray) -> torch.Tensor:
        """Pictures as the VAE takes them: float32 (B, 3, 64, 64) in [-1, 1]; channels last is a third faster."""
        batch = torch.from_numpy(self.pictures[index]).permute(0, 3, 1, 2).float() / 127.5 - 1
        return batch.contiguous(memory_format=torch.channels_last)


class Fit:
    """A training loop's bookkeeping: AdamW, warm-up, then constant, then cosine to zero; clipping; averaged weights."""

    def __init__(
        self, name: str, module: nn.Module, steps: int, rate: float, decay_from: float = 0.5, average: float = 0.999
    ):
        self.name, self.module, self.steps, self.average = name, module, steps, average
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=rate, weight_decay=1e-3, fused=True)

        def factor(step: int) -> float:
            progress = max(0.0, (step / steps - decay_from) / (1 - decay_from))
            return min(1.0, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * min(1.0, progress)))

        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)
        self.averaged = copy.deepcopy(module)
        self.began, self.losses = time.time(), []

    def __iter__(self):
        yield from range(self.steps)
        minutes = (time.time() - self.began) / 60
        print(f"{self.name}: {self.steps} steps in {minutes:.1f} min", flush=True)

    def step(self, loss: torch.Tensor):
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.losses.append(loss.item())
        done = len(self.losses)
        # a young average would remember the random start
        weight = 1 - min(self.average, done / (done + 10))
        with torch.no_grad():
            for kept, new in zip(self.averaged.parameters(), self.module.parameters(), strict=True):
                kept.lerp_(new, weight)
        if done % 100 == 0:
            loss, pace = np.mean(self.losses[-100:]), (time.time() - self.began) / done
            print(f"{self.name} {done}/{self.steps} loss {loss:.4f} {pace:.3f} s/step", flush=True)


# Text encoder --------------------------------------------------------------------------------------------------------


class Prompts:
    """Captions as rows of the small token table; None stands for a word never taught."""

    def __init__(self, tokenizer):
        self.ids = {w: tokenizer(w, add_special_tokens=False).input_ids for w in shapes.vocabulary()}
        self.vocabulary = nets.Vocabulary(sorted({i for ids in self.ids.values() for i in ids}))

    def encode(self, words: list[str | None]) -> list[int]:
        """77 rows. A tokenizer splits at spaces and punctuation anyway, so word by word is the same as whole."""
        return self.vocabulary.rows([i for w in words for i in (self.ids[w] if w else [-1])])

    def caption(self, a: shapes.Attributes, rng: np.random.Generator) -> list[int]:
        words = shapes.caption(a, rng).replace(",", " ,").replace(".", " .").split()
        if rng.random() < UNSEEN_WORDS:
            for _ in range(min(40, rng.geometric(0.2))):
                words.insert(rng.integers(len(words) + 1), None if rng.random() < 0.8 else ",")
        return self.encode(words)

    def empty(self, rng: np.random.Generator) -> list[int]:
        """A caption that says nothing: "", or (three in four) unknown words, as negative prompts are."""
        if rng.random() < 0.25:
            return self.encode([])
        words = [None if rng.random() < 0.7 else str(rng.choice(shapes.FILLERS)) for _ in range(rng.integers(1, 40))]
        return self.encode(words)


def some_left_open(a: shapes.Attributes, rng: np.random.Generator) -> shapes.Attributes:
    """Now and then a caption without a shape or a colour, so that "a star" alone is understood too."""
    shape = None if rng.random() < OPEN_ATTRIBUTE else a.shape
    colour = None if rng.random() < OPEN_ATTRIBUTE else a.colour
    return shapes.Attributes(shape, colour, a.background, a.size, a.position)


def train_text_encoder(prompts: Prompts, steps: int) -> nn.Module:
    """Taught alone to name the attributes from END and every pad after it, where cross-attention finds them."""
    rng = np.random.default_rng(2)
    encoder = nets.build_text_encoder(len(prompts.vocabulary), start=0, end=1).train()
    heads = nn.ModuleList(nn.Linear(WIDTH, len(values) + 1) for values in shapes.VALUES.values())  # + 1: left open
    model = nn.ModuleDict({"encoder": encoder, "heads": heads})
    fit = Fit("text", model, steps, rate=1e-3)
    for _ in fit:
        rows, labels = [], []
        for _ in range(128):
            a = shapes.OPEN if rng.random() < EMPTY_CAPTIONS else some_left_open(shapes.choose(rng), rng)
            rows.append(prompts.empty(rng) if a is shapes.OPEN else prompts.caption(a, rng))
            labels.append(a.labels())
        rows, labels = torch.tensor(rows), torch.tensor(labels)
        hidden = encoder(rows).last_hidden_state
        batch, place = torch.nonzero(rows == 1, as_tuple=True)
        found = hidden[batch, place]
        fit.step(sum(F.cross_entropy(head(found), labels[batch, i]) for i, head in enumerate(heads)))
    return fit.averaged["encoder"]


# VAE -----------------------------------------------------------------------------------------------------------------


def picture_loss(made: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """L1 + MSE + half the L1 of the differences between neighbours, which keeps edges sharp."""
    error = made - wanted
    edges = (error[..., 1:] - error[..., :-1]).abs().mean() + (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
    return error.abs().mean() + error.square().mean() + 0.5 * edges


def train_vae(data: Data, steps: int) -> nn.Module:
    rng = np.random.default_rng(3)
    vae = nets.build_vae().to(memory_format=torch.channels_last)
    fit = Fit("vae", vae, steps, rate=2e-3)
    for _ in fit:
        pictures = data.batch(rng.integers(len(data.pictures), size=8))
        posterior = vae.encode(pictures).latent_dist
        made = vae.decode(posterior.sample()).sample
        divergence = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        fit.step(picture_loss(made, pictures) + 3e-4 * divergence)
    whiten(fit.averaged, data)
    return fit.averaged


@torch.no_grad()
def latents_of(vae: nn.Module, data: Data, count: int | None = None) -> torch.Tensor:
    """Means of the latents, float32 (count, 4, 8, 8)."""
    index = np.arange(len(data.pictures) if count is None else count)
    return torch.cat([vae.encode(data.batch(i)).latent_dist.mean for i in np.array_split(index, len(index) // 100 + 1)])


@torch.no_grad()
def whiten(vae: nn.Module, data: Data):
    """Makes the four latent channels uncorrelated, with mean 0 and deviation 1 / 0.18215, without changing a picture.

    z' = W (z - m) / s with W = cov(z)^(-1/2) goes into the 1x1 convolution after the encoder, and its inverse into the
    one before the decoder. Variances of the posterior follow the diagonal of W, which dominates it.
    """
    z = latents_of(vae, data, 4000).permute(1, 0, 2, 3).flatten(1).double()
    mean = z.mean(1)
    values, vectors = torch.linalg.eigh(torch.cov(z))
    forward = (vectors * values.rsqrt() @ vectors.T) / LATENT_SCALE
    backward = torch.linalg.inv(forward)

    quant, post = vae.quant_conv, vae.post_quant_conv
    matrix, bias = quant.weight[:, :, 0, 0].double(), quant.bias.double()
    matrix[:4], bias[:4] = forward @ matrix[:4], forward @ (bias[:4] - mean)
    bias[4:] += 2 * forward.diagonal().abs().log()
    quant.weight.copy_(matrix[:, :, None, None])
    quant.bias.copy_(bias)
    matrix = post.weight[:, :, 0, 0].double()
    post.bias.copy_(matrix @ mean + post.bias)
    post.weight.copy_((matrix @ backward)[:, :, None, None])


def tune_decoder(vae: nn.Module, data: Data, steps: int, guided: torch.Tensor | None = None) -> nn.Module:
    """The decoder alone, on latents with a little noise and, where given, as often on `guided` ones (see there)."""
    rng = np.random.default_rng([4, steps])
    latents = latents_of(vae, data)
    vae = copy.deepcopy(vae).requires_grad_(False).to(memory_format=torch.channels_last)
    vae.decoder.requires_grad_(True)
    vae.post_quant_conv.requires_grad_(True)
    fit = Fit("decoder", vae, steps, rate=1e-3, decay_from=0.3)
    for _ in fit:
        index = rng.integers(len(data.pictures), size=8)
        chosen = latents[index] + torch.randn(8, 4, 8, 8) * (0.04 / LATENT_SCALE)
        if guided is not None:
            index[:4] = rng.integers(len(guided), size=4)
            chosen[:4] = guided[index[:4]]
        fit.step(picture_loss(vae.decode(chosen).sample, data.batch(index)))
    return fit.averaged


@torch.no_grad()
def guided_latents(unet: nn.Module, vae: nn.Module, encoder: nn.Module, prompts: Prompts, data: Data) -> torch.Tensor:
    """What sampling makes of the first pictures' latents: float32 (GUIDED, 4, 8, 8), or fewer if there are fewer.

    Guidance overshoots, in colours above all. So the pictures' latents are noised to three steps before the end of an
    eight-step schedule and sampled to its end: near enough to keep the picture, far enough to show the sampler's
    errors, which the decoder can then learn to undo.
    """
    rng, count = np.random.default_rng(8), min(GUIDED, len(data.pictures))
    unet, made = unet.eval(), []
    rows = [prompts.caption(a, rng) for a in data.attributes[:count]]
    clean = latents_of(vae, data, count) * LATENT_SCALE
    a = alphas_cumprod()
    levels = ((1 - a) / a).sqrt()
    nothing = contexts_of(encoder, [prompts.encode([])]).float()
    for part in torch.arange(count).split(100):
        context = contexts_of(encoder, [rows[i] for i in part]).float()
        both = torch.cat([nothing.expand_as(context), context])
        timesteps = [374, 249, 124]
        schedule = [*levels[timesteps], torch.tensor(0.0)]
        cfg = float(rng.choice([3.0, 5.0]))
        x = clean[part] + schedule[0] * torch.randn(len(part), 4, 8, 8)
        for timestep, now, following in zip(timesteps, schedule, schedule[1:], strict=False):
            latent = (x / (1 + now**2).sqrt()).repeat(2, 1, 1, 1).contiguous(memory_format=torch.channels_last)
            without, along = unet(latent, timestep, both).sample.chunk(2)
            x = x + (without + cfg * (along - without)) * (following - now)
        made.append(x / LATENT_SCALE)
    return torch.cat(made)


@torch.no_grad()
def psnr(vae: nn.Module, data: Data, count: int = 2000) -> float:
    """Of `count` pictures through encoder and decoder, in dB: 10 log10(peak^2 / MSE), peak 2."""
    error, latents = [], latents_of(vae, data, count)
    for index in np.array_split(np.arange(count), count // 100):
        made = vae.decode(latents[index]).sample.clamp(-1, 1)
        error.append((made - data.batch(index)).square().mean().item())
    return 10 * math.log10(4 / np.mean(error))


# U-Net ---------------------------------------------------------------------------------------------------------------


def alphas_cumprod() -> torch.Tensor:
    """SD 1.x's 1000 noise levels: betas whose square roots run evenly from sqrt(0.00085) to sqrt(0.012)."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0).float()


@torch.no_grad()
def contexts_of(encoder: nn.Module, rows: list[list[int]]) -> torch.Tensor:
    """float16 (N, 77, 64): half precision so that 80,000 of them fit in memory with ease."""
    rows = torch.tensor(rows)
    return torch.cat([encoder(r).last_hidden_state.half() for r in rows.split(256)])


def train_unet(
    unet: nn.Module, rate: float, vae: nn.Module, encoder: nn.Module, prompts: Prompts, data: Data, steps: int
) -> nn.Module:
    """Predicts the noise (epsilon), the loss weighted by min-SNR (https://arxiv.org/abs/2303.09556), gamma 5."""
    rng = np.random.default_rng([5, steps])
    batch, captions_each = 64, 2
    latents = latents_of(vae, data) * LATENT_SCALE
    print(f"unet: latent mean {latents.mean():.3f}, deviation {latents.std((0, 2, 3)).tolist()}", flush=True)
    contexts = [
        contexts_of(encoder, [prompts.caption(some_left_open(a, rng), rng) for a in data.attributes])
        for _ in range(captions_each)
    ]
    empty = contexts_of(encoder, [prompts.empty(rng) for _ in range(2000)])

    signal = alphas_cumprod()
    unet = unet.train().to(memory_format=torch.channels_last)
    fit = Fit("unet", unet, steps, rate)
    for _ in fit:
        index = rng.integers(len(latents), size=batch)
        context = contexts[rng.integers(captions_each)][index].float()
        blank = torch.from_numpy(rng.random(batch) < EMPTY_CAPTIONS)
        context[blank] = empty[rng.integers(len(empty), size=int(blank.sum()))].float()
        timestep = ((torch.arange(batch) + torch.rand(batch)) * (1000 / batch)).long().clamp(max=999)  # one a stretch
        a = signal[timestep][:, None, None, None]
        noise = torch.randn(batch, 4, 8, 8)
        noisy = (a.sqrt() * latents[index] + (1 - a).sqrt() * noise).contiguous(memory_format=torch.channels_last)
        error = (unet(noisy, timestep, context).sample - noise).square().mean((1, 2, 3))
        snr = signal[timestep] / (1 - signal[timestep])
        fit.step((error * snr.clamp(max=5) / snr).mean())
    return fit.averaged


# Judge ---------------------------------------------------------------------------------------------------------------


def train_judge(data: Data, steps: int) -> nn.Module:
    """Taught on noisy and blurred drawings, so that it judges what a picture shows and not how clean it is."""
    rng = np.random.default_rng(6)
    judge = nets.Judge().to(memory_format=torch.channels_last)
    fit = Fit("judge", judge, steps, rate=2e-3, decay_from=0.3)
    for _ in fit:
        index = rng.integers(len(data.pictures), size=64)
        pictures = data.batch(index)
        if rng.random() < 0.3:
            pictures = F.avg_pool2d(pictures, 3, 1, 1, count_include_pad=False)
        pictures = pictures + torch.randn_like(pictures) * rng.uniform(0, 0.15)
        logits = judge(pictures)
        fit.step(sum(F.cross_entropy(named, data.labels[index, i]) for i, named in enumerate(logits)))
    return fit.averaged


@torch.no_grad()
def judge_accuracy(judge: nn.Module, count: int = 2000) -> float:
    """The share of fresh, clean pictures with every attribute named right."""
    rng = np.random.default_rng(7)
    attributes = [shapes.choose(rng) for _ in range(count)]
    pictures = np.stack([shapes.draw(a, rng) for a in attributes])
    logits = judge(torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1)
    named = torch.stack([values.argmax(1) for values in logits], 1)
    return (named == torch.tensor([a.labels() for a in attributes])).all(1).float().mean().item()


# The whole -----------------------------------------------------------------------------------------------------------


class Stages:
    """Trains stage after stage, each from its own seed; what a work folder already holds is taken from there."""

    def __init__(self, args: argparse.Namespace, steps: dict[str, int]):
        self.folder, self.effort, self.steps = args.work, args.effort, steps
        self.folder.mkdir(parents=True, exist_ok=True)

    def run(self, name: str, blank: nn.Module, train) -> nn.Module:
        """`blank` with what `train(steps)` learnt, for inference."""
        path = self.folder / f"{name}.safetensors"
        if not path.exists():
            torch.manual_seed(sum(map(ord, name)))
            trained = train(max(1, int(self.steps[name] * self.effort)))
            state = {k: v.contiguous() for k, v in trained.state_dict().items()}
            save_file(state, path.with_suffix(".part"))
            path.with_suffix(".part").rename(path)
        blank.load_state_dict(load_file(path))
        return blank.eval()


def arguments(about: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with CLIP's vocab.json and merges.txt")
    parser.add_argument("--work", type=Path, default=Path(".local/demo/stages"), help="where stages leave results")
    parser.add_argument("--out", type=Path, default=nets.WEIGHTS)
    parser.add_argument("--effort", type=float, default=1.0, help="scales steps and pictures; 0.01 for a quick try")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    return args


def main():
    args = arguments(__doc__)
    prompts = Prompts(nets.tokenizer(args.tokenizer))
    data = Data(max(4000, int(PICTURES * min(1.0, args.effort))))
    print(f"{len(data.pictures)} pictures, {len(prompts.vocabulary)} token vectors", flush=True)

    stage = Stages(args, STEPS).run
    encoder = nets.build_text_encoder(len(prompts.vocabulary), start=0, end=1)
    encoder = stage("text", encoder, lambda steps: train_text_encoder(prompts, steps))
    vae = stage("vae", nets.build_vae(), lambda steps: train_vae(data, steps))
    print(f"vae: PSNR {psnr(vae, data):.1f} dB", flush=True)
    denoising = (vae, encoder, prompts, data)
    unet = nets.build_unet()
    for name, rate in UNET_ROUNDS.items():
        unet = stage(name, unet, lambda steps, start=unet, rate=rate: train_unet(start, rate, *denoising, steps))
    vae = stage("decoder", nets.build_vae(), lambda steps: tune_decoder(vae, data, steps))
    vae = stage("decoder2", vae, lambda steps: tune_decoder(vae, data, steps, guided_latents(unet, vae, *denoising[1:])))
    print(f"decoder: PSNR {psnr(vae, data):.1f} dB", flush=True)
    judge = stage("judge", nets.Judge(), lambda steps: train_judge(data, steps))
    print(f"judge: {judge_accuracy(judge):.2%} of fresh pictures named right", flush=True)

    seen = torch.tensor(prompts.vocabulary.seen, dtype=torch.int32)
    nets.save(encoder, args.out / "text_encoder.safetensors", seen_tokens=seen)
    nets.save(unet, args.out / "unet.safetensors")
    nets.save(vae, args.out / "vae.safetensors")
    nets.save(judge, args.out / "judge.safetensors")
    print(f"written to {args.out}", flush=True)


if __name__ == "__main__":
    main()
