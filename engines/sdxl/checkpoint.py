"""A file or folder -> what it is, its parts' configs, and its parameters one by one.

    checkpoint = open_checkpoint(path)              reads headers only, a few milliseconds for any size
    checkpoint.require("unet")                      one sentence if that part is not in it
    for parameter in checkpoint.parameters("unet"):
        network[parameter.name] = parameter.read()

Every parameter that a part needs is there, has the shape that its config asks for, and every tensor of the file is used
or known to mean nothing, or `open_checkpoint` says what is wrong.
"""
from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from . import configs, parts
from .ckptfile import read_ckpt
from .families import other_family, other_prediction
from .folder import TITLES, read_folder
from .layout import EXTRAS, PARTS, Diffusers, SingleFile, Source, plain
from .safetensorsfile import read_safetensors
from .tensors import FLOATS, CheckpointError, Tensor, elements, named

__all__ = ["PARTS", "Checkpoint", "CheckpointError", "Parameter", "open_checkpoint"]


class Parameter(NamedTuple):
    """One parameter by its diffusers or transformers name. `read()` gives it; bfloat16 as the uint16 of its bits."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


class _Found(NamedTuple):
    """A parameter's tensor, and which part of it the parameter is."""

    tensor: Tensor
    source: Source

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.tensor.shape
        if self.source.third is not None and shape:
            return (shape[0] // 3, *shape[1:])
        return shape[::-1] if self.source.transposed else shape

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether this can be read as `shape`: a matrix and a 1x1 convolution have the same numbers, and files differ."""
        whole = self.source.third is None or self.tensor.shape[:1] and self.tensor.shape[0] % 3 == 0
        return bool(whole) and _squeezed(self.shape) == _squeezed(shape)

    def read(self, shape: tuple[int, ...]) -> np.ndarray:
        array = self.tensor.read(self.source.third)
        return np.ascontiguousarray(array.T) if self.source.transposed else array.reshape(shape)


class Checkpoint:
    """What `open_checkpoint` found. `missing` names parts that are not in it, in the order of PARTS.

    `files` hold the parameters, `bytes` counts those, `dtype` is what most of them have: numpy's name or "bfloat16".
    """

    def __init__(self, path: Path, kind: str, configs: dict[str, dict], found: dict[str, dict[str, _Found]]):
        self.path, self.kind, self.configs = path, kind, configs
        self.missing = [part for part in PARTS if part not in configs]
        self._found = found
        used = {id(one.tensor): one.tensor for part in found.values() for one in part.values()}.values()
        self.files = sorted({tensor.path for tensor in used})
        self.bytes = sum(tensor.bytes for tensor in used)
        sizes: Counter[str] = Counter()
        for tensor in used:
            sizes[tensor.dtype] += elements(tensor.shape)
        self.dtype = sizes.most_common(1)[0][0]

    def require(self, *wanted: str) -> None:
        """Raise CheckpointError, one sentence that names them, unless these parts are in the checkpoint."""
        lacking = [f"no {TITLES[part]}" for part in PARTS if part in wanted and part in self.missing]
        if lacking:
            raise CheckpointError(f"{self.path.name}: it has {' and '.join(lacking)}: take a checkpoint with all parts.")

    def parameters(self, part: str) -> Iterator[Parameter]:
        """Every parameter of a part, in the order in which they lie in the file."""
        self.require(part)
        expected = parts.parameters(part, self.configs[part])
        for name, one in sorted(self._found[part].items(), key=lambda item: (item[1].tensor.path, item[1].tensor.pieces)):
            yield Parameter(name, one.tensor.dtype, expected[name], partial(one.read, expected[name]))

    @property
    def widths(self) -> tuple[int, int, int]:
        """Of the first and second encoder's part of the context, and of the pooled text."""
        self.require("text_encoder", "text_encoder_2")
        second = self.configs["text_encoder_2"]
        return self.configs["text_encoder"]["hidden_size"], second["hidden_size"], second["projection_dim"]

    @property
    def latent_channels(self) -> int:
        config = self.configs.get("vae")
        return config.get("latent_channels", 4) if config else self.configs["unet"].get("in_channels", 4)


def open_checkpoint(path: Path | str) -> Checkpoint:
    """A .safetensors file, a MindSpore .ckpt or a diffusers folder with SDXL's parts, or some of them.

    Raises CheckpointError, one sentence that begins with its name: what it is instead, or what is wrong with it.
    """
    path = Path(path)
    with named(path):
        if path.is_dir():
            known, tensors = read_folder(path)
            return _checkpoint(path, "diffusers folder", tensors, known)
        if not path.is_file():      # also keeps us from waiting on a pipe
            raise CheckpointError("there is no such file or folder")
        suffix = path.suffix.lower()
        if suffix == ".safetensors":
            return _checkpoint(path, "single file", read_safetensors(path), None)
        if suffix == ".ckpt":
            return _checkpoint(path, "mindspore checkpoint", read_ckpt(path), None)
        raise CheckpointError("only .safetensors files, MindSpore's .ckpt files and diffusers folders can be read")


def _checkpoint(path: Path, kind: str, tensors: dict[str, Tensor], known: dict[str, dict] | None) -> Checkpoint:
    """`known` are the configs, None where they are to be inferred."""
    tensors = _plain(tensors)
    layout = Diffusers()
    if known is None:
        _refuse_others(tensors)
        if not any(name.startswith(tuple(Diffusers.PREFIXES.values())) for name in tensors):
            layout = SingleFile(tensors)
        known = {}
        for part, prefix in layout.PREFIXES.items():
            if any(name.startswith(prefix) and not EXTRAS.fullmatch(name) for name in tensors):
                known[part] = configs.infer(part, partial(_shape, tensors, layout, part))
    if not known:
        raise CheckpointError("it holds no part of an SDXL model")
    found = {part: _find(tensors, layout, part, config) for part, config in known.items()}
    _refuse_leftovers(tensors, found)
    _check_fit(known)
    return Checkpoint(path, kind, known, found)


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {plain(name): tensor for name, tensor in tensors.items()}
    if len(renamed) < len(tensors):
        raise CheckpointError("it is damaged: it has a parameter under PyTorch's name and under MindSpore's")
    return renamed


def _lookup(tensors: dict[str, Tensor], layout: Diffusers | SingleFile, part: str, name: str) -> _Found | None:
    for source in layout.sources(part, name):
        if source.name in tensors:
            return _Found(tensors[source.name], source)
    return None


def _shape(tensors: dict[str, Tensor], layout: Diffusers | SingleFile, part: str, name: str) -> tuple[int, ...] | None:
    found = _lookup(tensors, layout, part, name)
    return found.shape if found else None


def _find(tensors: dict[str, Tensor], layout: Diffusers | SingleFile, part: str, config: dict) -> dict[str, _Found]:
    """The tensor of each parameter; CheckpointError if one is not there, or is not of its size or of a usable dtype."""
    title = TITLES[part]
    found, lacking = {}, []
    for name, shape in parts.parameters(part, config).items():
        one = _lookup(tensors, layout, part, name)
        if one is None:
            lacking.append(name)
            continue
        if one.tensor.dtype not in FLOATS:
            raise CheckpointError(_unusable(one.tensor.dtype))
        if not one.fits(shape):
            raise CheckpointError(f"its {title} is not SDXL's, or damaged: {one.tensor.name} has the shape "
                                  f"{list(one.tensor.shape)}, which does not fit the rest")
        found[name] = one
    if lacking:
        raise CheckpointError(f"its {title} is not SDXL's, or incomplete: it has no {_some(lacking)}")
    return found


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[:2] if shape[2:] == (1, 1) else shape


def _unusable(dtype: str) -> str:
    what = "8-bit floats" if dtype.upper().startswith("F8") else f"{dtype} numbers"
    return f"its parameters are {what}, which MindSpore does not load: take the float16, bfloat16 or float32 file"


def _refuse_others(tensors: dict[str, Tensor]) -> None:
    family = other_family(tensors)
    if family:
        raise CheckpointError(f"it is {family}, and only SDXL base checkpoints can be used")
    prediction = other_prediction(tensors)
    if prediction:
        raise CheckpointError(f"its U-Net predicts {prediction}, and only models that predict noise can be sampled here")


def _refuse_leftovers(tensors: dict[str, Tensor], found: dict[str, dict[str, _Found]]) -> None:
    used = {one.source.name for part in found.values() for one in part.values()}
    # a single number or a text is a note of whoever trained it, such as a step count
    left = [name for name, tensor in tensors.items() if name not in used and tensor.shape and not EXTRAS.fullmatch(name)]
    if left:
        raise CheckpointError(f"it has tensors that SDXL has not: {_some(left)}")


def _check_fit(known: dict[str, dict]) -> None:
    """Parts of one model have widths that go together; CheckpointError if they do not."""
    unet, vae = known.get("unet"), known.get("vae")
    if unet:
        if unet.get("in_channels", 4) != unet.get("out_channels", 4):
            raise CheckpointError(f"its U-Net takes {unet.get('in_channels', 4)} channels, as models for inpainting or "
                                  "editing do, and only SDXL's text-to-image models can be used")
        if vae and vae.get("latent_channels", 4) != unet.get("in_channels", 4):
            raise CheckpointError("its VAE and its U-Net do not fit: their latents have different channels")
        if "text_encoder" in known and "text_encoder_2" in known:
            first, second = known["text_encoder"], known["text_encoder_2"]
            context = first["hidden_size"] + second["hidden_size"]
            added = second["projection_dim"] + configs.SIZES * parts.number(unet, "addition_time_embed_dim", configs.SINES)
            if (unet["cross_attention_dim"], unet["projection_class_embeddings_input_dim"]) != (context, added):
                raise CheckpointError(f"its text encoders and its U-Net do not fit: they give a context {context} wide and "
                                      f"a vector of {added}, it takes {unet['cross_attention_dim']} and "
                                      f"{unet['projection_class_embeddings_input_dim']}")


def _some(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    shown = ", ".join(name[:100] for name in names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown
