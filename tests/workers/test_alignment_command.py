"""python -m engines.alignment: what the nodes do, from a shell."""
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from engines.alignment.recording import Recorder
from tests.helpers import onnx_nets, toy_networks

PACK = Path(__file__).resolve().parents[2]


def command(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "engines.alignment", *map(str, arguments)], cwd=PACK, capture_output=True,
                          text=True)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    onnx_nets.checkpoint(folder / "good")
    onnx_nets.checkpoint(folder / "nan", nan_at=600)
    return folder


@pytest.fixture(scope="module")
def recording(tmp_path_factory) -> Path:
    """Of the arithmetic networks, their answers computed by numpy."""
    path, rng = tmp_path_factory.mktemp("recordings") / "reference.npz", np.random.default_rng(0)
    recorder = Recorder(path, "reference")
    ids = rng.integers(0, 49408, (1, 77))
    recorder.add("text_encoder", {"ids": ids}, {"hidden": np.repeat((ids + np.arange(77))[..., None] / 50000, 64, 2)})
    context = rng.normal(size=(2, 77, 64)).astype(np.float32)
    for step, time in enumerate((999, 600, 300), 1):
        latent, times = rng.normal(size=(2, 4, 8, 8)).astype(np.float32), np.full(2, time, np.float32)
        recorder.add("unet", {"latent": latent, "timestep": times, "context": context},
                     {"prediction": onnx_nets.unet_result(latent, times, context)}, step=step, steps=3)
    latent = rng.normal(size=(1, 4, 8, 8)).astype(np.float32)
    recorder.add("vae_decoder", {"latent": latent}, {"image": np.kron(latent[:, :3], np.ones((8, 8)))})
    return path


def test_show(recording):
    shown = command("show", recording)
    assert shown.returncode == 0 and "3 calls of the U-Net" in shown.stdout


def test_replay(recording, models, tmp_path):
    done = command("replay", recording, models / "good", "--min-cosine", 0.99999, "--plot", tmp_path / "p.png", "--json",
                   tmp_path / "p.json")
    assert done.returncode == 0, done.stderr
    assert "U-Net         3/3   prediction" in done.stdout and "unet_8x8.onnx on onnx" in done.stdout
    assert "No classic cause" in done.stdout and (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"
    rows = json.loads((tmp_path / "p.json").read_text())["rows"]
    assert len(rows) == 5 and all(row["cosine"] > 0.99999 for row in rows)


def test_replay_of_a_single_file(recording, models):
    done = command("replay", recording, models / "good" / "unet_8x8.onnx")
    assert done.returncode == 0 and "prediction" in done.stdout and "hidden" not in done.stdout


def test_replay_that_fails(recording, models):
    done = command("replay", recording, models / "nan")
    assert done.returncode == 1 and "U-Net, step 2 of 3" in done.stderr and "NaN" in done.stderr
    wrong = command("replay", recording, models / "good", "--latent-scale", "inside", "--min-cosine", 0.9)
    assert "latent scale 0.18215 is not applied at all" in wrong.stdout


def test_replay_of_what_is_not_kept_or_of_another_family(models, tmp_path):
    def replayed(stage, inputs, outputs):
        recorder = Recorder(tmp_path / "r.npz", "r")
        recorder.add(stage, inputs, outputs)
        return command("replay", tmp_path / "r.npz", models / "good")
    embedded = replayed("text_encoder", {"ids": np.full((1, 77), -1)}, {"hidden": np.ones((1, 77, 64))})
    latent = np.ones((2, 4, 8, 8), np.float32)
    bare = replayed("unet", {"latent": latent, "timestep": np.full(2, 999)}, {"prediction": latent})
    for done, words in ((embedded, "textual inversion"), (bare, "another family")):
        assert done.returncode == 1 and words in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_compare(tmp_path):
    toy_networks.run(tmp_path / "a.npz")
    toy_networks.run(tmp_path / "b.npz", after=lambda stage, out: {k: v * np.float32(1.01) for k, v in out.items()})
    done = command("compare", tmp_path / "a.npz", tmp_path / "b.npz", "--min-cosine", 0.5)
    assert done.returncode == 0 and "Free-running" in done.stdout and "PSNR" in done.stdout
    strict = command("compare", tmp_path / "a.npz", tmp_path / "b.npz", "--min-psnr", 100)
    assert strict.returncode == 1 and "less than 100 dB" in strict.stderr


@pytest.mark.parametrize(("arguments", "words"), [
    (["show", "nothing.npz"], "no recording nothing.npz"), (["replay", "REFERENCE", "nowhere"], "no model file or folder"),
    (["replay", "REFERENCE", "MODEL", "--device", "tpu:7"], "tpu:7"),
    (["compare", "REFERENCE", "pyproject.toml"], "no recording"),
])
def test_bad_arguments_are_said_in_a_sentence(recording, models, arguments, words):
    places = {"REFERENCE": recording, "MODEL": models / "good"}
    done = command(*(places.get(argument, argument) for argument in arguments))
    assert done.returncode == 1 and words in done.stderr and "Traceback" not in done.stderr
