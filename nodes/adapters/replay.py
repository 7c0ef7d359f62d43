"""The networks of a MODEL, CLIP or VAE, called with what a recording holds: for teacher-forced comparison."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import comfy.model_management
import numpy as np
import torch

from ...engines.alignment.compare import Networks
from ...engines.alignment.recording import Call, known_ids
from ...engines.errors import EngineError
from ...engines.roles import ROLES
from .recording import arrays_to_control, behind, text_encoders, to_array


def networks_of(model=None, clip=None, vae=None) -> Networks:
    """{stage: network} of what is given, each answering a recorded call as engines.alignment.compare wants it."""
    found = {}
    if clip is not None:
        found["text_encoder"] = _Text(clip)
    if model is not None:
        found["unet"] = _Diffusion(model)
    if vae is not None:
        network = behind(vae.first_stage_model)
        for stage in ("vae_decoder", "vae_encoder"):      # a compiled VAE may lack a half
            if getattr(network, stage.removeprefix("vae_"), True) is not None:
                found[stage] = _Half(vae, stage)
    return found


class _Diffusion:
    def __init__(self, model):
        self.model = model

    def __call__(self, call: Call) -> dict[str, np.ndarray]:
        comfy.model_management.load_models_gpu([self.model])
        base, device = self.model.model, self.model.load_device
        dtype = base.manual_cast_dtype or base.get_dtype()

        def to(array: np.ndarray, kind=dtype) -> torch.Tensor:
            return torch.from_numpy(np.array(array)).to(device, kind)
        inputs = dict(call.inputs)
        latent, timestep = to(inputs.pop("latent")), to(inputs.pop("timestep"), torch.float32)      # as ComfyUI passes it
        residuals = {name: inputs.pop(name) for name in list(inputs) if name.startswith("residual.")}
        options = dict(self.model.model_options.get("transformer_options", {}))
        options["cond_or_uncond"] = list(call.facts.get("cond_or_uncond", ()))
        others = {name: to(array, dtype if array.dtype.kind == "f" else torch.int32) for name, array in inputs.items()}
        control = arrays_to_control(residuals, call.facts.get("control", {}), to)
        with _fitting(call):
            answer = base.diffusion_model(latent, timestep, control=control, transformer_options=options,
                                          **{"context": None, **others})
        return {"prediction": to_array(answer)}

    def locate(self, call: Call) -> str | None:
        """The first layer of a torch model that makes NaN or infinite values of finite ones."""
        found, hooks = [], []

        def watch(name):
            def after(_, args, answer):
                given = [arg for arg in args if isinstance(arg, torch.Tensor) and arg.is_floating_point()]
                if (not found and isinstance(answer, torch.Tensor) and not answer.isfinite().all()
                        and all(arg.isfinite().all() for arg in given)):
                    found.append(name)
            return after
        network = self.model.model.diffusion_model
        for name, module in network.named_modules():
            if name and not any(module.children()):
                hooks.append(module.register_forward_hook(watch(name)))
        try:
            self(call)
        except EngineError:
            pass                              # a compiled network says no more than that
        finally:
            for hook in hooks:
                hook.remove()
        return found[0] if found else None


class _Text:
    def __init__(self, clip):
        self.clip = clip

    def __call__(self, call: Call) -> dict[str, np.ndarray]:
        encoders, part = text_encoders(self.clip.cond_stage_model), call.facts.get("part", "clip_l")
        if part not in encoders:
            raise EngineError(f"The recording holds calls of a text encoder '{part}' and this CLIP has "
                              f"{', '.join(encoders) or 'none'}: compare models of one family.")
        ids = known_ids(call)
        model = behind(self.clip.cond_stage_model)
        model.reset_clip_options()
        if self.clip.layer_idx is not None:
            model.set_clip_options({"layer": self.clip.layer_idx})
        self.clip.load_model()
        with _fitting(call):
            hidden, pooled = encoders[part](ids.tolist())[:2]
        return {"hidden": to_array(hidden)} | ({} if pooled is None else {"pooled": to_array(pooled)})


class _Half:
    def __init__(self, vae, stage: str):
        self.vae, self.stage = vae, stage

    def __call__(self, call: Call) -> dict[str, np.ndarray]:
        comfy.model_management.load_models_gpu([self.vae.patcher])
        network = behind(self.vae.first_stage_model)
        given, taken = ("latent", "image") if self.stage == "vae_decoder" else ("image", "latent")
        tensor = torch.from_numpy(np.array(call.inputs[given])).to(self.vae.device, self.vae.vae_dtype)
        with _fitting(call):
            return {taken: to_array(network.decode(tensor) if given == "latent" else network.encode(tensor))}


@contextmanager
def _fitting(call: Call) -> Iterator[None]:
    """Instead of what torch says of inputs that do not fit, a sentence."""
    try:
        yield
    except (EngineError, comfy.model_management.OOM_EXCEPTION):
        raise
    except (RuntimeError, ValueError, TypeError, AssertionError, IndexError, AttributeError, KeyError) as error:
        given = ", ".join(f"{name} {list(array.shape)}" for name, array in list(call.inputs.items())[:5])
        raise EngineError(f"This {ROLES[call.stage]} cannot take what the recording holds{call.where} ({given}): compare "
                          "models of one family.") from error
