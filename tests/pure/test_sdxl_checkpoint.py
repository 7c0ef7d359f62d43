"""Checkpoints of SDXL: what is read from them, bit for bit, and what is said of those that cannot be used."""
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from engines.sdxl.checkpoint import PARTS, Checkpoint, open_checkpoint
from engines.sdxl.layout import plain
from tests.helpers.sdxl_models import (
    DTYPES,
    FULL_CONFIGS,
    TinySDXL,
    write_ckpt,
    write_folder,
    write_full_size,
    write_single,
)


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


@pytest.mark.parametrize("dtype, names, piece, crc", [
    ("float32", "gm", 512 << 20, False), ("float16", "gm", 10_000, True), ("bfloat16", "diffusers", 512 << 20, False)])
def test_a_mindspore_checkpoint_does_too(tmp_path, model, dtype, names, piece, crc):
    path = write_ckpt(model, tmp_path / "tiny.ckpt", dtype, names, piece, crc)
    checkpoint = open_checkpoint(path)
    assert (checkpoint.kind, checkpoint.files) == ("mindspore checkpoint", [path])
    assert_same(checkpoint, model, dtype)


def test_the_fixture_is_what_diffusers_takes_for_a_single_file(tmp_path, model):
    from diffusers import UNet2DConditionModel
    path = write_single(model, tmp_path / "tiny.safetensors")
    folder = write_folder(model, tmp_path / "tiny")
    loaded = UNet2DConditionModel.from_single_file(str(path), config=str(folder), subfolder="unet").state_dict()
    assert all(torch.equal(loaded.pop(name), tensor) for name, tensor in model.state("unet").items()) and not loaded


def test_a_file_of_the_full_size_gives_the_configs_of_sdxl_base_at_once(tmp_path):
    path = write_full_size(tmp_path / "sd_xl_base_1.0.safetensors")
    start = time.process_time()
    checkpoint = open_checkpoint(path)
    assert time.process_time() - start < 2      # seconds of a processor; 0.05 on a quiet machine
    assert checkpoint.configs == FULL_CONFIGS
    assert (checkpoint.widths, checkpoint.latent_channels, checkpoint.dtype) == ((768, 1280, 1280), 4, "float16")
    counts = {part: sum(1 for _ in checkpoint.parameters(part)) for part in PARTS}
    assert counts == {"text_encoder": 196, "text_encoder_2": 517, "unet": 1680, "vae": 248}
    assert 6.9e9 < checkpoint.bytes == 2 * sum(
        int(np.prod(parameter.shape)) for part in PARTS for parameter in checkpoint.parameters(part))


@pytest.mark.parametrize("name, expected", [
    ("model.diffusion_model.out.0.gamma", "model.diffusion_model.out.0.weight"),
    ("model.diffusion_model.out.0.beta", "model.diffusion_model.out.0.bias"),
    ("model.diffusion_model._backbone.out.2.weight", "model.diffusion_model.out.2.weight"),
    ("conditioner.embedders.1.model.token_embedding.embedding_table",
     "conditioner.embedders.1.model.token_embedding.weight"),
    ("conditioner.embedders.1.model.token_embedding..embedding_table",
     "conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight"),
    ("conditioner.embedders.1.model.positional_embedding", "conditioner.embedders.1.model.positional_embedding"),
    ("gamma", "gamma"),
])
def test_mindspore_s_names_become_pytorch_s(name, expected):
    assert plain(name) == expected


def test_what_training_leaves_in_a_file_means_nothing(tmp_path, model):
    tensors = load_file(write_single(model, tmp_path / "a.safetensors", "float16", parts=("vae",)))
    tensors |= {"model_ema.diffusion_modelout0weight": torch.ones(3), "first_stage_model.loss.logvar": torch.ones(1),
                "denoiser.sigmas": torch.ones(1000), "global_step": torch.tensor(3), "any_note": torch.tensor(0.5)}
    save_file(tensors, tmp_path / "b.safetensors")
    checkpoint = open_checkpoint(tmp_path / "b.safetensors")
    assert list(checkpoint.configs) == ["vae"] and checkpoint.missing == ["text_encoder", "text_encoder_2", "unet"]
