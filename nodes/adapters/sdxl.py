"""SDXL on a worker as an ordinary MODEL, CLIP and VAE, and its conditioning."""
from __future__ import annotations

from functools import partial

import comfy.ldm.modules.diffusionmodules.openaimodel
import comfy.model_base
import comfy.sd
import comfy.supported_models
import numpy as np
import torch
from comfy import sdxl_clip

from ...engines.errors import EngineError
from ...engines.sdxl.stages import NORMED, PENULTIMATE, SDXL, TextEncoder, UNet
from .choices import ENCODE, ZEROS
from .clip import EngineTextEncoder, engine_clip
from .host import one_of
from .model import EngineModel, EngineUNet, as_array
from .patcher import EnginePatcher, Together, patcher_for
from .vae import EngineVAE

ENCODERS = {"l", "g"}            # ComfyUI's names of SDXL's two text encoders; SD 1.x has "l", the refiner "g", SD3 three
HOW_TO_CONDITION = ("use AscendSDXLConditioner, CLIPTextEncodeSDXL or CLIPTextEncode with the CLIP of AscendLoadSDXL or of "
                    "another SDXL checkpoint")


# -- MODEL ---------------------------------------------------------------------------------------------------------
class SDXLUNet(EngineUNet):
    def inputs(self, batch: int, control: dict | None, extra: dict) -> dict:
        if control is not None:
            raise EngineError(f"The U-Net in {self.stage.names} takes no ControlNet residuals: remove the ControlNet.")
        return {"y": as_array(extra["y"])}


class SDXLModel(EngineModel, comfy.model_base.SDXL):
    """SDXL with its U-Net on a worker: epsilon prediction, SDXL's betas and latent scale 0.13025."""

    def __init__(self, stage: UNet):
        config = comfy.supported_models.SDXL({
            "disable_unet_model_creation": True, "in_channels": stage.channels, "context_dim": stage.width,
            "adm_in_channels": stage.vector_width, "model_channels": stage.first_channels})
        super().__init__(config, model_type=comfy.model_base.ModelType.EPS)
        self.diffusion_model = SDXLUNet(stage)
        self.embedder = comfy.ldm.modules.diffusionmodules.openaimodel.Timestep(stage.size_width)

    def encode_adm(self, **kwargs):
        if kwargs.get("pooled_output") is None and "unclip_conditioning" not in kwargs:
            raise EngineError(f"The conditioning has no pooled text, which SDXL needs: {HOW_TO_CONDITION}.")
        return super().encode_adm(**kwargs)


def as_model(stage: UNet) -> EnginePatcher:
    return patcher_for(SDXLModel(stage))


# -- CLIP ----------------------------------------------------------------------------------------------------------
class SDXLTextEncoder(EngineTextEncoder):
    """One of SDXL's two encoders, with any of its layers, as comfy.sd1_clip.SDClipModel."""

    def __init__(self, stage: TextEncoder, padding: int):
        super().__init__(stage)
        self.special_tokens = {**self.special_tokens, "pad": padding}
        self.layer = PENULTIMATE

    def set_clip_options(self, options):
        if not options.get("projected_pooled", True):
            raise EngineError(f"A node before this one wants the pooled text without its projection, and {self.stage.names} "
                              "gives it as SDXL takes it: use a node that is made for SDXL.")
        layer = options.get("layer", self.layer)
        # As ComfyUI does: beyond the first layer it takes the last one, normed.
        self.layer = layer if layer is not None and abs(layer) <= self.stage.layers else NORMED

    def reset_clip_options(self):
        self.layer = PENULTIMATE

    def run(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.stage(ids, self.layer)


class SDXLClip(sdxl_clip.SDXLClipModel):
    def __init__(self, first: TextEncoder, second: TextEncoder, device=None, dtype=None, model_options=None):
        torch.nn.Module.__init__(self)         # SDXLClipModel's own makes the two networks in torch
        self.clip_l = SDXLTextEncoder(first, padding=49407)
        self.clip_g = SDXLTextEncoder(second, padding=0)
        self.dtypes = {dtype}
        self.stage = Together("CLIP", [first, second])


def as_clip(sdxl: SDXL, embedding_directory: list[str]) -> comfy.sd.CLIP:
    model = partial(SDXLClip, sdxl.text_encoder_1, sdxl.text_encoder_2)
    return engine_clip(sdxl_clip.SDXLTokenizer, model, embedding_directory)


def as_vae(sdxl: SDXL) -> EngineVAE:
    return EngineVAE(sdxl.decoder, sdxl.encoder)


# -- conditioning --------------------------------------------------------------------------------------------------
def conditions(clip, prompt: str, negative_prompt: str, sizes: dict[str, int], unconditional: str) -> tuple[list, list]:
    """(positive, negative) CONDITIONING of any SDXL CLIP. sizes: ComfyUI's keys "width", "crop_h", ...

    unconditional ZEROS makes the negative text and pooled text zero, as the article does; ENCODE encodes the negative
    prompt, as stock ComfyUI does. Raises EngineError.
    """
    one_of("unconditional", unconditional, (ENCODE, ZEROS))
    if unconditional == ZEROS and negative_prompt.strip():
        raise EngineError("unconditional 'zeros' leaves no place for a negative prompt: clear negative_prompt, or set "
                          "unconditional to 'encode'.")
    tokens = clip.tokenize(prompt)
    if not isinstance(tokens, dict) or set(tokens) != ENCODERS:
        raise EngineError("The CLIP is not SDXL's, whose two text encoders give the context and the pooled text: connect "
                          "the CLIP of AscendLoadSDXL or of another SDXL checkpoint.")
    positive = clip.encode_from_tokens_scheduled(tokens, add_dict=sizes)
    if any(options.get("pooled_output") is None for _, options in positive):
        raise EngineError("The CLIP gives no pooled text, which SDXL needs: connect the CLIP of AscendLoadSDXL or of "
                          "another SDXL checkpoint.")
    if unconditional == ENCODE:
        return positive, clip.encode_from_tokens_scheduled(clip.tokenize(negative_prompt), add_dict=sizes)
    # As long as the positive one, so that both share a model call: of zeros any number means the same to the U-Net.
    return positive, [[torch.zeros_like(context), {**options, "pooled_output": torch.zeros_like(options["pooled_output"])}]
                      for context, options in positive]
