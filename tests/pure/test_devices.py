"""Which devices a server offers, from its settings file and from what the machine shows."""
from pathlib import Path

import pytest

from engines.devices import COMPILED, SIMULATOR_LIBRARIES, find_devices
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


def mindspore(pack: Path) -> Path:
    """A pack with MindSpore installed; its interpreter."""
    python = pack / ".local" / "mindspore" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    return python


ONNX = ModelFile(Path("unet.onnx"), "onnx", None, (), 0, 0)


def test_auto_comes_first_and_the_simulator_serves_each_chip_by_its_own_worker(tmp_path):
    simulator(tmp_path, "bm1684", "bm1684x")
    devices = find_devices(None, tmp_path)
    assert devices.names()[:2] == ["auto", "simulator"]
    x, old = devices.choose("auto", [bmodel("BM1684X")])[1], devices.choose("simulator", [bmodel("BM1684")])[1]
    assert x != old and x.idle_seconds and x.cancel_seconds == 0
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
    assert spec.cancel_seconds is None and spec.idle_seconds is None


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
    ("cpu", ONNX, ["onnx file", "'cpu' runs SDXL checkpoints on MindSpore"]),
])
def test_what_does_not_fit_is_said_in_one_sentence(tmp_path, ask, file, words):
    simulator(tmp_path, "bm1684x")
    mindspore(tmp_path)
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
    ('[[device]]\nname = "x"\nruntime = "mindspore"\ntarget = "gpu"\n', ["target = 'gpu'", "neither ascend nor cpu"]),
    ('[mindspore]\ncpu = "yes"\n', ["[mindspore] has cpu = 'yes'", "true or false"]),
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


def test_mindspore_runs_on_the_npus_of_this_machine_else_on_its_cpu(tmp_path):
    python = mindspore(tmp_path)
    assert find_devices(None, tmp_path, dev=tmp_path).names("mindspore") == ["auto", "cpu"]
    for node in ("davinci0", "davinci1", "davinci_manager", "davinci10"):
        (tmp_path / node).touch()
    devices = find_devices(None, tmp_path, dev=tmp_path)
    assert devices.names("mindspore") == ["auto", "ascend:0", "ascend:1", "ascend:10", "cpu"]
    card, cpu = devices.choose_worker("mindspore", "auto"), devices.choose_worker("mindspore", "cpu")
    assert (card.name, card.runtime, card.python, card.cancel_seconds) == ("ascend:0", "mindspore", str(python), None)
    assert dict(card.options) == {"device_id": 0, "target": "ascend", "threads": 0}
    assert dict(devices.choose_worker("mindspore", "ascend:10").options)["device_id"] == 10
    assert (cpu.python, cpu.cancel_seconds, dict(cpu.options)["target"]) == (str(python), 3.0, "cpu")


def test_each_loader_offers_what_runs_its_files(tmp_path):
    simulator(tmp_path, "bm1684x")
    mindspore(tmp_path)
    devices = find_devices(None, tmp_path, dev=tmp_path)
    assert "cpu" not in devices.names(*COMPILED) and "simulator" in devices.names(*COMPILED)
    assert devices.names("mindspore") == ["auto", "cpu"]


def test_settings_name_the_interpreter_of_mindspore_and_take_the_cpu_away(tmp_path):
    mindspore(tmp_path)
    text = '[mindspore]\npython = "/opt/ms/bin/python"\nthreads = 3\n'
    spec = find_devices(settings(tmp_path, text), tmp_path, dev=tmp_path).choose_worker("mindspore", "auto")
    assert (spec.name, spec.python, dict(spec.options)["threads"]) == ("cpu", "/opt/ms/bin/python", 3)
    with pytest.raises(DeviceError, match="No device for SDXL checkpoints"):
        find_devices(settings(tmp_path, "[mindspore]\ncpu = false\n"), tmp_path, dev=tmp_path).choose_worker(
            "mindspore", "auto")


def test_configured_npus_here_and_on_another_machine(tmp_path):
    python = mindspore(tmp_path)
    path = settings(tmp_path, '[[device]]\nname = "second"\nruntime = "mindspore"\ndevice_id = 1\n'
                              '[[device]]\nname = "box"\nruntime = "mindspore"\nssh = "user@box"\n'
                              '[[device]]\nname = "slow"\nruntime = "mindspore"\ntarget = "cpu"\npython = "/opt/py"\n')
    devices = find_devices(path, tmp_path, dev=tmp_path)
    assert devices.names("mindspore") == ["auto", "second", "box", "slow", "cpu"]
    second, box, slow = (devices.choose_worker("mindspore", name) for name in ("auto", "box", "slow"))
    assert dict(second.options) == {"device_id": 1, "target": "ascend", "threads": 0} and second.python == str(python)
    assert (box.ssh, box.python) == ("user@box", "")       # the interpreter of this machine is not there
    assert slow.python == "/opt/py" and slow.cancel_seconds


@pytest.mark.parametrize("ask,words", [
    ("ascend:7", ["'ascend:7' is not on this server", "which has: auto, cpu;"]),
    ("simulator", ["'simulator' does not run SDXL checkpoints", "choose one of: auto, cpu."]),
])
def test_a_device_that_cannot_run_sdxl_is_said_in_one_sentence(tmp_path, ask, words):
    simulator(tmp_path, "bm1684x")
    mindspore(tmp_path)
    with pytest.raises(DeviceError) as error:
        find_devices(None, tmp_path, dev=tmp_path).choose_worker("mindspore", ask)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("ask", ["auto", "cpu", "ascend:0", "simulator"])
def test_without_mindspore_the_error_says_how_to_get_it(tmp_path, ask):
    simulator(tmp_path, "bm1684x")
    with pytest.raises(DeviceError, match=r"'python tools/install.py mindspore' .* \[mindspore\]"):
        find_devices(None, tmp_path, dev=tmp_path).choose_worker("mindspore", ask)
