"""A ModelPatcher for networks that are not torch's: nothing to patch, memory of a device of its own."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import comfy.model_patcher
import torch

from ...engines.errors import EngineError
from ...engines.stages import Stage
from .host import running_node

CPU = torch.device("cpu")


class Together:
    """Stages that ComfyUI holds as one object: two text encoders as a CLIP, two halves as a VAE."""

    def __init__(self, title: str, stages: Sequence[Stage]):
        self.title, self.stages = title, list(stages)
        self.nature, self.instead = self.stages[0].nature, self.stages[0].instead

    @property
    def names(self) -> str:
        return ", ".join(dict.fromkeys(stage.names for stage in self.stages))

    @property
    def memory(self) -> dict[Path, int]:
        """Of each file once, which several stages may be in."""
        return {path: size for stage in self.stages for path, size in stage.memory.items()}

    def release(self) -> None:
        for stage in self.stages:
            stage.release()


class EnginePatcher(comfy.model_patcher.ModelPatcher):
    """Holds a torch module without parameters whose `stage`, a Stage or Together, runs on a device of its own.

    Everything ComfyUI does to models works (clone, hooks on the schedule, model_sampling patches, /free); what would
    change weights is refused, because a LoRA that silently does nothing is worse than none.
    """

    def _refuse(self, what: str):
        raise EngineError(f"{running_node() or 'This node'} {what}, and {self._fixed()} Remove that node, or "
                          f"{self.stage.instead}.")

    def _fixed(self) -> str:
        return f"the {self.stage.title} in {self.stage.names} {self.stage.nature}: its weights are fixed."

    @property
    def stage(self):
        return self.model.stage

    def model_size(self):
        """What ComfyUI makes room for. 1 at least, since it divides by sizes."""
        return max(1, sum(self.stage.memory.values()))

    def add_patches(self, patches, strength_patch=1.0, strength_model=1.0):
        if strength_patch:
            self._refuse("wants to patch weights")
        return []

    def get_key_patches(self, filter_prefix=None):
        self._refuse("wants to read weights")

    def model_state_dict(self, filter_prefix=None):
        self._refuse("wants to read weights")      # attention multipliers and LoRA extraction start from these

    def add_hook_patches(self, hook, patches, strength_patch=1.0, strength_model=1.0):
        raise EngineError(f"A hook of a condition wants to patch weights, and {self._fixed()} Remove the hook "
                          f"(CreateHookLora and its kind), or {self.stage.instead}.")

    def patch_hooks(self, hooks):
        pass                                       # hooks that patch weights were refused, the others need none

    def partially_load(self, device_to, extra_memory=0, force_patch_weights=False):
        if force_patch_weights:
            self._refuse("wants to save weights")
        return super().partially_load(device_to, extra_memory, force_patch_weights)

    def add_wrapper_with_key(self, wrapper_type, key, wrapper):
        if key == "torch.compile":
            self._refuse("wants to compile with torch")
        super().add_wrapper_with_key(wrapper_type, key, wrapper)

    def add_object_patch(self, name, obj):
        if name.startswith("diffusion_model"):
            self._refuse(f"wants to replace '{name}'")
        super().add_object_patch(name, obj)

    def detach(self, unpatch_all=True):
        # unpatch_all is False on every re-sample and in __del__; True means that the host wants the memory (/free).
        if unpatch_all:
            self.stage.release()
        return super().detach(unpatch_all)


def patcher_for(module: torch.nn.Module) -> EnginePatcher:
    return EnginePatcher(module, load_device=CPU, offload_device=CPU)
