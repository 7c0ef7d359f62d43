"""Which devices there are, by what name a workflow may ask for them, and which one runs a given file.

A workflow names a device, nothing more: interpreters, hosts and library folders come from one TOML file of the
server's owner (docs/devices.md). Without that file there are still: the cards this machine shows (`tpu:0`, `ascend:0`, ...),
the simulator if it is installed, onnxruntime for `.onnx` files, and MindSpore's CPU back end if it is installed.
"""
from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import DeviceError, EngineError
from .network import ModelFile
from .workers import Worker, WorkerSpec

log = logging.getLogger("sophgo_ascend")

AUTO = "auto"
SIMULATOR_LIBRARIES = ("libbmlib.so.0", "libbmrt.so.1.0", "libcmodel.so")
SIMULATOR_IDLE_SECONDS = 5.0
CPU_CANCEL_SECONDS = 3.0            # enough for a small model to end its step and stay loaded
SIMULATOR_NICE = 10                 # its threads busy-poll; the server must stay responsive
LIBSOPHON = Path("/opt/sophon/libsophon-current/lib")
DEVICE_NODES = ("bm-sophon[0-9]*", "bm-tpu[0-9]*")       # PCIe cards; the TPU of a SoC box
ASCEND_NODES = ("davinci[0-9]*",)                        # NPUs
TARGETS = ("ascend", "cpu")                              # what MindSpore computes on
# The keys of the settings file and what they hold (docs/devices.md).
KEYS: dict[str, dict[str, tuple[type, ...]]] = {
    "device": {"name": (str,), "runtime": (str,), "device_id": (int,), "chip": (str,), "python": (str,), "ssh": (str,),
               "libraries": (str,), "target": (str,)},
    "simulator": {"enabled": (bool,), "libraries": (str,), "python": (str,), "idle_seconds": (int, float)},
    "onnx": {"python": (str,), "threads": (int,)},
    "mindspore": {"python": (str,), "threads": (int,), "cpu": (bool,)},
}
WORDS = {(str,): "a text", (int,): "a whole number", (int, float): "a number", (bool,): "true or false"}
RESERVED_NAMES = (AUTO, "same")
RUNTIME_FORMATS = {"bmrt": "bmodel", "sail": "bmodel", "onnx": "onnx", "mindspore": "mindspore"}
COMPILED = ("bmodel", "onnx")       # files of networks; "mindspore" takes checkpoints
RUNS = {"bmodel": "bmodel files", "onnx": "onnx files", "mindspore": "SDXL checkpoints on MindSpore"}
HOW_TO_SIMULATE = "install Sophgo's simulator with 'python tools/install.py simulator' in the pack's folder"
HOW_TO_MINDSPORE = ("run 'python tools/install.py mindspore' in the pack's folder, or name an interpreter under [mindspore] "
                    "in the accelerator settings file, without cpu = false")


@dataclass(frozen=True)
class Device:
    """A device a workflow can name. A simulator has one worker a chip, hence the specs by chip."""

    name: str
    format: str                                 # what it runs: a key of RUNS
    specs: tuple[tuple[str, WorkerSpec], ...]   # (chip, how to start); chip "" is found out by asking the device
    simulated: bool = False

    def spec_for(self, model_file: ModelFile) -> WorkerSpec:
        """The worker that runs this file. Raises DeviceError if the format or the chip does not fit."""
        if model_file.format != self.format:
            raise DeviceError(f"'{model_file.path.name}' is a {model_file.format} file and device '{self.name}' runs "
                              f"{RUNS[self.format]}: choose another device, or 'auto'.")
        if model_file.chip is None:
            return self.specs[0][1]
        chips = []
        for chip, spec in self.specs:
            chip = chip or str(Worker.of(spec).describe()["chip"])
            if chip == model_file.chip:
                return spec
            chips.append(chip)
        raise DeviceError(f"'{model_file.path.name}' was compiled for {model_file.chip} and device '{self.name}' is "
                          f"{' or '.join(chips)}: choose another device or a file for that chip.")


class Devices:
    """The devices of this server, in the order in which `auto` tries them: hardware, simulator, onnxruntime, CPU."""

    def __init__(self, devices: Sequence[Device]):
        self.devices = list(devices)

    def names(self, *formats: str) -> list[str]:
        """What a combo offers: `auto` and the devices that run one of `formats`; all devices if none is given."""
        return [AUTO] + [device.name for device in self.devices if not formats or device.format in formats]

    def check(self, name: str, *formats: str) -> None:
        """Raise DeviceError, listing those for `formats`, unless a device of this server is called `name`."""
        if name not in self.names():
            raise DeviceError(f"Device '{name}' is not on this server, which has: {', '.join(self.names(*formats))}; "
                              "choose one of those, or describe it in the accelerator settings file.")

    def choose_worker(self, format: str, name: str) -> WorkerSpec:
        """The worker of the device called `name`, for a model that any device of `format` runs.

        `auto` takes the first without asking whether it works: a card that fails must not silently become a CPU.
        Raises DeviceError.
        """
        fitting = [device for device in self.devices if device.format == format]
        if not fitting:
            raise DeviceError(f"No device for {RUNS[format]} on this server: {HOW_TO_MINDSPORE}.")
        self.check(name, format)
        for device in fitting:
            if name in (AUTO, device.name):
                return device.specs[0][1]
        raise DeviceError(f"Device '{name}' does not run {RUNS[format]}; choose one of: {', '.join(self.names(format))}.")

    def choose(self, name: str, files: Sequence[ModelFile]) -> tuple[ModelFile, WorkerSpec]:
        """Which of some equivalent files to run, and the worker for it, on the device called `name`.

        `auto` takes the first device that can run one of them. Raises DeviceError with the reason for each that cannot.
        """
        self.check(name, *COMPILED)
        reasons = []
        for device in self.devices:
            if name not in (AUTO, device.name):
                continue
            for file in files:
                if name == AUTO and file.format != device.format:
                    continue
                try:
                    return file, device.spec_for(file)
                except EngineError as error:
                    # A card that is passed over must not go unnoticed; the simulator lacking a chip is no news.
                    log.log(logging.INFO if device.simulated else logging.WARNING, "%s", error)
                    reasons.append(error)
        if name != AUTO:
            raise reasons[0]
        wanted = " or ".join(dict.fromkeys(f"chip {file.chip}" if file.chip else "onnxruntime" for file in files))
        tried = f" ({'; '.join(str(reason).rstrip('.') for reason in reasons)})" if reasons else ""
        remedy = HOW_TO_SIMULATE if files[0].format == "bmodel" else "install onnxruntime in ComfyUI's interpreter"
        if any(device.simulated and device.format == files[0].format for device in self.devices):
            remedy = "use a file for a chip that is here"
        raise DeviceError(f"No device for '{files[0].path.name}' ({wanted}) on this server{tried}; {remedy}.")


def find_devices(settings_file: Path | None, pack: Path, dev: Path = Path("/dev")) -> Devices:
    """All devices: those of the settings file, then what this machine shows by itself.

    settings_file: TOML (docs/devices.md), may be missing. pack: the folder where the installer puts the simulator and
    MindSpore.
    Raises DeviceError with one sentence for a settings file that cannot be understood. Opens no device.
    """
    settings = _read(settings_file) if settings_file and settings_file.exists() else {}
    simulator, onnx, mindspore = (settings.get(title, {}) for title in ("simulator", "onnx", "mindspore"))
    mindspore = {"python": _mindspore_python(pack), **mindspore}
    devices = [_configured(table, mindspore) for table in settings.get("device", [])]
    taken = {device.name for device in devices}
    found = [*_hardware(dev), *_simulator(simulator, pack), *_onnx(onnx), *_mindspore(mindspore, dev)]
    return Devices(devices + [device for device in found if device.name not in taken])


def _read(path: Path) -> dict:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        settings = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DeviceError(f"The accelerator settings in {path} could not be read: {error}.") from error
    for mistake in _mistakes(settings):
        raise DeviceError(f"The accelerator settings in {path} cannot be used: {mistake}.")
    return settings


def _mistakes(settings: dict) -> Iterator[str]:
    """What is wrong, in the order of the file; what yields nothing needs no further check."""
    names = set()
    for title, content in settings.items():
        if title not in KEYS:
            yield f"there is no [{title}], only {', '.join(KEYS)}"
        many = title == "device"
        tables = content if many and isinstance(content, list) else [content]
        for number, table in enumerate(tables, 1):
            where = f"[[device]] number {number}" if many else f"[{title}]"
            if not isinstance(table, dict) or many and tables is not content:
                yield f"{title} is not a table headed {'[[device]]' if many else where}"
            if unknown := sorted(set(table) - set(KEYS[title])):
                yield f"{where} has unknown keys: {', '.join(unknown)} (known: {', '.join(sorted(KEYS[title]))})"
            for key, value in table.items():
                if type(value) not in KEYS[title][key]:
                    yield f"{where} has {key} = {value!r}, which is not {WORDS[KEYS[title][key]]}"
                if isinstance(value, (int, float)) and value < 0:
                    yield f"{where} has {key} = {value!r}, which is below 0"
            if many and (not table.get("name") or table.get("runtime") not in RUNTIME_FORMATS):
                yield f"{where} needs a 'name' and a 'runtime', one of: {', '.join(RUNTIME_FORMATS)}"
            if many and table.get("target", TARGETS[0]) not in TARGETS:
                yield f"{where} has target = '{table['target']}', which is neither {' nor '.join(TARGETS)}"
            if many and table["name"] in {*names, *RESERVED_NAMES}:
                yield f"{where} has the name '{table['name']}', which is taken"
            names.add(table.get("name"))


def _configured(table: dict, mindspore: dict) -> Device:
    name, runtime, python, ssh = table["name"], table["runtime"], table.get("python", ""), table.get("ssh", "")
    number = table.get("device_id", 0)
    if runtime == "mindspore":
        # Another machine has its own interpreter.
        spec = _mindspore_spec(name, table.get("target", TARGETS[0]), number, python or ("" if ssh else mindspore["python"]),
                               mindspore, ssh)
    else:
        libraries = [("libraries", table.get("libraries", str(LIBSOPHON)))] if runtime == "bmrt" else []
        spec = WorkerSpec(name, runtime, (("device_id", number), *libraries), python=python, ssh=ssh)
    return Device(name, RUNTIME_FORMATS[runtime], ((table.get("chip", ""), spec),))


def _numbers(dev: Path, patterns: Sequence[str]) -> list[int]:
    """The numbers of the device nodes whose names fit one of `patterns`."""
    return sorted({int("".join(filter(str.isdigit, node.name))) for pattern in patterns for node in dev.glob(pattern)})


def _hardware(dev: Path) -> list[Device]:
    if not LIBSOPHON.is_dir():
        return []
    return [Device(f"tpu:{number}", "bmodel", (("", WorkerSpec(
        f"tpu:{number}", "bmrt", (("device_id", number), ("libraries", str(LIBSOPHON))))),))
        for number in _numbers(dev, DEVICE_NODES)]


def _simulator(settings: dict, pack: Path) -> list[Device]:
    """One folder a chip under `libraries`, each with the three libraries of SIMULATOR_LIBRARIES."""
    root = Path(settings.get("libraries", pack / ".local" / "simulator")).expanduser()
    if settings.get("enabled") is False or not root.is_dir():
        return []
    specs = []
    for folder in sorted(root.iterdir()):
        if all((folder / name).exists() for name in SIMULATOR_LIBRARIES):
            options = (("libraries", str(folder)), ("nice", SIMULATOR_NICE), ("simulated", True))
            specs.append((folder.name.upper(), WorkerSpec(
                "simulator", "bmrt", options, python=settings.get("python", ""),
                idle_seconds=float(settings.get("idle_seconds", SIMULATOR_IDLE_SECONDS)), cancel_seconds=0)))
    return [Device("simulator", "bmodel", tuple(specs), simulated=True)] if specs else []


def _onnx(settings: dict) -> list[Device]:
    python = settings.get("python", "")
    if not python and importlib.util.find_spec("onnxruntime") is None:
        return []
    options = (("threads", settings.get("threads", 0)),)
    return [Device("onnx", "onnx", (("", WorkerSpec("onnx", "onnx", options, python=python)),))]


def _mindspore_python(pack: Path) -> str:
    """The interpreter that the installer made, or ""."""
    python = pack / ".local" / "mindspore" / "bin" / "python"
    return str(python) if python.exists() else ""


def _mindspore(settings: dict, dev: Path) -> list[Device]:
    if not settings["python"]:
        return []
    places = [(f"ascend:{number}", "ascend", number) for number in _numbers(dev, ASCEND_NODES)]
    if settings.get("cpu", True):
        places.append(("cpu", "cpu", 0))
    return [Device(name, "mindspore", (("", _mindspore_spec(name, target, number, settings["python"], settings)),))
            for name, target, number in places]


def _mindspore_spec(name: str, target: str, number: int, python: str, settings: dict, ssh: str = "") -> WorkerSpec:
    options = (("device_id", number), ("target", target), ("threads", settings.get("threads", 0)))
    return WorkerSpec(name, "mindspore", options, python=python, ssh=ssh,
                      cancel_seconds=CPU_CANCEL_SECONDS if target == "cpu" else None)
