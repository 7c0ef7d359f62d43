"""The noise levels SDXL was trained with, and the choices of those a sampler visits.

A noise level sigma is the noise's standard deviation where the data's own scale is 1: x = data + sigma * noise. Levels
are Python floats; a schedule is a list of them that falls, and ends with 0.0, the picture.

The network predicts the noise. With c_in(sigma) = 1 / sqrt(sigma^2 + 1) the denoised picture is
D(x, sigma) = x - sigma * network(c_in(sigma) * x, timestep(sigma)), "VP preconditioning" of table 1 in Karras et al.,
"Elucidating the Design Space of Diffusion-Based Generative Models" (2022), EpsScaling in gm (generative-models, and
mindone's port of it). Names of discretizations are gm's.

Also runs in workers: Python 3.9, numpy and the standard library.
"""
from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from ..errors import EngineError

LEVELS = 1000


def _table() -> np.ndarray:
    """Ho et al. (2020) with the "scaled linear" betas of latent diffusion: sigma_t = sqrt((1 - a_t) / a_t),
    a_t = product of (1 - beta). Rounded to float32, as gm and ComfyUI hold them, so that a level compares equal to theirs.
    """
    betas = np.linspace(0.00085 ** 0.5, 0.012 ** 0.5, LEVELS) ** 2
    alphas = np.cumprod(1.0 - betas)
    return np.sqrt((1.0 - alphas) / alphas).astype(np.float32).astype(np.float64)


TABLE = _table()              # ascending, 0.029 to 14.6; the index is the timestep
LOG_TABLE = np.log(TABLE)
HIGHEST = float(TABLE[-1])


def snap(sigma: float) -> tuple[float, int]:
    """The nearest level of the table and its timestep, by plain distance: gm's DiscreteDenoiser."""
    index = int(np.abs(TABLE - sigma).argmin())
    return float(TABLE[index]), index


def timestep(sigma: float) -> int:
    """The timestep of the level nearest in logarithm: ComfyUI's ModelSamplingDiscrete, which leaves sigma as it is."""
    return int(np.abs(LOG_TABLE - math.log(sigma)).argmin())


def c_in(sigma: float) -> float:
    """What the network's input is multiplied by, so that its variance is about 1 at every level."""
    return 1.0 / math.sqrt(sigma ** 2 + 1.0)


def legacy_ddpm(n: int) -> list[float]:
    """n timesteps evenly spaced from 999 towards 0, each cut to an integer; the highest level is always the first."""
    indices = np.arange(LEVELS)[::-1] if n == LEVELS else np.linspace(LEVELS - 1, 0, n, endpoint=False).astype(int)
    return [*TABLE[indices].tolist(), 0.0]


def diffusers_ddpm(n: int) -> list[float]:
    """Multiples of 1000 // n, plus 1: "leading" spacing with an offset of 1, the scheduler file of SDXL on diffusers.

    It begins below the highest level: at 12.7 for 40 steps.
    """
    indices = np.arange(LEVELS) if n == LEVELS else np.arange(n) * (LEVELS // n) + 1
    return [*TABLE[indices[::-1]].tolist(), 0.0]


def edm(n: int, lowest: float = 0.03, highest: float = 14.61, rho: float = 3.0) -> list[float]:
    """Equation 5 of Karras et al. (2022), with the limits and rho of gm's SDXL demo. Its levels are not in the table."""
    ramp = np.linspace(highest ** (1 / rho), lowest ** (1 / rho), n)
    return [*(ramp ** rho).astype(np.float32).astype(np.float64).tolist(), 0.0]


DISCRETIZATIONS: dict[str, Callable[[int], list[float]]] = {
    "LegacyDDPM": legacy_ddpm,
    "DiffusersDDPM": diffusers_ddpm,
    "EDM": edm,
}


def schedule(discretization: str, steps: int, denoise: float = 1.0) -> list[float]:
    """The levels of a run, steps + 1 of them: the last ones of a longer schedule where denoise < 1, as stock KSampler.

    Empty for denoise 0: nothing is to be done. Raises EngineError where the table has too few levels.
    """
    if denoise <= 0.0:
        return []
    total = steps if denoise > 0.9999 else int(steps / denoise)
    if total > LEVELS and discretization != "EDM":
        asked = f"{steps} steps" if total == steps else f"{steps} steps at denoise {denoise:g} are a schedule of {total} and"
        raise EngineError(f"{asked} want more noise levels than the {LEVELS} of {discretization}: take fewer steps, a "
                          "higher denoise, or the EDM discretization.")
    return DISCRETIZATIONS[discretization](total)[-(steps + 1):]


def from_pure_noise(sigmas: list[float], denoise: float = 1.0) -> bool:
    """Whether a run begins with noise alone: x = latent + noise * sqrt(1 + sigma^2), the setting "max_denoise".

    gm does so whenever a picture is made from nothing, ComfyUI whenever the first level is the highest.
    """
    return bool(sigmas) and (denoise > 0.9999 or sigmas[0] >= HIGHEST * (1 - 1e-5))
