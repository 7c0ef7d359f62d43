"""The noise of AscendSDXLSampler with noise "comfy" is what ComfyUI's own samplers draw, at the start and later."""
from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from tests.conftest import need
from tools.inprocess import load_pack
from tools.install import comfyui

SHAPE, COUNT, SEED = (2, 4, 8, 8), 3, 2 ** 40 + 5


@pytest.fixture(scope="module")
def sampling():
    """The pack's module, with ComfyUI's folder on the path only as long as these tests run."""
    need((comfyui() / "main.py").exists(), "ComfyUI is not installed: run 'python tools/install.py dev'")
    path = list(sys.path)
    yield load_pack("nodes.adapters.sampling")
    sys.path[:] = path


@pytest.fixture
def drawn(sampling):
    """The source of noise, what it drew for the start, and what for each step of a named sampler."""
    def draw(sampler: str, seed: int = SEED):
        source = sampling.ComfyNoise(seed)
        first = source.first(torch.zeros(SHAPE), None)
        torch.randn(7)              # whatever else draws meanwhile changes nothing
        return first.numpy(), source.steps(sampler, COUNT, first)
    return draw


def churned(function, seed: int) -> np.ndarray:
    """The noise that a stock sampler puts back at each step, (COUNT, *SHAPE)."""
    import comfy.sample
    levels = torch.tensor([8.0, 4.0, 2.0, 0.0])
    comfy.sample.prepare_noise(torch.zeros(SHAPE), seed)
    seen = []
    # A model that finds nothing to remove leaves x as it is: what changes from call to call is the noise.
    function(lambda x, sigma: x, torch.zeros(SHAPE), levels, s_churn=1.0, disable=True,
             callback=lambda step: seen.append((step["x"], step["sigma"], step["sigma_hat"])))
    before = torch.zeros(SHAPE)
    noise = []
    for x, sigma, raised in seen:
        noise.append((x - before) / (raised ** 2 - sigma ** 2) ** 0.5)
        before = x
    return torch.stack(noise).numpy()


@pytest.mark.parametrize(("sampler", "stock"), [("EulerEDM", "sample_euler"), ("HeunEDM", "sample_heun")])
def test_churn_goes_on_where_the_first_noise_ended(drawn, sampler, stock):
    first, steps = drawn(sampler)
    import comfy.k_diffusion.sampling
    np.testing.assert_allclose(steps, churned(getattr(comfy.k_diffusion.sampling, stock), SEED), atol=1e-5)
    everything = [first, *steps]
    for i, one in enumerate(everything):
        assert all(abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.2 for other in everything[:i])


@pytest.mark.parametrize("sampler", ["EulerAncestral", "DPMPP2SAncestral"])
@pytest.mark.parametrize("seed", [0, SEED])
def test_ancestral_noise_is_the_default_sampler_s(drawn, sampler, seed):
    first, steps = drawn(sampler, seed)
    import comfy.k_diffusion.sampling
    stock = comfy.k_diffusion.sampling.default_noise_sampler(torch.zeros(SHAPE), seed=seed)
    np.testing.assert_array_equal(steps, np.stack([stock(None, None).numpy() for _ in range(COUNT)]))


def test_a_seed_gives_the_same_noise_again_and_another_one_other(drawn):
    for sampler in ("EulerEDM", "EulerAncestral"):
        (first, steps), again, other = drawn(sampler), drawn(sampler), drawn(sampler, SEED + 1)
        np.testing.assert_array_equal(first, again[0])
        np.testing.assert_array_equal(steps, again[1])
        assert (first != other[0]).mean() > 0.99 and (steps != other[1]).mean() > 0.99


def test_the_largest_seed_draws(drawn):
    """Newer versions of ComfyUI add 1 to it."""
    assert np.isfinite(drawn("EulerAncestral", 2 ** 64 - 1)[1]).all()
