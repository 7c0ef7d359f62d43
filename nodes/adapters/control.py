"""What a ControlNet tells a U-Net, from ComfyUI's dictionary to a compiled U-Net's inputs."""
from __future__ import annotations

import torch

from ...engines.errors import EngineError
from ...engines.stages import UNet


def residuals_of(control: dict[str, list[torch.Tensor | None]] | None, stage: UNet, batch: int) -> dict[str, torch.Tensor]:
    """{"residual.0": (B,C,h,w), ..., "residual.mid"} of what was given; the U-Net adds zeros for the others.

    ComfyUI's U-Net (openaimodel.py, apply_control) pops: it takes the lists from their ends, "output" while it walks back
    over the skip connections. So the last of "output" belongs to the last skip connection, and a list that is shorter
    leaves out the first ones. Raises EngineError for a U-Net without these inputs, and for what it has no input for.
    """
    if control is None:
        return {}
    given = {kind: list(values) for kind, values in control.items() if any(value is not None for value in values)}
    if not given:
        return {}
    if not stage.residuals:
        raise EngineError(f"The U-Net in {stage.names} takes no ControlNet residuals: remove the ControlNet, or compile the "
                          "U-Net with 'controlnet' switched on.")
    if "input" in given:
        raise EngineError(f"This adapter (a T2I-Adapter, for example) adds to the input blocks of the U-Net, and "
                          f"{stage.names} takes what a ControlNet adds after them: use a ControlNet.")
    skips = given.get("output", [])
    if len(skips) > stage.residuals:
        raise EngineError(f"The ControlNet gives {len(skips)} residuals and the U-Net in {stage.names} takes "
                          f"{stage.residuals}: use a ControlNet for SD 1.x.")
    named = {f"residual.{stage.residuals - len(skips) + number}": value for number, value in enumerate(skips)}
    if "middle" in given:
        named["residual.mid"] = given["middle"][-1]
    # one row may stand for all, as torch adds
    return {role: value.expand(batch, *value.shape[1:]) for role, value in named.items() if value is not None}
