"""The whole sampling loop over numpy arrays: conditions, guidance, masks, progress. It runs beside the U-Net.

What it needs of the U-Net is one function,

    predict(latent, timestep, rows) -> prediction
        latent      (N, C, h, w) float32, scaled for the network already
        timestep    (N,) float32, whole numbers, all the same
        rows        Rows: .context (N, L, D) float32 and .y (N, V) float32, one row a row of the latent
        prediction  (N, C, h, w) float32, the noise

`rows` is the same object in every call that has the same conditions, usually in all of them, and hashes by identity: a
runtime uploads its arrays when it first sees it, and keeps what it made in a dict {rows: ...} for the run. All
conditions of one size go into one call, the negative ones first: with the usual pair N = 2B, rows (uncond, cond).

The arithmetic is ComfyUI's (calc_cond_batch, cfg_function, KSamplerX0Inpaint in comfy/samplers.py), so that the same
settings give the same picture; the samplers are in `samplers`, the levels in `schedules`. Also runs in workers:
Python 3.9, numpy and the standard library.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import EngineError
from .samplers import SAMPLERS, Options, noise_count
from .schedules import c_in, snap, timestep

UNCOVERED = 1e-37       # the weight of nothing: where no condition reaches, the denoised picture is 0
LONGEST_REPEAT = 4      # repeating a context does not change the result, but costs time


@dataclass(frozen=True, eq=False)
class Rows:
    """The conditioning of one model call, one row a row of its latent; equal only to itself."""

    context: np.ndarray     # (N, L, D) float32
    y: np.ndarray           # (N, V) float32


@dataclass(frozen=True, eq=False)
class Condition:
    """One prompt, where and when it acts, with B rows."""

    positive: bool
    area: tuple[slice, ...]           # of a (B, C, H, W) array
    size: tuple[int, int]             # of the area in latent cells
    weight: np.ndarray | float        # broadcasts to (B, C, *size)
    start: float                      # acts while end <= sigma <= start
    end: float
    context: np.ndarray
    y: np.ndarray

    @classmethod
    def read(cls, arrays: Mapping[str, np.ndarray], index: int, settings: Mapping, shape: tuple[int, ...]) -> Condition:
        batch, _, height, width = shape
        h, w, top, left = settings.get("area") or (height, width, 0, 0)
        h, w = min(h, height - top), min(w, width - left)
        if min(h, w) <= 0 or min(top, left) < 0:
            raise EngineError(f"The area of a condition, {w}x{h} latent cells at ({left}, {top}), is not in the latent of "
                              f"{width}x{height}.")
        rows = np.arange(batch)
        context, y = arrays[f"context.{index}"], arrays[f"y.{index}"]
        start, end = settings.get("start"), settings.get("end")
        return cls(positive=settings["positive"], area=np.s_[..., top:top + h, left:left + w], size=(h, w),
                   weight=arrays.get(f"weight.{index}", 1.0), start=math.inf if start is None else start,
                   end=0.0 if end is None else end, context=context[rows % len(context)], y=y[rows % len(y)])


def sample(predict: Callable[[np.ndarray, np.ndarray, Rows], np.ndarray], arrays: Mapping[str, np.ndarray],
           settings: Mapping, report: Callable[[dict], None]) -> np.ndarray:
    """Run a sampler to its end: the latent (B, C, h, w) float32, in the scale of the latent that went in.

    arrays, all float32, h and w in latent cells:
        noise       (B, C, h, w) standard normal
        latent      (B, C, h, w) what the run starts from, times the VAE's scaling factor; zeros for an empty picture
        mask        (B or 1, 1 or C, h, w), optional: 1 where the picture is made anew, 0 where it stays
        step_noise  (samplers.noise_count, B, C, h, w), for samplers that draw noise
        context.i   (1 or B, L, D), y.i (1 or B, V) of condition i; fewer rows than B are repeated
        weight.i    (1 or B, 1 or C, ah, aw) of the area's size, optional: strength, mask and soft edges multiplied
    settings:
        sampler     a name in samplers.SAMPLERS
        sigmas      the levels, falling; with less than two nothing is done and the latent comes back
        guider      "VanillaCFG": u + cfg * (c - u); "Identity": c. cfg: a float; at 1.0 u is not computed either
        snap        whether the network is asked at the nearest of its 1000 levels, as gm does
        max_denoise whether the run starts from noise alone, see schedules.from_pure_noise
        options     fields of samplers.Options that are not at their defaults
        preview     whether reports carry the denoised picture
        conditions  a list of {"positive": bool, "area": (h, w, top, left) in latent cells or None,
                    "start", "end": levels or None, it acts while end <= sigma <= start}
    report({"step": 1..n, "steps": n, "denoised": (dtype, shape, bytes) of the batch's first row (1, C, h, w), or None})
    is called after every step; what it raises ends the run. Raises EngineError in one sentence.
    """
    noise, latent, sigmas = arrays["noise"], arrays["latent"], settings["sigmas"]
    steps = len(sigmas) - 1
    if steps < 1:
        return latent
    options = Options(**settings.get("options") or {})
    draws = iter(_step_noise(arrays, noise_count(settings["sampler"], sigmas, options)))
    denoiser = Denoiser(predict, arrays, settings)

    def step(i: int, x: np.ndarray, denoised: np.ndarray) -> None:
        denoiser.step = i + 2
        first = np.ascontiguousarray(denoised[:1]) if settings.get("preview") else None
        report({"step": i + 1, "steps": steps,
                "denoised": None if first is None else (first.dtype.name, first.shape, first.tobytes())})

    spread = math.sqrt(1.0 + sigmas[0] ** 2) if settings.get("max_denoise") else sigmas[0]
    x = SAMPLERS[settings["sampler"]](denoiser, latent + noise * spread, sigmas, lambda: next(draws), options, step)
    if not np.isfinite(x).all():
        raise EngineError(f"The sampler {settings['sampler']} ended in NaN or infinite values: use other sampler settings.")
    return x


def _step_noise(arrays: Mapping[str, np.ndarray], wanted: int) -> Sequence[np.ndarray]:
    given = arrays.get("step_noise", ())
    if len(given) < wanted:
        raise EngineError(f"This run draws noise {wanted} times and was given {len(given)} arrays of it.")
    return given


class Denoiser:
    """D(x, sigma) of the guided, masked model: calls `predict` and mixes what it says."""

    def __init__(self, predict: Callable[[np.ndarray, np.ndarray, Rows], np.ndarray], arrays: Mapping[str, np.ndarray],
                 settings: Mapping):
        self.predict, self.snap = predict, settings.get("snap", False)
        self.noise, self.latent, self.mask = arrays["noise"], arrays["latent"], arrays.get("mask")
        self.cfg = 1.0 if settings.get("guider", "VanillaCFG") == "Identity" else float(settings["cfg"])
        self.guided = not math.isclose(self.cfg, 1.0)
        conditions = [Condition.read(arrays, i, one, self.noise.shape) for i, one in enumerate(settings["conditions"])]
        self.conditions = [one for one in conditions if one.positive or self.guided]
        self.calls: dict[tuple[Condition, ...], list[tuple[list[Condition], Rows]]] = {}
        self.step, self.steps = 1, len(settings["sigmas"]) - 1      # for errors

    def __call__(self, x: np.ndarray, sigma: float) -> np.ndarray:
        """x (B, C, h, w) at level sigma -> the denoised picture, the same shape."""
        if self.mask is None:
            return self._guided(x, sigma)
        # Outside the mask the network sees the picture that stays, at this level of noise, and its answer is not used.
        stays = 1.0 - self.mask
        x = x * self.mask + (self.latent + self.noise * sigma) * stays
        return self._guided(x, sigma) * self.mask + self.latent * stays

    def _guided(self, x: np.ndarray, sigma: float) -> np.ndarray:
        positive, negative = self._denoised(x, sigma)
        return negative + (positive - negative) * self.cfg if self.guided else positive

    def _denoised(self, x: np.ndarray, sigma: float) -> list[np.ndarray]:
        """The weighted means of what the positive and the negative conditions say."""
        if not np.isfinite(x).all():
            raise EngineError(f"The sampler gave the U-Net NaN or infinite values{self._where()}, before the network ran: "
                              "look at the latent, the schedule and the nodes before it.")
        level, t = snap(sigma) if self.snap else (sigma, timestep(sigma))
        sums = {True: np.zeros_like(x), False: np.zeros_like(x)}
        weights = {sign: np.full_like(x, UNCOVERED) for sign in sums}
        for members, rows in self._calls(sigma):
            crops = [x[one.area] for one in members]
            prediction = self.predict(np.concatenate(crops) * c_in(level), np.full(len(rows.y), t, np.float32), rows)
            if not np.isfinite(prediction).all():
                what = "NaN" if np.isnan(prediction).any() else "infinite values"
                raise EngineError(f"The U-Net returned {what}{self._where()}: half precision overflows in some networks, "
                                  "load the model with precision float32 or bfloat16, and if it has that, its file is "
                                  "damaged.")
            for one, crop, noise in zip(members, crops, np.split(prediction, len(members))):
                sums[one.positive][one.area] += (crop - noise * level) * one.weight
                weights[one.positive][one.area] += one.weight
        return [sums[sign] / weights[sign] for sign in (True, False)]

    def _calls(self, sigma: float) -> list[tuple[list[Condition], Rows]]:
        """The conditions that act at this level, put together into as few model calls as their sizes allow."""
        active = tuple(one for one in self.conditions if one.end <= sigma <= one.start)
        if active not in self.calls:
            groups: list[list[Condition]] = []
            for one in sorted(active, key=lambda one: one.positive):
                group = next((group for group in groups if fit(group[0], one)), None)
                if group is None:
                    groups.append([one])
                else:
                    group.append(one)
            self.calls[active] = [(group, rows_of(group)) for group in groups]
        return self.calls[active]

    def _where(self) -> str:
        return f" at step {self.step} of {self.steps}"


def fit(one: Condition, other: Condition) -> bool:
    """Whether two conditions can share a model call: equal sizes, and contexts that repeat to a common length."""
    lengths = one.context.shape[1], other.context.shape[1]
    return one.size == other.size and math.lcm(*lengths) <= LONGEST_REPEAT * min(lengths)


def rows_of(group: Sequence[Condition]) -> Rows:
    length = math.lcm(*(one.context.shape[1] for one in group))
    contexts = [np.tile(one.context, (1, length // one.context.shape[1], 1)) for one in group]
    return Rows(np.concatenate(contexts), np.concatenate([one.y for one in group]))
