"""Between torch's pictures and the engines' arrays."""
from __future__ import annotations

import numpy as np
import torch

from ...engines.alignment import plot
from ...engines.alignment.compare import Parity


def arrays_of(*images: torch.Tensor) -> tuple[np.ndarray, ...]:
    """IMAGEs as float32 arrays."""
    return tuple(image.detach().to("cpu", torch.float32).numpy() for image in images)


def plot_of(parity: Parity) -> torch.Tensor:
    """The plot of a comparison as an IMAGE (1,H,W,3)."""
    return torch.from_numpy(np.asarray(plot.of_parity(parity), np.float32) / 255)[None]
