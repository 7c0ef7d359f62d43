"""Samplers against mathematics: where the data is Gaussian, the ideal denoiser and its flow are known exactly."""
from __future__ import annotations

import math

import numpy as np
import pytest

from engines.sdxl.samplers import (
    LARGEST_CHURN,
    SAMPLERS,
    Options,
    adams_bashforth,
    ancestral_levels,
    noise_count,
)
from engines.sdxl.schedules import edm, legacy_ddpm

MEAN, DEVIATION = 0.5, 0.7
NO_NOISE = {name: Options(eta=0.0) for name in SAMPLERS}     # every sampler follows the flow
# LinearMultistep is of order 4 but for its first steps, which have too few directions behind them
ORDERS = {"EulerEDM": 1, "HeunEDM": 2, "EulerAncestral": 1, "DPMPP2SAncestral": 2, "DPMPP2M": 2, "LinearMultistep": 3.3}


def ideal(x, sigma: float, mean: float = MEAN):
    """The mean of data N(mean, DEVIATION^2) given x = data + sigma * noise."""
    return (DEVIATION ** 2 * x + sigma ** 2 * mean) / (DEVIATION ** 2 + sigma ** 2)


def flow(x, start: float, end: float):
    """Where the probability flow of that data takes x: distances from the mean shrink with the deviation of x."""
    return MEAN + (x - MEAN) * math.sqrt((DEVIATION ** 2 + end ** 2) / (DEVIATION ** 2 + start ** 2))


def no_noise():
    raise AssertionError("no noise is to be drawn")


def run(name, x, sigmas, options=Options(), noise=no_noise, denoise=ideal, step=lambda *_: None):
    return SAMPLERS[name](denoise, x, sigmas, noise, options, step)


def generator(shape, seed=0, dtype=np.float32):
    random = np.random.default_rng(seed)
    return lambda: random.standard_normal(shape, dtype=dtype)


@pytest.mark.parametrize("name", SAMPLERS)
def test_error_falls_with_the_order_of_the_method(name):
    """Twice the steps, a 2^order-th of the error. Even steps in log sigma, where all of them are at their order."""
    x = np.linspace(-30, 30, 41)
    errors = []
    for n in (40, 80):
        sigmas = np.geomspace(10.0, 0.2, n + 1).tolist()
        errors.append(np.abs(run(name, x, sigmas, NO_NOISE[name]) - flow(x, 10.0, 0.2)).max())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(ORDERS[name], abs=0.1)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("discretization", [legacy_ddpm, edm])
def test_schedules_lead_to_the_data(name, discretization):
    x = np.linspace(-30, 30, 41)
    errors = [np.abs(run(name, x, sigmas, NO_NOISE[name]) - flow(x, sigmas[0], 0.0)).max()
              for sigmas in (discretization(20), discretization(100))]
    assert errors[1] < errors[0] / 4 and errors[1] < 0.04


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("options", [Options(), Options(eta=0.5), Options(s_churn=20.0)], ids=["plain", "eta", "churn"])
def test_samples_have_the_deviation_of_the_data(name, options):
    """Also with noise put in on the way: what a step takes out and puts in must balance.

    Around a mean of 0 every step is linear in x and in its noise. So a run in which x and each draw are axes of their own
    ends with the weight of each, and the deviation is the length of that, exactly.
    """
    def deviation(sigmas):
        axes = iter(np.eye(1 + noise_count(name, sigmas, options)))
        start = next(axes) * math.hypot(DEVIATION, sigmas[0])
        end = run(name, start, sigmas, options, lambda: next(axes), lambda x, sigma: ideal(x, sigma, mean=0))
        return np.linalg.norm(end)
    errors = [abs(deviation(legacy_ddpm(n)) / DEVIATION - 1) for n in (50, 200)]
    assert errors[1] < errors[0] / 2.9 and errors[1] < (0.04 if ORDERS[name] == 1 else 0.01)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_fixed_picture_is_reached_exactly_in_any_number_of_steps(name):
    """With D constant the flow is a straight line, which no step leaves."""
    picture = np.linspace(-1, 1, 16, dtype=np.float32)
    for n in (1, 2, 3, 30):
        sigmas = legacy_ddpm(n)
        x = picture + np.float32(sigmas[0]) * generator((16,))()
        fixed = lambda x, sigma: picture
        end = run(name, x, sigmas, noise=generator((16,), 1), denoise=fixed)
        np.testing.assert_allclose(end, picture, atol=2e-6)
        half = run(name, x, sigmas[:-1], NO_NOISE[name], denoise=fixed)
        np.testing.assert_allclose(half, picture + (x - picture) * (sigmas[-2] / sigmas[0]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("options", [Options(), Options(s_churn=30.0, s_tmin=0.1, s_tmax=8.0, s_noise=1.01),
                                     Options(eta=0.3), Options(eta=0.0), Options(eta=3.0)])
def test_every_call_of_a_run(name, options):
    """float32 stays float32, levels are positive floats, noise is drawn as often as announced, steps are told in order."""
    sigmas, draws, told, levels = legacy_ddpm(12), [], [], []

    def denoise(x, sigma):
        assert x.dtype == np.float32 and type(sigma) is float and sigma > 0
        levels.append(sigma)
        return ideal(x, sigma)

    def noise():
        draws.append(generator((8,), len(draws))())
        return draws[-1]

    def step(i, x, denoised):
        assert x.dtype == denoised.dtype == np.float32
        told.append((i, x, denoised))
    x = generator((8,))() * np.float32(sigmas[0])
    before = x.copy()
    end = run(name, x, sigmas, options, noise, denoise, step)
    assert end.dtype == np.float32 and np.isfinite(end).all()
    assert [i for i, _, _ in told] == list(range(12)) and told[-1][1] is end
    np.testing.assert_array_equal(told[-1][2], end)          # the last step goes to the denoised picture itself
    np.testing.assert_array_equal(x, before)
    assert len(draws) == noise_count(name, sigmas, options)
    second_order = name == "HeunEDM" or name == "DPMPP2SAncestral" and options.eta <= 1
    assert len(levels) == (23 if second_order else 12)       # the last step needs no second call


@pytest.mark.parametrize("name", SAMPLERS)
def test_nothing_to_do(name):
    x = np.ones(3, np.float32)
    assert run(name, x, [2.0]) is x and run(name, x, []) is x
    assert noise_count(name, [], Options(s_churn=1)) == noise_count(name, [2.0], Options(s_churn=1)) == 0


@pytest.mark.parametrize("name", ["EulerEDM", "HeunEDM"])
def test_churn_raises_the_level_inside_its_window_only(name):
    sigmas = legacy_ddpm(10)
    asked = []

    def denoise(x, sigma):
        asked.append(sigma)
        return ideal(x, sigma)
    options = Options(s_churn=2.0, s_tmin=sigmas[6], s_tmax=sigmas[2])       # both ends belong to the window
    run(name, np.ones(4, np.float32), sigmas, options, generator((4,)), denoise)
    first = asked if name == "EulerEDM" else asked[::2]
    assert first == [sigma * 1.2 if 2 <= i <= 6 else sigma for i, sigma in enumerate(sigmas[:-1])]
    assert noise_count(name, sigmas, options) == 5


def test_churn_is_limited_and_its_noise_fills_the_raised_level():
    ones, seen = np.ones(4), []
    run("EulerEDM", 0 * ones, [2.0, 1.0], Options(s_churn=1e6, s_noise=1.5), lambda: ones,
        lambda x, sigma: seen.append((x[0], sigma)) or x)
    (x, raised), = seen
    assert raised == pytest.approx(2 * math.sqrt(2)) and LARGEST_CHURN == math.sqrt(2) - 1
    assert x == pytest.approx(1.5 * math.sqrt(raised ** 2 - 4))


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0, 2.0])
def test_ancestral_levels_make_up_the_target(eta):
    for sigma, target in [(14.6, 10.0), (1.0, 0.999), (0.1, 0.03), (1.0, 1.0), (0.5, 0.0)]:
        down, up = ancestral_levels(sigma, target, eta)
        assert math.hypot(down, up) == pytest.approx(target) and 0 <= up <= target
    assert ancestral_levels(2.0, 1.0, 0.0) == (1.0, 0.0)
    assert ancestral_levels(2.0, 1.0, 1.0) == pytest.approx((0.5, math.sqrt(0.75)))


@pytest.mark.parametrize("name", ["EulerAncestral", "DPMPP2SAncestral"])
def test_s_noise_scales_what_an_ancestral_step_adds(name):
    still = lambda x, sigma: np.zeros(1)
    out = run(name, np.ones(1), [2.0, 1.0], Options(s_noise=0.5), lambda: np.ones(1), still)
    down, up = ancestral_levels(2.0, 1.0, 1.0)
    assert out == pytest.approx([down / 2 + 0.5 * up])


def test_the_second_call_of_2s_is_half_way_in_logarithm():
    asked = []
    run("DPMPP2SAncestral", np.ones(1), [8.0, 2.0, 0.0], Options(eta=0.0), denoise=lambda x, sigma: asked.append(sigma) or x)
    assert asked == [8.0, 4.0, 2.0]


def test_without_noise_ancestral_sampling_is_euler():
    x, sigmas = np.linspace(-20, 20, 9), legacy_ddpm(15)
    np.testing.assert_array_equal(run("EulerAncestral", x, sigmas, Options(eta=0.0)), run("EulerEDM", x, sigmas))


@pytest.mark.parametrize("nodes,start,end", [
    ([2.0], 2.0, 1.5), ([2.0, 3.0], 2.0, 0.1), ([0.5, 0.7, 1.1], 0.5, 0.35), ([13.1, 13.5, 14.0, 14.6], 13.1, 12.7),
    ([0.05, 0.08, 0.1, 0.2, 0.4], 0.05, 0.03)])
def test_multistep_weights_integrate_polynomials_exactly(nodes, start, end):
    """One node: the Euler step. m nodes: every polynomial of degree m - 1."""
    weights = adams_bashforth(nodes, start, end)
    assert all(type(weight) is float for weight in weights)
    for degree in range(len(nodes)):
        integral = (end ** (degree + 1) - start ** (degree + 1)) / (degree + 1)
        assert np.dot(weights, np.power(nodes, degree)) == pytest.approx(integral, rel=1e-9)
