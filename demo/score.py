"""Samples pictures for random prompts and says how many obey in every attribute.

    python -m demo.score --tokenizer path/to/ComfyUI/comfy/sd1_tokenizer [--steps 8] [--cfg 3] [--grid grid.png]

Any three functions that stand for the stages of sampling will do; by itself this scores the ONNX files. What does not
depend on them (prompts, sampler, judge) serves demo.sdxl.score as well.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from . import export, nets, shapes
from .vocabulary import END, START, TOKENS


@dataclass(frozen=True)
class Networks:
    """The stages as functions of float32 arrays; ids and timesteps are int64."""

    text: Callable[[np.ndarray], np.ndarray]  # ids (1, 77) -> context (1, 77, 64)
    unet: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]  # (2, 4, 8, 8), (2,), (2, 77, 64) -> (2, 4, 8, 8)
    decode: Callable[[np.ndarray], np.ndarray]  # (1, 4, 8, 8) -> (1, 3, 64, 64) in [-1, 1]


def onnx_networks(folder: Path = export.OUT) -> Networks:
    """The exported files on onnxruntime."""
    import onnxruntime

    def stage(name: str) -> Callable[..., np.ndarray]:
        session = onnxruntime.InferenceSession(str(folder / f"{name}.onnx"), providers=["CPUExecutionProvider"])
        names = [i.name for i in session.get_inputs()]
        return lambda *arrays: session.run(None, dict(zip(names, arrays, strict=True)))[0]

    return Networks(stage("text_encoder"), stage("unet"), stage("vae_decoder"))


def sigmas() -> np.ndarray:
    """SD 1.x's 1000 noise levels as deviation of the noise over a clean latent's, float64, rising.

    sigma = sqrt((1 - a) / a), where a is the running product of 1 - beta (https://arxiv.org/abs/2206.00364, table 1).
    """
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    kept = np.cumprod(1 - betas)
    return np.sqrt((1 - kept) / kept)


def euler(predict: Callable[[np.ndarray, int], np.ndarray], seeds: Sequence[int], steps: int) -> np.ndarray:
    """Latents (N, 4, 8, 8) by ComfyUI's `euler` on the `simple` schedule, which SD 1.x and SDXL share.

    `predict` gives the (guided) noise in float32 latents (N, 4, 8, 8) of unit variance at a timestep.
    """
    levels = sigmas()
    timesteps = [999 - int(i * 1000 / steps) for i in range(steps)]
    schedule = [*levels[timesteps], 0.0]
    noise = np.stack([np.random.default_rng(seed).standard_normal((4, 8, 8)) for seed in seeds])
    x = noise * np.sqrt(1 + schedule[0] ** 2)
    for timestep, now, following in zip(timesteps, schedule, schedule[1:], strict=False):
        x = x + predict((x / np.sqrt(1 + now**2)).astype(np.float32), timestep) * (following - now)
    return x


def pixels(pictures: np.ndarray) -> np.ndarray:
    """(N, 3, 64, 64) in [-1, 1] -> uint8 (N, 64, 64, 3)."""
    return np.uint8(np.clip(pictures.transpose(0, 2, 3, 1) * 127.5 + 127.5, 0, 255).round())


def sample(networks: Networks, prompt: np.ndarray, negative: np.ndarray, seed: int, steps: int, cfg: float) -> np.ndarray:
    """One picture, uint8 (64, 64, 3), for the contexts (1, 77, 64) of a prompt and a negative prompt."""
    context = np.concatenate([negative, prompt]).astype(np.float32)

    def predict(latent: np.ndarray, timestep: int) -> np.ndarray:
        without, along = networks.unet(np.repeat(latent, 2, 0), np.full(2, timestep, np.int64), context)
        return (without + cfg * (along - without))[None]

    latent = euler(predict, [seed], steps) / nets.LATENT_SCALE
    return pixels(networks.decode(latent.astype(np.float32)))[0]


def ids_of(tokenizer, prompt: str, pad: int = END) -> np.ndarray:
    """int64 (1, 77), as SD 1.x takes a prompt; SDXL's text encoder 2 has another `pad`."""
    ids = [START, *tokenizer(prompt, add_special_tokens=False).input_ids[: TOKENS - 2], END]
    return np.array([ids + [pad] * (TOKENS - len(ids))])


def judged(pictures: np.ndarray) -> np.ndarray:
    """Labels (N, 5), as shapes.Attributes.labels gives them, of uint8 pictures (N, 64, 64, 3)."""
    import torch

    batch = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        return torch.stack([logits.argmax(1) for logits in nets.load_judge()(batch)], 1).numpy()


def random_prompts(count: int, seed: int = 0) -> list[tuple[str, shapes.Attributes]]:
    rng = np.random.default_rng([seed, 2024])  # a stream training never saw
    wanted = [shapes.choose(rng) for _ in range(count)]
    return [(shapes.caption(a, rng), a) for a in wanted]


@dataclass(frozen=True)
class Score:
    prompts: list[tuple[str, shapes.Attributes]]
    pictures: np.ndarray  # uint8 (N, 64, 64, 3)
    right: np.ndarray  # bool (N, 5)

    @property
    def all_right(self) -> float:
        """The share of pictures that obey in every attribute."""
        return float(self.right.all(1).mean())

    def __str__(self):
        parts = ", ".join(f"{name} {share:.1%}" for name, share in zip(shapes.VALUES, self.right.mean(0), strict=True))
        return f"{self.all_right:.1%} of {len(self.prompts)} obey in everything ({parts})"

    @classmethod
    def of(cls, prompts: list[tuple[str, shapes.Attributes]], pictures: np.ndarray) -> "Score":
        return cls(prompts, pictures, judged(pictures) == np.array([a.labels() for _, a in prompts]))

    def report(self, file: Path | None):
        """Prints what is wrong and the shares, and writes all pictures to `file`."""
        for (text, _), right in zip(self.prompts, self.right, strict=True):
            if not right.all():
                print(f"wrong {', '.join(np.array(list(shapes.VALUES))[~right])}: {text}")
        print(self)
        if file:
            grid(self.pictures).save(file)


def score(
    networks: Networks,
    tokenizer,
    prompts: list[tuple[str, shapes.Attributes]],
    steps: int = 8,
    cfg: float = 3.0,
    negative: str = "",
) -> Score:
    """Samples every prompt once; the seed is its place in the list."""
    without = networks.text(ids_of(tokenizer, negative))
    contexts = [networks.text(ids_of(tokenizer, text)) for text, _ in prompts]
    pictures = np.stack([sample(networks, c, without, seed, steps, cfg) for seed, c in enumerate(contexts)])
    return Score.of(prompts, pictures)


def grid(pictures: np.ndarray, columns: int = 16) -> Image.Image:
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * shapes.PIXELS, rows * shapes.PIXELS), "grey")
    for i, picture in enumerate(pictures):
        sheet.paste(Image.fromarray(picture), (i % columns * shapes.PIXELS, i // columns * shapes.PIXELS))
    return sheet


def parser(description: str) -> argparse.ArgumentParser:
    """What both scores can be asked for."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with CLIP's vocab.json and merges.txt")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--set", type=int, default=0, help="which prompts; checkpoints were chosen by set 0")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--cfg", type=float, default=3.0)
    parser.add_argument("--negative", default="")
    parser.add_argument("--grid", type=Path, help="write all pictures to this file")
    return parser


def main():
    options = parser(__doc__)
    options.add_argument("--onnx", type=Path, default=export.OUT, help="folder of the exported networks")
    args = options.parse_args()
    networks, prompts = onnx_networks(args.onnx), random_prompts(args.prompts, args.set)
    score(networks, nets.tokenizer(args.tokenizer), prompts, args.steps, args.cfg, args.negative).report(args.grid)


if __name__ == "__main__":
    main()
