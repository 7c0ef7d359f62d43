"""The records of a MindSpore .ckpt file, and never its numbers: pure Python, no MindSpore.

The file is protobuf, mindspore/train/checkpoint.proto as MindSpore 2.10's `save_checkpoint` writes it:

    Checkpoint {repeated Value value = 1}
    Value {string tag = 1, TensorProto tensor = 2, MapTensorProto maptensor = 3}
    TensorProto {repeated int64 dims = 1, string tensor_type = 2, bytes tensor_content = 3}

A tensor above 512 MiB is cut into several values of one tag, each with the dims of the whole. With `crc_check` the file
ends in "crc_num" and ten bytes, which are no protobuf.
"""
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from .tensors import MAX_TENSORS, NUMPY, CheckpointError, Tensor, check, elements, named, refuse_strangers

DTYPES = {"Float64": "float64", "Float32": "float32", "Float16": "float16", "BFloat16": "bfloat16", "Int64": "int64",
          "Int32": "int32", "Int16": "int16", "Int8": "int8", "UInt64": "uint64", "UInt32": "uint32", "UInt16": "uint16",
          "UInt8": "uint8", "Bool": "bool"}
NO_CKPT = "it is no MindSpore checkpoint, or a damaged or encrypted one"

# Far above any SDXL, low enough that a forged file costs a second or two.
MAX_TEXT = 1 << 10      # bytes of a name
MAX_FIELDS = 500_000
MAX_PIECES = 1_000


class _Span(NamedTuple):
    """Where the payload of a field lies in the file."""

    start: int
    end: int


def read_ckpt(path: Path) -> dict[str, Tensor]:
    """Every tensor of the file by name. Raises CheckpointError, one sentence, if it is damaged, cut short or a pickle."""
    with named(path), open(path, "rb") as file:
        beginning = file.read(32)
        if beginning[:1] != b"\n":      # field 1, a message: the first tensor
            refuse_strangers(beginning)
            raise CheckpointError(NO_CKPT)
        return _Reader(path, file).tensors()


class _Reader:
    """One pass over a file."""

    def __init__(self, path: Path, file: BinaryIO):
        self.path, self.file, self.fields_seen = path, file, 0
        self.end = file.seek(0, 2)
        file.seek(max(0, self.end - 17))
        if file.read(7) == b"crc_num":
            self.end -= 17

    def tensors(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for field, value in self._fields(_Span(0, self.end)):
            if field != 1:
                raise CheckpointError(NO_CKPT)
            tensor = self._tensor(value)
            before = found.get(tensor.name)
            if before is not None:      # the next piece of a large one
                if (before.dtype, before.shape) != (tensor.dtype, tensor.shape):
                    raise CheckpointError(f"it is damaged: it has {tensor.name!r} twice")
                tensor = tensor._replace(pieces=before.pieces + tensor.pieces)
            found[tensor.name] = tensor
            if len(found) > MAX_TENSORS or len(tensor.pieces) > MAX_PIECES:
                raise CheckpointError(f"it has more than {MAX_TENSORS:,} tensors, or one in more than {MAX_PIECES:,} pieces")
        for tensor in found.values():
            if tensor.dtype in NUMPY and tensor.bytes != elements(tensor.shape) * int(NUMPY[tensor.dtype][2:]):
                raise CheckpointError(f"it is damaged: {tensor.name!r} has {tensor.bytes:,} bytes, which is not its "
                                      "shape's size")
        return found

    def _tensor(self, value: _Span | int) -> Tensor:
        name, dtype, dims, content = "", "", [], None
        for field, where in self._fields(value):
            if field == 1:
                name = self._text(where)
            elif field == 2:
                for inner, what in self._fields(where):
                    if inner == 1:
                        dims += self._dims(what)
                    elif inner == 2:
                        dtype = self._text(what)
                    elif inner == 3 and isinstance(what, _Span):
                        content = what
        if content is None:
            raise CheckpointError(f"it has {name[:80]!r}, which is no tensor")
        shape = check(name, [] if dims == [0] else dims)        # MindSpore writes 0 for a single number
        return Tensor(name, DTYPES.get(dtype, dtype), shape, self.path, ((content.start, content.end - content.start),))

    def _dims(self, what: _Span | int) -> list[int]:
        """One size, or several in one record, which protobuf allows too."""
        if not isinstance(what, _Span):
            return [what]
        sizes, at = [], what.start
        while at < what.end and len(sizes) < 64:
            size, at = self._varint(at, what.end)
            sizes.append(size)
        return sizes

    def _text(self, where: _Span | int) -> str:
        if not isinstance(where, _Span) or where.end - where.start > MAX_TEXT:
            raise CheckpointError(NO_CKPT)
        self.file.seek(where.start)
        text = self.file.read(where.end - where.start).decode("utf-8", "replace")
        if not text.isprintable():
            raise CheckpointError(NO_CKPT)
        return text

    def _fields(self, span: _Span | int) -> Iterator[tuple[int, _Span | int]]:
        """(field number, value) of a message: an int, or a span that lies inside the message."""
        if not isinstance(span, _Span):
            raise CheckpointError(NO_CKPT)
        at, end = span
        while at < end:
            self.fields_seen += 1
            if self.fields_seen > MAX_FIELDS:
                raise CheckpointError(f"it has more than {MAX_FIELDS:,} records, which no checkpoint of this kind has")
            key, at = self._varint(at, end)
            field, wire = key >> 3, key & 7
            if wire == 0:
                value, at = self._varint(at, end)
                yield field, value
                continue
            if wire != 2:
                raise CheckpointError(NO_CKPT)
            size, at = self._varint(at, end)
            if size > end - at:
                raise CheckpointError(f"it is cut short, or damaged: a record has {size:,} bytes and {end - at:,} are left: "
                                      "download or copy it again")
            yield field, _Span(at, at + size)
            at += size

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        """(value, position after it); at most ten bytes of seven bits, the lowest first."""
        self.file.seek(at)
        value = 0
        for shift, byte in enumerate(self.file.read(min(10, end - at))):
            value |= (byte & 0x7F) << 7 * shift
            if byte < 0x80:
                return value, at + shift + 1
        raise CheckpointError(NO_CKPT)
