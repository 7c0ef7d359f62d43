"""The pack's own cost of a U-Net call at Stable Diffusion 1.5's sizes, worker hop included, and what it moves."""
from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import torch

from engines import workers
from engines.engine import Engine
from engines.files import read_model
from engines.stages import UNet
from engines.workers import WorkerSpec
from tests.helpers.bmodel_writer import unet_demo, write_bmodel
from tools.inprocess import load_pack

PUBLISHED_STEP_MS = 240          # BM1684X SoC, SD 1.5 at 512x512, BF16 (sophon-demo)
CALLS = 200


def _engines(folder: Path) -> Path:
    """What is sent to workers, with this folder's `instant` among the runtimes."""
    engines = shutil.copytree(workers.ENGINES, folder / "engines", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(Path(__file__).with_name("instant.py"), engines / "runtimes")
    return engines


def run() -> Iterator[tuple[str, str]]:
    adapters = load_pack("nodes.adapters.model")
    with tempfile.TemporaryDirectory() as folder, patch.object(workers, "ENGINES", _engines(Path(folder))):
        path = write_bmodel(Path(folder) / "unet.bmodel", [unet_demo()])
        file = read_model(path)
        spec = WorkerSpec("instant", "instant")
        stage = UNet([Engine(file, file.networks[0], spec)])
        model = adapters.CompiledUNet(stage)
        latent, timestep = torch.randn(2, 4, 64, 64), torch.full((2,), 500.0)
        context = torch.randn(2, 77, 768)
        model(latent, timestep, context)
        worker = stage.engines[0].worker
        before, times = dict(worker.counters), []
        for _ in range(CALLS):
            started = time.perf_counter()
            model(latent, timestep, context)
            times.append((time.perf_counter() - started) * 1000)
        moved = {name: (worker.counters[name] - before[name]) / CALLS for name in before}
        worker.close()
    median, worst = statistics.median(times), statistics.quantiles(times, n=100)[98]
    yield "our cost of a U-Net call, 2x4x64x64 with 2x77x768", f"median {median:.2f} ms, p99 {worst:.2f} ms"
    yield "  as a share of the published 240 ms step", f"{median / PUBLISHED_STEP_MS:.2%}"
    latent_bytes, timestep_bytes = 2 * 4 * 64 * 64 * 4, 4 * file.networks[0].inputs[1].shapes[0][0]
    yield ("bytes to the device a step after the first",
           f"{moved['bytes_in']:.0f} (latent {latent_bytes} + timestep {timestep_bytes})")
    yield "bytes from the device a step", f"{moved['bytes_out']:.0f} (prediction {latent_bytes})"
