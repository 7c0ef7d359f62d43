"""Run a fixed-size image network over any size: overlapping tiles, blended where they meet."""
from __future__ import annotations

from collections.abc import Callable

import numpy as np


def tile_starts(size: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin along one axis, evenly spread so that neighbours share at least `overlap` elements."""
    if size <= tile:
        return [0]
    count = -(-(size - overlap) // (tile - overlap))
    return [round(i * (size - tile) / (count - 1)) for i in range(count)]


def _ramp(length: int, before: int, after: int) -> np.ndarray:
    """Weights of one tile along one axis: rising over `before` elements, 1, falling over `after`; never 0."""
    weights = np.ones(length, np.float32)
    if before:
        weights[:before] *= (np.arange(before) + 1) / (before + 1)
    if after:
        weights[-after:] *= ((np.arange(after) + 1) / (after + 1))[::-1]
    return weights


def _axis(size: int, tile: int, overlap: int) -> list[tuple[int, int, int]]:
    """(start, elements shared with the previous tile, elements shared with the next tile) of every tile."""
    starts = tile_starts(size, tile, overlap)
    shared = [previous + tile - start for previous, start in zip(starts, starts[1:])]
    return list(zip(starts, [0, *shared], [*shared, 0]))


def run_tiled(run: Callable[[np.ndarray], np.ndarray], image: np.ndarray, tile: tuple[int, int], overlap: int,
              scale: tuple[int, int]) -> np.ndarray:
    """`run` over `image` in tiles of the one size it takes.

    image: (B, C, H, W) float32. tile: (th, tw), the input size of `run`, which maps (B, C, th, tw) to
    (B, C', th*up/down, tw*up/down) for scale == (up, down). overlap: elements of the input that neighbours share,
    at least; cut to half a tile. An image smaller than a tile is continued with its edge and the result cut.
    Sizes, tile and overlap must be multiples of `down`. Returns (B, C', H*up/down, W*up/down) float32.
    """
    up, down = scale
    height, width = image.shape[-2:]
    padded = np.pad(image, [(0, 0), (0, 0), (0, max(0, tile[0] - height)), (0, max(0, tile[1] - width))], mode="edge")
    # Work in units of `down` elements, so that a tile's place is whole in the input and in the output.
    rows, columns = (_axis(size // down, side // down, min(overlap, side // 2) // down)
                     for size, side in zip(padded.shape[-2:], tile))
    total = weight = None
    for top, above, below in rows:
        for left, before, after in columns:
            part = run(padded[..., top * down:top * down + tile[0], left * down:left * down + tile[1]])
            if total is None:
                shape = (*part.shape[:2], padded.shape[-2] * up // down, padded.shape[-1] * up // down)
                total, weight = np.zeros(shape, np.float32), np.zeros(shape[-2:], np.float32)
            mask = np.outer(_ramp(part.shape[-2], above * up, below * up),
                            _ramp(part.shape[-1], before * up, after * up))
            place = (slice(top * up, top * up + part.shape[-2]), slice(left * up, left * up + part.shape[-1]))
            total[(..., *place)] += part * mask
            weight[place] += mask
    return (total / weight)[..., :height * up // down, :width * up // down]
