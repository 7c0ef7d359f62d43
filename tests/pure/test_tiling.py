"""Tiles cover everything, blend to the exact picture where the network is local, and never leave a seam."""
import numpy as np
import pytest

from engines.tiling import run_tiled, tile_starts


@pytest.mark.parametrize("size", [*range(1, 40), 200])
@pytest.mark.parametrize("tile,overlap", [(8, 0), (8, 1), (8, 4), (5, 2), (16, 8)])
def test_starts_cover_the_axis_with_the_asked_overlap(size, tile, overlap):
    starts = tile_starts(size, tile, overlap)
    assert starts[0] == 0 and starts[-1] == max(0, size - tile)
    for previous, start in zip(starts, starts[1:]):
        assert 0 < start - previous <= tile - overlap


@pytest.mark.parametrize("height,width", [(8, 8), (9, 25), (3, 4), (8, 17), (40, 8)])
@pytest.mark.parametrize("overlap", [0, 2, 4, 100])
def test_a_local_network_gives_the_exact_picture(height, width, overlap):
    image = np.random.default_rng(0).standard_normal((2, 4, height, width)).astype(np.float32)
    grow = lambda part: part[:, :3].repeat(8, -2).repeat(8, -1)
    calls = []

    def run(part):
        calls.append(part.shape)
        return grow(part)
    out = run_tiled(run, image, (8, 8), overlap, (8, 1))
    assert set(calls) == {(2, 4, 8, 8)}
    np.testing.assert_allclose(out, grow(image), rtol=0, atol=1e-6)


def test_an_encoder_shrinks_by_blocks():
    picture = np.random.default_rng(1).standard_normal((1, 3, 72, 200)).astype(np.float32)
    mean = lambda part: part.reshape(*part.shape[:2], part.shape[2] // 8, 8, part.shape[3] // 8, 8).mean((3, 5))
    np.testing.assert_allclose(run_tiled(mean, picture, (64, 64), 24, (1, 8)), mean(picture), atol=1e-6)


def test_overlaps_blend_from_one_tile_into_the_next():
    """Two tiles that disagree: the result falls steadily from one value to the other across the overlap."""
    values = iter([np.zeros((1, 3, 8, 8), np.float32), np.ones((1, 3, 8, 8), np.float32)])
    row = run_tiled(lambda part: next(values), np.zeros((1, 4, 8, 12), np.float32), (8, 8), 4, (1, 1))[0, 0, 0]
    assert (row[:4] == 0).all() and (row[8:] == 1).all()
    assert (np.diff(row[3:9]) > 0).all()
