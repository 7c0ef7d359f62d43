"""Stable Diffusion 1.x as ONNX graphs, straight from a checkpoint: no torch, and weights that never lie in memory whole.

Written for compilers of accelerators. By construction every size is fixed, outputs are tensors, timesteps come as
integers, one a row, and are looked up rather than computed, and attention is plain matrix products; `graph.check` asserts
it on each graph.
"""

from .graph import Graph, Value, Weights, check
from .text_encoder import text_encoder
from .unet import residual_shapes, unet, unet_levels
from .vae import vae_decoder, vae_encoder

__all__ = [
    "Graph",
    "Value",
    "Weights",
    "check",
    "residual_shapes",
    "text_encoder",
    "unet",
    "unet_levels",
    "vae_decoder",
    "vae_encoder",
]
