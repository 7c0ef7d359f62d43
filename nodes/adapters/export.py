"""A stock MODEL, CLIP and VAE, with what was patched into them, as the checkpoint that the compiler reads.

Patches are baked by ComfyUI's own arithmetic, in float32; what cannot be baked is refused, because a LoRA that silently
does nothing is worse than none.
"""
from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import comfy.lora
import comfy.model_sampling
import comfy.sd
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

from ...compiler.checkpoint import METADATA, OTHER_FAMILIES, PREFIXES
from ...engines.errors import EngineError
from ...engines.roles import INPAINT_CHANNELS, LATENT_CHANNELS, VAE_SCALE
from .host import maker
from .patcher import EnginePatcher

SUPPORTED = "what can be compiled is SD 1.x: its U-Net takes a context 768 wide"
# safetensors' names of what the compiler reads; others, 8-bit floats for one, are written as float32
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
          torch.int32: "I32"}
SCALES = ("scale_weight", "scale_input", "weight_scale", "input_scale", "scaled_fp8", "comfy_quant")


@dataclass(frozen=True)
class Part:
    """One network to write, and what its shapes do not show. `inside` is where the patcher's model has it."""

    kind: str
    patcher: object
    inside: str
    conventions: dict[str, int]
    skip: int = 0

    def tensors(self) -> Iterator[Baked]:
        """Nothing is loaded to a device, and nothing of the model is changed: others may be using it."""
        for key, (stored, *patches) in self.patcher.get_key_patches(self.inside).items():
            name = key.removeprefix(self.inside)
            if not name.endswith(SCALES):          # of 8-bit weights, which `stored` knows how to apply
                yield Baked(PREFIXES[self.kind][0] + name, key, stored, patches)

    @property
    def patches(self) -> dict:
        """What was patched: how many weights, at which strengths."""
        applied = [patch[0] for patches in self.patcher.patches.values() for patch in patches]
        return {"weights": len(self.patcher.patches), "strengths": sorted(set(applied))} if applied else {}


@dataclass(frozen=True)
class Baked:
    """A tensor of a network with its patches: float32 where there are any, else as it is stored."""

    name: str
    key: str
    stored: tuple
    patches: list

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.patches or self.stored[0].dtype not in DTYPES else self.stored[0].dtype

    @property
    def shape(self) -> torch.Size:
        return self.stored[0].shape

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def numbers(self) -> torch.Tensor:
        """On the CPU, in memory of its own if it was computed."""
        weight, convert = self.stored
        if self.dtype == weight.dtype and not self.patches:
            return weight.detach().to("cpu")
        weight = convert(weight.detach().to("cpu", torch.float32, copy=True), inplace=True)
        weight = comfy.lora.calculate_weight(self.patches, weight, self.key) if self.patches else weight
        if weight.shape != self.shape:
            raise EngineError(f"A patch makes '{self.key}' {list(weight.shape)} of {list(self.shape)}, and shapes cannot "
                              "change: remove the node that patches it.")
        return weight


def parts_of(model=None, clip=None, vae=None) -> list[Part]:
    """The parts of what is connected. Raises EngineError for what is not SD 1.x, or cannot be baked."""
    found = []
    if clip is not None:
        found.append(_clip(clip))
    if model is not None:
        found.append(_model(model))
    if vae is not None:
        found.append(_vae(vae))
    return found


def size_multiple(model) -> int:
    """Of what picture sizes must be: a U-Net of n levels halves the latent n - 1 times."""
    return VAE_SCALE * 2 ** (len(model.model.diffusion_model.channel_mult) - 1)


@contextmanager
def saved(parts: list[Part], folder: Path, poll: Callable[[], None], empty: bool = False) -> Iterator[Path]:
    """The checkpoint of some parts, in `folder` for as long as it is needed. Raises EngineError where it has no room.

    A server that is killed meanwhile leaves it, and the next compile removes it. empty: shapes alone matter; the numbers
    are a hole in the file, which takes no disk.
    """
    from ...compiler import workplace  # not on Windows, where nothing is compiled either
    with ExitStack() as kept:
        with _room(folder):
            folder.mkdir(parents=True, exist_ok=True)
            workplace.remove_abandoned(folder)
            place = Path(kept.enter_context(tempfile.TemporaryDirectory(prefix=f"{workplace.PREFIX}weights-", dir=folder)))
            kept.callback(os.close, workplace.hold(place))
            path = place / "baked.safetensors"
            with path.open("wb") as file:
                if empty:
                    file.truncate(file.write(_head(parts)) + sum(t.bytes for part in parts for t in part.tensors()))
                else:
                    write(parts, file.write, poll)
        yield path


@contextmanager
def _room(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise EngineError(f"The disk of {folder} is too full for the checkpoint that is compiled from: make room "
                              "there.") from error
        raise EngineError(f"Nothing can be written in {folder} ({error.strerror}): give ComfyUI's account the right to.") \
            from error


def digest(parts: list[Part], poll: Callable[[], None] = lambda: None) -> str:
    """sha256, in hex, of the file that `saved` would write."""
    hashed = hashlib.sha256()
    write(parts, hashed.update, poll)
    return hashed.hexdigest()


def write(parts: list[Part], sink: Callable[[bytes], object], poll: Callable[[], None]) -> None:
    """One .safetensors file in SD 1.x's layout, tensor by tensor, so that no copy of a model lies in memory."""
    sink(_head(parts))
    for part in parts:
        for tensor in part.tensors():
            poll()
            sink(tensor.numbers().contiguous().flatten().view(torch.uint8).numpy().data)


def _head(parts: list[Part]) -> bytes:
    header, position = {"__metadata__": {METADATA: json.dumps({part.kind: part.conventions for part in parts})}}, 0
    for part in parts:
        for tensor in part.tensors():
            header[tensor.name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape),
                                   "data_offsets": [position, position + tensor.bytes]}
            position += tensor.bytes
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text


def outside(model) -> list[str]:
    """What nodes made of a MODEL beside its U-Net, each in a sentence: nothing of it can be compiled in, nor is lost."""
    options, sampling = model.model_options, model.get_model_object("model_sampling")
    made = [thing for name, thing in model.object_patches.items() if not name.startswith("diffusion_model")]
    made += [value for name, value in options.items() if callable(value)]
    made += [value for name, values in options.items() if isinstance(values, list) for value in values if callable(value)]
    wrapped = (key for kinds in (model.wrappers, options.get("transformer_options", {}).get("wrappers", {}))
               for by_key in kinds.values() for key, wrappers in by_key.items() if wrappers and key != "torch.compile")
    names = [*map(maker, made), *(f"A node before this one ({key})" for key in wrapped)]
    said = [f"{name} works on the sampling, which is not in the U-Net: put that node behind the loader, too."
            for name in dict.fromkeys(names)]
    if isinstance(sampling, comfy.model_sampling.V_PREDICTION) and "model_sampling" not in model.object_patches:
        said.append("The U-Net predicts v, and the loader takes it for one that predicts noise: put ModelSamplingDiscrete "
                    "with v_prediction behind the loader.")
    return said


def _model(model) -> Part:
    network, kind = model.model.diffusion_model, type(model.model).__name__
    if isinstance(model, EnginePatcher):
        raise EngineError(f"The MODEL is {model.stage.names}, which {model.stage.nature}: connect a stock one, from Load "
                          "Checkpoint for example.")
    if not isinstance(network, UNetModel):
        raise EngineError(f"The MODEL is a {kind}, and {SUPPORTED}.")
    width = next((tensor.shape[1] for name, tensor in network.named_parameters() if name.endswith("attn2.to_k.weight")), 0)
    family = OTHER_FAMILIES.get(width) or ("SDXL" if network.num_classes is not None else "" if width else f"a {kind}")
    if family or network.use_temporal_resblocks:
        raise EngineError(f"The MODEL is {'a video model' if network.use_temporal_resblocks else family}, and {SUPPORTED}.")
    if network.in_channels not in (LATENT_CHANNELS, INPAINT_CHANNELS):
        raise EngineError(f"The MODEL takes {network.in_channels} latent channels: of SD 1.x those with {LATENT_CHANNELS} "
                          f"can be compiled, and the inpainting ones with {INPAINT_CHANNELS}.")
    _refuse_inside(model)
    return Part("unet", model, "diffusion_model.", {"heads": network.num_heads, "groups": _groups(network)})


def _refuse_inside(model) -> None:
    """Raises EngineError for what changes how the U-Net computes, rather than its weights."""
    options = model.model_options.get("transformer_options", {})
    patches = options.get("patches", {}) | options.get("patches_replace", {})
    inside = {name: value for name, value in patches.items() if value}
    inside |= {name: value for name, value in model.object_patches.items() if name.startswith("diffusion_model")}
    inside |= getattr(model, "weight_wrapper_patches", {})
    if not inside:
        return
    first = next(iter(inside.values()))            # of a list of functions, or a dict of them by block
    while isinstance(first, (list, dict)) and first:
        first = next(iter(first.values())) if isinstance(first, dict) else first[0]
    raise EngineError(f"{maker(first)} changes how the U-Net computes ({', '.join(sorted(inside)[:4])}), which is no weight "
                      "and cannot be compiled in: remove it (FreeU, ToMe, IPAdapter and their kind).")


def _clip(clip) -> Part:
    if isinstance(clip.patcher, EnginePatcher):
        raise EngineError(f"The CLIP is {clip.patcher.stage.names}, which {clip.patcher.stage.nature}: connect a stock one.")
    encoders = [name for name, module in clip.cond_stage_model.named_children() if isinstance(module, torch.nn.Module)]
    if encoders != ["clip_l"]:
        raise EngineError(f"The CLIP holds {', '.join(encoders) or 'no text encoder'}, and {SUPPORTED}, from CLIP-L alone.")
    if clip.patcher.forced_hooks or clip.apply_hooks_to_conds:
        raise EngineError("The CLIP has hooks, which change its weights while a picture is made, and a compiled one cannot: "
                          "remove SetClipHooks, and apply its LoRA with LoraLoader.")
    text = clip.cond_stage_model.clip_l.transformer.text_model
    layer = clip.layer_idx if clip.layer_idx is not None else -1
    if not -len(text.encoder.layers) <= layer <= -1:
        raise EngineError(f"CLIP skip {layer} was set and this CLIP has {len(text.encoder.layers)} layers: use -1 to "
                          f"-{len(text.encoder.layers)}.")
    return Part("text_encoder", clip.patcher, "clip_l.transformer.text_model.",
                {"heads": text.encoder.layers[0].self_attn.heads}, skip=-1 - layer)


def _vae(vae) -> Part:
    if isinstance(vae.patcher, EnginePatcher):
        raise EngineError(f"The VAE is {vae.patcher.stage.names}, which {vae.patcher.stage.nature}: connect a stock one.")
    network = vae.first_stage_model
    names = dict(network.named_parameters()) if isinstance(network, torch.nn.Module) else {}
    if "post_quant_conv.weight" not in names or names["post_quant_conv.weight"].ndim != 4 or vae.latent_channels != 4:
        raise EngineError(f"The VAE is a {type(network).__name__} of another kind than SD 1.x's, and that is what can be "
                          "compiled: connect the VAE of an SD 1.x checkpoint.")
    return Part("vae", vae.patcher, "", {"groups": _groups(network)})


def _groups(network: torch.nn.Module) -> int:
    return next(module.num_groups for module in network.modules() if isinstance(module, torch.nn.GroupNorm))
