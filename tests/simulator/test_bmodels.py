"""The shipped bmodels on Sophgo's simulator: every stage against the ONNX reference, and libbmrt's own behaviour."""
from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from engines.assembly import Source
from engines.devices import find_devices
from engines.errors import DeviceError, EngineError, WorkerDied
from engines.files import read_model
from engines.workers import FileVersion, Worker, WorkerSpec
from tests.conftest import need
from tools.install import CHIPS, DEMO_ONNX, PACK, SIMULATOR

MODELS = PACK / "demo" / "models"
HOW = "run 'python tools/install.py host'"
# the cosine similarity that each precision must reach, stage by stage
LIMITS = {"f32": 0.999999, "bf16": 0.9995}
SHIPPED = ["shapes-bm1684x-f32", "shapes-bm1684x-bf16", "shapes-bm1684-f32"]


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.fixture(scope="session")
def devices():
    need(all((SIMULATOR / chip / "libcmodel.so").exists() for chip in CHIPS), f"Sophgo's simulator is not installed: {HOW}")
    need((DEMO_ONNX / "unet.onnx").exists(), f"the demo model is not exported: {HOW}")
    return find_devices(None, PACK)


def source(name: str) -> Source:
    return Source.open(name, MODELS / name, [MODELS])


@pytest.fixture(scope="session")
def reference(devices):
    """Inputs as a real run has them, and what the ONNX reference makes of them, stage by stage."""
    onnx = source("shapes-onnx")
    rng = np.random.default_rng(0)
    ids = np.full((2, 77), 49407)
    ids[:, 0] = 49406
    ids[1, 1:9] = [320, 736, 7117, 525, 320, 1579, 5994, 2]          # "a red circle on a white background", about
    hidden, pooled = onnx.text_encoder(devices, "onnx", lambda: None)(ids)
    latent = rng.standard_normal((2, 4, 8, 8)).astype(np.float32)
    timestep = np.array([601.0, 601.0], np.float32)
    prediction = onnx.unet(devices, "onnx", lambda: None)(latent, timestep, hidden)
    image = onnx.vae_decoder(devices, "onnx", lambda: None)(latent[:1])
    moments = onnx.vae_encoder(devices, "onnx", lambda: None)(np.clip(image, -1, 1))
    return {"ids": ids, "hidden": hidden, "pooled": pooled, "latent": latent, "timestep": timestep,
            "prediction": prediction, "image": image, "moments": moments}


@pytest.mark.parametrize("name", SHIPPED)
def test_every_stage_agrees_with_the_reference(devices, reference, name):
    model, r = source(name), reference
    limit = LIMITS[name.rsplit("-", 1)[1]]
    encoder, unet = model.text_encoder(devices, "auto", lambda: None), model.unet(devices, "auto", lambda: None)
    assert "on simulator" in unet.describe()
    hidden, pooled = encoder(r["ids"])
    assert cosine(hidden, r["hidden"]) > limit and cosine(pooled, r["pooled"]) > limit
    prediction = unet(r["latent"], r["timestep"], r["hidden"])
    assert cosine(prediction, r["prediction"]) > limit
    image = model.vae_decoder(devices, "auto", lambda: None)(r["latent"][:1])
    assert cosine(image, r["image"]) > limit
    moments = model.vae_encoder(devices, "auto", lambda: None)(np.clip(r["image"], -1, 1))
    assert cosine(moments, r["moments"]) > limit
    unet.engines[0].worker.close()


def test_a_step_moves_only_latent_timestep_and_prediction(devices, reference):
    unet, r = source("shapes-bm1684x-f32").unet(devices, "simulator", lambda: None), reference
    worker = unet.engines[0].worker
    unet(r["latent"], r["timestep"], r["hidden"])
    before = dict(worker.counters)
    # One row, padded to the net's batch of two, is another context: it crosses once more, then never again.
    for timestep in (500, 400):
        unet(r["latent"], np.full(2, timestep, np.float32), r["hidden"])
    moved = {name: worker.counters[name] - before[name] for name in before}
    itemsize = 4                                                     # int32 timesteps on the device
    assert moved == {"calls": 2, "bytes_in": 2 * (r["latent"].nbytes + 2 * itemsize),
                     "bytes_out": 2 * r["prediction"].nbytes, "bytes_loaded": 0}


def test_an_odd_batch_and_a_fractional_timestep(devices, reference):
    """Three rows through a net of two; 601.4 is the integer 601 for a network that embeds integers."""
    unet, r = source("shapes-bm1684x-f32").unet(devices, "simulator", lambda: None), reference
    rows = [0, 1, 0]
    three = unet(r["latent"][rows], np.full(3, 601.4, np.float32), r["hidden"][rows])
    assert cosine(three, r["prediction"][rows]) > LIMITS["f32"]
    np.testing.assert_array_equal(three[0], three[2])


def test_a_cancelled_simulator_is_gone_at_once_and_works_again(devices, reference):
    unet, r = source("shapes-bm1684x-f32").unet(devices, "simulator", lambda: None), reference
    unet(r["latent"], r["timestep"], r["hidden"])

    def cancel():
        raise KeyboardInterrupt
    unet.poll = cancel
    with pytest.raises(KeyboardInterrupt):
        unet(r["latent"], r["timestep"], r["hidden"])
    assert unet.engines[0].worker.pid is None
    unet.poll = lambda: None
    assert cosine(unet(r["latent"], r["timestep"], r["hidden"]), r["prediction"]) > LIMITS["f32"]


# What libbmrt itself says, past the checks that the pack makes before it.

@pytest.fixture
def bm1684x(devices, request):
    options = (("libraries", str(SIMULATOR / "bm1684x")), ("simulated", True))
    worker = Worker(WorkerSpec(request.node.name, "bmrt", options))
    yield worker
    worker.close()


def test_a_file_of_another_chip_is_refused(bm1684x):
    with pytest.raises(EngineError, match="another chip's file") as error:
        bm1684x.run(FileVersion.of(MODELS / "shapes-bm1684-f32" / "vae_decoder.bmodel"), "x", [], [])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", [b"", b"garbage" * 100])
def test_a_broken_file_is_refused(bm1684x, tmp_path, damage):
    (tmp_path / "broken.bmodel").write_bytes(damage)
    with pytest.raises((EngineError, WorkerDied), match="broken.bmodel"):
        bm1684x.run(FileVersion.of(tmp_path / "broken.bmodel"), "x", [], [])


def test_an_unknown_network_and_a_missing_input_are_named(bm1684x):
    path = MODELS / "shapes-bm1684x-f32" / "shapes.bmodel"
    names = [network.name for network in read_model(path).networks]
    with pytest.raises(EngineError, match="no network 'nothing' in this file, it has: " + re.escape(", ".join(names))):
        bm1684x.run(FileVersion.of(path), "nothing", [], [])
    with pytest.raises(EngineError, match="needs input '.*', which was not given"):
        bm1684x.run(FileVersion.of(path), names[0], [], [])


def test_a_device_that_the_simulator_does_not_have(devices):
    """The simulator's library ends the process for a device other than 0: one sentence, nothing hangs."""
    options = (("device_id", 3), ("libraries", str(SIMULATOR / "bm1684x")))
    with pytest.raises((DeviceError, WorkerDied)) as error:
        Worker(WorkerSpec("absent", "bmrt", options)).describe()
    assert "absent" in str(error.value) and "\n" not in str(error.value)


def test_a_folder_without_libraries_is_named(tmp_path):
    with pytest.raises(DeviceError, match=f"no libbmlib.so in {re.escape(str(tmp_path))}"):
        Worker(WorkerSpec("empty", "bmrt", (("libraries", str(tmp_path)),))).describe()


def test_only_whole_files_are_shipped():
    """What a stranger downloads is read without a device, and says what it is."""
    for name in SHIPPED:
        for path in sorted(Path(MODELS / name).glob("*.bmodel")):
            file = read_model(path)
            assert file.chip == name.split("-")[1].upper() and file.networks
