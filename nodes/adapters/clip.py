"""A compiled text encoder as an ordinary CLIP: prompt weights and batching are ComfyUI's own."""
from __future__ import annotations

import logging

import comfy.sd
import numpy as np
import torch
from comfy import sd1_clip

from ...engines.errors import EngineError
from ...engines.stages import TextEncoder
from .host import tell
from .patcher import CPU, patcher_for

TRUNCATE, ERROR = "truncate", "error"
SPECIAL_TOKENS = {"start": 49406, "end": 49407, "pad": 49407}


class CompiledTextEncoder(torch.nn.Module, sd1_clip.ClipTokenWeightEncoder):
    """Stands where ComfyUI expects CLIP-L: encodes sections of 77 token ids, has only the last layer."""

    special_tokens = SPECIAL_TOKENS

    def __init__(self, stage: TextEncoder, long_prompts: str, sections: int):
        super().__init__()
        self.stage, self.long_prompts, self.sections = stage, long_prompts, sections

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

    def encode(self, tokens: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self(tokens)          # through torch's call, as in ComfyUI's encoders: hooks see it

    def forward(self, tokens: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Sections of 77 ids -> hidden (N,77,D), pooled (N,P) or None, float32."""
        if not all(isinstance(token, int) for section in tokens for token in section):
            raise EngineError(f"The prompt names a textual inversion embedding, and {self.stage.names} is compiled: it "
                              "takes words only; remove 'embedding:...' from the prompt.")
        hidden, pooled = self.stage(np.array(tokens))
        return torch.from_numpy(hidden), None if pooled is None else torch.from_numpy(pooled)


class CompiledCLIP(sd1_clip.SD1ClipModel):
    @property
    def stage(self) -> TextEncoder:
        return self.clip_l.stage


class _Target:
    """What comfy.sd.CLIP wants to know: the tokenizer, the model and its parameters."""

    def __init__(self, stage: TextEncoder, long_prompts: str, sections: int):
        self.tokenizer, self.clip = sd1_clip.SD1Tokenizer, CompiledCLIP
        self.params = {"clip_model": lambda **_: CompiledTextEncoder(stage, long_prompts, sections)}


def as_clip(stage: TextEncoder, long_prompts: str, embedding_directory: list[str], tokens: int = 0) -> comfy.sd.CLIP:
    """The CLIP for a text encoder stage.

    tokens: what the U-Net takes, where it is known; more of a prompt is cut. long_prompts: TRUNCATE (with a warning on the
    node) or ERROR.
    """
    if long_prompts not in (TRUNCATE, ERROR):
        raise EngineError(f"long_prompts cannot be '{long_prompts}': choose '{TRUNCATE}' or '{ERROR}'.")
    # Without an initial device ComfyUI does not load the patcher it makes, so that ours can take its place.
    target = _Target(stage, long_prompts, max(1, tokens // stage.length))
    clip = comfy.sd.CLIP(target, embedding_directory=embedding_directory,
                         model_options={"load_device": CPU, "offload_device": CPU, "initial_device": None,
                                        "dtype": torch.float32})
    clip.patcher = patcher_for(clip.cond_stage_model)
    clip.patcher.is_clip = True
    return clip
