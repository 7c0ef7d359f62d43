"""Noise levels: the table against its definition, each discretization against its formula, KSampler's cut for denoise."""
from __future__ import annotations

import math

import numpy as np
import pytest

from engines.errors import EngineError
from engines.sdxl import schedules
from engines.sdxl.schedules import DISCRETIZATIONS, TABLE, schedule


def test_the_table_is_the_trained_one():
    kept, expected = 1.0, []
    for t in range(1000):
        kept *= 1 - (math.sqrt(0.00085) + t / 999 * (math.sqrt(0.012) - math.sqrt(0.00085))) ** 2
        expected.append(math.sqrt((1 - kept) / kept))
    np.testing.assert_allclose(TABLE, expected, rtol=1e-7)
    assert (np.diff(TABLE) > 0).all() and (TABLE == TABLE.astype(np.float32)).all()
    assert TABLE[0] == pytest.approx(0.0291672, rel=1e-5) and TABLE[-1] == pytest.approx(14.61464, rel=1e-5)


def test_levels_of_the_table_are_their_own_nearest():
    for t, sigma in enumerate(TABLE.tolist()):
        assert schedules.timestep(sigma) == t and schedules.snap(sigma) == (sigma, t)


def test_snapping_measures_plainly_and_timesteps_in_logarithm():
    low, high = TABLE[[500, 501]].tolist()
    between = (math.sqrt(low * high) + (low + high) / 2) / 2     # past the middle in logarithm, before it in distance
    assert schedules.snap(between) == (low, 500) and schedules.timestep(between) == 501
    assert schedules.snap(20.7) == (schedules.HIGHEST, 999) and schedules.timestep(20.7) == 999
    assert schedules.snap(0.001) == (float(TABLE[0]), 0) and schedules.timestep(0.001) == 0


def test_the_scaled_input_has_variance_one():
    assert [schedules.c_in(sigma) ** 2 * (1 + sigma ** 2) for sigma in (0.03, 1.0, 14.6)] == pytest.approx([1, 1, 1])


@pytest.mark.parametrize("name", DISCRETIZATIONS)
def test_every_schedule_falls_to_zero(name):
    for n in range(1, 1001):
        sigmas = DISCRETIZATIONS[name](n)
        assert len(sigmas) == n + 1 and sigmas[-1] == 0.0 and all(type(sigma) is float for sigma in sigmas)
        assert all(a > b for a, b in zip(sigmas, sigmas[1:]))


# Step counts up to 100 for which LegacyDDPM visits exactly the levels of stock KSampler's scheduler "simple".
EQUAL_TO_SIMPLE = [1, 2, 3, 4, 5, 8, 9, 10, 20, 25, 27, 37, 40, 50, 100]


def test_legacy_ddpm_beside_the_scheduler_simple():
    """`simple` takes every (1000 / n)th level from the top; LegacyDDPM every (999 / n)th: at most one timestep apart."""
    equal = []
    for n in range(1, 1001):
        simple = [999 - int(k * 1000 / n) for k in range(n)]
        legacy = [schedules.timestep(sigma) for sigma in schedules.legacy_ddpm(n)[:-1]]
        assert max(abs(a - b) for a, b in zip(simple, legacy)) <= 1
        equal += [n] * (simple == legacy)
    assert [n for n in equal if n <= 100] == EQUAL_TO_SIMPLE
    assert schedules.legacy_ddpm(1000)[:-1] == TABLE[::-1].tolist()


def test_diffusers_ddpm_counts_up_from_timestep_one():
    timesteps = [schedules.timestep(sigma) for sigma in schedules.diffusers_ddpm(40)[:-1]]
    assert timesteps == list(range(976, 0, -25))
    assert [schedules.timestep(sigma) for sigma in schedules.diffusers_ddpm(30)[:-1]] == list(range(958, 0, -33))


def test_edm_is_even_in_the_cube_root():
    sigmas = schedules.edm(12)[:-1]
    assert sigmas[0] == pytest.approx(14.61) and sigmas[-1] == pytest.approx(0.03)
    roots = np.cbrt(sigmas)
    np.testing.assert_allclose(np.diff(roots), (roots[-1] - roots[0]) / 11, rtol=1e-5)
    assert schedules.edm(1) == pytest.approx([14.61, 0.0])


def test_denoise_takes_the_end_of_a_longer_schedule_as_ksampler_does():
    assert schedule("LegacyDDPM", 20) == schedules.legacy_ddpm(20)
    assert schedule("LegacyDDPM", 20, 0.99999) == schedules.legacy_ddpm(20)
    assert schedule("LegacyDDPM", 20, 0.6) == schedules.legacy_ddpm(33)[-21:]
    assert len(schedule("EDM", 7, 0.001)) == 8
    assert schedule("LegacyDDPM", 20, 0.0) == []


def test_more_steps_than_levels_is_one_sentence():
    with pytest.raises(EngineError, match=r"^1001 steps want more noise levels than the 1000 of LegacyDDPM: take fewer"):
        schedule("LegacyDDPM", 1001)
    with pytest.raises(EngineError, match=r"^20 steps at denoise 0.01 are a schedule of 2000 and want more .* EDM"):
        schedule("DiffusersDDPM", 20, 0.01)
    assert len(schedule("EDM", 1001)) == 1002


def test_a_whole_schedule_starts_from_noise_alone():
    assert schedules.from_pure_noise(schedule("EDM", 10))
    assert schedules.from_pure_noise(schedule("DiffusersDDPM", 10))
    assert schedules.from_pure_noise(schedule("LegacyDDPM", 10, 0.95), 0.95)       # still the highest level: int(10 / 0.95)
    assert not schedules.from_pure_noise(schedule("LegacyDDPM", 10, 0.5), 0.5)
    assert not schedules.from_pure_noise([])
