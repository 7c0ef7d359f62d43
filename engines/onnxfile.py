"""Read the inputs and outputs of an ONNX file: pure Python, no onnx package, and never the weights.

ONNX is protobuf. The field numbers below are those of onnx/onnx `onnx/onnx.proto` (IR version 10); everything else is
skipped by seeking over it, so a file of several GB is read in the time its list of nodes takes.
"""
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from .bmodel import named, readable
from .network import ModelFile, ModelFileError, Network, Port

DTYPES = {1: "float32", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64", 9: "bool",
          10: "float16", 11: "float64", 12: "uint32", 16: "bfloat16"}      # TensorProto.DataType, less what no Port has
FIXED_BYTES = {1: 8, 5: 4}      # of protobuf's wire types

# Far above any real graph, low enough that a forged file costs about a second.
MAX_FIELDS = 500_000
MAX_TEXT_BYTES = 4096
MAX_RANK = 16
MAX_SIZE = 2**31 - 1


class _Span(NamedTuple):
    """Where the payload of a length-delimited field (a text, a nested message, packed numbers) lies in the file."""

    start: int
    end: int


def read_onnx(path: Path | str) -> ModelFile:
    """The graph as one Network: inputs (less the weights that old exporters list there) and outputs.

    A size that is symbolic or not stated is -1. `file_bytes` includes files of weights beside it; `device_bytes` is 0,
    the file does not say. Raises ModelFileError, one sentence with the file's name, for whatever is damaged or missing.
    """
    path = Path(path)
    with named(path):
        graph = _Graph(path)
        if not graph.inputs or not graph.outputs:
            raise ModelFileError("it holds no graph with inputs and outputs, so it is no ONNX model or a damaged one")
        network = Network(graph.name, tuple(graph.inputs), tuple(graph.outputs),
                          dynamic=any(-1 in port.shapes[0] for port in graph.inputs))
        files = (path, *_beside(path, graph.external))
        return ModelFile(path=path, format="onnx", chip=None, networks=(network,), device_bytes=0,
                         file_bytes=sum(file.stat().st_size for file in files), compiler=graph.producer)


def external_files(path: Path | str) -> tuple[Path, ...]:
    """The files beside `path` that hold its weights, sorted; none for a file that holds its own. Errors as above."""
    path = Path(path)
    with named(path):
        return _beside(path, _Graph(path).external)


def _beside(path: Path, names: set[str]) -> tuple[Path, ...]:
    folder = path.parent.resolve()
    files = []
    for name in sorted(names):
        # the name is a stranger's: it may not lead out of the folder, also not by a link
        file = (folder / name).resolve()
        if "\\" in name or PurePosixPath(name).is_absolute() or not file.is_relative_to(folder):
            raise ModelFileError(f"its weights are said to lie outside its folder ({name!r})")
        if not file.is_file():
            raise ModelFileError(f"its weights are in {name!r}, which is not beside it")
        files.append(file)
    return tuple(files)


class _Graph:
    """What one pass over a file finds: name, producer, inputs, outputs, names of external files."""

    def __init__(self, path: Path):
        self.name = self.producer = ""
        self.inputs: list[Port] = []
        self.outputs: list[Port] = []
        self.external: set[str] = set()
        self.fields_seen = 0
        with path.open("rb") as self.file:
            self._model(_Span(0, self.file.seek(0, 2)))

    def _model(self, span: _Span) -> None:
        producer = version = ""
        for field, value in self._fields(span):
            if field == 2:
                producer = self._text(value)
            elif field == 3:
                version = self._text(value)
            elif field == 7:
                self._graph(value)
        self.producer = f"{producer} {version}".strip()

    def _graph(self, span: _Span) -> None:
        weights = set()
        inputs = []
        for field, value in self._fields(span):
            if field == 2:
                self.name = self._text(value)
            elif field == 5:
                weights.add(self._weight(value))
            elif field == 11:
                inputs.append(value)
            elif field == 12:
                self.outputs.append(self._port(value))
        # only now are all weights known; their value_info may have types that no input can have
        for value in inputs:
            if self._text(self._find(value, 1)) not in weights:
                self.inputs.append(self._port(value))

    def _weight(self, span: _Span) -> str:
        """The name of an initializer (TensorProto); notes where its numbers are if not in this file."""
        name = ""
        external, location = False, None
        for field, value in self._fields(span):
            if field == 8:
                name = self._text(value)
            elif field == 13 and self._text(self._find(value, 1)) == "location":
                location = self._text(self._find(value, 2))
            elif field == 14:
                external = value == 1
        if external and location:
            self.external.add(location)
        return name

    def _port(self, span: _Span) -> Port:
        """ValueInfoProto {name 1, type 2 {tensor_type 1 {elem_type 1, shape 2 {dim 1}}}}."""
        name = self._text(self._find(span, 1))
        tensor = self._find(self._find(span, 2), 1)
        number = self._find(tensor, 1)
        if number not in DTYPES:
            raise ModelFileError(f"{name!r} is no tensor of a type that can be sent")
        dims = tuple(self._dim(value) for field, value in self._fields(self._find(tensor, 2)) if field == 1)
        if len(dims) > MAX_RANK:
            raise ModelFileError(f"{name!r} has {len(dims)} dimensions")
        return Port(name, DTYPES[number], (dims,))

    def _dim(self, span: _Span | int) -> int:
        size = self._find(span, 1)
        return size if isinstance(size, int) and 0 < size <= MAX_SIZE else -1

    def _find(self, span: _Span, wanted: int) -> int | _Span | None:
        return next((value for field, value in self._fields(span) if field == wanted), None)

    def _text(self, span: _Span | int | None) -> str:
        if span is None:
            return ""
        if not isinstance(span, _Span) or span.end - span.start > MAX_TEXT_BYTES:
            raise ModelFileError("it is damaged: one of its names is no text")
        self.file.seek(span.start)
        return readable(self.file.read(span.end - span.start))

    def _fields(self, span: _Span | int | None) -> Iterator[tuple[int, int | _Span]]:
        """(field number, value) of a message, in order: an int, or a span that lies inside the message.

        An absent message is an empty one, as protobuf has it.
        """
        if span is None:
            return
        if not isinstance(span, _Span):
            raise ModelFileError("it is no ONNX model, or a damaged one: a number stands where a record should")
        at, end = span
        while at < end:
            self.fields_seen += 1
            if self.fields_seen > MAX_FIELDS:
                raise ModelFileError(f"it has more than {MAX_FIELDS:,} records, which no model of this kind has")
            key, at = self._varint(at, end)
            field, wire = key >> 3, key & 7
            if wire == 0:
                value, at = self._varint(at, end)
                yield field, value
                continue
            if wire == 2:
                size, at = self._varint(at, end)
            elif wire in FIXED_BYTES:
                size = FIXED_BYTES[wire]
            else:
                raise ModelFileError("it is no ONNX model, or a damaged one")
            if size > end - at:
                raise ModelFileError("it is no ONNX model, or one cut short: a record is longer than what is left")
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
        raise ModelFileError("it is no ONNX model, or a damaged one: a number in it has no end")
