"""The same seed through the whole workflow: pictures from bmodels in the simulator against the ONNX reference."""
from __future__ import annotations

import io
import math
from collections.abc import Iterator

import numpy as np
from PIL import Image

from demo.run import text_to_image
from tools.comfyui import Server

REFERENCE = "shapes-onnx"
COMPILED = ("shapes-bm1684x-f32", "shapes-bm1684x-bf16", "shapes-bm1684-f32")


def picture(server: Server, model: str, seed: int = 0) -> np.ndarray:
    """The workflow's picture, (H, W, 3) in 0..255."""
    outputs = server.run(text_to_image(seed=seed, model=model))
    image = next(image for output in outputs.values() for image in output.get("images", []))
    return np.asarray(Image.open(io.BytesIO(server.picture(image))).convert("RGB"), np.float64)


def psnr(picture: np.ndarray, reference: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB, for a peak of 255; infinite for equal pictures."""
    error = np.mean((picture - reference) ** 2)
    return math.inf if error == 0 else 10 * math.log10(255 ** 2 / error)


def run(server: Server) -> Iterator[tuple[str, str]]:
    reference = picture(server, REFERENCE)
    for model in COMPILED:
        yield (f"{model} in the simulator against the ONNX reference",
               f"PSNR {psnr(picture(server, model), reference):.1f} dB")
