"""A compiled U-Net as an ordinary MODEL."""
from __future__ import annotations

import comfy.model_base
import comfy.supported_models
import numpy as np
import torch

from ...engines.errors import EngineError
from ...engines.roles import FAMILIES, INPAINT_CHANNELS, LATENT_CHANNELS
from ...engines.stages import SizeError, Stage, UNet
from .control import residuals_of
from .host import maker
from .patcher import CPU, EnginePatcher, patcher_for

SD1_CHANNELS = 320       # of the first block of an SD 1.x U-Net; FreeU and its kind reckon with it


class EngineUNet(torch.nn.Module):
    """What stands where ComfyUI expects the diffusion model; no parameters, so nothing of it is ever moved."""

    dtype = torch.float32

    def __init__(self, stage: Stage):
        super().__init__()
        self.stage = stage
        self.in_channels = stage.channels      # stock nodes ask for it

    def forward(self, x, timesteps, context=None, control=None, transformer_options=None, **extra):
        """x (B,C,h,w), timesteps (B,), context (B,77n,D), SDXL's y (B,V) -> raw prediction (B,4,h,w), float32."""
        options = transformer_options or {}
        self.refuse_patches(options)
        if context is None:
            raise EngineError("The conditioning holds no text context: connect the CLIP that belongs to this model.")
        arguments = [as_array(tensor) for tensor in (x, timesteps, context)]
        prediction = self.stage(*arguments, **self.inputs(len(x), control, extra), where=_where(options, timesteps))
        return torch.from_numpy(prediction).to(x.device)

    def inputs(self, batch: int, control: dict | None, extra: dict) -> dict:
        """What the stage takes besides latent, timestep and context, by its parameters' names."""
        raise NotImplementedError

    def refuse_patches(self, options: dict) -> None:
        patches = {name: patch for kind in ("patches", "patches_replace") for name, patch in options.get(kind, {}).items()
                   if patch}
        if patches:
            first = next(iter(patches.values()))       # a list of functions, or a dict of them by block
            function = next(iter(first.values() if isinstance(first, dict) else first))
            raise EngineError(f"{maker(function)} patches the U-Net's inside ({', '.join(sorted(patches))}) and "
                              f"{self.stage.names} {self.stage.nature}: its inside is fixed. Remove that node (FreeU, ToMe, "
                              "IPAdapter and their kind).")


class CompiledUNet(EngineUNet):
    def inputs(self, batch: int, control: dict | None, extra: dict) -> dict:
        return {"residuals": {role: as_array(value) for role, value in residuals_of(control, self.stage, batch).items()}}


def as_array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().to(CPU, torch.float32).numpy()


def _where(options: dict, timesteps: torch.Tensor) -> str:
    where = f" at timestep {float(timesteps[0]):g}"
    sigma, schedule = options.get("sigmas"), options.get("sample_sigmas")
    if sigma is not None and schedule is not None:
        step = int((schedule.cpu() - sigma[0].cpu()).abs().argmin())
        where += f", step {step + 1} of {len(schedule) - 1}"
    return where


class EngineModel:
    """What ComfyUI's model classes need to hold an EngineUNet; goes before one of them."""

    @property
    def stage(self):
        return self.diffusion_model.stage

    def state_dict_for_saving(self, *args, **kwargs):
        raise EngineError(f"{self.stage.names} {self.stage.nature}: its weights cannot be saved as a checkpoint; copy the "
                          "file.")

    def memory_required(self, input_shape, cond_shapes={}):
        return 0.0               # cond and uncond always share a call: the device's memory is not the host's


class CompiledModel(EngineModel, comfy.model_base.BaseModel):
    """Stable Diffusion 1.x with a compiled U-Net: epsilon prediction, SD 1.x betas and latent scale."""

    def __init__(self, stage: UNet):
        config = comfy.supported_models.SD15({"disable_unet_model_creation": True, "in_channels": stage.channels,
                                              "context_dim": stage.width, "model_channels": SD1_CHANNELS})
        super().__init__(config, model_type=comfy.model_base.ModelType.EPS, device=CPU)
        self.diffusion_model = CompiledUNet(stage)
        self.latent_size = None      # of the latent that is being sampled
        if stage.channels == INPAINT_CHANNELS:
            self.set_inpaint()

    def extra_conds(self, **kwargs):
        self.latent_size = tuple(kwargs["noise"].shape[-2:])
        return super().extra_conds(**kwargs)

    def _apply_model(self, x, *args, **kwargs):
        try:
            return super()._apply_model(x, *args, **kwargs)
        except SizeError as error:
            if tuple(x.shape[-2:]) == self.latent_size:
                raise
            raise EngineError(f"ConditioningSetArea asks the U-Net for a part of {error.asked[0]}x{error.asked[1]}, and "
                              f"{self.stage.names} has only {', '.join(f'{w}x{h}' for w, h in error.sizes)}: use "
                              "ConditioningSetMask, which keeps the whole picture's size.") from error


def as_model(stage: UNet) -> EnginePatcher:
    """The MODEL for a U-Net stage. Raises EngineError for a family whose sampling differs from SD 1.x."""
    if stage.family != "sd1":
        raise EngineError(f"The U-Net in {stage.names} takes a context {stage.width} wide, as {FAMILIES[stage.family]} "
                          "does: this loader is for SD 1.x.")
    if stage.channels not in (LATENT_CHANNELS, INPAINT_CHANNELS):
        raise EngineError(f"The U-Net in {stage.names} takes {stage.channels} latent channels: SD 1.x has 4, its "
                          "inpainting model 9.")
    return patcher_for(CompiledModel(stage))
