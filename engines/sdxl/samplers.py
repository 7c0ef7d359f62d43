"""Samplers over noise levels; each reads beside its paper.

    sampler(denoise, x, sigmas, noise, options, step) -> x

denoise(x, sigma) is the denoised picture D(x, sigma); the direction of the probability flow is d = (x - D) / sigma
(Karras et al. 2022, equation 3). sigmas falls; 0.0 at its end is the picture. noise() is the next standard normal array of
the run. step(i, x, denoised) is told after step i, counted from 0.

x stays in its own dtype: levels and coefficients are Python floats, which numpy does not let widen a float32 array.
Names are gm's; where gm departs from the papers (LinearMultistep adds its update twice, EulerAncestral ignores eta), the
papers are followed. Also runs in workers: Python 3.9, numpy and the standard library.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Denoise = Callable[[np.ndarray, float], np.ndarray]
Noise = Callable[[], np.ndarray]
Step = Callable[[int, np.ndarray, np.ndarray], None]

GUIDERS = ("VanillaCFG", "Identity")
LARGEST_CHURN = math.sqrt(2) - 1     # at most double the variance: Karras et al. 2022, algorithm 2, line 2


@dataclass(frozen=True)
class Options:
    """s_churn ... s_noise: Karras et al. 2022, table 5. s_noise and eta also scale the noise of the ancestral samplers."""

    s_churn: float = 0.0      # noise put back during the whole run, shared among its steps; EDM samplers only
    s_tmin: float = 0.0       # only where s_tmin <= sigma <= s_tmax
    s_tmax: float = 999.0
    s_noise: float = 1.0      # standard deviation of added noise
    eta: float = 1.0          # 0: no noise, 1: as much as the DDPM posterior has
    order: int = 4            # LinearMultistep


def churn(sigma: float, steps: int, options: Options) -> float:
    """gamma of algorithm 2 in Karras et al. (2022): the share by which the noise level is raised before a step."""
    return min(options.s_churn / steps, LARGEST_CHURN) if options.s_tmin <= sigma <= options.s_tmax else 0.0


def add_churn(x: np.ndarray, sigma: float, steps: int, noise: Noise, options: Options) -> tuple[np.ndarray, float]:
    """Lines 4 to 6 of algorithm 2 in Karras et al. (2022): x with the noise level raised, and that level."""
    gamma = churn(sigma, steps, options)
    if gamma <= 0:
        return x, sigma
    raised = sigma * (1 + gamma)
    return x + noise() * (options.s_noise * math.sqrt(raised ** 2 - sigma ** 2)), raised


def ancestral_levels(sigma: float, target: float, eta: float) -> tuple[float, float]:
    """(down, up): go down to `down` without noise, then add noise of `up`; down^2 + up^2 = target^2.

    The variance of the DDPM posterior (Ho et al. 2020, equation 7) in terms of sigma, as in k-diffusion.
    """
    up = min(target, eta * target * math.sqrt(max(0.0, sigma ** 2 - target ** 2)) / sigma)
    return math.sqrt(target ** 2 - up ** 2), up


def toward(x: np.ndarray, denoised: np.ndarray, sigma: float, target: float) -> np.ndarray:
    """x + (target - sigma) * d: the Euler step, and the exact solution while D stays the same."""
    return (target / sigma) * x + (1 - target / sigma) * denoised


def euler_edm(denoise: Denoise, x: np.ndarray, sigmas: Sequence[float], noise: Noise, options: Options,
              step: Step) -> np.ndarray:
    """Algorithm 2 of Karras et al. (2022) without its second-order correction; k-diffusion's `euler`."""
    steps = len(sigmas) - 1
    for i, (sigma, target) in enumerate(zip(sigmas, sigmas[1:])):
        x, sigma = add_churn(x, sigma, steps, noise, options)
        denoised = denoise(x, sigma)
        x = toward(x, denoised, sigma, target)
        step(i, x, denoised)
    return x


def heun_edm(denoise: Denoise, x: np.ndarray, sigmas: Sequence[float], noise: Noise, options: Options,
             step: Step) -> np.ndarray:
    """Algorithm 2 of Karras et al. (2022): an Euler step, then the mean of the directions at both of its ends."""
    steps = len(sigmas) - 1
    for i, (sigma, target) in enumerate(zip(sigmas, sigmas[1:])):
        x, sigma = add_churn(x, sigma, steps, noise, options)
        denoised = denoise(x, sigma)
        reached = toward(x, denoised, sigma, target)
        if target > 0:
            direction = (x - denoised) / sigma
            there = (reached - denoise(reached, target)) / target
            reached = x + (direction + there) * ((target - sigma) / 2)
        x = reached
        step(i, x, denoised)
    return x


def euler_ancestral(denoise: Denoise, x: np.ndarray, sigmas: Sequence[float], noise: Noise, options: Options,
                    step: Step) -> np.ndarray:
    """Ancestral sampling of Ho et al. (2020) with Euler steps, as in k-diffusion."""
    for i, (sigma, target) in enumerate(zip(sigmas, sigmas[1:])):
        denoised = denoise(x, sigma)
        down, up = ancestral_levels(sigma, target, options.eta)
        x = toward(x, denoised, sigma, down)
        if up > 0:
            x = x + noise() * (options.s_noise * up)
        step(i, x, denoised)
    return x


def dpmpp_2s_ancestral(denoise: Denoise, x: np.ndarray, sigmas: Sequence[float], noise: Noise, options: Options,
                       step: Step) -> np.ndarray:
    """DPM-Solver++(2S), algorithm 1 of Lu et al., "DPM-Solver++" (2022), with r = 1/2, in ancestral steps.

    With alpha = 1 and lambda = -log(sigma), the paper's exp(-h) is target / sigma, and the half-way level in lambda the
    geometric mean.
    """
    for i, (sigma, target) in enumerate(zip(sigmas, sigmas[1:])):
        denoised = denoise(x, sigma)
        down, up = ancestral_levels(sigma, target, options.eta)
        if down > 0:
            middle = math.sqrt(sigma * down)
            x = toward(x, denoise(toward(x, denoised, sigma, middle), middle), sigma, down)
        else:
            x = denoised
        if up > 0:
            x = x + noise() * (options.s_noise * up)
        step(i, x, denoised)
    return x


def dpmpp_2m(denoise: Denoise, x: np.ndarray, sigmas: Sequence[float], noise: Noise, options: Options,
             step: Step) -> np.ndarray:
    """DPM-Solver++(2M), algorithm 2 of Lu et al. (2022); the first and the last step are of first order."""
    previous, h_previous = None, 0.0
    for i, (sigma, target) in enumerate(zip(sigmas, sigmas[1:])):
        denoised = extrapolated = denoise(x, sigma)
        if target > 0:
            h = math.log(sigma / target)
            if previous is not None:
                share = h / (2 * h_previous)          # 1 / (2r) in the paper
                extrapolated = (1 + share) * denoised - share * previous
            h_previous = h
        x = toward(x, extrapolated, sigma, target)
        previous = denoised
        step(i, x, denoised)
    return x


def linear_multistep(denoise: Denoise, x: np.ndarray, sigmas: Sequence[float], noise: Noise, options: Options,
                     step: Step) -> np.ndarray:
    """Adams-Bashforth on uneven levels, k-diffusion's `lms`: d is a polynomial through the last `order` directions.

    The last step goes straight to D, as in ComfyUI: next to 0 the polynomial would be an extrapolation far beyond its nodes.
    """
    directions: list[np.ndarray] = []                 # the newest first
    for i, (sigma, target) in enumerate(zip(sigmas, sigmas[1:])):
        denoised = denoise(x, sigma)
        directions = [(x - denoised) / sigma, *directions[:options.order - 1]]
        if target > 0:
            weights = adams_bashforth([sigmas[i - k] for k in range(len(directions))], sigma, target)
            for weight, direction in zip(weights, directions):
                x = x + weight * direction
        else:
            x = denoised
        step(i, x, denoised)
    return x


def adams_bashforth(nodes: Sequence[float], start: float, end: float) -> list[float]:
    """Integrals from start to end of the polynomials that are 1 at one node and 0 at the others (Lagrange's basis).

    Gauss-Legendre quadrature with m points is exact for polynomials of degree 2m - 1; these have degree m - 1.
    """
    points, shares = np.polynomial.legendre.leggauss(len(nodes))
    at = (start + end) / 2 + (end - start) / 2 * points
    return [float((end - start) / 2 * np.sum(shares * np.prod([(at - other) / (node - other) for other in nodes
                                                               if other != node], axis=0))) for node in nodes]


SAMPLERS: dict[str, Callable[..., np.ndarray]] = {
    "EulerEDM": euler_edm,
    "HeunEDM": heun_edm,
    "EulerAncestral": euler_ancestral,
    "DPMPP2SAncestral": dpmpp_2s_ancestral,
    "DPMPP2M": dpmpp_2m,
    "LinearMultistep": linear_multistep,
}


def noise_count(name: str, sigmas: Sequence[float], options: Options) -> int:
    """How many arrays of noise a run draws after the one it starts from."""
    steps = list(zip(sigmas, sigmas[1:]))
    if name in ("EulerEDM", "HeunEDM"):
        return sum(churn(sigma, len(steps), options) > 0 for sigma, _ in steps)
    if name in ("EulerAncestral", "DPMPP2SAncestral"):
        return sum(ancestral_levels(sigma, target, options.eta)[1] > 0 for sigma, target in steps)
    return 0
