"""Reads Stable Diffusion 1.x checkpoints: one .safetensors file in the layout that ComfyUI saves.

numpy and the standard library alone, because the compiler's own Python has little else. A tensor is read when it is
asked for, so that a file of several GB never lies in memory.
"""

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .errors import CompilerError

METADATA = "sophgo_ascend"  # key of what shapes do not show, as JSON
PREFIXES = {
    "text_encoder": ("cond_stage_model.transformer.text_model.", "cond_stage_model.transformer."),
    "unet": ("model.diffusion_model.",),
    "vae": ("first_stage_model.",),
}
TITLES = {"text_encoder": "text encoder", "unet": "U-Net", "vae": "VAE"}
# What numpy calls each type; bfloat16, which it does not have, is read as its bits.
DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4"}
BITS = {"F8_E4M3": 8, "F8_E5M2": 8, "I16": 16, "U16": 16, "I8": 8, "U8": 8, "BOOL": 8, "U32": 32, "U64": 64}

MAX_HEADER_BYTES = 100 << 20  # as safetensors itself has it
SD1_WIDTH = 768  # of the context
OTHER_FAMILIES = {1024: "SD 2.x", 1280: "SDXL's refiner", 2048: "SDXL"}
# The beginnings of names that tell a family, or another layout, whatever else there is.
OTHER_NAMES = {
    "model.diffusion_model.label_emb.": "SDXL",
    "conditioner.": "SDXL",
    "cond_stage_model.model.": "SD 2.x",
    "model.diffusion_model.double_blocks.": "Flux",
    "model.diffusion_model.joint_blocks.": "SD 3",
}
DIFFUSERS = ("down_blocks.", "unet.down_blocks.", "encoder.down_blocks.", "vae.encoder.", "text_model.encoder.")


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies in the file. `dtype` is safetensors' name of it."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    bytes: int


class Part:
    """One network's tensors, by their names without the prefix; remembers which were asked for."""

    def __init__(self, checkpoint: "Checkpoint", kind: str, prefix: str):
        self.checkpoint, self.kind, self.prefix = checkpoint, kind, prefix
        names = [name for name in checkpoint.tensors if name.startswith(prefix)]
        self.tensors = {name[len(prefix) :]: checkpoint.tensors[name] for name in names}
        self.conventions: dict[str, int] = checkpoint.conventions.get(kind, {})
        self.used: set[str] = set()
        self.dry = False  # give zeros that take no memory, to learn shapes and costs only

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self.tensors:
            path = self.checkpoint.path.name
            raise CompilerError(
                f"'{path}' holds no {TITLES[self.kind]} of SD 1.x: it has no tensor '{self.prefix}{name}'; "
                f"pick a whole SD 1.x checkpoint."
            )
        return self.tensors[name].shape

    def read(self, name: str) -> np.ndarray:
        """float32."""
        shape = self.shape(name)
        self.used.add(name)
        if self.dry:
            return np.broadcast_to(np.float32(0), shape)
        return self.checkpoint.read(self.prefix + name)

    def count(self, pattern: str) -> int:
        """How many there are of 'down.{}.block': numbers from 0 without a gap, each with some tensor."""
        number = 0
        while any(name.startswith(pattern.format(number) + ".") for name in self.tensors):
            number += 1
        return number


class Checkpoint:
    """An open file. Raises CompilerError, one sentence, for whatever cannot be read."""

    def __init__(self, path: Path):
        self.path = Path(path)
        self.tensors, self.conventions = {}, {}
        try:
            self._read_header()
        except OSError as error:
            raise CompilerError(f"'{path}' cannot be read: {error.strerror}.") from None
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise CompilerError(
                f"'{self.path.name}' is no .safetensors file, or a damaged one; convert other formats by loading them "
                "in ComfyUI and saving them with CheckpointSave."
            ) from None

    def _read_header(self):
        size = self.path.stat().st_size
        with self.path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8).ljust(8))
            if length > min(MAX_HEADER_BYTES, size - 8):
                raise ValueError
            header = json.loads(file.read(length))
        metadata = header.pop("__metadata__", {})
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            tensor = Tensor(entry["dtype"], tuple(entry["shape"]), 8 + length + begin, end - begin)
            bits = BITS.get(tensor.dtype) or 8 * np.dtype(DTYPES[tensor.dtype]).itemsize
            if not 0 <= begin <= end or not all(isinstance(side, int) and side >= 0 for side in tensor.shape):
                raise ValueError
            if tensor.bytes * 8 != bits * math.prod(tensor.shape):
                raise ValueError
            if tensor.start + tensor.bytes > size:
                raise CompilerError(f"'{self.path.name}' is cut short: download or copy it again.")
            self.tensors[name] = tensor
        conventions = json.loads(metadata.get(METADATA, "{}"))
        for kind in PREFIXES:
            said = conventions.get(kind, {})
            if not all(isinstance(value, int) and value > 0 for value in said.values()):
                raise ValueError
            self.conventions[kind] = said

    def read(self, name: str) -> np.ndarray:
        """A tensor's numbers as float32, in memory of their own. Raises CompilerError if they are no numbers."""
        tensor = self.tensors[name]
        if tensor.dtype not in DTYPES:
            raise CompilerError(
                f"'{self.path.name}' keeps '{name}' as {tensor.dtype}, which holds too little to compile from: "
                "use the 16-bit or 32-bit checkpoint."
            )
        count = math.prod(tensor.shape)
        numbers = np.fromfile(self.path, DTYPES[tensor.dtype], count, offset=tensor.start).reshape(tensor.shape)
        if tensor.dtype == "BF16":
            numbers = (numbers.astype(np.uint32) << 16).view(np.float32)
        numbers = numbers.astype(np.float32, copy=False)
        if not np.isfinite(numbers).all():
            raise CompilerError(
                f"'{self.path.name}' is damaged: '{name}' has NaN or infinity among its numbers, so every picture would be "
                "black; take it from where it came from again, or merge it anew."
            )
        return numbers

    def parts(self) -> list[str]:
        """The kinds of networks in it, of PREFIXES."""
        return [kind for kind, prefixes in PREFIXES.items() if any(self._holds(prefix) for prefix in prefixes)]

    def _holds(self, prefix: str) -> bool:
        return any(name.startswith(prefix) for name in self.tensors)

    def part(self, kind: str, dry: bool = False) -> Part:
        """One network's tensors, without their numbers if `dry`.

        Raises CompilerError if it is not there, or of another family than SD 1.x.
        """
        self._refuse_other_families()
        for prefix in PREFIXES[kind]:
            if self._holds(prefix):
                part = Part(self, kind, prefix)
                part.dry = dry
                return part
        held = ", ".join(TITLES[kind] for kind in self.parts()) or "none of the networks of SD 1.x"
        raise CompilerError(
            f"'{self.path.name}' holds no {TITLES[kind]}, only: {held}; pick another checkpoint, or leave that part out."
        )

    def _refuse_other_families(self):
        """Whatever part is asked for: another family's VAE would be compiled, and never fit."""
        widths = (t.shape[1] for n, t in self.tensors.items() if n.endswith("attn2.to_k.weight") and len(t.shape) == 2)
        family = OTHER_FAMILIES.get(next(widths, None))
        for beginning, known in OTHER_NAMES.items():
            if self._holds(beginning):
                family = family or known
        if any("time_stack" in name or "time_mixer" in name for name in self.tensors):
            family = "a video model"
        if not family and not self.parts() and any(map(self._holds, DIFFUSERS)):
            raise CompilerError(
                f"'{self.path.name}' is one network in diffusers' layout: load its parts in ComfyUI and compile them there, "
                "or save them as one checkpoint with CheckpointSave."
            )
        if family:
            raise CompilerError(
                f"'{self.path.name}' is {family}, and what can be compiled here is SD 1.x, whose U-Net takes a context "
                f"{SD1_WIDTH} wide."
            )
