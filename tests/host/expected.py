"""What ComfyUI must compute with the arithmetic networks, by numpy and by the definitions: SD 1.x noise levels, Euler."""
from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from tests.helpers.onnx_nets import unet_result

LATENT_SCALE = 0.18215
START, END = 49406, 49407
TOKENS = {"cat": 2368, "dog": 1929}      # CLIP's ids of the words that tests use
# SD 1.x: 1000 betas, linear in their square roots from 0.00085 to 0.012
ALPHAS = np.cumprod(1 - np.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000) ** 2)
SIGMAS = np.sqrt((1 - ALPHAS) / ALPHAS)


def hidden(*parts: str | tuple[str, float]) -> np.ndarray:
    """The arithmetic encoder's answer (77, 64) for a prompt of known words, some parts of it as (words, weight)."""
    parts = [part if isinstance(part, tuple) else (part, 1.0) for part in parts]
    weighted = [(word, weight) for words, weight in parts for word in words.split()]

    def encoded(ids: list[int]) -> np.ndarray:
        ids = [START, *ids, END]
        return (np.array(ids + [END] * (77 - len(ids))) + np.arange(77)) / 50000

    plain, empty = encoded([TOKENS[word] for word, _ in weighted]), encoded([])
    weights = np.ones(77)
    weights[1:1 + len(weighted)] = [weight for _, weight in weighted]
    return np.repeat(((plain - empty) * weights + empty)[:, None], 64, axis=1)


def schedule(steps: int) -> np.ndarray:
    """ComfyUI's scheduler 'simple'."""
    return np.array([SIGMAS[-1 - int(step * len(SIGMAS) / steps)] for step in range(steps)] + [0.0])


def noise(shape: tuple[int, ...], seed: int = 1) -> np.ndarray:
    return torch.randn(shape, generator=torch.manual_seed(seed)).numpy()


Condition = np.ndarray | Callable[[float], np.ndarray]      # hidden states, or which of them at a noise level


def epsilon(x: np.ndarray, sigma: float, condition: Condition) -> np.ndarray:
    condition = condition(sigma) if callable(condition) else condition
    timestep = np.full(len(x), np.abs(SIGMAS - sigma).argmin())
    return unet_result(x / np.sqrt(sigma ** 2 + 1), timestep, np.repeat(condition[None], len(x), axis=0))


def euler(positive: Condition, negative: Condition, shape: tuple[int, ...] = (1, 4, 8, 8), seed: int = 1, cfg: float = 5.0,
          sigmas: Sequence[float] = tuple(schedule(4)), picture: np.ndarray | None = None,
          v_prediction: bool = False) -> np.ndarray:
    """The LATENT that KSampler with sampler 'euler' gives; `picture` is the LATENT that it starts from."""
    first = sigmas[0]
    x = noise(shape, seed) * (np.sqrt(1 + first ** 2) if np.isclose(first, SIGMAS[-1]) else first)
    if picture is not None:
        x = x + picture * LATENT_SCALE
    for sigma, following in zip(sigmas, sigmas[1:]):
        prediction, other = epsilon(x, sigma, positive), epsilon(x, sigma, negative)
        prediction = other + cfg * (prediction - other)
        denoised = (x / (sigma ** 2 + 1) - prediction * sigma / np.sqrt(sigma ** 2 + 1) if v_prediction
                    else x - sigma * prediction)
        x = x + (x - denoised) / sigma * (following - sigma)
    return x / LATENT_SCALE


def close(got: np.ndarray, wanted: np.ndarray) -> None:
    """Equal but for the rounding of float32 arithmetic over a few steps."""
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=2e-5 * float(np.abs(wanted).max()))
