"""MODEL, CLIP and VAE that note what their networks are given and what they answer, whatever these are made of.

The networks are watched where ComfyUI calls them: a diffusion model and text encoders through torch's hooks, for the time
of one call, a VAE by standing in its place. So every sampler and node works as before, and the object that was
given stays as it was.
"""
from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from comfy import sd1_clip
from comfy.patcher_extension import WrappersMP

from ...engines.alignment.recording import UNKNOWN_TOKEN, Recorder, Recording
from ...engines.errors import EngineError
from .host import tell

KEY = "sophgo_record"
PLACES = {"output": "residual.{}", "middle": "residual.mid.{}", "input": "residual.in.{}"}     # of ComfyUI's control dict
MIDDLE = {"residual.mid.0": "residual.mid"}


def to_array(tensor: torch.Tensor) -> np.ndarray:
    """A copy, float32 or int32."""
    return np.array(tensor.detach().to("cpu", torch.float32 if tensor.is_floating_point() else torch.int32))


def _add(recorder: Recorder, stage: str, inputs: dict, outputs: dict, **facts) -> None:
    recorder.add(stage, inputs, outputs, **facts)
    if recorder.left_out == 1:
        tell(f"The recording '{recorder.name}' has reached its limit of {recorder.limit >> 20} MB: later calls are left "
             "out; raise limit_mb, or record fewer steps.", level=logging.WARNING)


# MODEL ----------------------------------------------------------------------------------------------------------------


def record_model(model, recorder: Recorder):
    """A MODEL like `model` that writes each call of its diffusion model into `recorder`."""
    recorded = model.clone()

    def apply(executor, *args, **kwargs):
        with _watched(executor.class_obj.diffusion_model, recorder):
            return executor(*args, **kwargs)

    apply.__qualname__ = "SophgoRecord"      # by this a sampler that refuses wrappers names the node
    recorded.add_wrapper_with_key(WrappersMP.APPLY_MODEL, f"{KEY}.{recorder.name}", apply)
    return recorded


@contextmanager
def _watched(network: torch.nn.Module, recorder: Recorder) -> Iterator[None]:
    seen = []

    def before(_, args, kwargs):
        # Before, because a U-Net takes the residuals out of their lists while it runs.
        given = {"latent": args[0], "timestep": args[1], **kwargs}
        inputs = {name: to_array(value) for name, value in given.items() if isinstance(value, torch.Tensor)}
        residuals, lengths = control_to_arrays(kwargs.get("control"))
        facts = {**_facts(kwargs.get("transformer_options") or {}), **_given(args[0])}
        seen.append(({**inputs, **residuals}, {**facts, **({"control": lengths} if lengths else {})}))

    def after(_, args, kwargs, answer):
        if isinstance(answer, torch.Tensor):
            inputs, known = seen.pop()
            _add(recorder, "unet", inputs, {"prediction": to_array(answer)}, **known)

    hooks = [network.register_forward_pre_hook(before, with_kwargs=True),
             network.register_forward_hook(after, with_kwargs=True)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _facts(options: Mapping) -> dict:
    """What ComfyUI says of a call: step (from 1), steps, sigma, and which part of the batch is which."""
    facts = {}
    if "cond_or_uncond" in options:
        facts["cond_or_uncond"] = [int(flag) for flag in options["cond_or_uncond"]]
    if options.get("sigmas") is not None:
        facts["sigma"] = float(options["sigmas"].flatten()[0])
        if options.get("sample_sigmas") is not None:
            schedule = options["sample_sigmas"].cpu()
            # The last level is no step: uni_pc calls the network close to it.
            nearest = (schedule[:-1] - facts["sigma"]).abs()
            facts |= {"step": int(nearest.argmin()) + 1, "steps": len(nearest)} if len(nearest) else {}
    return facts


def _given(tensor: torch.Tensor) -> dict:
    """That a network is given 16-bit floats, by its own choice of type."""
    return {} if tensor.dtype == torch.float32 else {"dtype": str(tensor.dtype).removeprefix("torch.")}


def control_to_arrays(control: Mapping | None) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """({residual.N, residual.mid: array}, the lengths of ComfyUI's lists, in which some places may be empty)."""
    arrays, lengths = {}, {}
    for place, tensors in (control or {}).items():
        if place in PLACES:
            lengths[place] = len(tensors)
            names = [PLACES[place].format(number) for number in range(len(tensors))]
            arrays |= {MIDDLE.get(name, name): to_array(t) for name, t in zip(names, tensors) if t is not None}
    return arrays, lengths


def arrays_to_control(arrays: Mapping[str, np.ndarray], lengths: Mapping[str, int], to) -> dict | None:
    """The inverse; `to` makes a tensor of an array."""
    def tensor(place: str, number: int):
        name = PLACES[place].format(number)
        name = MIDDLE.get(name, name)
        return to(arrays[name]) if name in arrays else None
    places = [place for place in PLACES if place in lengths]
    return {place: [tensor(place, number) for number in range(lengths[place])] for place in places} or None


# CLIP -----------------------------------------------------------------------------------------------------------------


class Stand:
    """Stands in the place of a module; whatever is not its own is the module's."""

    def __init__(self, module, recorder: Recorder):
        self.stands_for, self.recorder = module, recorder

    def __getattr__(self, name):
        if name == "stands_for":           # asked for before it is there, as when copied
            raise AttributeError(name)
        return getattr(self.stands_for, name)


def behind(module):
    """The module itself, without what records it."""
    while isinstance(module, Stand):
        module = module.stands_for
    return module


class _Text(Stand):
    def encode_token_weights(self, tokens):
        hooks = []
        for part, encoder in text_encoders(self.stands_for).items():
            hooks.append(encoder.register_forward_hook(self._after(part)))
        try:
            return self.stands_for.encode_token_weights(tokens)
        finally:
            for hook in hooks:
                hook.remove()

    def _after(self, part: str):
        def after(_, args, answer):
            hidden, pooled = answer[:2]
            outputs = {"hidden": to_array(hidden)} | ({} if pooled is None else {"pooled": to_array(pooled)})
            _add(self.recorder, "text_encoder", {"ids": _ids(args[0])}, outputs, part=part)
        return after


def text_encoders(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The encoders of a CLIP's model by name; SD 1.x has one, clip_l."""
    return {name: module for name, module in behind(model).named_modules()
            if isinstance(module, sd1_clip.ClipTokenWeightEncoder)}


def _ids(sections: list[list]) -> np.ndarray:
    rows = [[token if isinstance(token, int) else UNKNOWN_TOKEN for token in section] for section in sections]
    longest = max(map(len, rows))
    return np.array([row + [UNKNOWN_TOKEN] * (longest - len(row)) for row in rows], np.int32)


def record_clip(clip, recorder: Recorder):
    """A CLIP like `clip` that writes each call of its text encoders into `recorder`."""
    recorded = clip.clone()
    recorded.cond_stage_model = _Text(clip.cond_stage_model, recorder)      # clones of this one keep it
    return recorded


# VAE ------------------------------------------------------------------------------------------------------------------


class _Halves(Stand):
    def decode(self, latent, *args, **kwargs):
        given = to_array(latent)
        image = self.stands_for.decode(latent, *args, **kwargs)
        _add(self.recorder, "vae_decoder", {"latent": given}, {"image": to_array(image)}, **_given(latent))
        return image

    def encode(self, image, *args, **kwargs):
        given = to_array(image)
        latent = self.stands_for.encode(image, *args, **kwargs)
        _add(self.recorder, "vae_encoder", {"image": given}, {"latent": to_array(latent)}, **_given(image))
        return latent


def record_vae(vae, recorder: Recorder):
    """A VAE like `vae` that writes each call of its halves into `recorder`."""
    recorded = copy.copy(vae)
    recorded.first_stage_model = _Halves(vae.first_stage_model, recorder)
    return recorded


def whole_run(recording: Recorder | Recording | None, images) -> Recording | None:
    """A recording of a whole run. Raises EngineError where its run has not come to its end for want of a connection."""
    if not isinstance(recording, Recorder):
        return recording
    if images is None and (silent := recording.silent()):
        raise EngineError(f"'{recording.name}' has no call of its {' and '.join(silent)} yet: connect the pictures of its "
                          "run as well, so that the run comes first.")
    return recording.recording()


def said_of(model=None, clip=None, vae=None) -> dict[str, str]:
    """Stage -> what runs there, in words: file and device of a compiled network, class and type of torch's."""
    found = {}
    if model is not None:
        network, patches = model.model.diffusion_model, len(model.patches)
        found["unet"] = _said(network, model.model.get_dtype(), patches)
    if clip is not None:
        encoders = text_encoders(clip.cond_stage_model)
        encoder = next(iter(encoders.values()), behind(clip.cond_stage_model))
        found["text_encoder"] = _said(encoder, _dtype(encoder), len(clip.patcher.patches))
    if vae is not None:
        network = behind(vae.first_stage_model)
        halves = {"vae_decoder": getattr(network, "decoder", None), "vae_encoder": getattr(network, "encoder", None)}
        for stage, half in halves.items():
            if hasattr(half, "describe"):
                found[stage] = half.describe().partition(": ")[2]
            elif half is not None:
                found[stage] = _said(network, vae.vae_dtype, 0)
    return found


def _said(network, dtype, patches: int) -> str:
    stage = getattr(network, "stage", None)
    if stage is not None:
        return stage.describe().partition(": ")[2]
    patched = f", {patches} weights patched" if patches else ""
    return f"torch {type(network).__name__}, {str(dtype).removeprefix('torch.')}{patched}"


def _dtype(module: torch.nn.Module):
    return next((parameter.dtype for parameter in module.parameters()), torch.float32)
