"""A recording holds what was called, whole or up to a failure or its limit, and a stranger's file harms nothing."""
import io
import json
import pickle
import threading
import zipfile

import numpy as np
import pytest

from engines.alignment import recording as files
from engines.alignment.compare import pairs
from engines.alignment.recording import Recorder, Recording, RecordingError, recording_path
from tests.helpers import toy_networks


def test_everything_comes_back(tmp_path):
    recorder = Recorder(tmp_path / "sub" / "a.npz", "a")
    recorder.networks["unet"] = "torch"
    latent = np.arange(32, dtype=np.float64).reshape(1, 2, 4, 4) / 7
    recorder.add("text_encoder", {"ids": np.array([[1, 2, 3]], np.int64)}, {"hidden": np.ones((1, 3, 2), np.float16)})
    recorder.add("unet", {"latent": latent, "timestep": np.float32(999)}, {"prediction": latent * np.nan}, step=3, steps=4)
    found = recorder.recording()
    assert found.name == "a" and found.networks == {"unet": "torch"} and not found.full
    text, unet = found.calls
    assert text.inputs["ids"].dtype == np.int32 and text.inputs["ids"].tolist() == [[1, 2, 3]] and text.where == ""
    assert text.outputs["hidden"].dtype == np.float32 and text.outputs["hidden"].shape == (1, 3, 2)
    np.testing.assert_array_equal(unet.inputs["latent"], latent.astype(np.float32))
    assert unet.inputs["timestep"].shape == () and np.isnan(unet.outputs["prediction"]).all()
    assert unet.where == " at step 3 of 4" and found.of("unet") == [unet]


def test_it_is_an_ordinary_npz(tmp_path):
    toy_networks.run(tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz", allow_pickle=False) as archive:
        assert {archive[name].dtype for name in archive.files} <= {np.dtype(t) for t in ("float32", "int32", "uint8")}
        assert json.loads(archive["about"].tobytes())["name"] == "a"


def test_equal_arrays_are_kept_once(tmp_path):
    toy_networks.run(tmp_path / "a.npz", steps=20)
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:
        assert sum("context" in name for name in archive.namelist()) == 1


def broken_off(path) -> Recording:
    """A run whose U-Net fails at its fourth step."""
    def fail(stage, inputs):
        if stage == "unet" and inputs["timestep"][0] < 500:
            raise RuntimeError
        return inputs
    with pytest.raises(RuntimeError):
        toy_networks.run(path, fail)
    return Recording.open(path)


def test_what_came_before_a_failure_is_there(tmp_path):
    assert len(broken_off(tmp_path / "a.npz").of("unet")) == 3


def test_a_new_run_replaces_the_file(tmp_path):
    toy_networks.run(tmp_path / "a.npz", steps=7)
    assert len(toy_networks.run(tmp_path / "a.npz", steps=3).of("unet")) == 3


def test_limit(tmp_path):
    array = np.zeros((1, 4, 8, 8), np.float32)
    recorder = Recorder(tmp_path / "a.npz", "a", limit_bytes=5 * array.nbytes)
    for step in range(10):
        recorder.add("vae_decoder", {"latent": array + step}, {"image": array - step - 1})
    found = recorder.recording()
    assert found.full and len(found.calls) == 2 and recorder.left_out == 8
    assert (tmp_path / "a.npz").stat().st_size < 8 * array.nbytes


def test_nothing_recorded(tmp_path):
    with pytest.raises(RecordingError, match="Nothing was recorded as 'a' yet"):
        Recorder(tmp_path / "a.npz", "a").recording()


def test_threads_do_not_mix(tmp_path):
    recorder = Recorder(tmp_path / "a.npz", "a")

    def work(number):
        for i in range(5):
            recorder.add("vae_decoder", {"latent": np.full((1, 4, 2, 2), number)}, {"image": np.full((1, 3, 2, 2), i)},
                         step=number)
    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    calls = recorder.recording().calls
    assert len(calls) == 20 and all((call.inputs["latent"] == call.facts["step"]).all() for call in calls)


def test_disk_errors_are_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RecordingError, match="could not be written"):
        Recorder(tmp_path / "file" / "a.npz", "a").add("unet", {}, {})


@pytest.mark.parametrize("name", ["a", "BM1684X F16 (new)", "参考-1", "a.b"])
def test_names(tmp_path, name):
    assert recording_path(name, tmp_path).parent == tmp_path


@pytest.mark.parametrize("name", ["", "../a", "a/b", "a\\b", ".a", "a.", "C:a", "a\n", "a" * 101, "~", "a\x00"])
def test_names_that_are_none(tmp_path, name):
    with pytest.raises(RecordingError, match="cannot be the name"):
        recording_path(name, tmp_path)


# -- strangers' files --------------------------------------------------------------------------------------------------
def npz(path, members, compress=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compress) as archive:
        for name, value in members.items():
            buffer = io.BytesIO()
            if isinstance(value, bytes):
                buffer.write(value)
            else:
                value = files._as_bytes(value) if isinstance(value, dict) else value
                np.lib.format.write_array(buffer, value, version=(1, 0), allow_pickle=True)
            archive.writestr(f"{name}.npy", buffer.getvalue())
    return path


ABOUT = {"version": 1, "name": "a", "networks": {}}
CALL = {"stage": "vae_decoder", "facts": {}, "inputs": {"latent": "x"}, "outputs": {"image": "x"}}


@pytest.mark.parametrize("members", [
    {}, {"about": {"version": 1}}, {"about": {"version": 1, "name": "a", "networks": 3}}, {"about": np.zeros(3, np.uint8)},
    {"about": ABOUT | {"version": 2}}, {"about": ABOUT, "0": {"stage": "unet"}}, {"about": ABOUT, "0": CALL},
    {"about": ABOUT, "0": CALL | {"stage": "x"}, "x": np.zeros(1)}, {"about": ABOUT, "0": CALL | {"inputs": [1]}},
    {"about": ABOUT, "0": b"PK"}, {"about": ABOUT, "0": np.frombuffer(b"[" * 100000, np.uint8)}, {"about": np.array([{}])},
], ids=str)
def test_files_that_are_none(tmp_path, members):
    with pytest.raises(RecordingError) as said:
        Recording.open(npz(tmp_path / "a.npz", members))
    assert str(said.value).startswith("a.npz is") and str(said.value).endswith(".")


GOOD = {"stage": "unet", "facts": {}, "inputs": {"latent": "x", "timestep": "t"}, "outputs": {"prediction": "x"}}
ARRAYS = {"x": np.ones((2, 4, 8, 8), np.float32), "t": np.full(2, 999, np.float32)}


@pytest.mark.parametrize("entry", [
    {"stage": "controlnet"}, {"inputs": {"timestep": "t"}}, {"outputs": {}}, {"facts": {"step": "<x>"}},
    {"facts": {"steps": [1]}}, {"facts": {"sigma": None}}, {"facts": {"cond_or_uncond": 3}}, {"facts": {"control": [1]}},
    {"facts": {"cond_or_uncond": ["x"]}}, {"facts": {"step": float("inf")}}, {"facts": {"control": {"output": "many"}}},
], ids=str)
def test_entries_that_are_none(tmp_path, entry):
    Recording.open(npz(tmp_path / "good.npz", {"about": ABOUT, "0": GOOD, **ARRAYS}))
    with pytest.raises(RecordingError, match="damaged one"):
        Recording.open(npz(tmp_path / "a.npz", {"about": ABOUT, "0": GOOD | entry, **ARRAYS}))


def test_what_a_stranger_may_say_is_cut(tmp_path):
    facts = {"control": {"output": 10 ** 12}, "cond_or_uncond": [1] * 5000, "part": "x" * 1000, "other": [1]}
    about = {"version": 1, "name": "n" * 1000, "networks": {"unet": "w" * 1000, "x" * 1000: "y"}}
    found = Recording.open(npz(tmp_path / "a.npz", {"about": about, "0": GOOD | {"facts": facts}, **ARRAYS}))
    said = found.calls[0].facts
    assert said["control"]["output"] == len(said["cond_or_uncond"]) == 1000 and len(said["part"]) == 40
    assert said.keys() == {"control", "cond_or_uncond", "part"} and len(found.name) == 100
    assert list(found.networks) == ["unet"] and len(found.networks["unet"]) == 200


@pytest.mark.parametrize("array", [np.ones(4, np.float32), np.zeros((2, 0, 8, 8), np.float32), np.ones((1, 1, 1), np.uint8)],
                         ids=["rank", "empty", "bytes"])
def test_shapes_that_are_none(tmp_path, array):
    found = Recording.open(npz(tmp_path / "a.npz", {"about": ABOUT, "0": GOOD, **ARRAYS, "x": array}))
    with pytest.raises(RecordingError, match="damaged"):
        found.calls[0].inputs["latent"]


def test_a_directory_that_lies(tmp_path):
    """Of a member's size, place and name, at every byte of the zip's own headers."""
    good = npz(tmp_path / "a.npz", {"about": ABOUT, "0": GOOD, **ARRAYS}).read_bytes()
    directory = good.index(b"PK\x01\x02")
    for place in range(directory, len(good)):
        for value in (0, 0x7F, 0xFF):
            (tmp_path / "b.npz").write_bytes(good[:place] + bytes([value]) + good[place + 1:])
            try:
                for call in Recording.open(tmp_path / "b.npz").calls:
                    for side in (call.inputs, call.outputs):
                        assert sum(array.nbytes for array in side.values()) < len(good)
            except RecordingError:
                pass


def test_a_file_that_was_replaced_meanwhile(tmp_path):
    found = toy_networks.run(tmp_path / "a.npz", steps=3)
    toy_networks.run(tmp_path / "a.npz", steps=5, seed=1)
    with pytest.raises(RecordingError, match="damaged"):
        [call.outputs["prediction"] for call in found.of("unet")]


def test_a_run_that_ended_early_is_told(tmp_path):
    early, whole = broken_off(tmp_path / "a.npz"), toy_networks.run(tmp_path / "b.npz")
    assert early.stopped_at == "step 3 of 5" and whole.stopped_at == ""
    with pytest.raises(RecordingError, match="'a' ends at step 3 of 5, so if its run was interrupted record it again"):
        pairs(whole, early)


HUGE = io.BytesIO()
np.lib.format.write_array_header_1_0(HUGE, {"descr": "<f4", "fortran_order": False, "shape": (10 ** 14,)})


@pytest.mark.parametrize("array", [np.array([{}], object), np.zeros(3, complex), HUGE.getvalue(), b"x", b""], ids=str)
def test_arrays_that_are_none(tmp_path, array):
    found = Recording.open(npz(tmp_path / "a.npz", {"about": ABOUT, "0": CALL, "x": array}))
    with pytest.raises(RecordingError, match="damaged"):
        found.calls[0].inputs["latent"]


def test_compressed_bombs_are_refused(tmp_path):
    path = npz(tmp_path / "a.npz", {"about": ABOUT, "x": np.zeros(10 ** 6, np.uint8)}, zipfile.ZIP_DEFLATED)
    with pytest.raises(RecordingError, match="compressed"):
        Recording.open(path)


@pytest.mark.parametrize("data", [b"", b"hello", pickle.dumps({"a": 1})])
def test_no_archive(tmp_path, data):
    (tmp_path / "a.npz").write_bytes(data)
    with pytest.raises(RecordingError, match="no recording"):
        Recording.open(tmp_path / "a.npz")
    with pytest.raises(RecordingError, match="There is no recording b.npz"):
        Recording.open(tmp_path / "b.npz")


def test_fuzz(tmp_path):
    """Whatever is flipped or cut, nothing but RecordingError comes out."""
    toy_networks.run(tmp_path / "a.npz", steps=2)
    good, rng = (tmp_path / "a.npz").read_bytes(), np.random.default_rng(0)
    for _ in range(500):
        bad = bytearray(good[:rng.integers(len(good))] if rng.random() < 0.2 else good)
        for _ in range(rng.integers(1, 8)):
            if bad:
                bad[rng.integers(len(bad))] = rng.integers(256)
        (tmp_path / "b.npz").write_bytes(bad)
        try:
            for call in Recording.open(tmp_path / "b.npz").calls:
                for side in (call.inputs, call.outputs):
                    assert all(isinstance(array, np.ndarray) for array in side.values())
        except RecordingError:
            pass
