"""SDXL on MindSpore's CPU back end: our sampling loop against mindone's pipeline, and our calls against torch's.

Run by itself with `python -m bench.sdxl`; the full size is in `sdxl_full`.
"""
from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from bench.sdxl_inside import STEPS, best
from tests.helpers.sdxl_models import UNET, TinySDXL, write_folder

ROOT = Path(__file__).resolve().parents[1]
PYTHON = ROOT / ".local" / "mindspore" / "bin" / "python"
# Widths a fifth of SDXL's, its depth: 94 million parameters.
FIFTH = {**UNET, "block_out_channels": (64, 128, 256), "attention_head_dim": (1, 2, 4),
         "transformer_layers_per_block": (1, 2, 10)}


def inside(function: str, **settings: object) -> dict[str, float]:
    """A function of sdxl_inside in MindSpore's interpreter."""
    command = [PYTHON, ROOT / "bench" / "sdxl_inside.py", function, json.dumps(settings)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


@torch.no_grad()
def torch_calls(model: TinySDXL, size: int) -> dict[str, float]:
    config, latent = model.unet.config, torch.zeros(2, 4, size, size)
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    added = {"text_embeds": torch.zeros(2, pooled), "time_ids": torch.zeros(2, 6)}
    context = torch.zeros(2, 77, config.cross_attention_dim)
    return {"U-Net": best(lambda: model.unet(latent, 0, context, added_cond_kwargs=added)),
            "VAE decoder": best(lambda: model.vae.decode(latent[:1]))}


def run() -> Iterator[tuple[str, str]]:
    if not PYTHON.exists():
        yield "SDXL on MindSpore", "not measured: run 'python tools/install.py mindspore'"
        return
    tiny, fifth = TinySDXL(rows=1000), TinySDXL(rows=1000)
    fifth.unet = UNet2DConditionModel(**FIFTH).eval().requires_grad_(False)
    with tempfile.TemporaryDirectory() as folder:
        for name, model, size in (("tiny", tiny, 32), ("a fifth of the width", fifth, 32)):
            path = str(write_folder(model, Path(folder) / name))
            parameters = sum(parameter.numel() for parameter in model.unet.parameters()) / 1e6
            ours, torchs = inside("calls", path=path, size=size), torch_calls(model, size)
            for what, seconds in ours.items():
                yield (f"SDXL {name} ({parameters:.0f} M), {what} at {8 * size}x{8 * size}, MindSpore on the CPU",
                       f"{seconds:.3f} s, {seconds / torchs[what]:.2f} times torch's {torchs[what]:.3f} s")
        found = inside("loops", path=str(Path(folder) / "tiny"), size=32)
    yield (f"our sampling loop, {STEPS} steps, against mindone's pipeline",
           f"{found['ours']:.3f} s, {found['ours'] / found['theirs']:.3f} times its {found['theirs']:.3f} s")
    yield "  of which inside the U-Net", f"{found['unet'] / found['ours']:.1%}"


if __name__ == "__main__":
    for what, value in run():
        print(f"{what}: {value}", flush=True)
