"""What this server offers the nodes: model files by name, devices by name."""
from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import folder_paths

from ..engines.alignment import SUFFIX
from ..engines.devices import Devices, find_devices
from ..engines.errors import DeviceError, EngineError
from ..engines.files import MAX_NAME, list_models, picked_files, resolve
from ..engines.network import ModelFileError

PACK = Path(__file__).resolve().parent.parent
FOLDER = "sophgo"                            # models/sophgo, and what extra_model_paths.yaml adds to it
CHECKPOINTS = "checkpoints"                  # ComfyUI's own folder of whole models
SDXL_FILES = (".safetensors", ".ckpt")       # in it, what may be an SDXL for MindSpore
PIPELINE = "model_index.json"                # in a folder of models/diffusers
RECORDINGS = "recordings"                    # below the server's output folder
SETTINGS_VARIABLE = "SOPHGO_ASCEND_SETTINGS"
SETTINGS_NAME = "sophgo_ascend.toml"         # in ComfyUI's user folder


def register_folders() -> None:
    """Make models/sophgo known to ComfyUI, and the pack's own tiny models, so that its templates run as they are."""
    mine = Path(folder_paths.models_dir) / FOLDER
    mine.mkdir(parents=True, exist_ok=True)
    folder_paths.add_model_folder_path(FOLDER, str(mine), is_default=True)
    folder_paths.add_model_folder_path(FOLDER, str(PACK / "demo" / "models"))
    folder_paths.add_model_folder_path("diffusers", str(PACK / "demo" / "models" / "diffusers"))


def roots() -> list[Path]:
    return [Path(path) for path in folder_paths.get_folder_paths(FOLDER)]


def models() -> list[str]:
    return list_models(roots())


def files(name: str) -> list[Path]:
    """The model files called `name`: one, or a folder's. Raises ModelFileError."""
    return picked_files(resolve(name, roots()), roots())


def source(name: str):
    """The model files called `name`, as assembly.Source. Raises ModelFileError."""
    from ..engines.assembly import Source
    return Source.open(name, resolve(name, roots()), roots())


def sdxl_models() -> dict[str, Path]:
    """What may be an SDXL, by name: checkpoint files, and diffusers folders. Only these can be asked for."""
    files = [name for name in folder_paths.get_filename_list(CHECKPOINTS) if name.lower().endswith(SDXL_FILES)]
    found = {name: Path(folder_paths.get_full_path(CHECKPOINTS, name)) for name in files}
    for root in folder_paths.get_folder_paths("diffusers"):
        for folder, below, names in os.walk(root, followlinks=True):      # as stock DiffusersLoader does
            if PIPELINE in names:
                found.setdefault(Path(folder).relative_to(root).as_posix(), Path(folder))
                below.clear()
    return found


def sdxl_model(name: str) -> Path:
    """The file or folder called `name`. Raises EngineError with the nearest names there are."""
    models = sdxl_models()
    if name not in models:
        near = _nearest(name, models)
        there = f"there are {near}" if near else "there is none yet"
        raise EngineError(f"There is no SDXL model {str(name)[:80]!r} in models/checkpoints or models/diffusers; {there}.")
    return models[name]


def checkpoints() -> dict[str, Path]:
    """.safetensors files of models/checkpoints by name, and the pack's own tiny one where it was built.

    The latter is not made known to ComfyUI, whose own loader cannot load it.
    """
    names = [name for name in folder_paths.get_filename_list(CHECKPOINTS) if name.endswith(".safetensors")]
    mine = sorted((PACK / "demo" / "models" / CHECKPOINTS).glob("*.safetensors"))
    return {path.name: path for path in mine} | {name: Path(folder_paths.get_full_path(CHECKPOINTS, name)) for name in names}


def checkpoint(name: str) -> Path:
    """The checkpoint called `name`. Raises ModelFileError."""
    known = checkpoints()
    if name not in known:
        raise ModelFileError(f"There is no checkpoint '{str(name)[:80]}' in models/checkpoints as .safetensors; there are: "
                             f"{_nearest(name, known) or 'none yet'}.")
    return known[name]


def recordings_folder() -> Path:
    """Where runs are recorded: output/recordings."""
    return Path(folder_paths.get_output_directory()) / RECORDINGS


def recordings() -> dict[str, Path]:
    """Recordings by name, and the pack's own one of its tiny model."""
    folders = (PACK / "demo" / RECORDINGS, recordings_folder())
    return {path.stem: path for folder in folders for path in sorted(folder.glob(f"*{SUFFIX}"))}


def recording(name: str) -> Path:
    """The recording called `name`. Raises RecordingError."""
    from ..engines.alignment.recording import RecordingError, recording_path
    wanted, known = recording_path(name, recordings_folder()), recordings()
    if name not in known:
        raise RecordingError(f"There is no recording '{wanted.stem}' in output/{RECORDINGS}; there are: "
                             f"{_nearest(name, known) or 'none yet'}.")
    return known[name]


def devices() -> Devices:
    """Read afresh each time: the owner may edit the settings while the server runs. Raises DeviceError."""
    return find_devices(_settings(), PACK)


def _settings() -> Path:
    return Path(os.environ.get(SETTINGS_VARIABLE) or Path(folder_paths.get_user_directory()) / SETTINGS_NAME)


def device_names(*formats: str) -> list[str]:
    """For a combo, the devices that run `formats`: never raises, since a broken settings file must not remove a node."""
    try:
        return devices().names(*formats)
    except DeviceError:
        return ["auto"]


def fingerprint(*names: str, files: Callable[[str], Iterable[Path]] = files) -> tuple:
    """Changes when one of the `files` of `names` or the settings do, so that a replaced file is loaded again."""
    stamps = [_stamp(_settings())] if _settings().exists() else []
    for name in names:
        try:
            stamps += map(_stamp, files(name))
        except (ModelFileError, EngineError, OSError):
            stamps.append((name, 0, 0))
    return tuple(stamps)


def sdxl_files(name: str) -> list[Path]:
    """The file called `name`, or everything in the folder. Raises EngineError."""
    path = sdxl_model(name)
    return sorted(path.rglob("*")) if path.is_dir() else [path]


def file_fingerprint(name: str, find: Callable[[str], Path]) -> tuple:
    """Changes when the file does that `find` (checkpoint, recording) finds."""
    try:
        return _stamp(find(name))
    except (ModelFileError, EngineError, OSError):
        return (name, 0, 0)


def _nearest(name: str, known: Iterable[str]) -> str:
    """The names most like `name`, five at most; empty if there are none."""
    return ", ".join(difflib.get_close_matches(str(name)[:MAX_NAME], known, n=5, cutoff=0))


def _stamp(file: Path) -> tuple[str, int, int]:
    stat = file.stat()
    return str(file), stat.st_mtime_ns, stat.st_size
