"""Checkpoints of SDXL: what is read from them, bit for bit, and what is said of those that cannot be used."""
import numpy as np
import pytest
import torch

from engines.sdxl.checkpoint import PARTS, Checkpoint, open_checkpoint
from tests.helpers.sdxl_models import DTYPES, TinySDXL, write_folder, write_single


@pytest.fixture(scope="module")
def model() -> TinySDXL:
    return TinySDXL(rows=1000)


def bits(tensor: torch.Tensor) -> np.ndarray:
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def assert_same(checkpoint: Checkpoint, model: TinySDXL, dtype: str) -> None:
    assert checkpoint.missing == [] and checkpoint.dtype == dtype
    total = 0
    for part in PARTS:
        state = model.state(part, dtype)
        seen = set()
        for parameter in checkpoint.parameters(part):
            array, expected = parameter.read(), bits(state[parameter.name])
            assert (parameter.dtype, parameter.shape) == (dtype, expected.shape)
            assert array.dtype == expected.dtype and array.shape == expected.shape and array.flags["C_CONTIGUOUS"]
            assert np.array_equal(array, expected), parameter.name
            seen.add(parameter.name)
            total += array.nbytes
        assert seen == set(state)
    assert checkpoint.bytes == total
    assert (checkpoint.widths, checkpoint.latent_channels) == ((64, 128, 128), 4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_single_file_gives_every_parameter_bit_for_bit(tmp_path, model, dtype):
    path = write_single(model, tmp_path / "tiny.safetensors", dtype)
    checkpoint = open_checkpoint(path)
    assert (checkpoint.kind, checkpoint.files) == ("single file", [path])
    assert_same(checkpoint, model, dtype)


@pytest.mark.parametrize("dtype, variant, shards", [("float32", "", 1), ("float16", "fp16", 1), ("float32", "", 3),
                                                    ("bfloat16", "bf16", 2)])
def test_a_diffusers_folder_does_too(tmp_path, model, dtype, variant, shards):
    path = write_folder(model, tmp_path / "tiny", dtype, variant=variant, shards=shards)
    checkpoint = open_checkpoint(path)
    assert (checkpoint.kind, len(checkpoint.files)) == ("diffusers folder", 4 * shards)
    assert_same(checkpoint, model, dtype)
