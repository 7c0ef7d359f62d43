"""A tensor where it lies in a file: nothing is read until someone asks, and then only the rows that are asked for."""
from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import EngineError

# numpy has no bfloat16: its two bytes are read as uint16
NUMPY = {"float64": "<f8", "float32": "<f4", "float16": "<f2", "bfloat16": "<u2", "int64": "<i8", "int32": "<i4",
         "int16": "<i2", "int8": "<i1", "uint64": "<u8", "uint32": "<u4", "uint16": "<u2", "uint8": "<u1", "bool": "|b1"}
FLOATS = ("float64", "float32", "float16", "bfloat16")

# Far above any SDXL, low enough that a forged header costs a second at most.
MAX_TENSORS = 20_000
MAX_NAME = 400
MAX_RANK = 8
MAX_SIZE = 2**40


class CheckpointError(EngineError):
    """A checkpoint that cannot be used. What `open_checkpoint` raises is one sentence that begins with its name.

    Readers raise it with the reason alone, and `named` puts the name before it.
    """

    where: Path | None = None       # the file that the reason is about
    reason = ""


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Errors below become one sentence that begins with the name of `path`, and of the file in it if that is a folder."""
    try:
        yield
    except CheckpointError as why:
        where, reason = why.where or path, why.reason or str(why)
    except OSError as error:
        where, reason = path, f"the file cannot be read ({error.strerror or error})"
    else:
        return
    inside = where.is_relative_to(path) and where != path
    error = CheckpointError(f"{path.name}/{where.relative_to(path).as_posix()}: {reason}." if inside
                            else f"{path.name}: {reason}.")
    error.where, error.reason = where, reason
    raise error from None


class Tensor(NamedTuple):
    """A tensor of a file. `dtype` is numpy's name, "bfloat16", or what the file calls it where numpy has no such type."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    pieces: tuple[tuple[int, int], ...]      # (position, bytes) in the file, in order; one, except in a large .ckpt

    @property
    def bytes(self) -> int:
        return sum(size for _, size in self.pieces)

    def read(self, third: int | None = None) -> np.ndarray:
        """The array, or one of three equal parts of its rows; bfloat16 as the uint16 of its bits.

        Plain reads, so that the file's pages do not stay in this process. Raises CheckpointError if the file has
        become shorter.
        """
        rows = self.shape if third is None else (self.shape[0] // 3, *self.shape[1:])
        array = np.empty(rows, NUMPY[self.dtype])
        # a view as bytes needs a dimension
        target, start = memoryview(array.reshape(-1)).cast("B"), (third or 0) * array.nbytes
        with named(self.path), open(self.path, "rb", buffering=0) as file:
            for position, size in self.pieces:
                end = min(size, start + len(target))
                while target and start < end:
                    file.seek(position + start)
                    got = file.readinto(target[:end - start])    # a system may read less than was asked, 2 GiB for one
                    if not got:
                        raise CheckpointError("it became shorter while it was read")
                    target, start = target[got:], start + got
                start = max(0, start - size)
        return array


def elements(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def check(name: object, shape: list) -> tuple[int, ...]:
    """The shape of a tensor as a stranger's header has it; CheckpointError unless name and sizes are plain."""
    if not isinstance(name, str) or not name.isprintable() or not 0 < len(name) <= MAX_NAME:
        raise CheckpointError("it is damaged: one of its tensors has no readable name")
    if (not isinstance(shape, list) or len(shape) > MAX_RANK
            or not all(type(size) is int and 0 <= size <= MAX_SIZE for size in shape)):
        raise CheckpointError(f"it is damaged: the shape of {name!r} makes no sense")
    return tuple(shape)


def read_json(path: Path, most: int) -> dict:
    """The object of a JSON file of at most `most` bytes, or CheckpointError."""
    with named(path), open(path, "rb") as file:
        return parse_json(file.read(most + 1), most)


def parse_json(raw: bytes, most: int) -> dict:
    if len(raw) > most:
        raise CheckpointError(f"it has more than {most:,} bytes, which no file of this kind has")
    try:
        # RecursionError: brackets nested too deep
        found = json.loads(raw.decode("utf-8"), object_pairs_hook=_object)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise CheckpointError("it is damaged: its JSON cannot be read")
    return found


def _object(pairs: list[tuple[str, object]]) -> dict:
    """JSON allows a name twice; two tensors of one name would be two readings of one file."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name occurs twice")
    return found


# How files begin that are often taken for a checkpoint.
_BEGINNINGS = (
    (b"PK\x03\x04", "it is a pickle of PyTorch, which can run any program when it is opened: "
                    "only .safetensors files and MindSpore's .ckpt files are read"),
    (b"\x80", "it is a pickle, which can run any program when it is opened: "
              "only .safetensors files and MindSpore's .ckpt files are read"),
    (b"version https://git-lfs", "it is a Git LFS pointer of a few lines, not the file itself: download it again"),
    (b"<", "it is a web page, not a checkpoint: download it again"),
    (b"GGUF", "it is a GGUF file, and only .safetensors files and MindSpore's .ckpt files are read"),
)


def refuse_strangers(beginning: bytes) -> None:
    """Raise CheckpointError, with the reason, if a file that begins like this is no checkpoint that can be read."""
    if not beginning:
        raise CheckpointError("it is empty")
    for start, why in _BEGINNINGS:
        if beginning.startswith(start):
            raise CheckpointError(why)
