"""A compiled U-Net as an ordinary MODEL."""
from __future__ import annotations

import comfy.model_base
import comfy.supported_models
import torch

from ...engines.errors import EngineError
from ...engines.roles import FAMILIES, INPAINT_CHANNELS, LATENT_CHANNELS
from ...engines.stages import SizeError, UNet
from .control import residuals_of
from .patcher import CPU, CompiledPatcher, patcher_for

SD1_CHANNELS = 320       # of the first block of an SD 1.x U-Net; FreeU and its kind reckon with it


class CompiledUNet(torch.nn.Module):
    """What stands where ComfyUI expects the diffusion model; no parameters, so nothing of it is ever moved."""

    dtype = torch.float32

    def __init__(self, stage: UNet):
        super().__init__()
        self.stage = stage
        self.in_channels = stage.channels      # stock nodes ask for it

    def forward(self, x, timesteps, context=None, control=None, transformer_options=None, **extra):
        """x (B,C,h,w), timesteps (B,), context (B,77n,D) -> raw prediction (B,4,h,w), float32."""
        options = transformer_options or {}
        self._refuse_patches(options)
        if context is None:
            raise EngineError("The conditioning holds no text context: connect the CLIP that belongs to this model.")
        if x.shape[1] != self.stage.channels:
            raise EngineError(f"The U-Net in {self.stage.names} takes {self.stage.channels} latent channels and was "
                              f"given {x.shape[1]}.")
        prediction = self.stage(*(t.detach().to(CPU, torch.float32).numpy() for t in (x, timesteps, context)),
                                residuals_of(control, self.stage, len(x)), _where(options, timesteps))
        return torch.from_numpy(prediction).to(x.device)

    def _refuse_patches(self, options: dict) -> None:
        names = [name for kind in ("patches", "patches_replace") for name, value in options.get(kind, {}).items() if value]
        if names:
            raise EngineError(f"A node before this one patches the U-Net's inside ({', '.join(sorted(names))}) and "
                              f"{self.stage.names} is compiled: its inside is fixed. Remove that node (FreeU, ToMe, "
                              "IPAdapter and their kind).")


def _where(options: dict, timesteps: torch.Tensor) -> str:
    where = f" at timestep {float(timesteps[0]):g}"
    sigma, schedule = options.get("sigmas"), options.get("sample_sigmas")
    if sigma is not None and schedule is not None:
        step = int((schedule.cpu() - sigma[0].cpu()).abs().argmin())
        where += f", step {step + 1} of {len(schedule) - 1}"
    return where


class CompiledModel(comfy.model_base.BaseModel):
    """Stable Diffusion 1.x with a compiled U-Net: epsilon prediction, SD 1.x betas and latent scale."""

    def __init__(self, stage: UNet):
        config = comfy.supported_models.SD15({"disable_unet_model_creation": True, "in_channels": stage.channels,
                                              "context_dim": stage.width, "model_channels": SD1_CHANNELS})
        super().__init__(config, model_type=comfy.model_base.ModelType.EPS, device=CPU)
        self.diffusion_model = CompiledUNet(stage)
        self.latent_size = None      # of the latent that is being sampled
        if stage.channels == INPAINT_CHANNELS:
            self.set_inpaint()

    @property
    def stage(self) -> UNet:
        return self.diffusion_model.stage

    def state_dict_for_saving(self, *args, **kwargs):
        raise EngineError(f"{self.stage.names} is compiled: its weights cannot be saved as a checkpoint; copy the file.")

    def memory_required(self, input_shape, cond_shapes={}):
        return 0.0               # cond and uncond always share a call: the device's memory is not the host's

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


def as_model(stage: UNet) -> CompiledPatcher:
    """The MODEL for a U-Net stage. Raises EngineError for a family whose sampling differs from SD 1.x."""
    if stage.family != "sd1":
        raise EngineError(f"The U-Net in {stage.names} takes a context {stage.width} wide, as {FAMILIES[stage.family]} "
                          "does: this loader is for SD 1.x.")
    if stage.channels not in (LATENT_CHANNELS, INPAINT_CHANNELS):
        raise EngineError(f"The U-Net in {stage.names} takes {stage.channels} latent channels: SD 1.x has 4, its "
                          "inpainting model 9.")
    return patcher_for(CompiledModel(stage))
