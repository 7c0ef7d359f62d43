"""Stable Diffusion's stages as a few lines of numpy, to record, to disturb and to compare.

Every input matters to every answer, and nothing is linear, as in a real network. `run` is a whole picture by Euler steps.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from engines.alignment.recording import Call, Recorder, Recording

SCALE = 0.18215
START, END = 49406, 49407
RESIDUALS = {"residual.0": (3, 8, 8), "residual.1": (3, 8, 8), "residual.2": (3, 8, 8), "residual.3": (3, 4, 4),
             "residual.4": (6, 4, 4), "residual.5": (6, 4, 4), "residual.mid": (6, 4, 4)}
_rng = np.random.default_rng(0)
TOKENS = _rng.normal(size=(1000, 16)).astype(np.float32)
MIX = _rng.normal(size=(16, 4)).astype(np.float32)
PICTURE = _rng.normal(size=(4, 3)).astype(np.float32)
BACK = np.linalg.pinv(PICTURE).astype(np.float32)
WEIGHTS = {name: _rng.normal(size=shape).astype(np.float32) for name, shape in RESIDUALS.items()}

Inputs = Mapping[str, np.ndarray]


def ids(*words: int) -> np.ndarray:
    row = [START, *words, END]
    return np.array([row + [END] * (77 - len(row))])


def text_encoder(inputs: Inputs) -> dict[str, np.ndarray]:
    """Each row depends on the ids up to it."""
    embedded = TOKENS[np.asarray(inputs["ids"], np.int64) % 1000]
    hidden = np.tanh(embedded + np.cumsum(embedded, axis=1) / 77)
    return {"hidden": hidden.astype(np.float32), "pooled": hidden[:, -1].astype(np.float32)}


def unet(inputs: Inputs) -> dict[str, np.ndarray]:
    latent, time = inputs["latent"].astype(np.float32), np.asarray(inputs["timestep"], np.float32).reshape(-1, 1, 1, 1)
    word = (inputs["context"].mean(1) @ MIX)[:, :, None, None]
    answer = np.tanh(latent * 0.7 + 0.3 * np.roll(latent, 1, -1)) + np.sin(time / 40) * word + 0.2 * np.cos(time / 100)
    for name, weight in WEIGHTS.items():
        if name in inputs:
            answer = answer + (inputs[name] * weight).mean((1, 2, 3), keepdims=True)
    return {"prediction": answer.astype(np.float32)}


def vae_decoder(inputs: Inputs) -> dict[str, np.ndarray]:
    mixed = np.einsum("bchw,cd->bdhw", np.tanh(inputs["latent"] * 0.1), PICTURE)
    return {"image": np.kron(mixed, np.ones((8, 8))).astype(np.float32)}


def vae_encoder(inputs: Inputs) -> dict[str, np.ndarray]:
    image = inputs["image"]
    small = image.reshape(*image.shape[:2], image.shape[2] // 8, 8, image.shape[3] // 8, 8).mean((3, 5))
    return {"latent": (np.einsum("bchw,cd->bdhw", small, BACK) * 5).astype(np.float32)}


HEALTHY = {"text_encoder": text_encoder, "unet": unet, "vae_decoder": vae_decoder, "vae_encoder": vae_encoder}


class Network:
    """A stage as `forced` takes it, disturbed before and after; counts its calls."""

    def __init__(self, function, before: Callable[[dict], dict] = dict, after: Callable[[dict], dict] = dict):
        self.function, self.before, self.after, self.calls = function, before, after, 0

    def __call__(self, call: Call) -> dict[str, np.ndarray]:
        self.calls += 1
        return self.after(self.function(self.before(dict(call.inputs))))


def networks(**disturbed: Network) -> dict[str, Network]:
    return {stage: disturbed.get(stage) or Network(function) for stage, function in HEALTHY.items()}


def run(path: Path, before: Callable[[str, dict], dict] = lambda stage, inputs: inputs,
        after: Callable[[str, dict], dict] = lambda stage, outputs: outputs, *, steps: int = 5, seed: int = 0,
        picture: np.ndarray | None = None, residuals: bool = False, apart: bool = False, words: tuple[int, ...] = (5, 6, 7),
        scale: float = SCALE, width: int = 8) -> Recording:
    """Record a run as ComfyUI makes it. before, after: what a fault does to a stage's inputs and outputs."""
    recorder = Recorder(path, path.stem)

    def call(stage: str, inputs: dict, **facts) -> dict:
        inputs = before(stage, inputs)
        outputs = after(stage, HEALTHY[stage](inputs))
        recorder.add(stage, inputs, outputs, **facts)
        return outputs

    contexts = [call("text_encoder", {"ids": ids(*prompt)}, part="clip_l")["hidden"] for prompt in (words, ())]
    alphas = np.cumprod(1 - np.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000) ** 2)
    sigmas = np.sqrt((1 - alphas) / alphas)
    times = [999 - int(i * 1000 / steps) for i in range(steps)]
    levels = [*sigmas[times], 0.0]
    x = np.random.default_rng(seed).normal(size=(1, 4, 8, width)) * levels[0]
    if picture is not None:
        x = x * 0.1 + call("vae_encoder", {"image": picture})["latent"] * scale
    rng = np.random.default_rng(9)
    extra = {name: rng.normal(size=(1, *shape)).astype(np.float32) for name, shape in RESIDUALS.items()} if residuals else {}
    for step, (time, now, after_it) in enumerate(zip(times, levels, levels[1:])):
        latent = (x / np.sqrt(1 + now ** 2)).astype(np.float32)
        parts, facts = {1: contexts[1], 0: contexts[0]}, {"step": step + 1, "steps": steps, "sigma": float(now)}
        answers = {}
        for flags in ([1], [0]) if apart else ([1, 0],):
            many = len(flags)
            inputs = {"latent": np.repeat(latent, many, 0), "timestep": np.full(many, time, np.float32),
                      "context": np.concatenate([parts[flag] for flag in flags]),
                      **{name: np.repeat(array, many, 0) for name, array in extra.items()}}
            out = call("unet", inputs, **facts, cond_or_uncond=flags)["prediction"]
            answers.update(zip(flags, out))
        prediction = answers[1] + 3 * (answers[0] - answers[1])
        x = x + prediction * (after_it - now)
    call("vae_decoder", {"latent": (x / SCALE).astype(np.float32)})
    return recorder.recording()
