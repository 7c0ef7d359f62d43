"""SDXL at full size, random weights in float16, through the real worker: what a load and one U-Net call take.

`python -m bench.sdxl_full [folder for a file of 7 GB]`. Needs 16 GB of memory, and the machine for itself.
"""
from __future__ import annotations

import json
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from bench.sdxl import PYTHON
from engines.sdxl.checkpoint import open_checkpoint
from engines.sdxl.stages import open_sdxl
from engines.workers import WorkerSpec
from tests.helpers.sdxl_models import single_file

LATENT = 64                     # cells: a picture of 512x512
BLOCK = 1 << 24                 # random numbers, repeated


def networks() -> dict[str, nn.Module]:
    """stabilityai/stable-diffusion-xl-base-1.0's networks, without memory."""
    clip = dict(vocab_size=49408, max_position_embeddings=77, bos_token_id=0, eos_token_id=2, pad_token_id=1)
    with torch.device("meta"):
        return {
            "text_encoder": CLIPTextModel(CLIPTextConfig(
                hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768,
                hidden_act="quick_gelu", **clip)),
            "text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig(
                hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, projection_dim=1280,
                hidden_act="gelu", **clip)),
            "unet": UNet2DConditionModel(
                sample_size=128, block_out_channels=(320, 640, 1280), layers_per_block=2,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=(5, 10, 20),
                transformer_layers_per_block=(1, 2, 10), cross_attention_dim=2048, use_linear_projection=True,
                addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816),
            "vae": AutoencoderKL(
                block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, scaling_factor=0.13025,
                down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)}


def write(path: Path) -> Path:
    """A single file of sd_xl_base_1.0's layout and 6.9 GB, without ever having it in memory."""
    shapes = {}
    for part, network in networks().items():
        state = network.state_dict()
        if part == "text_encoder" and not any(name.startswith("text_model.") for name in state):
            state = {f"text_model.{name}": tensor for name, tensor in state.items()}
        shapes |= {name: tuple(tensor.shape) for name, tensor in single_file(part, state).items()}
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": (start, end)}
    text = json.dumps(header).encode()
    # small enough that the networks' sums stay far from float16's limits
    numbers = (0.02 * np.random.default_rng(0).standard_normal(BLOCK)).astype(np.float16).tobytes()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for start in range(0, end, len(numbers)):
            file.write(numbers[:end - start])
    return path


def memory(pid: int, key: str) -> int:
    """VmRSS or VmHWM, its highest so far, of a process in bytes."""
    return int(re.search(rf"{key}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())[1]) << 10


def run(folder: Path) -> Iterator[tuple[str, str]]:
    path = write(folder / "random_xl_base.safetensors")
    size = path.stat().st_size
    yield "file", f"{size / 1e9:.2f} GB, float16"
    options = (("device_id", 0), ("target", "cpu"), ("threads", 0))
    sdxl = open_sdxl(open_checkpoint(path), WorkerSpec("cpu", "mindspore", options, python=str(PYTHON)), "float16")
    worker, unet = sdxl.unet.network.worker, sdxl.unet
    worker.describe()
    before = memory(worker.pid, "VmRSS")

    started = time.perf_counter()
    ids = np.full((1, 77), 49407, np.int32)
    sdxl.text_encoder_1(ids)
    loaded = time.perf_counter() - started
    peak = memory(worker.pid, "VmHWM")
    yield "load and the first text encoder", f"{loaded:.1f} s"
    yield "peak memory of the load", f"{peak / 1e9:.2f} GB, {(peak - before) / size:.3f} times the file (MindSpore itself " \
                                     f"has {before / 1e9:.2f} GB)"
    yield "memory after it", f"{memory(worker.pid, 'VmRSS') / 1e9:.2f} GB"

    started = time.perf_counter()
    sdxl.text_encoder_2(ids)
    yield "second text encoder, one prompt", f"{time.perf_counter() - started:.1f} s"

    random = np.random.default_rng(0)
    noise = random.standard_normal((1, 4, LATENT, LATENT)).astype(np.float32)
    arrays = {"noise": noise, "latent": np.zeros_like(noise),
              "context.0": random.standard_normal((1, 77, unet.width)).astype(np.float32),
              "y.0": random.standard_normal((1, unet.vector_width)).astype(np.float32)}
    settings = {"sampler": "EulerEDM", "sigmas": [14.6, 0.0], "cfg": 1.0, "max_denoise": True,
                "conditions": [{"positive": True}]}
    for what in ("first", "second"):
        started = time.perf_counter()
        latent = unet.sample(arrays, settings, lambda report: None)
        yield f"one step at a {LATENT}x{LATENT} latent, {what} time", f"{time.perf_counter() - started:.1f} s"
    yield "peak memory with it", f"{memory(worker.pid, 'VmHWM') / 1e9:.2f} GB"

    started = time.perf_counter()
    sdxl.decoder(latent / max(1.0, float(np.abs(latent).max())))
    yield f"VAE decode of {8 * LATENT}x{8 * LATENT}", f"{time.perf_counter() - started:.1f} s"
    yield "peak memory with it", f"{memory(worker.pid, 'VmHWM') / 1e9:.2f} GB"
    worker.close()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as place:
        for what, value in run(Path(place)):
            print(f"{what}: {value}", flush=True)
