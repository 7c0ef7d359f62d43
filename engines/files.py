"""Model files on disk: read one, hash one, list what a folder offers, and turn a workflow's name into a safe path."""
from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable, Iterable, Iterator
from functools import wraps
from pathlib import Path, PurePosixPath
from typing import TypeVar

from .bmodel import named, read_bmodel
from .network import ModelFile, ModelFileError
from .onnxfile import external_files, read_onnx

READERS = {".bmodel": read_bmodel, ".onnx": read_onnx}
MAX_NAME = 400          # characters; looking for the nearest names takes time that grows with the square of this
MAX_DEPTH = 4           # folders below a root that are listed

T = TypeVar("T")


def _remembered(function: Callable[[Path], T]) -> Callable[[Path | str], T]:
    """Keep the answer for a path until that file's time stamp or size changes. Errors are not kept."""
    kept: dict[Path, tuple[tuple, T]] = {}

    @wraps(function)
    def remembering(path: Path | str) -> T:
        path = Path(path)
        with named(path):
            stat = path.stat()
        stamp = stat.st_mtime_ns, stat.st_size
        if path not in kept or kept[path][0] != stamp:
            kept[path] = stamp, function(path)
        return kept[path][1]

    return remembering


@_remembered
def read_model(path: Path | str) -> ModelFile:
    """What the file says of itself, by suffix: .bmodel or .onnx. Raises ModelFileError, one sentence."""
    if path.suffix.lower() not in READERS:
        raise ModelFileError(f"{path.name}: only {' and '.join(READERS)} files can be read.")
    return READERS[path.suffix.lower()](path)


@_remembered
def content_hash(path: Path | str) -> str:
    """sha256, in hex, of the file and of the files of weights beside it (ONNX); about a second for each GB."""
    digest = hashlib.sha256()
    for part in (path, *(external_files(path) if path.suffix.lower() == ".onnx" else ())):
        with named(part), part.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def find_models(folder: Path | str, roots: Iterable[Path | str] = ()) -> list[Path]:
    """The model files of a folder, sorted: those in it, or, where it has none itself, those one level down.

    One level down is how pipelines are often stored (`unet/model.onnx`, `vae_decoder/model.onnx`). Links are followed
    within the folder and the given roots, so that two folders can share a text encoder, and left out beyond them.
    """
    folder = Path(folder)
    allowed = [folder, *map(Path, roots)]
    files, folders = _entries(folder, allowed)
    return files or [file for below in folders for file in _entries(below, allowed)[0]]


def picked_files(path: Path, roots: Iterable[Path | str]) -> list[Path]:
    """The model files that a path from `resolve` stands for: itself, or those of the folder it is."""
    return find_models(path, roots) if path.is_dir() else [path]


def list_models(roots: Iterable[Path | str]) -> list[str]:
    """What a menu offers: each folder with model files and each single file, as sorted names that `resolve` takes.

    Names are relative to their root, with "/". A root that does not exist offers nothing.
    """
    roots = [Path(root) for root in roots]
    paths = ((path, root) for root in roots for path in _below(root, roots, MAX_DEPTH))
    return sorted({name for path, root in paths if _is_plain(name := path.relative_to(root).as_posix())})


def _below(folder: Path, roots: list[Path], depth: int) -> Iterator[Path]:
    """Every model file, and every folder that `find_models` finds some in, down to `depth` folders."""
    files, folders = _entries(folder, roots)
    yield from files
    for below in folders if depth else ():
        if find_models(below, roots):
            yield below
        yield from _below(below, roots, depth - 1)


def _entries(folder: Path, allowed: list[Path]) -> tuple[list[Path], list[Path]]:
    """(model files, folders) directly in `folder`, each sorted; nothing where it cannot be listed."""
    try:
        entries = [entry for entry in sorted(folder.iterdir())
                   if not entry.name.startswith(".") and _is_inside(entry, allowed)]
        return [entry for entry in entries if _is_model(entry)], [entry for entry in entries if entry.is_dir()]
    except OSError:
        return [], []


def resolve(name: str, roots: Iterable[Path | str]) -> Path:
    """The file or folder that a name from `list_models` stands for, links followed; the first root that has it wins.

    The name comes from a workflow, so from a stranger: it is relative, uses "/", and stays below the roots, also
    through links. Raises ModelFileError: what was asked, and the nearest names there are.
    """
    roots = [Path(root) for root in roots]
    if not isinstance(name, str) or not _is_plain(name):
        raise ModelFileError(f"{str(name)[:80]!r} is no name of a model file or folder; {_offer('', roots)}.")
    for path in (root / name for root in roots):
        if path.is_dir() or _is_model(path):
            if not _is_inside(path, roots):
                raise ModelFileError(f"{name!r} is a link that leads out of the model folders; {_offer(name, roots)}.")
            return path.resolve()
    raise ModelFileError(f"There is no {name!r} in the model folders; {_offer(name, roots)}.")


def _is_model(path: Path) -> bool:
    return path.suffix.lower() in READERS and path.is_file()


def _is_plain(name: str) -> bool:
    """Whether a name is a relative path with "/" on every system: no drive, no "..", nothing hidden in it."""
    return (0 < len(name) <= MAX_NAME and name.isprintable() and "\\" not in name and ":" not in name
            and name == PurePosixPath(name).as_posix() and not name.startswith("/")
            and not any(part.startswith(".") or part != part.strip() or len(part.encode()) > 255
                        for part in name.split("/")))


def _is_inside(path: Path, folders: list[Path]) -> bool:
    """Whether `path`, all links followed, lies below one of the folders."""
    try:
        real = path.resolve()
        return any(real.is_relative_to(folder.resolve()) for folder in folders)
    except (OSError, RuntimeError):     # RuntimeError: links in a circle, before Python 3.13
        return False


def _offer(name: str, roots: list[Path]) -> str:
    names = list_models(roots)
    if not names:
        folders = " or ".join(repr(root.name) for root in roots)
        return f"there is no {' or '.join(READERS)} file in {folders} yet"
    nearest = difflib.get_close_matches(name, names, n=5, cutoff=0) if name else names[:5]
    more = f" and {len(names) - len(nearest)} more" if len(names) > len(nearest) else ""
    return f"there are {', '.join(nearest)}{more}"
