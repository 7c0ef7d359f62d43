"""Stable Diffusion 1.5 at its full size as a checkpoint without its real numbers: the shapes are those of diffusers' and
transformers' own classes, the names those of the single file."""
from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from demo import checkpoint as demo


def shapes() -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        text = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12,
                                            num_hidden_layers=12))
        net = UNet2DConditionModel(cross_attention_dim=768)
        vae = AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2,
                            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
    texts = {name.removeprefix("text_model."): tensor for name, tensor in text.state_dict().items()}
    parts = {"text_encoder": texts.items(), "unet": demo._unet(net.state_dict()), "vae": demo._vae(vae.state_dict())}
    return {demo.PREFIXES[kind] + name: tuple(tensor.shape) for kind, tensors in parts.items() for name, tensor in tensors}


def numbers(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Such that every layer gives about as large numbers as it takes: norms near 1, rows of products of length 1."""
    array = rng.standard_normal(shape, np.float32)
    if len(shape) == 1:
        return 0.1 * array + (1 if name.endswith(".weight") else 0)
    return array / math.sqrt(math.prod(shape[1:]))


def _header(dtype: str, size: int) -> Iterator[bytes | int]:
    """The bytes that a file begins with, and how many follow."""
    entries, end = {}, 0
    for name, shape in shapes().items():
        begin, end = end, end + size * math.prod(shape)
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": (begin, end)}
    text = json.dumps(entries).encode()
    yield len(text).to_bytes(8, "little") + text
    yield end


def write_sparse(path: Path) -> Path:
    """A file of 2.1 GB, all zeros, that takes no room on the disk."""
    head, length = _header("F16", 2)
    with path.open("wb") as file:
        file.write(head)
        file.truncate(len(head) + length)
    return path


def write_random(path: Path, seed: int = 0) -> Path:
    """Random numbers in float16, 2.1 GB."""
    rng, (head, _) = np.random.default_rng(seed), _header("F16", 2)
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        file.write(head)
        for name, shape in shapes().items():
            numbers(name, shape, rng).astype(np.float16).tofile(file)
    return part.replace(path)
