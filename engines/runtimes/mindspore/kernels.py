"""What MindSpore's CPU back end lacks or does slowly, for the networks of SDXL. An NPU never sees any of it.

Many `mint` operators, which mindone is written in, are registered for Ascend only. Here they are numpy, with MindSpore's
own matrix product (oneDNN) where a product is large. 3x3 convolutions exist on the CPU but take a reference path, over a
hundred times slower than a product; they become products of patches (im2col), a band of rows at a time so that memory
stays bounded.

Everything computes in float32. Weights may be kept in float16, half the memory, and are widened when used: MindSpore's
own half-precision products are an order of magnitude slower.

First come functions over arrays, which write to what they made themselves and never to what they were given; then the
operators of `mint` over tensors; `layers` has mindone's layers made of both.
"""
from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from mindspore import Tensor, mint, ops
from mindspore import dtype as mstype

BAND_BYTES = 4 << 20        # of a convolution's patches at a time; larger bands are not faster
WEIGHT_BYTES = 16 << 20     # of attention weights at a time
SMALL_PRODUCT = 300_000     # multiplications below which numpy is done before MindSpore has begun
CACHED = 1 << 15            # elements that stay in the first caches through many passes

_product = ops.MatMul(False, False)
_product_t = ops.MatMul(False, True)
_products = ops.BatchMatMul(False, False)
_products_t = ops.BatchMatMul(False, True)
_softmax = ops.Softmax(-1)


# -- between tensors and arrays ------------------------------------------------------------------------------------
def array(tensor: Tensor) -> np.ndarray:
    """The float32 array of a tensor: its own memory if it is float32, widened otherwise.

    What has been an array once remembers it: MindSpore's way from a tensor to its memory takes 40 microseconds.
    """
    if tensor.dtype != mstype.float32:
        return _widened(tensor).asnumpy()
    kept = getattr(tensor, "seen_as_array", None)
    if kept is None:
        kept = tensor.seen_as_array = tensor.asnumpy()
    return kept


def tensor(values: np.ndarray) -> Tensor:
    """A tensor of the same memory."""
    values = np.ascontiguousarray(values)
    made = Tensor.from_numpy(values)
    if values.dtype == np.float32:
        made.seen_as_array = values
    return made


def _widened(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == mstype.float32 else ops.cast(tensor, mstype.float32)


# -- products ------------------------------------------------------------------------------------------------------
def times(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The product of two matrices."""
    if a.size * b.shape[1] < SMALL_PRODUCT:
        return a @ b
    return _product(tensor(a), tensor(b)).asnumpy()


def transformed(x: np.ndarray, weight: Tensor, bias: Tensor | None = None) -> np.ndarray:
    """x (..., inputs), weight (outputs, inputs), bias (outputs,) -> x weight' + bias (..., outputs)."""
    flat = x.reshape(-1, x.shape[-1])
    if flat.size * weight.shape[0] < SMALL_PRODUCT:
        y = flat @ array(weight).T
    else:
        y = _product_t(tensor(flat), _widened(weight)).asnumpy()
    if bias is not None:
        y += array(bias)
    return y.reshape(*x.shape[:-1], weight.shape[0])


def convolved(x: np.ndarray, weight: Tensor, bias: Tensor | None, stride: tuple[int, int] = (1, 1),
              padding: tuple[int, int] = (1, 1), dilation: tuple[int, int] = (1, 1)) -> np.ndarray:
    """x (N, C, H, W), weight (O, C, kh, kw), pairs (vertical, horizontal) -> (N, O, H', W')."""
    (sh, sw), (ph, pw), (dh, dw) = stride, padding, dilation
    n, c, h, w = x.shape
    o, _, kh, kw = weight.shape
    rows, columns = (h + 2 * ph - dh * (kh - 1) - 1) // sh + 1, (w + 2 * pw - dw * (kw - 1) - 1) // sw + 1
    kernel, out = array(weight).reshape(o, -1), np.empty((n, o, rows, columns), np.float32)
    whole = (kh, kw, sh, sw, ph, pw) == (1, 1, 1, 1, 0, 0)      # nothing to gather
    band = min(rows, max(1, BAND_BYTES // (4 * c * kh * kw * columns)))
    for sample in range(n):
        for top in range(0, rows, band):
            count = min(band, rows - top)
            if whole:
                patches = x[sample, :, top:top + count]
            else:
                patches = np.empty((c, kh, kw, count, columns), np.float32)
                strip = _strip(x[sample], top * sh - ph, (count - 1) * sh + dh * (kh - 1) + 1, pw)
                for i in range(kh):
                    for j in range(kw):
                        patches[:, i, j] = strip[:, i * dh:i * dh + (count - 1) * sh + 1:sh,
                                                 j * dw:j * dw + (columns - 1) * sw + 1:sw]
            part = times(kernel, patches.reshape(kernel.shape[1], -1))
            if bias is not None:
                part += array(bias)[:, None]
            out[sample, :, top:top + count] = part.reshape(o, count, columns)
    return out


def _strip(image: np.ndarray, top: int, count: int, sides: int) -> np.ndarray:
    """`count` rows of image (C, H, W) from `top` on, with zeros where there are none and `sides` columns of them around."""
    c, h, w = image.shape
    first, last = max(top, 0), min(top + count, h)
    if not sides and (first, last) == (top, top + count):
        return image[:, first:last]
    strip = np.zeros((c, count, w + 2 * sides), np.float32)
    strip[:, first - top:last - top, sides:sides + w] = image[:, first:last]
    return strip


def attention(query: np.ndarray, key: np.ndarray, value: np.ndarray) -> np.ndarray:
    """query (B, L, H, d), key and value (B, S, H, d) -> (B, L, H, d): softmax(q k / sqrt(d)) v for each head.

    The weights of all heads together can be gigabytes (a 1024x1024 picture has 16384 positions in the VAE), so they are
    made for a part of the heads, or of one head's queries, at a time.
    """
    batch, length, heads, width = query.shape
    others = key.shape[1]
    query, key, value = (np.ascontiguousarray(each.transpose(0, 2, 1, 3)).reshape(batch * heads, -1, width)
                         for each in (query * np.float32(1 / math.sqrt(width)), key, value))
    out = np.empty((batch, length, heads, width), np.float32)
    target = out.transpose(0, 2, 1, 3)         # (B, H, L, d), a view of it
    together = max(1, WEIGHT_BYTES // (4 * length * others))
    rows = min(length, max(1, WEIGHT_BYTES // (4 * others)))
    for first in range(0, batch * heads, together):
        some = slice(first, first + together)
        keys, values = tensor(key[some]), tensor(value[some])
        for top in range(0, length, rows):
            weights = _softmax(_products_t(tensor(query[some, top:top + rows]), keys))
            for i, part in enumerate(_products(weights, values).asnumpy(), first):
                target[i // heads, i % heads, top:top + rows] = part
    return out


# -- norms and activations -----------------------------------------------------------------------------------------
def normalized(rows: np.ndarray, eps: float) -> np.ndarray:
    """rows (R, n) with mean 0 and variance 1 each; in two passes, since squares of a large mean would drown the rest."""
    centred = rows - rows.mean(1, keepdims=True)
    variance = np.einsum("ij,ij->i", centred, centred) / np.float32(rows.shape[1])
    centred *= (1 / np.sqrt(variance + np.float32(eps)))[:, None]
    return centred


def scaled(x: np.ndarray, weight: Tensor | None, bias: Tensor | None) -> np.ndarray:
    """x weight + bias in place, x (..., n) and each (n,)."""
    if weight is not None:
        x *= array(weight).reshape(-1)
    if bias is not None:
        x += array(bias).reshape(-1)
    return x


def grouped(x: np.ndarray, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> np.ndarray:
    """Group norm of x (N, C, ...)."""
    n, c = x.shape[:2]
    y = normalized(x.reshape(n * groups, -1), eps).reshape(n, c, -1)
    scaled(y.swapaxes(1, 2), weight, bias)
    return y.reshape(x.shape)


def swish(x: np.ndarray) -> np.ndarray:
    """x / (1 + exp(-x)) in place, x of contiguous memory."""
    flat = x.reshape(-1)
    with np.errstate(over="ignore"):       # exp of a large -x is infinite and the quotient 0, as it should be
        for start in range(0, flat.size, CACHED):
            some = flat[start:start + CACHED]
            divisor = np.negative(some)
            np.exp(divisor, out=divisor)
            divisor += np.float32(1)
            some /= divisor
    return x


def gelu_of(source: np.ndarray) -> np.ndarray:
    """x Phi(x) of a matrix by Abramowitz and Stegun 7.1.26 for erf: max(x, 0) - |x| erfc(|x| / sqrt 2) / 2, to 1e-7 |x|."""
    out = np.empty(source.shape, np.float32)
    columns = min(source.shape[1], CACHED)
    rows = max(1, CACHED // columns)
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


# -- mint's operators ----------------------------------------------------------------------------------------------
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return tensor(transformed(array(x), weight, bias))


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None, stride=1, padding=0, dilation=1, groups=1) -> Tensor:
    """Of one group, with padding in numbers; RuntimeError otherwise."""
    if groups != 1 or isinstance(padding, str):
        raise RuntimeError("This convolution has groups or a named padding, which the CPU kernels do not do.")
    return tensor(convolved(array(x), weight, bias, _pair(stride), _pair(padding), _pair(dilation)))


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[-1]))


def layer_norm(x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None,
               eps: float = 1e-5) -> Tensor:
    y = normalized(array(x).reshape(-1, math.prod(normalized_shape)), eps)
    return tensor(scaled(y, weight, bias).reshape(x.shape))


def group_norm(x: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None,
               eps: float = 1e-5) -> Tensor:
    return tensor(grouped(array(x), num_groups, weight, bias, eps))


def silu(x: Tensor) -> Tensor:
    return tensor(swish(array(x).copy()))


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    if approximate != "none":
        return ops.gelu(_widened(x), approximate)
    return tensor(gelu_of(array(x).reshape(1, -1)).reshape(x.shape))


def embedding(ids: Tensor, weight: Tensor, *unused, **options) -> Tensor:
    """ids (...) integers, weight (rows, width) -> (..., width) float32."""
    return tensor(weight.asnumpy()[ids.asnumpy()].astype(np.float32))


def pad(x: Tensor, pad: Sequence[int], mode: str = "constant", value: float = 0.0) -> Tensor:
    """(before, after) of the last axis, then of the one before it, ...; RuntimeError for other than constants."""
    if mode != "constant":
        raise RuntimeError(f"Padding by '{mode}' is not among the CPU kernels.")
    widths = [(0, 0)] * (x.ndim - len(pad) // 2) + [tuple(pad[i:i + 2]) for i in range(len(pad) - 2, -1, -2)]
    return tensor(np.pad(x.asnumpy(), widths, constant_values=value or 0))


def interpolate(x: Tensor, size=None, scale_factor=None, mode: str = "nearest", *unused, **options) -> Tensor:
    """x (N, C, H, W) to (N, C, *size), each place taking its nearest one: floor(i * H / H'); RuntimeError otherwise."""
    if mode != "nearest" or x.ndim != 4:
        raise RuntimeError(f"Resizing by '{mode}' is not among the CPU kernels.")
    h, w = x.shape[-2:]
    if size is None:
        size = tuple(int(side * factor) for side, factor in zip((h, w), np.broadcast_to(scale_factor, 2)))
    (tall, wide), source = _pair(size), array(x)
    if tall % h == 0 and wide % w == 0:         # the usual case, ten times faster than looking each place up
        shape = (*x.shape[:2], h, tall // h, w, wide // w)
        return tensor(np.broadcast_to(source[:, :, :, None, :, None], shape).reshape(*x.shape[:2], tall, wide))
    rows, columns = (np.arange(new) * old // new for new, old in ((tall, h), (wide, w)))
    return tensor(source[:, :, rows[:, None], columns])


def arange(start=0, end=None, step=1, *, dtype=None) -> Tensor:
    values = Tensor(np.arange(start, step=step) if end is None else np.arange(start, end, step))
    return values if dtype is None else values.astype(dtype)


def install() -> None:
    """Put the operators where `mint` has them. Before mindone is imported, and only on the CPU."""
    functional, layers = mint.nn.functional, mint.nn
    for kernel in (linear, conv2d, layer_norm, group_norm, silu, gelu, embedding, pad, interpolate):
        setattr(functional, kernel.__name__, kernel)
    mint.arange = arange
    layers.Linear.construct = lambda self, x: linear(x, self.weight, self.bias)
    layers.Conv2d.construct = lambda self, x: conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation,
                                                     self.groups)
    layers.LayerNorm.construct = lambda self, x: layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
    layers.GroupNorm.construct = lambda self, x: group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
    layers.SiLU.construct = lambda self, x: silu(x)
    layers.GELU.construct = lambda self, x: gelu(x, self.approximate)
    layers.Dropout.construct = lambda self, x: x       # networks here only ever predict
