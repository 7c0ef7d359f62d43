"""What a load leaves in memory: every parameter as its file has it, and little else on the way."""
from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.helpers.sdxl_models import TinySDXL, write_ckpt, write_folder, write_single
from tests.mindspore.conftest import ROWS

# label: (written as, in this dtype, loaded in this precision)
LOADS = {
    "folder, float32": ("folder", "float32", "float32"),
    "single file, float16": ("single", "float16", "float16"),
    "single file, bfloat16 as float32": ("single", "bfloat16", "float32"),
    "MindSpore's ckpt, float16 as float32": ("ckpt", "float16", "float32"),
}
PEAK = 1.3          # of a load, in sizes of the file


@pytest.fixture(scope="module")
def loaded(inside, torch_sdxl, tmp_path_factory) -> dict[str, np.ndarray]:
    where = tmp_path_factory.mktemp("files")
    models = {}
    for label, (kind, dtype, precision) in LOADS.items():
        name = "".join(filter(str.isalnum, label))
        path = {"folder": lambda: write_folder(torch_sdxl, where / name, dtype),
                "single": lambda: write_single(torch_sdxl, where / f"{name}.safetensors", dtype),
                "ckpt": lambda: write_ckpt(torch_sdxl, where / f"{name}.ckpt", dtype)}[kind]()
        models[label] = str(path), precision
    return inside("parameters", {}, models=models)


@pytest.mark.parametrize("label", LOADS)
def test_every_parameter_is_the_files_to_the_bit(loaded, torch_sdxl, label):
    _, dtype, precision = LOADS[label]
    found = {name.removeprefix(f"{label}/"): array for name, array in loaded.items() if name.startswith(f"{label}/")}
    expected = {}
    for part in torch_sdxl.parts():
        kept = torch.float32 if part == "vae" else getattr(torch, precision)
        expected |= {f"{part}/{name}": tensor.to(kept).numpy() for name, tensor in torch_sdxl.state(part, dtype).items()
                     if not name.endswith("position_ids")}
    assert found.keys() == expected.keys()
    different = [name for name, array in expected.items()
                 if found[name].dtype != array.dtype or found[name].tobytes() != array.tobytes()]
    assert different == []


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_load_needs_little_more_memory_than_the_parameters(inside, tmp_path, dtype):
    small = write_single(TinySDXL(rows=ROWS), tmp_path / "small.safetensors", dtype)
    large = write_single(TinySDXL(rows=150_000), tmp_path / "large.safetensors", dtype)     # long tables of tokens
    found = inside("loads", {}, paths=[str(small), str(large)], precision=dtype)
    size, before = large.stat().st_size, int(found["before"])
    assert 0.5 * size < found["after"] - before         # what the small one gave back is used again
    assert found["peak"] - before < PEAK * size
    assert found["unloaded"] - before < 0.2 * size
