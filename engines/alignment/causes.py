"""The classic causes of a difference, and their sentences: what is wrong and what to do.

A cause is found in two ways: `diagnose_runs` sees it in what the networks of two runs were given, `diagnose_networks` by
calling a network with what would undo it.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..roles import ROLES
from ..stages import SD1_LATENT_SCALE
from .recording import Call

CAUSES = {
    "timestep_fraction": "a timestep that is no whole number",
    "timestep_shift": "timesteps off by one",
    "timestep_ignored": "a timestep without effect",
    "cast": "values forced into a type that cannot hold them",
    "latent_scale": "the latent scale applied twice or not at all",
    "conditions": "condition and uncondition exchanged",
    "residual_order": "ControlNet residuals in another order",
    "residual_ignored": "ControlNet residuals without effect",
    "padding": "tokens padded with another id",
    "overflow": "NaN or infinite values",
    "other_run": "runs that do not belong together",
}
FINE = 6e-4                       # relative error that needs no explanation: the BM1684X's worst call in F32 has 5.5e-4
EXPLAINS = 0.5                    # of the error may be left when a fault is undone
START, END = 49406, 49407         # CLIP's token ids


@dataclass(frozen=True)
class Finding:
    """A recognised cause, a key of CAUSES, in words; `step` from 1, where it shows first."""

    cause: str
    stage: str
    sentence: str
    step: int | None = None


def bfloat16(array: np.ndarray) -> np.ndarray:
    """Values as bfloat16 holds them (8 bits, nearest even), as float32."""
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)


def float16(array: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.asarray(array).astype(np.float16).astype(np.float32)


CASTS = {"bfloat16": bfloat16, "float16": float16, "a whole number": np.trunc, "the nearest whole number": np.rint}


def latent_scale(stage: str, factor: float) -> str:
    """The sentence for latents that are `factor` times what they should be; empty if that is not SD's scale."""
    if abs(factor / SD1_LATENT_SCALE - 1) > 0.1 and abs(factor * SD1_LATENT_SCALE - 1) > 0.1:
        return ""
    # What scales: into the U-Net latents are multiplied by 0.18215, before the decoder they are divided by it.
    twice = (factor < 1) == (stage in ("unet", "vae_encoder"))
    where = {"unet": "the U-Net's latent", "vae_decoder": "the VAE decoder's latent",
             "vae_encoder": "the VAE encoder's result"}[stage]
    told = "is applied twice: leave it to one place" if twice else "is not applied at all: apply it once"
    return (f"SD's latent scale {SD1_LATENT_SCALE} {told}; {where} is {factor:.4g} times the reference's (with Load VAE "
            "(Sophgo) choose the other latent_scale).")


def residual_order(moved: Mapping[str, str]) -> str:
    """moved: {residual: the one given in its place}."""
    told = ", ".join(f"{source} as {name}" for name, source in sorted(moved.items()))
    return (f"ControlNet residuals are in another order: the U-Net gets {told}; the order is the 12 of the way down, first "
            "to last, and the middle one, which Sophgo's files take first and ControlNets give last.")


def overflow(call: Call, layer: str | None = None) -> str:
    """The sentence for a call whose answer is not finite; layer: the first of the network whose answer is not."""
    given = [name for name, array in call.inputs.items() if not np.isfinite(array).all()]
    if given:
        return (f"The {ROLES[call.stage]} was given NaN or infinite values{call.where} ({', '.join(given)}): look at what "
                "comes before it.")
    first = f", first in its layer '{layer}'" if layer else ""
    return (f"The {ROLES[call.stage]} answers finite inputs with NaN or infinite values{call.where}{first}: half precision "
            "overflows beyond 65504, compile it as BF16 or F32.")
