"""How a small error of every step grows over the steps of a sampler, on the demo's model in torch.

Euler steps for many prompts at once, so that a number is no accident of one picture. Part of `python -m bench.alignment`.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from tools.install import comfyui

PROMPTS, STEPS, CFG = 64, 20, 3.0
ARTICLE_STEPS = 32
# Relative errors of a prediction: 0.3 %, and what a cosine of 99.7 % amounts to.
ERRORS = {"0.3 %": 0.003, "cosine 99.7 %": float(np.sqrt(1 - 0.997 ** 2) / 0.997)}

Disturb = Callable[[np.ndarray], np.ndarray]          # a network's answer -> what is taken for it


@dataclass(frozen=True)
class Grown:
    """What became of an error: of each call (relative, cosine), of the latent after each step (relative), of pictures."""

    calls: list[float]
    cosines: list[float]
    latents: list[float]
    psnr: float                    # dB, of all pictures together
    obey: float                    # the share whose shape, colours, size and place are still those of the prompt


class Demo:
    """The demo's model in torch, and PROMPTS prompts for it."""

    def __init__(self):
        import torch

        from demo import nets, score
        self.torch, self.score = torch, score
        self.unet, self.vae, self.scale = nets.load_unet(), nets.load_vae(), nets.LATENT_SCALE
        self.prompts = score.random_prompts(PROMPTS, seed=2)
        text, tokenizer = nets.load_text_encoder(), nets.tokenizer(comfyui() / "comfy" / "sd1_tokenizer")
        ids = [score.ids_of(tokenizer, prompt) for prompt in [""] + [prompt for prompt, _ in self.prompts]]
        with torch.no_grad():
            contexts = torch.cat([text(torch.from_numpy(row)).last_hidden_state for row in ids])
        self.contexts = torch.cat([contexts[:1].expand(PROMPTS, -1, -1), contexts[1:]])

    def predict(self, latents: np.ndarray, timestep: float) -> np.ndarray:
        """Both halves, without and along the prompt: (N,4,8,8) -> (2N,4,8,8)."""
        torch = self.torch
        given = torch.from_numpy(latents.astype(np.float32)).repeat(2, 1, 1, 1)
        with torch.no_grad():
            return self.unet(given, torch.tensor(timestep), self.contexts, return_dict=False)[0].numpy().astype(np.float64)

    def trajectory(self, levels: np.ndarray, predict: Callable[[np.ndarray, int], np.ndarray]) -> list[np.ndarray]:
        """The latents (N,4,8,8) after each Euler step over noise `levels`. predict: of latents of unit variance, step."""
        x = np.stack([np.random.default_rng(seed).standard_normal((4, 8, 8)) for seed in range(PROMPTS)])
        x, after = x * np.sqrt(1 + levels[0] ** 2), []
        for step, (now, following) in enumerate(zip(levels, [*levels[1:], 0.0])):
            without, along = np.split(predict(x / np.sqrt(1 + now ** 2), step), 2)
            x = x + (without + CFG * (along - without)) * (following - now)
            after.append(x)
        return after

    def pictures(self, latents: np.ndarray) -> np.ndarray:
        """uint8 (N,64,64,3)."""
        with self.torch.no_grad():
            decoded = self.vae.decode(self.torch.from_numpy(latents / self.scale).float(), return_dict=False)[0]
        return self.score.pixels(decoded.numpy())

    def obey(self, pictures: np.ndarray) -> float:
        return self.score.Score.of(self.prompts, pictures).all_right

    def compare(self, levels: np.ndarray, wanted: Callable[[np.ndarray, int], np.ndarray],
                got: Callable[[np.ndarray, int], np.ndarray]) -> Grown:
        """Trajectories of two ways to predict; an error of a call is that on the first one's trajectory."""
        inputs = []

        def kept(latents: np.ndarray, step: int) -> np.ndarray:
            answer = wanted(latents, step)
            inputs.append((got(latents, step), answer))
            return answer
        reference, other = self.trajectory(levels, kept), self.trajectory(levels, got)
        pictures = [self.pictures(run[-1]) for run in (other, reference)]
        error = np.mean((pictures[0].astype(np.float64) - pictures[1]) ** 2) / 255 ** 2
        return Grown([relative(*pair) for pair in inputs], [cosine(*pair) for pair in inputs],
                     [relative(*pair) for pair in zip(other, reference)], float(-10 * np.log10(error)),
                     self.obey(pictures[0]))

    @cached_property
    def unharmed(self) -> float:
        """The share of the reference's own pictures that obey."""
        times, levels = schedule(STEPS)
        latents = self.trajectory(levels, lambda latents, step: self.predict(latents, times[step]))[-1]
        return self.obey(self.pictures(latents))


def relative(got: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


def cosine(got: np.ndarray, wanted: np.ndarray) -> float:
    return float(got.ravel() @ wanted.ravel() / (np.linalg.norm(got) * np.linalg.norm(wanted)))


def schedule(steps: int) -> tuple[np.ndarray, np.ndarray]:
    """(timesteps, noise levels) of ComfyUI's `simple` schedule."""
    from demo import score
    times = np.array([999 - int(i * 1000 / steps) for i in range(steps)])
    return times, score.sigmas()[times]


def small_errors(demo: Demo) -> dict[tuple[str, str], Grown]:
    """(size, kind) of an error of every step -> what becomes of it."""
    times, levels = schedule(STEPS)

    def exact(latents: np.ndarray, step: int) -> np.ndarray:
        return demo.predict(latents, times[step])

    def scattered(size: float, seed: Callable[[int], int]) -> Callable:
        def predict(latents: np.ndarray, step: int) -> np.ndarray:
            answer = exact(latents, step)
            pattern = np.random.default_rng(seed(step)).standard_normal(answer.shape)
            return answer + size * np.sqrt(np.mean(answer ** 2)) * pattern
        return predict
    found = {}
    for name, size in ERRORS.items():
        kinds = {"another at each step": scattered(size, lambda step: 1000 + step),
                 "the same at each step": scattered(size, lambda step: 1000),
                 "too large a prediction": lambda latents, step, size=size: exact(latents, step) * (1 + size)}
        found |= {(name, kind): demo.compare(levels, exact, predict) for kind, predict in kinds.items()}
    return found


def fractions(demo: Demo) -> Grown:
    """The schedule of the article's pipeline, whose timesteps are fractions: as they are, against cut to whole numbers.

    diffusers 0.2.4, LMSDiscreteScheduler: 999 to 0 in equal parts, noise levels interpolated; its U-Net makes a timestep
    that is no tensor a whole number (torch.long). Here with Euler steps.
    """
    from demo import score
    times = np.linspace(999, 0, ARTICLE_STEPS)
    levels = np.interp(times, np.arange(1000), score.sigmas())
    return demo.compare(levels, lambda latents, step: demo.predict(latents, int(times[step])),
                        lambda latents, step: demo.predict(latents, float(times[step])))
