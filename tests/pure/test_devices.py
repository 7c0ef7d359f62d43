"""Which devices a server offers, from its settings file and from what the machine shows."""
from pathlib import Path

import pytest

from engines.devices import SIMULATOR_LIBRARIES, find_devices
from engines.errors import DeviceError
from engines.network import ModelFile


def simulator(pack: Path, *chips: str) -> None:
    for chip in chips:
        folder = pack / ".local" / "simulator" / chip
        folder.mkdir(parents=True)
        for name in SIMULATOR_LIBRARIES:
            (folder / name).touch()


def settings(folder: Path, text: str) -> Path:
    path = folder / "sophgo_ascend.toml"
    path.write_text(text, encoding="utf-8")
    return path


def bmodel(chip: str) -> ModelFile:
    return ModelFile(Path("unet.bmodel"), "bmodel", chip, (), 0, 0)


ONNX = ModelFile(Path("unet.onnx"), "onnx", None, (), 0, 0)


def test_auto_comes_first_and_the_simulator_serves_each_chip_by_its_own_worker(tmp_path):
    simulator(tmp_path, "bm1684", "bm1684x")
    devices = find_devices(None, tmp_path)
    assert devices.names()[:2] == ["auto", "simulator"]
    x, old = devices.choose("auto", [bmodel("BM1684X")])[1], devices.choose("simulator", [bmodel("BM1684")])[1]
    assert x != old and x.idle_seconds and x.kill_on_cancel
    assert dict(x.options)["libraries"].endswith("bm1684x")


def test_an_incomplete_simulator_is_not_offered(tmp_path):
    simulator(tmp_path, "bm1684x")
    (tmp_path / ".local/simulator/bm1684x/libcmodel.so").unlink()
    assert "simulator" not in find_devices(None, tmp_path).names()


def test_configured_devices_come_before_the_simulator(tmp_path):
    simulator(tmp_path, "bm1684x")
    path = settings(tmp_path, '[[device]]\nname = "card0"\nruntime = "sail"\npython = "/usr/bin/python3.8"\n'
                              'chip = "BM1684X"\ndevice_id = 1\n')
    devices = find_devices(path, tmp_path)
    spec = devices.choose("auto", [bmodel("BM1684X")])[1]
    assert (spec.name, spec.runtime, spec.python, dict(spec.options)) == (
        "card0", "sail", "/usr/bin/python3.8", {"device_id": 1})
    assert not spec.kill_on_cancel and spec.idle_seconds is None


def test_a_card_is_preferred_to_a_file_that_only_the_simulator_runs(tmp_path):
    """A folder with files for two chips: the device decides, not the order of the files."""
    simulator(tmp_path, "bm1684", "bm1684x")
    path = settings(tmp_path, '[[device]]\nname = "card0"\nruntime = "sail"\nchip = "BM1684X"\n')
    file, spec = find_devices(path, tmp_path).choose("auto", [bmodel("BM1684"), bmodel("BM1684X"), ONNX])
    assert (file.chip, spec.name) == ("BM1684X", "card0")


def test_settings_move_and_switch_off_the_simulator(tmp_path):
    simulator(tmp_path / "elsewhere", "bm1684x")
    root = tmp_path / "elsewhere" / ".local" / "simulator"
    assert "simulator" in find_devices(settings(tmp_path, f'[simulator]\nlibraries = "{root}"\n'), tmp_path).names()
    off = settings(tmp_path, f'[simulator]\nlibraries = "{root}"\nenabled = false\n')
    assert "simulator" not in find_devices(off, tmp_path).names()


def test_an_onnx_file_goes_to_onnxruntime(tmp_path):
    spec = find_devices(settings(tmp_path, '[onnx]\npython = "/opt/py/bin/python"\n'), tmp_path).choose("auto", [ONNX])[1]
    assert (spec.runtime, spec.python) == ("onnx", "/opt/py/bin/python")


@pytest.mark.parametrize("ask,file,words", [
    ("tpu:7", bmodel("BM1684X"), ["'tpu:7' is not on this server", "auto, simulator"]),
    ("auto", bmodel("BM1688"), ["No device for 'unet.bmodel' (chip BM1688)", "simulator", "BM1684X"]),
    ("simulator", bmodel("BM1688"), ["compiled for BM1688", "'simulator' is BM1684X"]),
    ("simulator", ONNX, ["onnx file", "'simulator' runs bmodel files"]),
])
def test_what_does_not_fit_is_said_in_one_sentence(tmp_path, ask, file, words):
    simulator(tmp_path, "bm1684x")
    with pytest.raises(DeviceError) as error:
        find_devices(None, tmp_path).choose(ask, [file])
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)


def test_without_anything_the_error_says_how_to_get_a_simulator(tmp_path):
    with pytest.raises(DeviceError, match="tools/install.py simulator"):
        find_devices(None, tmp_path).choose("auto", [bmodel("BM1684X")])[1]


@pytest.mark.parametrize("text,words", [
    ("[[device]\n", ["could not be read", "sophgo_ascend.toml", "line 1"]),
    ('[[device]]\nname = "x"\n', ["number 1", "'runtime'", "bmrt, sail, onnx"]),
    ('[[device]]\nname = "x"\nruntime = "cuda"\n', ["'runtime'", "bmrt, sail, onnx"]),
    ('[[device]]\nname = "x"\nruntime = "sail"\npythn = "y"\n', ["unknown keys: pythn"]),
])
def test_settings_that_cannot_be_understood(tmp_path, text, words):
    with pytest.raises(DeviceError) as error:
        find_devices(settings(tmp_path, text), tmp_path)
    assert all(word in str(error.value) for word in words), error.value


def test_cards_are_found_by_their_device_nodes(tmp_path, monkeypatch):
    for node in ("bm-sophon0", "bm-sophon1", "bmdev-ctl", "null"):
        (tmp_path / node).touch()
    monkeypatch.setattr("engines.devices.LIBSOPHON", tmp_path)
    devices = find_devices(None, tmp_path, dev=tmp_path)
    assert [name for name in devices.names() if name.startswith("tpu")] == ["tpu:0", "tpu:1"]
