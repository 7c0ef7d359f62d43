"""mindone's layers on the CPU, each in one piece: arrays from its first operator to its last.

Between operators that are each a tensor's, half of a small network's time goes into making tensors, and large ones are
copied for every transposition. A layer that SDXL configures differently keeps mindone's own way, on `kernels`.
"""
from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
from mindspore import Tensor

from .kernels import array, attention, convolved, gelu_of, grouped, normalized, scaled, swish, tensor, transformed


def install(mindone: SimpleNamespace) -> None:
    """Give mindone's classes (modules.mindone) these ways to compute, once. Only on the CPU, after kernels.install."""
    for kind, construct, fits in (
            (mindone.Attention, attend, lambda self: self.spatial_norm is None and self.norm_cross is None
                and self.norm_q is None and self.norm_k is None and not self.only_cross_attention),
            (mindone.GEGLU, geglu, lambda self: True),
            (mindone.BasicTransformerBlock, transformer_block, lambda self: self.norm_type == "layer_norm"
                and self.pos_embed is None and self.attn2 is not None and not self.only_cross_attention),
            (mindone.ResnetBlock2D, resnet, lambda self: self.upsample is None and self.downsample is None
                and self.time_embedding_norm in ("default", "group") and type(self.nonlinearity).__name__ == "SiLU"),
            (mindone.Transformer2DModel, transformer, lambda self: self.is_input_continuous and self.use_linear_projection)):
        if not hasattr(kind.construct, "original"):
            kind.construct = _instead(kind.construct, construct, fits)


def _instead(original: Callable, construct: Callable, fits: Callable) -> Callable:
    def chosen(self, *arguments, **keywords):
        return (construct if fits(self) else original)(self, *arguments, **keywords)
    chosen.original = original
    return chosen


# -- attention and transformers ------------------------------------------------------------------------------------
def attend(self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, *unused, **options) -> Tensor:
    """Attention over (B, L, C), or over the places of (B, C, h, w) as in the VAE. SDXL masks nothing."""
    x = array(hidden_states)
    y = x.reshape(*x.shape[:2], -1)
    if self.group_norm is not None:
        y = grouped(y if x.ndim == 4 else y.swapaxes(1, 2), *_group_norm(self.group_norm))
        y = y if x.ndim == 4 else y.swapaxes(1, 2)
    y = np.ascontiguousarray(y.swapaxes(1, 2)) if x.ndim == 4 else y
    y = _attended(self, y, y if encoder_hidden_states is None else array(encoder_hidden_states))
    if x.ndim == 4:
        y = np.ascontiguousarray(y.swapaxes(1, 2)).reshape(x.shape)
    if self.residual_connection:
        y += x
    if self.rescale_output_factor != 1.0:
        y /= np.float32(self.rescale_output_factor)
    return tensor(y)


def _attended(layer, x: np.ndarray, context: np.ndarray) -> np.ndarray:
    query, key, value = (_linear(projection, source).reshape(*source.shape[:2], layer.heads, -1) for projection, source in
                         ((layer.to_q, x), (layer.to_k, context), (layer.to_v, context)))
    return _linear(layer.to_out[0], attention(query, key, value).reshape(x.shape[0], x.shape[1], -1))


def geglu(self, hidden_states: Tensor) -> Tensor:
    return tensor(_gated(self.proj, array(hidden_states)))


def _gated(projection, x: np.ndarray) -> np.ndarray:
    """The first half of each row of the projection times gelu of the second."""
    both = _linear(projection, x)
    width = both.shape[-1] // 2
    rows = both.reshape(-1, 2 * width)
    out = gelu_of(rows[:, width:])
    out *= rows[:, :width]
    return out.reshape(*both.shape[:-1], width)


def transformer_block(self, hidden_states: Tensor, attention_mask=None, encoder_hidden_states: Tensor | None = None,
                      *unused, **options) -> Tensor:
    """x + self-attention, + attention to the text, + feed-forward, each of the layer-normed x."""
    x = array(hidden_states)
    normed = _layer_normed(self.norm1, x)
    x = _attended(self.attn1, normed, normed) + x
    x += _attended(self.attn2, _layer_normed(self.norm2, x), array(encoder_hidden_states))
    gate, _, last = self.ff.net
    x += _linear(last, _gated(gate.proj, _layer_normed(self.norm3, x)))
    return tensor(x)


def transformer(self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, *unused, **options):
    """The blocks over the places of (B, C, h, w)."""
    x = array(hidden_states)
    batch, channels, height, width = x.shape
    y = grouped(x, *_group_norm(self.norm)).reshape(batch, channels, -1)
    y = tensor(_linear(self.proj_in, np.ascontiguousarray(y.swapaxes(1, 2))))
    for block in self.transformer_blocks:
        y = block(y, encoder_hidden_states=encoder_hidden_states)
    y = _linear(self.proj_out, array(y)).swapaxes(1, 2).reshape(x.shape)
    return (tensor(y + x),)


# -- convolutions --------------------------------------------------------------------------------------------------
def resnet(self, input_tensor: Tensor, temb: Tensor | None = None, *unused) -> Tensor:
    """The U-Net's and the VAE's, which has no timestep and calls its norm "group"."""
    x = array(input_tensor)
    y = _convolved(self.conv1, swish(grouped(x, *_group_norm(self.norm1))))
    if self.time_emb_proj is not None and self.time_embedding_norm == "default":
        step = array(temb)
        y += _linear(self.time_emb_proj, step if self.skip_time_act else swish(step.copy()))[:, :, None, None]
    y = _convolved(self.conv2, swish(grouped(y, *_group_norm(self.norm2))))
    y += x if self.conv_shortcut is None else _convolved(self.conv_shortcut, x)
    if self.output_scale_factor != 1.0:
        y /= np.float32(self.output_scale_factor)
    return tensor(y)


# -- mint's layers over arrays -------------------------------------------------------------------------------------
def _linear(layer, x: np.ndarray) -> np.ndarray:
    return transformed(x, layer.weight, layer.bias)


def _convolved(layer, x: np.ndarray) -> np.ndarray:
    return convolved(x, layer.weight, layer.bias, *(tuple(np.broadcast_to(each, 2)) for each in
                                                    (layer.stride, layer.padding, layer.dilation)))


def _group_norm(layer) -> tuple:
    return layer.num_groups, layer.weight, layer.bias, layer.eps


def _layer_normed(layer, x: np.ndarray) -> np.ndarray:
    return scaled(normalized(x.reshape(-1, x.shape[-1]), layer.eps), layer.weight, layer.bias).reshape(x.shape)
