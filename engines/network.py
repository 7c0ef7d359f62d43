"""What a compiled file says of itself: networks, their inputs and outputs, and the chip they were compiled for.

Readers (`bmodel`, `onnxfile`) fill these records from the file alone; nothing about a network is typed in by hand.
"""
from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

# Names are numpy's, plus "bfloat16", which numpy does not have: on the wire it is two bytes an element.
ITEM_BYTES = {
    "float32": 4, "float16": 2, "bfloat16": 2, "int8": 1, "uint8": 1, "int16": 2, "uint16": 2,
    "int32": 4, "uint32": 4, "int64": 8, "bool": 1, "float64": 8,
}


class ModelFileError(ValueError):
    """A file that cannot be used; the message is one sentence for the person who picked it."""


@dataclass(frozen=True)
class Port:
    """An input or output. `shapes[s]` is its shape in compiled variant s; -1 stands for a size free at run time."""

    name: str
    dtype: str
    shapes: tuple[tuple[int, ...], ...]

    @property
    def rank(self) -> int:
        return len(self.shapes[0])


@dataclass(frozen=True)
class Memory:
    """What one variant of a network takes on the device, in bytes, as the file states it.

    scratch: what lies between its layers. Variants and networks share one such area, the largest.
    """

    weights: int
    scratch: int
    io: int                          # inputs and outputs
    commands: int                    # the chip's instructions


@dataclass(frozen=True)
class Network:
    """One network of a file. Every port has the same number of shapes: one a compiled variant (a bmodel "stage")."""

    name: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    dynamic: bool = False
    memory: tuple[Memory, ...] = field(default=(), compare=False)        # of each variant; none where it is not stated

    @property
    def variants(self) -> int:
        return len(self.inputs[0].shapes) if self.inputs else 0


@dataclass(frozen=True)
class ModelFile:
    """A readable model file. `chip` is None where any machine can run it (ONNX); sizes are in bytes."""

    path: Path
    format: str                      # "bmodel" or "onnx"
    chip: str | None                 # as the file spells it, upper case: "BM1684X", "BM1684"
    networks: tuple[Network, ...]
    file_bytes: int
    device_bytes: int                # weights + the largest scratch area + I/O as the file states them; 0 if unknown
    compiler: str = ""               # compiler version, if stated
    created: str = ""                # time stamp, if stated
    kernel_bytes: int = 0            # of the chip's kernels, which each BM1684X file brings along
