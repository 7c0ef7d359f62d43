"""A diffusers folder: which pipeline it is, each part's config, and the files that hold its parameters."""
from __future__ import annotations

import re
from pathlib import Path

from .layout import PARTS
from .safetensorsfile import read_safetensors
from .tensors import CheckpointError, Tensor, named, read_json

MAX_CONFIG, MAX_INDEX = 1 << 20, 16 << 20       # bytes
MAX_FILES = 1000
TITLES = {"text_encoder": "first text encoder", "text_encoder_2": "second text encoder", "unet": "U-Net", "vae": "VAE"}
# of a config, what says nothing about the network
_HOUSEKEEPING = {"architectures", "model_type", "torch_dtype", "dtype", "transformers_version"}


def read_folder(path: Path) -> tuple[dict[str, dict], dict[str, Tensor]]:
    """(config of each part that is there, tensors as "part.name"); headers only.

    Raises CheckpointError if it is no SDXL pipeline, if weights are pickles, or if a file is damaged.
    """
    index = path / "model_index.json"
    if not index.is_file():
        raise CheckpointError("it is no diffusers folder: it has no model_index.json")
    pipeline = str(read_json(index, MAX_CONFIG).get("_class_name"))[:60]
    if not re.fullmatch(r"StableDiffusionXL\w*Pipeline", pipeline):
        raise CheckpointError(f"it is a {pipeline}, and only StableDiffusionXLPipeline folders can be used")
    _check_prediction(path / "scheduler" / "scheduler_config.json")
    configs, tensors = {}, {}
    for part in PARTS:
        if (path / part).is_dir():
            config = read_json(path / part / "config.json", MAX_CONFIG)
            configs[part] = {key: value for key, value in config.items()
                             if not key.startswith("_") and key not in _HOUSEKEEPING}
            stem = "model" if part.startswith("text_encoder") else "diffusion_pytorch_model"
            tensors.update((f"{part}.{name}", tensor) for name, tensor in _weights(path / part, stem).items())
    return configs, tensors


def _check_prediction(path: Path) -> None:
    kind = read_json(path, MAX_CONFIG).get("prediction_type", "epsilon") if path.is_file() else "epsilon"
    if kind != "epsilon":
        raise CheckpointError(f"its U-Net predicts {str(kind)[:40]}, and only models that predict noise can be sampled here")


def _weights(folder: Path, stem: str) -> dict[str, Tensor]:
    """The tensors of one part: in one file, or in several that an index lists; the plain variant, else fp16, else any."""
    single = [folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json",
              folder / f"{stem}.fp16.safetensors", folder / f"{stem}.safetensors.index.fp16.json"]
    indexes = folder.glob(f"{stem}.safetensors.index.*.json")
    others = (path for path in folder.glob(f"{stem}.*.safetensors") if not re.search(r"-\d+-of-\d+", path.name))
    chosen = next((path for path in (*single, *sorted(indexes), *sorted(others)) if path.is_file()), None)
    if chosen is None:
        raise CheckpointError(_no_safetensors(folder))
    return _sharded(chosen) if chosen.suffix == ".json" else read_safetensors(chosen)


def _sharded(index: Path) -> dict[str, Tensor]:
    with named(index):
        places = read_json(index, MAX_INDEX).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
            raise CheckpointError("it is damaged: it does not say which file holds which tensor")
        files = sorted(set(places.values()))
        if len(files) > MAX_FILES:
            raise CheckpointError(f"it lists more than {MAX_FILES:,} files")
        for name in files:
            # the name is a stranger's: it may not lead out of the folder
            if Path(name).name != name or "\\" in name or not name.isprintable() or not name.endswith(".safetensors"):
                raise CheckpointError(f"it says that weights lie in {name[:80]!r}, which is no file beside it")
            if not (index.parent / name).is_file():
                raise CheckpointError(f"it says that weights lie in {name[:80]!r}, which is not there")
    found: dict[str, Tensor] = {}
    for name in files:
        for tensor in read_safetensors(index.parent / name).values():
            if tensor.name in found:
                raise CheckpointError(f"it is damaged: {tensor.name} is in two of its files")
            found[tensor.name] = tensor
    lacking = next((name for name in places if name not in found), None)
    if lacking is not None:
        raise CheckpointError(f"it is damaged: {lacking[:80]} is in none of its files")
    return found


def _no_safetensors(folder: Path) -> str:
    title = TITLES[folder.name]
    for suffix in ("bin", "pt", "pth", "ckpt", "msgpack"):
        for path in sorted(folder.glob(f"*.{suffix}")):
            pickled = ", a pickle, which can run any program when it is opened" if suffix in ("bin", "pt", "pth") else ""
            return f"its {title} is in {path.name}{pickled}: save the pipeline as safetensors (safe_serialization=True)"
    return f"its {title} has no weights: there is no safetensors file in {folder.name}"
