"""The MindSpore tier: tiny SDXL models on MindSpore's CPU back end, in its interpreter, against torch and diffusers."""
from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

from engines.sdxl.checkpoint import open_checkpoint
from engines.sdxl.stages import SDXL, open_sdxl
from engines.workers import Worker, WorkerSpec
from tests.conftest import need
from tests.helpers.sdxl_models import TinySDXL, write_folder

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".local" / "mindspore" / "bin" / "python"
OPTIONS = (("device_id", 0), ("target", "cpu"), ("threads", 0))
ROWS = 1000          # of the token tables


def spec(name: str = "cpu", **options: object) -> WorkerSpec:
    return WorkerSpec(name, "mindspore", tuple(sorted({**dict(OPTIONS), **options}.items())), python=str(PYTHON))


@pytest.fixture(scope="session", autouse=True)
def installed():
    need(PYTHON.exists(), "MindSpore is not installed: run 'python tools/install.py mindspore'")


@pytest.fixture(scope="session")
def torch_sdxl() -> TinySDXL:
    return TinySDXL(rows=ROWS)


@pytest.fixture(scope="session")
def folder(torch_sdxl, tmp_path_factory) -> Path:
    return write_folder(torch_sdxl, tmp_path_factory.mktemp("sdxl") / "tiny")


@pytest.fixture(scope="session")
def worker() -> Worker:
    """The worker that all tests share; one that ends it must leave the next call working, as it does for a user."""
    yield Worker.of(spec())
    Worker.of(spec()).close()


@pytest.fixture(scope="session")
def sdxl(folder, worker) -> SDXL:
    return open_sdxl(open_checkpoint(folder), worker.spec, "float32")


@pytest.fixture(scope="session")
def inside(tmp_path_factory):
    """Call a function of inside.py in MindSpore's interpreter: inside(name, arrays, **settings) -> {name: array}."""
    def call(function: str, arrays: dict[str, np.ndarray], **settings: object) -> dict[str, np.ndarray]:
        where = tmp_path_factory.mktemp(function)
        np.savez(where / "in.npz", **arrays)
        run = subprocess.run([PYTHON, Path(__file__).with_name("inside.py"), function, where, json.dumps(settings)],
                             cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr[-4000:]
        with np.load(where / "out.npz") as out:
            return dict(out)
    return call
