"""What MindSpore's CPU back end lacks or does slowly, for the networks of SDXL. An NPU never sees any of it.

Many `mint` operators, which mindone is written in, are registered for Ascend only. Here they are numpy, with MindSpore's
own matrix product (oneDNN) where a product is large; tensors and arrays share their memory on the CPU, so that going
from one to the other costs microseconds. 3x3 convolutions exist on the CPU but take the reference path, about a hundred
times slower than a product; they become products of patches (im2col), a band of rows at a time so that memory stays bounded.

Everything computes in float32. Weights may be kept in float16, half the memory, and are widened when used: MindSpore's
own half-precision products are an order of magnitude slower.
"""
from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from mindspore import Tensor, mint, ops
from mindspore import dtype as mstype

BAND_BYTES = 4 << 20        # of patches, or of attention weights, in memory at once; larger bands are not faster
SMALL_PRODUCT = 300_000     # multiplications below which numpy is done before MindSpore has begun
CACHED = 1 << 15            # elements that stay in the first caches through many passes

_product = ops.MatMul(False, False)
_product_t = ops.MatMul(False, True)
_products = ops.BatchMatMul(False, False)
_products_t = ops.BatchMatMul(False, True)
_softmax = ops.Softmax(-1)


# -- between tensors and arrays ------------------------------------------------------------------------------------
def array(tensor: Tensor) -> np.ndarray:
    """The float32 array of a tensor: its own memory if it is float32, widened otherwise."""
    if tensor.dtype == mstype.float32:
        return tensor.asnumpy()
    return _widened(tensor).asnumpy()


def constant(parameter: Tensor) -> np.ndarray:
    """The same for a parameter, remembered: the way from a tensor to its memory is 30 microseconds long."""
    if parameter.dtype != mstype.float32:
        return array(parameter)
    kept = getattr(parameter, "seen_as_array", None)
    if kept is None:
        kept = parameter.seen_as_array = parameter.asnumpy()
    return kept


def _widened(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == mstype.float32 else ops.cast(tensor, mstype.float32)


def tensor(values: np.ndarray) -> Tensor:
    return Tensor.from_numpy(np.ascontiguousarray(values))


# -- products ------------------------------------------------------------------------------------------------------
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., inputs), weight (outputs, inputs), bias (outputs,) -> (..., outputs)."""
    flat = array(x).reshape(-1, x.shape[-1])
    if flat.size * weight.shape[0] < SMALL_PRODUCT:
        y = flat @ constant(weight).T
    else:
        y = _product_t(tensor(flat), _widened(weight)).asnumpy()
    if bias is not None:
        y += constant(bias)
    return tensor(y.reshape(*x.shape[:-1], weight.shape[0]))


def _times(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The product of two matrices."""
    if a.size * b.shape[1] < SMALL_PRODUCT:
        return a @ b
    return _product(tensor(a), tensor(b)).asnumpy()


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None, stride=1, padding=0, dilation=1, groups=1) -> Tensor:
    """x (N, C, H, W), weight (O, C, kh, kw) -> (N, O, H', W'), as torch.nn.functional.conv2d with one group.

    stride, padding and dilation are a number or (vertical, horizontal). Patches of a band of output rows are gathered and
    multiplied by the weights at once. Raises RuntimeError for more groups or a padding by name.
    """
    if groups != 1 or isinstance(padding, str):
        raise RuntimeError("This convolution has groups or a named padding, which the CPU kernels do not do.")
    (sh, sw), (ph, pw), (dh, dw) = _pair(stride), _pair(padding), _pair(dilation)
    n, c, h, w = x.shape
    o, _, kh, kw = weight.shape
    rows, columns = (h + 2 * ph - dh * (kh - 1) - 1) // sh + 1, (w + 2 * pw - dw * (kw - 1) - 1) // sw + 1
    source, kernel = array(x), constant(weight).reshape(o, -1)
    if ph or pw:
        padded = np.zeros((n, c, h + 2 * ph, w + 2 * pw), np.float32)
        padded[:, :, ph:ph + h, pw:pw + w] = source
        source = padded
    out = np.empty((n, o, rows, columns), np.float32)
    band = min(rows, max(1, BAND_BYTES // (4 * c * kh * kw * columns)))
    patches = np.empty((c, kh, kw, band, columns), np.float32)
    for sample in range(n):
        for top in range(0, rows, band):
            count = min(band, rows - top)
            view = patches if count == band else np.empty((c, kh, kw, count, columns), np.float32)
            for i in range(kh):
                first = top * sh + i * dh
                for j in range(kw):
                    view[:, i, j] = source[sample, :, first:first + (count - 1) * sh + 1:sh,
                                           j * dw:j * dw + (columns - 1) * sw + 1:sw]
            part = _times(kernel, view.reshape(c * kh * kw, count * columns))
            out[sample, :, top:top + count] = part.reshape(o, count, columns)
    if bias is not None:
        out += constant(bias)[:, None, None]
    return tensor(out)


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[-1]))


def attention(query: np.ndarray, key: np.ndarray, value: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """query (B, L, H, d), key and value (B, S, H, d) -> (B, L, H, d): softmax(q k / sqrt(d) + mask) v, mask (L, S).

    The weights of all heads together can be gigabytes (a 1024x1024 picture has 16384 positions in the VAE), so they are
    made for a part of the heads, or of one head's queries, at a time.
    """
    batch, length, heads, width = query.shape
    others = key.shape[1]
    query, key, value = (np.ascontiguousarray(each.transpose(0, 2, 1, 3)).reshape(batch * heads, -1, width)
                         for each in (query * np.float32(1 / math.sqrt(width)), key, value))
    out = np.empty((batch, length, heads, width), np.float32)
    target = out.transpose(0, 2, 1, 3)         # (B, H, L, d), a view of it
    limit = 4 * BAND_BYTES
    together = max(1, limit // (4 * length * others))
    rows = min(length, max(1, limit // (4 * others)))
    for first in range(0, batch * heads, together):
        some = slice(first, first + together)
        keys, values = tensor(key[some]), tensor(value[some])
        for top in range(0, length, rows):
            weights = _products_t(tensor(query[some, top:top + rows]), keys)
            if mask is not None:
                weights = tensor(weights.asnumpy() + mask[top:top + rows])
            part = _products(_softmax(weights), values).asnumpy()
            for i, head in enumerate(part, first):
                target[i // heads, i % heads, top:top + rows] = head
    return out


# -- norms and activations -----------------------------------------------------------------------------------------
def _normalized(rows: np.ndarray, eps: float) -> np.ndarray:
    """rows (R, n) with mean 0 and variance 1 each; in two passes, since squares of a large mean would drown the rest."""
    centred = rows - rows.mean(1, keepdims=True)
    variance = np.einsum("ij,ij->i", centred, centred) / np.float32(rows.shape[1])
    centred *= (1 / np.sqrt(variance + np.float32(eps)))[:, None]
    return centred


def layer_norm(x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None,
               eps: float = 1e-5) -> Tensor:
    """x (..., *normalized_shape), as torch.nn.functional.layer_norm."""
    y = _normalized(array(x).reshape(-1, math.prod(normalized_shape)), eps)
    if weight is not None:
        y *= constant(weight).reshape(-1)
    if bias is not None:
        y += constant(bias).reshape(-1)
    return tensor(y.reshape(x.shape))


def group_norm(x: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None,
               eps: float = 1e-5) -> Tensor:
    """x (N, C, ...), as torch.nn.functional.group_norm."""
    n, c = x.shape[:2]
    y = _normalized(array(x).reshape(n * num_groups, -1), eps).reshape(n, c, -1)
    if weight is not None:
        y *= constant(weight)[:, None]
    if bias is not None:
        y += constant(bias)[:, None]
    return tensor(y.reshape(x.shape))


def silu(x: Tensor) -> Tensor:
    return ops.silu(_widened(x))


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """As torch.nn.functional.gelu, to 1e-7 of |x|. MindSpore's own takes four times as long."""
    if approximate != "none":
        return ops.gelu(_widened(x), approximate)
    source = array(x).reshape(1, -1)
    return tensor(_gelu(source, np.empty_like(source)).reshape(x.shape))


def geglu(x: Tensor) -> Tensor:
    """x (..., 2n) -> (..., n): the first half of each row times gelu of the second."""
    width = x.shape[-1] // 2
    source = array(x).reshape(-1, 2 * width)
    out = _gelu(source[:, width:], np.empty((len(source), width), np.float32))
    out *= source[:, :width]
    return tensor(out.reshape(*x.shape[:-1], width))


def _gelu(source: np.ndarray, out: np.ndarray) -> np.ndarray:
    """x Phi(x) of a matrix by Abramowitz and Stegun 7.1.26 for erf: max(x, 0) - |x| erfc(|x| / sqrt 2) / 2."""
    rows = max(1, CACHED // source.shape[1])
    columns = min(source.shape[1], CACHED)
    for top in range(0, len(source), rows):
        for left in range(0, source.shape[1], columns):
            part = np.s_[top:top + rows, left:left + columns]
            size = np.abs(source[part])
            t = 1 / (1 + np.float32(0.3275911 / math.sqrt(2)) * size)
            tail = np.float32(1.061405429) * t
            for factor in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
                tail += np.float32(factor)
                tail *= t
            tail *= size
            size *= size
            size *= np.float32(-0.5)
            tail *= np.exp(size, out=size)
            tail *= np.float32(0.5)
            np.subtract(np.maximum(source[part], 0), tail, out=out[part])
    return out


# -- moving numbers ------------------------------------------------------------------------------------------------
def embedding(ids: Tensor, weight: Tensor, *unused, **options) -> Tensor:
    """ids (...) integers, weight (rows, width) -> (..., width) float32."""
    return tensor(weight.asnumpy()[ids.asnumpy()].astype(np.float32))


def pad(x: Tensor, pad: Sequence[int], mode: str = "constant", value: float = 0.0) -> Tensor:
    """As torch.nn.functional.pad: (before, after) of the last axis, then of the one before it, ..."""
    if mode != "constant":
        raise RuntimeError(f"Padding by '{mode}' is not among the CPU kernels.")
    widths = [(0, 0)] * (x.ndim - len(pad) // 2) + [tuple(pad[i:i + 2]) for i in range(len(pad) - 2, -1, -2)]
    return tensor(np.pad(x.asnumpy(), widths, constant_values=value or 0))


def interpolate(x: Tensor, size=None, scale_factor=None, mode: str = "nearest", *unused, **options) -> Tensor:
    """x (N, C, H, W) to (N, C, *size), each place taking its nearest one: floor(i * H / H')."""
    if mode != "nearest" or x.ndim != 4:
        raise RuntimeError(f"Resizing by '{mode}' is not among the CPU kernels.")
    h, w = x.shape[-2:]
    if size is None:
        size = tuple(int(side * factor) for side, factor in zip((h, w), np.broadcast_to(scale_factor, 2)))
    rows, columns = (np.arange(new) * old // new for new, old in zip(_pair(size), (h, w)))
    return tensor(x.asnumpy()[:, :, rows[:, None], columns])


def arange(start=0, end=None, step=1, *, dtype=None) -> Tensor:
    values = np.arange(start, step=step) if end is None else np.arange(start, end, step)
    values = Tensor(values)
    return values if dtype is None else values.astype(dtype)


# -- where mindone looks for them ----------------------------------------------------------------------------------
def _attend(self, hidden_states, encoder_hidden_states=None, attention_mask=None, **unused):
    """mindone's Attention.construct for what SDXL's networks use of it: no masks, no norms of queries."""
    x, shape = array(hidden_states), hidden_states.shape
    if len(shape) == 4:
        x = x.reshape(*shape[:2], -1).transpose(0, 2, 1)
    if self.group_norm is not None:
        normed = self.group_norm(tensor(x.transpose(0, 2, 1)))
        x = array(normed).transpose(0, 2, 1)
    states = tensor(x)
    context = states if encoder_hidden_states is None else encoder_hidden_states
    query, key, value = (array(layer(source)) for layer, source in
                         ((self.to_q, states), (self.to_k, context), (self.to_v, context)))
    query, key, value = (each.reshape(*each.shape[:2], self.heads, -1) for each in (query, key, value))
    y = attention(query, key, value)
    y = array(self.to_out[0](tensor(y.reshape(*y.shape[:2], -1))))
    if len(shape) == 4:
        y = np.ascontiguousarray(y.transpose(0, 2, 1)).reshape(shape)
    if self.residual_connection:
        y += array(hidden_states)
    if self.rescale_output_factor != 1.0:
        y /= np.float32(self.rescale_output_factor)
    return tensor(y)


def install() -> None:
    """Put the kernels where `mint` has the operators. Before mindone is imported, and only on the CPU."""
    functional = mint.nn.functional
    for kernel in (linear, conv2d, layer_norm, group_norm, silu, gelu, embedding, pad, interpolate):
        setattr(functional, kernel.__name__, kernel)
    mint.arange = arange
    layers = mint.nn
    layers.Linear.construct = lambda self, x: linear(x, self.weight, self.bias)
    layers.Conv2d.construct = lambda self, x: conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation,
                                                     self.groups)
    layers.LayerNorm.construct = lambda self, x: layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
    layers.GroupNorm.construct = lambda self, x: group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
    layers.SiLU.construct = lambda self, x: silu(x)
    layers.GELU.construct = lambda self, x: gelu(x, self.approximate)
    layers.Dropout.construct = lambda self, x: x       # networks here only ever predict


def install_layers(attention: type, gated: type) -> None:
    """The same for mindone's Attention and GEGLU, once they are imported."""
    attention.construct = _attend
    gated.construct = lambda self, x: geglu(self.proj(x))
