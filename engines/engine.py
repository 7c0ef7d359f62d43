"""A network of a file on a device: numpy in, numpy out, in the dtypes and shapes that the file states."""
from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from .errors import EngineError
from .network import ModelFile, Network
from .roles import Binding, identify
from .workers import NO_POLL, Feed, FileVersion, Worker, WorkerSpec


def to_wire(array: np.ndarray, dtype: str) -> bytes:
    """An array's values as raw little-endian bytes of `dtype`; bfloat16 is rounded to nearest even (IEEE 754)."""
    if dtype != "bfloat16":
        return np.ascontiguousarray(array, dtype).tobytes()
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    # Rounding would carry a NaN's mantissa into infinity or zero; keep it a NaN.
    return np.where(np.isnan(array), np.uint16(0x7FC0), rounded).astype(np.uint16).tobytes()


def from_wire(dtype: str, shape: tuple[int, ...], data: bytes) -> np.ndarray:
    """The inverse of to_wire; floating point comes back as float32, integers as they are."""
    if dtype == "bfloat16":
        return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(shape)
    array = np.frombuffer(data, dtype).reshape(shape)
    return array.astype(np.float32) if array.dtype.kind == "f" else array


@dataclass(eq=False)
class Constant:
    """An array that is fed unchanged for as long as it lives (zero residuals): cast and hashed once a dtype."""

    array: np.ndarray
    _cast: dict[str, tuple[bytes, str]] = field(default_factory=dict)

    def wire(self, dtype: str) -> tuple[bytes, str]:
        if dtype not in self._cast:
            data = to_wire(self.array, dtype)
            self._cast[dtype] = (data, digest_of(dtype, self.array.shape, data))
        return self._cast[dtype]


def digest_of(dtype: str, shape: tuple[int, ...], data: bytes) -> str:
    """The name under which an array stays on a device: equal content has an equal name."""
    digest = hashlib.sha1(f"{dtype}{shape}".encode(), usedforsecurity=False)     # a name, not a signature
    digest.update(data)
    return digest.hexdigest()


@dataclass(eq=False)
class Engine:
    """One network of `model_file`, to be run on the worker of `spec`.

    Nothing is loaded until the first call; the file stays loaded while any Engine of it lives, or until `release`.
    """

    model_file: ModelFile
    network: Network
    spec: WorkerSpec

    def __post_init__(self):
        self.worker = Worker.of(self.spec)
        self.file = FileVersion.of(self.path)
        self.worker.hold(self, self.file)

    @property
    def path(self) -> Path:
        return self.model_file.path

    @property
    def device_bytes(self) -> int:
        """What the file takes on the device, as it states it."""
        return self.model_file.device_bytes

    @cached_property
    def binding(self) -> Binding:
        return identify(self.network)

    def shape(self, role: str, variant: int = 0) -> tuple[int, ...]:
        """The compiled shape of the input or output that plays `role`; -1 where free."""
        if role in self.binding.inputs:
            return self.network.inputs[self.binding.inputs[role]].shapes[variant]
        return self.network.outputs[self.binding.outputs[role]].shapes[variant]

    def dtype(self, role: str) -> str:
        return self.network.inputs[self.binding.inputs[role]].dtype

    def run(self, feeds: Mapping[str, np.ndarray | Constant], variant: int = 0, resident: Set[str] = frozenset(),
            poll: Callable[[], None] = NO_POLL) -> dict[str, np.ndarray]:
        """One call of the network.

        feeds: an array a role, in the compiled shape of `variant`; cast here to the dtype the file states.
        resident: roles whose array stays on the device, so that a later call with equal content sends only its hash.
        Answers one array a role: float32, or the file's integer dtype. Raises EngineError naming file and port.
        """
        inputs = []
        for role, index in self.binding.inputs.items():
            port = self.network.inputs[index]
            value = feeds[role]
            array = value.array if isinstance(value, Constant) else value
            if not _fits(array.shape, port.shapes[variant]):
                raise EngineError(f"'{self.network.name}' in {self.path.name} takes {role} as "
                                  f"{list(port.shapes[variant])} and was given {list(array.shape)}.")
            if isinstance(value, Constant):
                data, digest = value.wire(port.dtype)
            else:
                data = to_wire(array, port.dtype)
                digest = digest_of(port.dtype, array.shape, data) if role in resident else ""
            inputs.append(Feed(port.name, port.dtype, tuple(array.shape), data, digest))
        outputs = [(port.name, port.dtype, port.shapes[variant]) for port in self.network.outputs]
        answers = self.worker.run(self.file, self.network.name, inputs, outputs, poll)
        return {role: from_wire(*answers[index]) for role, index in self.binding.outputs.items()}

    def release(self) -> None:
        """Free the device now; the next call loads the file again."""
        self.worker.unload(self.file)


def _fits(shape: tuple[int, ...], compiled: tuple[int, ...]) -> bool:
    return len(shape) == len(compiled) and all(want in (-1, got) for got, want in zip(shape, compiled))
