"""A stock MODEL, CLIP and VAE, with what was patched into them, as the checkpoint that the compiler reads.

ComfyUI bakes the patches, as its CheckpointSave does; what it cannot bake is refused, because a LoRA that silently does
nothing is worse than none.
"""
from __future__ import annotations

import errno
import json
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import comfy.model_management
import comfy.sd
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

from ...compiler.checkpoint import METADATA, OTHER_FAMILIES, PREFIXES
from ...engines.errors import EngineError
from ...engines.roles import INPAINT_CHANNELS, LATENT_CHANNELS, VAE_SCALE
from .patcher import EnginePatcher

SUPPORTED = "what can be compiled is SD 1.x: its U-Net takes a context 768 wide"
# safetensors' names; 8-bit floats are exact as 16-bit ones, which the compiler reads
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
          torch.int32: "I32"}
FLOAT8 = tuple(getattr(torch, name) for name in ("float8_e4m3fn", "float8_e5m2") if hasattr(torch, name))


@dataclass(frozen=True)
class Part:
    """One network to write: its tensors, once ComfyUI has baked its patches, and what shapes do not show."""

    kind: str
    patcher: object
    module: torch.nn.Module
    conventions: dict[str, int]
    skip: int = 0

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        comfy.model_management.load_models_gpu([self.patcher], force_patch_weights=True)
        prefix = PREFIXES[self.kind][0]
        return ((prefix + name, tensor) for name, tensor in self.module.state_dict().items())

    @property
    def patches(self) -> dict:
        """What was patched: how many weights, at which strengths."""
        applied = [patch[0] for patches in self.patcher.patches.values() for patch in patches]
        return {"weights": len(self.patcher.patches), "strengths": sorted(set(applied))} if applied else {}


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
def saved(parts: list[Part], folder: Path) -> Iterator[Path]:
    """The checkpoint of some parts, in `folder` for as long as it is needed. Raises EngineError where it has no room."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".checkpoint-", dir=folder) as place:
        path = Path(place, "baked.safetensors")
        try:
            write(parts, path)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise EngineError(f"The disk of {folder} is too full for the checkpoint that is compiled from: make room "
                              "there.") from error
        yield path


def write(parts: list[Part], path: Path) -> None:
    """One .safetensors file in SD 1.x's layout, tensor by tensor, so that no copy of a model lies in memory."""
    header, position, tensors = {"__metadata__": {METADATA: json.dumps({p.kind: p.conventions for p in parts})}}, 0, []
    for part in parts:
        for name, tensor in part.tensors():
            dtype = torch.float16 if tensor.dtype in FLOAT8 else tensor.dtype
            size = math.prod(tensor.shape) * dtype.itemsize
            header[name] = {"dtype": DTYPES[dtype], "shape": list(tensor.shape), "data_offsets": [position, position + size]}
            tensors.append((tensor, dtype))
            position += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor, dtype in tensors:
            tensor.detach().to("cpu", dtype).contiguous().flatten().view(torch.uint8).numpy().tofile(file)


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
    options = model.model_options.get("transformer_options", {})
    inside = [name for kind in ("patches", "patches_replace") for name, value in options.get(kind, {}).items() if value]
    inside += [name for name in model.object_patches if name.startswith("diffusion_model")]
    inside += list(getattr(model, "weight_wrapper_patches", {})) + ["hooks"] * bool(model.hook_patches)
    if inside:
        raise EngineError(f"A node before this one changes how the U-Net computes ({', '.join(sorted(inside)[:4])}), which "
                          "is no weight and cannot be compiled in: remove it (FreeU, ToMe, IPAdapter and their kind).")
    return Part("unet", model, network, {"heads": network.num_heads, "groups": _groups(network)})


def _clip(clip) -> Part:
    if isinstance(clip.patcher, EnginePatcher):
        raise EngineError(f"The CLIP is {clip.patcher.stage.names}, which {clip.patcher.stage.nature}: connect a stock one.")
    encoders = [name for name, module in clip.cond_stage_model.named_children() if isinstance(module, torch.nn.Module)]
    if encoders != ["clip_l"]:
        raise EngineError(f"The CLIP holds {', '.join(encoders) or 'no text encoder'}, and {SUPPORTED}, from CLIP-L alone.")
    text = clip.cond_stage_model.clip_l.transformer.text_model
    layer = clip.layer_idx if clip.layer_idx is not None else -1
    if not -len(text.encoder.layers) <= layer <= -1:
        raise EngineError(f"CLIP skip {layer} was set and this CLIP has {len(text.encoder.layers)} layers: use -1 to "
                          f"-{len(text.encoder.layers)}.")
    return Part("text_encoder", clip.patcher, text, {"heads": text.encoder.layers[0].self_attn.heads}, skip=-1 - layer)


def _vae(vae) -> Part:
    if isinstance(vae.patcher, EnginePatcher):
        raise EngineError(f"The VAE is {vae.patcher.stage.names}, which {vae.patcher.stage.nature}: connect a stock one.")
    network = vae.first_stage_model
    names = dict(network.named_parameters()) if isinstance(network, torch.nn.Module) else {}
    if "post_quant_conv.weight" not in names or names["post_quant_conv.weight"].ndim != 4 or vae.latent_channels != 4:
        raise EngineError(f"The VAE is a {type(network).__name__} of another kind than SD 1.x's, and that is what can be "
                          "compiled: connect the VAE of an SD 1.x checkpoint.")
    return Part("vae", vae.patcher, network, {"groups": _groups(network)})


def _groups(network: torch.nn.Module) -> int:
    return next(module.num_groups for module in network.modules() if isinstance(module, torch.nn.GroupNorm))
