"""Text encoders that run on a device as an ordinary CLIP: prompt weights and sections are ComfyUI's own."""
from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

import comfy.sd
import numpy as np
import torch
from comfy import sd1_clip
from comfy.supported_models_base import ClipTarget

from ...engines.errors import EngineError
from ...engines.stages import Stage, TextEncoder
from .choices import ERROR, TRUNCATE
from .host import one_of, tell
from .patcher import CPU, patcher_for

SPECIAL_TOKENS = {"start": 49406, "end": 49407, "pad": 49407}


class EngineTextEncoder(torch.nn.Module, sd1_clip.ClipTokenWeightEncoder):
    """Stands where ComfyUI expects a CLIP: encodes sections of 77 token ids."""

    special_tokens = SPECIAL_TOKENS

    def __init__(self, stage: Stage):
        super().__init__()
        self.stage = stage

    def encode(self, tokens: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self(tokens)          # through torch's call, as in ComfyUI's encoders: hooks see it

    def forward(self, tokens: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Sections of 77 ids -> hidden (N,77,D), pooled (N,P) or None, float32."""
        if not all(isinstance(token, int) for section in tokens for token in section):
            raise EngineError(f"The prompt names a textual inversion embedding, and {self.stage.names} {self.stage.nature}: "
                              "it takes words only; remove 'embedding:...' from the prompt.")
        hidden, pooled = self.run(np.array(tokens))
        return torch.from_numpy(hidden), None if pooled is None else torch.from_numpy(pooled)

    def run(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        return self.stage(ids)


class CompiledTextEncoder(EngineTextEncoder):
    """CLIP-L compiled with its last layer alone, for as many sections as the U-Net takes."""

    def __init__(self, stage: TextEncoder, long_prompts: str, sections: int):
        super().__init__(stage)
        self.long_prompts, self.sections = long_prompts, sections

    def set_clip_options(self, options):
        layer = options.get("layer")
        if layer not in (None, -1):
            raise EngineError(f"CLIP skip {layer} is not in {self.stage.names}: it was compiled with the last layer's "
                              "output alone; use -1 (or remove CLIPSetLastLayer), or compile one with that layer.")

    def reset_clip_options(self):
        pass

    def encode_token_weights(self, token_weight_pairs):
        return super().encode_token_weights(self._fitting(token_weight_pairs))

    def _fitting(self, sections: list) -> list:
        """What the U-Net can take: so many sections of 77."""
        if len(sections) <= self.sections:
            return sections
        special = set(SPECIAL_TOKENS.values())
        used = sum(1 for section in sections for token, _ in section if not isinstance(token, int) or token not in special)
        limit = self.sections * (self.stage.length - 2)
        if self.long_prompts == ERROR:
            raise EngineError(f"The prompt has {used} tokens and {self.stage.names} takes {limit}: shorten it, or set "
                              "long_prompts to 'truncate' in the loader.")
        tell(f"Prompt cut: it has {used} tokens, the compiled model takes {limit}; the rest is ignored.",
             level=logging.WARNING)
        return sections[:self.sections]


class CompiledCLIP(sd1_clip.SD1ClipModel):
    @property
    def stage(self) -> TextEncoder:
        return self.clip_l.stage


def engine_clip(tokenizer: type, model: Callable[..., torch.nn.Module], embedding_directory: list[str]) -> comfy.sd.CLIP:
    """The CLIP of a text model that has a `stage`; model(device=, dtype=, model_options=) makes it."""
    # Without an initial device ComfyUI does not load the patcher it makes, so that ours can take its place.
    clip = comfy.sd.CLIP(ClipTarget(tokenizer, model), embedding_directory=embedding_directory,
                         model_options={"load_device": CPU, "offload_device": CPU, "initial_device": None,
                                        "dtype": torch.float32})
    clip.patcher = patcher_for(clip.cond_stage_model)
    clip.patcher.is_clip = True
    return clip


def as_clip(stage: TextEncoder, long_prompts: str, embedding_directory: list[str], tokens: int = 0) -> comfy.sd.CLIP:
    """The CLIP for a compiled text encoder.

    tokens: what the U-Net takes, where it is known; more of a prompt is cut. long_prompts: TRUNCATE (with a warning on the
    node) or ERROR.
    """
    one_of("long_prompts", long_prompts, (TRUNCATE, ERROR))
    sections = max(1, tokens // stage.length)
    encoder = partial(CompiledCLIP, clip_model=lambda **_: CompiledTextEncoder(stage, long_prompts, sections))
    return engine_clip(sd1_clip.SD1Tokenizer, encoder, embedding_directory)
