"""The host tier: a real ComfyUI with the pack in it, driven as any client drives it."""
from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import need
from tests.helpers import onnx_nets
from tests.host.graphs import CATS, DOGS, TINY_SDXL, Graph
from tools.comfyui import Server
from tools.install import DEMO_ONNX, MINDSPORE, comfyui

TEST_NODES = Path(__file__).parent / "custom_nodes" / "testing"
ARITHMETIC = "arithmetic"      # models whose results can be computed by hand, 64x64 and 128x64 pictures


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """The server's folders, with models to load."""
    folder = tmp_path_factory.mktemp("comfyui")
    (folder / "custom_nodes").mkdir()
    (folder / "custom_nodes" / "testing").symlink_to(TEST_NODES, target_is_directory=True)
    onnx_nets.checkpoint(folder / "models" / "sophgo" / ARITHMETIC, sizes=((8, 8), (8, 16)))
    return folder


@pytest.fixture(scope="session")
def server(base):
    """One running server for all host tests; a test that harms it must leave it working, which is the point."""
    need((comfyui() / "main.py").exists(), "ComfyUI is not installed: run 'python tools/install.py dev'")
    need(any(DEMO_ONNX.glob("*.onnx")), "the demo model is not exported: run 'python tools/install.py host'")
    with Server(base) as running:
        yield running


@pytest.fixture
def graph() -> Graph:
    return Graph()


@pytest.fixture
def loaded(graph):
    """(model, positive, negative, clip, vae) in `graph`."""
    model, clip, vae = graph.checkpoint()
    return model, graph.prompt(clip, CATS), graph.prompt(clip, DOGS), clip, vae


@pytest.fixture(scope="session")
def tiny_sdxl(base):
    """An SDXL in miniature in models/checkpoints; its networks in torch, to compare with."""
    need((MINDSPORE / "bin" / "python").exists(), "MindSpore is not installed: run 'python tools/install.py mindspore'")
    from tests.helpers.sdxl_models import TinySDXL, write_single
    model = TinySDXL()
    write_single(model, base / "models" / "checkpoints" / TINY_SDXL)
    return model
