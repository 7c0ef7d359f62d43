"""Read what a Sophgo bmodel says of itself: pure Python, no device, no vendor library, and never the weights.

Layout, as in sophgo/libsophon `tpu-bmodel/model/model.fbs` and `include/bmodel.hpp` (January 2025) and in the same
schema in tpu_mlir 1.30 (`bmodel.fbs`, `bmodel.hpp`): a 64-byte little-endian header {magic u32, header_size u32,
flatbuffers_size u32, binary_size u64, reserved}, then a flatbuffer whose root is `Model`, then the binary part:
weights, instructions, kernel. (libsophon's binary_size is a u32 followed by zeros, so a u64 reads both.)

Files come from strangers, and flatbuffers' own Python reader checks no bounds; the small one here checks each read.
"""
from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .network import ITEM_BYTES, Memory, ModelFile, ModelFileError, Network, Port

MAGIC = 0xFF55AAEE
HEADER_BYTES = 64
DTYPES = ("float32", "float16", "int8", "uint8", "int16", "uint16", "int32", "uint32", "bfloat16")  # by enum value

# Far above any real file, low enough that a forged one costs neither memory nor time.
MAX_DESCRIPTION_BYTES = 64 << 20
MAX_TABLES = 20_000
MAX_TEXT_BYTES = 4096
MAX_RANK = 8                    # bm_shape_t of the runtime has room for eight
MAX_SIZE = 2**31 - 1            # and stores each as an int32


def read_bmodel(path: Path | str) -> ModelFile:
    """The networks of a bmodel, with one shape a port for each compiled stage.

    `device_bytes` = the weights of every stage (stored once where check code and size agree, as the runtime does)
    + the largest scratch area (`ctx_sizes`, else `ctx_size`; all networks share one)
    + inputs and outputs of every network, at its largest stage (buffers the caller allocates).
    Instructions and the kernel module, a few per cent, are not in it.

    Raises ModelFileError, one sentence with the file's name, for whatever is missing, cut short, forged or too old.
    """
    path = Path(path)
    with named(path):
        return _read(path)


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Errors of reading `path` become one sentence that begins with its name (the ONNX reader uses this too)."""
    try:
        if not path.is_file():      # also keeps us from waiting on a pipe
            raise ModelFileError("there is no such file")
        yield
    except ModelFileError as why:
        raise ModelFileError(f"{path.name}: {why}.") from None
    except OSError as error:
        raise ModelFileError(f"{path.name}: the file cannot be read ({error.strerror}).") from None


def readable(raw: bytes) -> str:
    """A name as the file spells it, or ModelFileError: names reach logs and pages, so control characters stay out."""
    try:
        text = raw.decode("utf-8").strip()
    except UnicodeDecodeError:
        text = "\0"
    if not text.isprintable():
        raise ModelFileError("it is damaged: one of its names is not readable text")
    return text


def _read(path: Path) -> ModelFile:
    with path.open("rb") as file:
        file_bytes = file.seek(0, 2)
        file.seek(0)
        header = file.read(HEADER_BYTES)
        if len(header) < HEADER_BYTES:
            raise ModelFileError(f"a bmodel begins with a header of {HEADER_BYTES} bytes, this file has {file_bytes}")
        magic, header_bytes, description_bytes, binary_bytes = struct.unpack_from("<IIIQ", header)
        if magic != MAGIC or header_bytes != HEADER_BYTES:
            raise ModelFileError("this is not a bmodel (or an encrypted one): it does not begin with a bmodel's header")
        stated = HEADER_BYTES + description_bytes + binary_bytes
        if file_bytes < stated:
            raise ModelFileError(f"the file is cut short, {file_bytes:,} of {stated:,} bytes: download it again")
        if description_bytes > MAX_DESCRIPTION_BYTES:
            raise ModelFileError(f"its header claims a description of {description_bytes:,} bytes, which no bmodel has")
        data = file.read(description_bytes)

    buffer = _Buffer(data)
    model = _Table(buffer, buffer.number("I", 0))
    nets = list(model.tables(4))
    if not nets:
        raise ModelFileError("it holds no network")
    binary_room = file_bytes - HEADER_BYTES - description_bytes
    weights: dict[tuple, int] = {}
    scratch = model.number(5, "Q")
    io_bytes = 0
    networks = []
    for net in nets:
        network, stages = _network(net)
        networks.append(network)
        for stage in stages:
            weights.update(_weights(stage, binary_room))
        scratch = max(scratch, *(memory.scratch for memory in network.memory))
        io_bytes += max(memory.io for memory in network.memory)
    kernel = model.table(6)
    return ModelFile(
        path=path, format="bmodel", chip=model.text(3).upper(), networks=tuple(networks), file_bytes=file_bytes,
        device_bytes=sum(weights.values()) + scratch + io_bytes, compiler=model.text(1), created=model.text(2),
        kernel_bytes=kernel.binary(1)[1] if kernel else 0)


def _network(net: _Table) -> tuple[Network, list[_Table]]:
    name = net.text(0)
    cascade = net.table(4)
    if cascade and cascade.text(2):
        raise ModelFileError(f"network {name!r} is split over several devices, which cannot be run here")
    stages = list(net.tables(3))
    if not stages:
        raise ModelFileError(f"network {name!r} has no compiled stage, or one in the form of an old compiler")
    inputs, outputs = (_ports(name, stages, field) for field in (0, 1))
    memory = tuple(map(_memory, stages))
    return Network(name, inputs, outputs, dynamic=stages[0].number(5, "i") != 0, memory=memory), stages


def _memory(stage: _Table) -> Memory:
    coeff = stage.table(4)
    groups = list(stage.tables(8))
    for part in () if groups else stage.tables(12):     # chips of several cores keep them by core
        groups += [group for core in part.tables(14) for group in core.tables(0)]
    return Memory(weights=coeff.binary(2)[1] if coeff else 0,
                  scratch=sum(stage.numbers(14, "Q", most=4096)) or stage.number(3, "Q"),
                  io=sum(map(_tensor_bytes, (*stage.tables(0), *stage.tables(1)))),
                  commands=sum(group.binary(field)[1] for group in groups for field in (2, 3)) + stage.binary(11)[1])


def _ports(net_name: str, stages: list[_Table], field: int) -> tuple[Port, ...]:
    """The inputs (field 0) or outputs (1) of a network; the stages differ in shapes and in nothing else."""
    rows = [[_port(tensor) for tensor in stage.tables(field)] for stage in stages]
    kinds = [[(port.name, port.dtype) for port in row] for row in rows]
    if not rows[0] or any(kind != kinds[0] for kind in kinds):
        what = ("inputs", "outputs")[field]
        raise ModelFileError(f"network {net_name!r} has no {what}, or stages that disagree on them")
    return tuple(Port(same[0].name, same[0].dtype, tuple(port.shapes[0] for port in same)) for same in zip(*rows))


def _port(tensor: _Table) -> Port:
    name, number = tensor.text(0), tensor.number(1, "I")
    if number >= len(DTYPES):
        raise ModelFileError(f"{name!r} has data type number {number}, which is none that arrays here can have")
    shape = next(tensor.tables(5), None)        # a second one belongs to the cascade and dynamic nets of old compilers
    dims = shape.numbers(0, "Q", most=MAX_RANK) if shape else ()
    if any(not 0 < size <= MAX_SIZE for size in dims):
        raise ModelFileError(f"{name!r} has the impossible shape {dims}")
    return Port(name, DTYPES[number], (dims,))


def _tensor_bytes(tensor: _Table) -> int:
    port = _port(tensor)
    size = ITEM_BYTES[port.dtype]
    for dim in port.shapes[0]:
        size *= dim
    return max(size, tensor.number(4, "Q"))     # the compiler may pad


def _weights(stage: _Table, binary_room: int) -> dict[tuple, int]:
    """{identity: bytes} of a stage's weights; none for a network without any."""
    coeff = stage.table(4)
    if not coeff:
        return {}
    start, size = coeff.binary(2)
    if start + size > binary_room:
        raise ModelFileError(f"its weights end {start + size - binary_room:,} bytes after the file does")
    return {(coeff.numbers(1, "B", most=64) or start, size): size}


class _Buffer:
    """The description's bytes. Offsets from the file are only followed through `number`, which checks them."""

    def __init__(self, data: bytes):
        self.data = data
        self.tables_seen = 0

    def number(self, code: str, at: int) -> int:
        self.check(at, struct.calcsize("<" + code))
        return struct.unpack_from("<" + code, self.data, at)[0]

    def check(self, at: int, size: int) -> None:
        if not 0 <= at <= len(self.data) - size:
            raise ModelFileError("its description is damaged: it points outside itself")


class _Table:
    """One flatbuffers table. `field` is the schema's id; what a file leaves out reads as 0, "" or empty.

    References run forward and the schema is a tree, so there is no cycle to follow; but many may share one target,
    which is how a small file could ask for endless work. Hence the count of tables.
    """

    def __init__(self, buffer: _Buffer, at: int):
        buffer.tables_seen += 1
        if buffer.tables_seen > MAX_TABLES:
            raise ModelFileError(f"its description is damaged: more than {MAX_TABLES:,} records")
        self.buffer, self.at = buffer, at
        self.vtable = at - buffer.number("i", at)
        self.vtable_bytes = buffer.number("H", self.vtable)

    def number(self, field: int, code: str) -> int:
        at = self._at(field)
        return 0 if at is None else self.buffer.number(code, at)

    def numbers(self, field: int, code: str, most: int) -> tuple[int, ...]:
        start, count = self._vector(field, struct.calcsize("<" + code))
        if count > most:
            raise ModelFileError(f"its description is damaged: a list of {count:,} numbers where {most} are the most")
        return struct.unpack_from(f"<{count}{code}", self.buffer.data, start)

    def binary(self, field: int) -> tuple[int, int]:
        """(start, size) of a `Binary`, a struct that lies in the table itself; start counts from the binary part."""
        at = self._at(field)
        return (0, 0) if at is None else (self.buffer.number("Q", at), self.buffer.number("Q", at + 8))

    def text(self, field: int) -> str:
        start, count = self._vector(field, 1)
        if count > MAX_TEXT_BYTES:
            raise ModelFileError(f"its description is damaged: a name of {count:,} bytes")
        return readable(self.buffer.data[start:start + count])

    def table(self, field: int) -> _Table | None:
        at = self._at(field)
        return None if at is None else _Table(self.buffer, at + self.buffer.number("I", at))

    def tables(self, field: int) -> Iterator[_Table]:
        start, count = self._vector(field, 4)
        for at in range(start, start + 4 * count, 4):
            yield _Table(self.buffer, at + self.buffer.number("I", at))

    def _at(self, field: int) -> int | None:
        entry = 4 + 2 * field
        if entry + 2 > self.vtable_bytes:
            return None
        offset = self.buffer.number("H", self.vtable + entry)
        return self.at + offset if offset else None

    def _vector(self, field: int, item_bytes: int) -> tuple[int, int]:
        """(position of the first item, count), all items inside the buffer."""
        at = self._at(field)
        if at is None:
            return 0, 0
        start = at + self.buffer.number("I", at)
        count = self.buffer.number("I", start)
        self.buffer.check(start + 4, count * item_bytes)
        return start + 4, count
