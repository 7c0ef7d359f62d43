"""The MindSpore runtime in its worker: sampling with progress and cancel, and one sentence for all that goes wrong."""
from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from engines.errors import DeviceError, EngineError, WorkerDied
from engines.runtimes import mindspore
from engines.sdxl.checkpoint import open_checkpoint
from engines.sdxl.stages import open_sdxl
from engines.workers import Feed, FileVersion, Worker, WorkerSpec
from tests.helpers.sdxl_models import TinySDXL, write_single
from tests.mindspore.conftest import OPTIONS, ROWS, spec

STEPS = 3


class Cancelled(Exception):
    pass


def sampling(sdxl, size=(8, 8), conditions: int = 2, **changes) -> tuple[dict, dict]:
    """Arrays and settings of a run of STEPS steps with one positive and one negative condition."""
    random, unet = np.random.default_rng(0), sdxl.unet
    arrays = {"noise": random.standard_normal((1, 4, *size)).astype(np.float32)}
    arrays["latent"] = np.zeros_like(arrays["noise"])
    for i in range(conditions):
        arrays[f"context.{i}"] = random.standard_normal((1, 77, unet.width)).astype(np.float32)
        arrays[f"y.{i}"] = random.standard_normal((1, unet.vector_width)).astype(np.float32)
    settings = {"sampler": "EulerEDM", "sigmas": [14.6, 5.0, 1.0, 0.0], "guider": "VanillaCFG", "cfg": 5.0, "snap": False,
                "max_denoise": True, "options": {}, "preview": True,
                "conditions": [{"positive": not i, "area": None} for i in range(conditions)], **changes}
    return arrays, settings


def raw(worker, file, network, outputs=(), **arrays: np.ndarray):
    """A call that no stage has looked at."""
    feeds = [Feed(name, str(array.dtype), array.shape, array.tobytes()) for name, array in arrays.items()]
    return worker.run(file, network, feeds, [(name, "float32", (1,)) for name in outputs])


@pytest.fixture
def file(folder) -> FileVersion:
    return FileVersion.of(folder, precision="float32")


# -- what it is ----------------------------------------------------------------------------------------------------
def test_it_says_what_it_is(worker):
    about = worker.describe()
    assert about["runtime"] == "MindSpore" and about["version"].count(".") == 2
    assert (about["chip"], about["device"]) == ("CPU", "cpu")


def test_mindone_is_imported_without_the_models_it_also_has(inside):
    found = inside("modules", {})
    assert "mindone.diffusers.models.unets.unet_2d_condition" in found["loaded"]
    assert not {"mindone.transformers", "mindone.peft", "scipy.stats"} & set(found["loaded"].tolist())


def test_a_mindone_laid_out_differently_is_imported_whole(inside):
    found = inside("modules", {}, moved=True)
    assert "mindone.transformers" in found["loaded"]


# -- sampling ------------------------------------------------------------------------------------------------------
def test_sampling_reports_every_step_with_a_preview(sdxl):
    arrays, settings = sampling(sdxl)
    reports = []
    latent = sdxl.unet.sample(arrays, settings, reports.append)
    assert latent.shape == arrays["noise"].shape and np.isfinite(latent).all()
    assert [report["step"] for report in reports] == [1, 2, 3]
    assert {tuple(report["denoised"][:2]) for report in reports} == {("float32", (1, 4, 8, 8))}


def test_two_runs_are_equal_to_the_bit(sdxl):
    runs = [sdxl.unet.sample(*sampling(sdxl), lambda report: None) for _ in range(2)]
    assert (runs[0] == runs[1]).all()


@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_a_run_is_cancelled_at_any_step_and_the_model_stays(sdxl, worker, step):
    sdxl.unet.sample(*sampling(sdxl), lambda report: None)
    process, loaded = worker.pid, worker.counters["bytes_loaded"]

    def progress(report):
        if report["step"] == step:
            raise Cancelled
    with pytest.raises(Cancelled):
        sdxl.unet.sample(*sampling(sdxl), progress)
    sdxl.unet.sample(*sampling(sdxl), lambda report: None)
    assert (worker.pid, worker.counters["bytes_loaded"]) == (process, loaded)


def test_conditioning_is_sent_once(sdxl, worker):
    arrays, settings = sampling(sdxl, preview=False)
    sdxl.unet.sample(arrays, settings, lambda report: None)
    before = worker.counters["bytes_in"]
    sdxl.unet.sample(arrays, settings, lambda report: None)
    assert worker.counters["bytes_in"] - before == arrays["noise"].nbytes + arrays["latent"].nbytes


def test_a_worker_that_is_killed_in_a_run_starts_again(sdxl, worker):
    import os
    import signal

    def progress(report):
        os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(WorkerDied, match="ended while performing 'sample'"):
        sdxl.unet.sample(*sampling(sdxl), progress)
    assert np.isfinite(sdxl.unet.sample(*sampling(sdxl), lambda report: None)).all()


# -- numbers that are none -----------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def broken(worker, tmp_path_factory):
    """A checkpoint whose networks give NaN."""
    model = TinySDXL(rows=ROWS)
    for norm in (model.unet.conv_norm_out, model.vae.decoder.conv_norm_out, model.text_encoder.text_model.final_layer_norm
                 if hasattr(model.text_encoder, "text_model") else model.text_encoder.final_layer_norm):
        norm.weight[0] = torch.nan
    path = write_single(model, tmp_path_factory.mktemp("broken") / "broken.safetensors")
    return open_sdxl(open_checkpoint(path), worker.spec, "float32")


def test_nan_names_the_stage_and_the_step(broken):
    with pytest.raises(EngineError, match=r"The U-Net .*NaN.* step 1 of 3"):
        broken.unet.sample(*sampling(broken), lambda report: None)
    with pytest.raises(EngineError, match="VAE decoder.* NaN"):
        broken.decoder(np.zeros((1, 4, 8, 8), np.float32))
    with pytest.raises(EngineError, match="text encoder 1.* NaN"):
        broken.text_encoder_1(np.full((1, 77), ROWS - 1))


def test_weights_too_large_for_float16_are_refused(torch_sdxl, worker, tmp_path):
    model = TinySDXL(rows=ROWS)
    model.unet.conv_in.weight[0, 0, 0, 0] = 1e6
    sdxl = open_sdxl(open_checkpoint(write_single(model, tmp_path / "wide.safetensors")), worker.spec, "float16")
    with pytest.raises(EngineError, match="'conv_in.weight' holds values that float16 cannot"):
        sdxl.unet.sample(*sampling(sdxl), lambda report: None)


# -- what was asked for --------------------------------------------------------------------------------------------
def test_bfloat16_is_not_for_the_cpu(folder, worker):
    sdxl = open_sdxl(open_checkpoint(folder), worker.spec, "bfloat16")
    with pytest.raises(EngineError, match="does not compute in bfloat16: choose precision float32"):
        sdxl.decoder(np.zeros((1, 4, 8, 8), np.float32))


def test_arrays_of_other_shapes_never_reach_a_kernel(sdxl, worker, file):
    def some(*shape):
        return np.zeros(shape, np.float32)
    width, vector = sdxl.unet.width, sdxl.unet.vector_width
    good = {"latent": some(1, 4, 8, 8), "timestep": some(1), "context": some(1, 77, width), "y": some(1, vector)}
    for changes, says in (
            ({"latent": some(1, 9, 8, 8)}, "takes latents"),
            ({"latent": some(4, 8, 8)}, "takes latents"),
            ({"latent": some(1, 4, 0, 8)}, "takes latents"),
            ({"context": some(1, 77, width + 1)}, "conditioning is .* text encoders that belong to it"),
            ({"context": some(1, width)}, "conditioning is "),
            ({"y": some(1, vector - 1)}, "vector is "),
            ({"y": some(2, vector)}, "as many"),
            ({"timestep": some(3)}, "as many")):
        with pytest.raises(EngineError, match=says):
            raw(worker, file, "unet", ["prediction"], **{**good, **changes})
    for network, port, shape, says in (
            ("vae_decoder", "latent", (1, 16, 8, 8), "VAE decoder takes"),
            ("vae_decoder", "latent", (4, 8, 8), "VAE decoder takes"),
            ("vae_encoder", "image", (1, 3, 60, 64), "multiples of 8"),
            ("vae_encoder", "image", (1, 4, 64, 64), "VAE encoder takes")):
        with pytest.raises(EngineError, match=says):
            raw(worker, file, network, [], **{port: some(*shape)})
    for ids, layer, says in (
            (np.full((1, 78), 1), -2, "at most 77"), (np.full((77,), 1), -2, "at most 77"),
            (np.full((1, 77), ROWS), -2, f"id of {ROWS} is outside"),
            (np.full((1, 77), -1), -2, "id of -1 is outside"),
            (np.full((1, 77), 1), -9, "layers"), (np.full((1, 77), 1), 3, "layers")):
        with pytest.raises(EngineError, match=says):
            raw(worker, file, "text_encoder", ["hidden"], ids=ids.astype(np.int32), layer=np.array([layer], np.int32))
    with pytest.raises(EngineError, match="needs 'y'"):
        raw(worker, file, "unet", ["prediction"], **{name: good[name] for name in ("latent", "timestep", "context")})
    with pytest.raises(EngineError, match="no network 'clip'"):
        raw(worker, file, "clip")
    with pytest.raises(EngineError, match="no output 'noise'"):
        raw(worker, file, "unet", ["noise"], **good)
    with pytest.raises(EngineError, match="the program 'sample', not 'train'"):
        worker.perform(file, "train", [], {})


def test_a_picture_too_large_for_the_memory_is_a_sentence(inside, folder):
    found = inside("starved", {}, path=str(folder))
    assert "not enough memory; use a smaller picture" in str(found["says"]) and "\n" not in str(found["says"])
    assert found["then"]


# -- what is there -------------------------------------------------------------------------------------------------
def test_a_missing_npu_is_a_sentence():
    worker = Worker(spec("ascend:0", target="ascend"))
    with pytest.raises(DeviceError, match="finds no Ascend NPU"):
        worker.describe()


def test_an_interpreter_without_mindspore_is_told_what_to_run():
    worker = Worker(WorkerSpec("cpu", "mindspore", OPTIONS, python=sys.executable))
    with pytest.raises(DeviceError, match=r"MindSpore is not installed in .*: run 'python tools/install.py mindspore'"):
        worker.describe()


def test_numpy_2_is_named_before_mindspore_fails_over_it(monkeypatch):
    monkeypatch.setattr(mindspore.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(mindspore.importlib.metadata, "version", lambda name: "2.4.1")
    with pytest.raises(RuntimeError, match=r"needs numpy below 2 and .* has 2.4.1: run '.* -m pip install \"numpy<2\"'"):
        mindspore.check_interpreter()


@pytest.mark.parametrize("error, says", [
    (MemoryError("Unable to allocate 4.00 TiB for an array with shape (1,)"), "not enough memory; use a smaller picture"),
    (RuntimeError("Allocate memory failed.\n\n---\n- C++ Call Stack:"), "not enough memory"),
    (RuntimeError("Malloc for kernel output failed, Memory isn't enough\n\n- C++"), "not enough memory"),
    (TypeError("For 'MatMul', the input must be 2-D.\n\n----\n- C++ Call Stack: ..."), "MatMul.* must be 2-D.$"),
    (ValueError(""), "no reason given")])
def test_mindspores_pages_become_a_sentence(error, says):
    with pytest.raises(RuntimeError, match=says) as caught, mindspore.one_sentence("MindSpore failed in the U-Net"):
        raise error
    assert str(caught.value).startswith("MindSpore failed in the U-Net: ") and "\n" not in str(caught.value)
