"""The sampling loop with networks that can be computed by hand: what is asked of them, and what becomes of the answers."""
from __future__ import annotations

import math

import numpy as np
import pytest

from engines.errors import EngineError
from engines.sdxl import loop, schedules
from engines.sdxl.samplers import SAMPLERS

SHAPE = (2, 4, 6, 8)
LENGTH, WIDTH, VECTOR = 7, 5, 3
SIGMAS = schedules.legacy_ddpm(4)


class Network:
    """predict() whose noise is y[0] * latent + the mean of the context; remembers its calls."""

    def __init__(self):
        self.calls = []

    def __call__(self, latent, timestep, rows):
        assert latent.dtype == timestep.dtype == rows.context.dtype == rows.y.dtype == np.float32
        assert len(latent) == len(timestep) == len(rows.context) == len(rows.y)
        assert len(set(timestep.tolist())) == 1 and float(timestep[0]).is_integer()
        self.calls.append((latent, int(timestep[0]), rows))
        return rows.y[:, 0, None, None, None] * latent + rows.context.mean((1, 2))[:, None, None, None]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


class Case:
    """Arrays and settings of a run; each condition answers with its own constant in the context and slope in y."""

    def __init__(self, shape=SHAPE, **settings):
        self.shape = shape
        self.arrays = {"noise": normal(*shape), "latent": 0.3 * normal(*shape, seed=1)}
        self.settings = {"sampler": "EulerEDM", "sigmas": SIGMAS, "guider": "VanillaCFG", "cfg": 5.0, "snap": False,
                         "options": {}, "preview": False, "max_denoise": False, "conditions": [], **settings}
        self.network, self.reports = Network(), []

    def add(self, positive: bool, value: float, slope: float = 0.0, length=LENGTH, batch=1, weight=None, **settings):
        index = len(self.settings["conditions"])
        self.arrays[f"context.{index}"] = np.full((batch, length, WIDTH), value, np.float32)
        self.arrays[f"y.{index}"] = np.full((batch, VECTOR), slope, np.float32)
        if weight is not None:
            self.arrays[f"weight.{index}"] = np.float32(weight)
        self.settings["conditions"].append({"positive": positive, "area": None, "start": None, "end": None, **settings})
        return self

    def pair(self):
        return self.add(True, 0.5, 0.2).add(False, -0.25, 0.1)

    def run(self):
        return loop.sample(self.network, self.arrays, self.settings, self.reports.append)

    def denoised(self, sigma: float):
        """D(noise, sigma) by the same conditions."""
        return loop.Denoiser(self.network, self.arrays, self.settings)(self.arrays["noise"], sigma)


def test_cond_and_uncond_share_every_call():
    case = Case().pair()
    x = case.run()
    assert x.shape == SHAPE and x.dtype == np.float32 and np.isfinite(x).all()
    assert len(case.network.calls) == 4
    assert [t for _, t, _ in case.network.calls] == [schedules.timestep(sigma) for sigma in SIGMAS[:-1]]
    latent, _, rows = case.network.calls[0]
    start = (case.arrays["latent"] + case.arrays["noise"] * SIGMAS[0]) * schedules.c_in(SIGMAS[0])
    np.testing.assert_allclose(latent, np.concatenate([start, start]), rtol=1e-6, atol=1e-6)
    assert rows.context[:, 0, 0].tolist() == [-0.25, -0.25, 0.5, 0.5]             # uncond first
    assert rows.y[:, 0].tolist() == pytest.approx([0.1, 0.1, 0.2, 0.2])
    assert len({rows for _, _, rows in case.network.calls}) == 1                  # one upload for the run


def test_guidance_by_hand():
    noise, sigma = Case().arrays["noise"], 2.0
    scaled = noise / math.sqrt(1 + sigma ** 2)
    cond, uncond = noise - sigma * (0.2 * scaled + 0.5), noise - sigma * (0.1 * scaled - 0.25)
    for cfg in (5.0, 0.0, -1.5, 1.001):
        np.testing.assert_allclose(Case(cfg=cfg).pair().denoised(sigma), uncond + cfg * (cond - uncond), atol=1e-5)
    for settings in ({"cfg": 1.0}, {"guider": "Identity", "cfg": 7.0}):
        case = Case(**settings).pair()
        np.testing.assert_allclose(case.denoised(sigma), cond, atol=1e-6)
        (latent, _, rows), = case.network.calls                                   # without the negative
        assert len(latent) == 2 and rows.y[:, 0].tolist() == pytest.approx([0.2, 0.2])


def test_starting_from_noise_alone_or_from_a_latent():
    for most, factor in ((False, SIGMAS[0]), (True, math.sqrt(1 + SIGMAS[0] ** 2))):
        case = Case(max_denoise=most).pair()
        case.run()
        start = case.arrays["latent"] + case.arrays["noise"] * factor
        np.testing.assert_allclose(case.network.calls[0][0][:2] / schedules.c_in(SIGMAS[0]), start, rtol=1e-5, atol=1e-5)


def test_snapping_asks_at_a_level_of_the_table():
    sigma = 3.0
    level, t = schedules.snap(sigma)
    assert level != sigma
    for snap, used in ((True, level), (False, sigma)):
        case = Case(snap=snap, cfg=1.0).pair()
        out = case.denoised(sigma)
        (latent, asked, _), = case.network.calls
        noise = case.arrays["noise"]
        np.testing.assert_allclose(latent, noise * schedules.c_in(used), rtol=1e-6)
        np.testing.assert_allclose(out, noise - used * (0.2 * latent + 0.5), atol=1e-5)
        assert asked == t


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_every_sampler_through_the_loop(name, steps):
    case = Case(sampler=name, sigmas=schedules.legacy_ddpm(steps), preview=True, max_denoise=True).pair()
    case.arrays["step_noise"] = normal(steps, *SHAPE, seed=3)
    before = {name: array.copy() for name, array in case.arrays.items()}
    x = case.run()
    assert x.shape == SHAPE and x.dtype == np.float32
    assert [(report["step"], report["steps"]) for report in case.reports] == [(i + 1, steps) for i in range(steps)]
    dtype, shape, data = case.reports[-1]["denoised"]
    assert (dtype, shape) == ("float32", (1, *SHAPE[1:]))
    np.testing.assert_array_equal(np.frombuffer(data, dtype).reshape(shape), x[:1])
    for key, array in before.items():
        np.testing.assert_array_equal(case.arrays[key], array)


def test_no_preview_no_bytes():
    case = Case().pair()
    case.run()
    assert [report["denoised"] for report in case.reports] == [None] * 4


@pytest.mark.parametrize("sigmas", [[], [0.0], [3.0]])
def test_nothing_to_do_gives_the_latent_back(sigmas):
    case = Case(sigmas=sigmas).pair()
    np.testing.assert_array_equal(case.run(), case.arrays["latent"])
    assert not case.network.calls and not case.reports


def test_what_report_raises_ends_the_run():
    case = Case().pair()

    class Cancelled(Exception):
        pass

    def report(payload):
        if payload["step"] == 2:
            raise Cancelled
    with pytest.raises(Cancelled):
        loop.sample(case.network, case.arrays, case.settings, report)
    assert len(case.network.calls) == 2


def test_churn_uses_the_given_noise_in_order():
    case = Case(options={"s_churn": 1e6, "s_noise": 0.5}, cfg=1.0).pair()
    case.arrays["step_noise"] = normal(4, *SHAPE, seed=3)
    case.run()
    raised = SIGMAS[0] * math.sqrt(2)
    start = case.arrays["latent"] + SIGMAS[0] * (case.arrays["noise"] + 0.5 * case.arrays["step_noise"][0])
    np.testing.assert_allclose(case.network.calls[0][0], start * schedules.c_in(raised), rtol=1e-5, atol=1e-5)
    case.arrays["step_noise"] = case.arrays["step_noise"][:3]
    with pytest.raises(EngineError, match="draws noise 4 times and was given 3"):
        case.run()


# -- several conditions --------------------------------------------------------------------------------------------------

def level_of(case, sigma=1.0):
    """What the network said, from D = x - sigma * noise; the constants of the conditions where the slope is 0."""
    return (case.arrays["noise"] - case.denoised(sigma)) / sigma


def test_combined_conditions_are_averaged_by_weight():
    case = Case(cfg=1.0).add(True, 1.0).add(True, 4.0, weight=np.full((1, 1, 6, 8), 0.5))
    np.testing.assert_allclose(level_of(case), 2.0, atol=1e-5)
    assert len(case.network.calls) == 1 and len(case.network.calls[0][0]) == 4


def test_weights_a_row_and_a_cell():
    weight = np.zeros((2, 1, 6, 8))
    weight[0, :, :3], weight[1, :, :, :2] = 1.0, 3.0
    out = level_of(Case(cfg=1.0).add(True, 1.0).add(True, 3.0, weight=weight))
    np.testing.assert_allclose(out, np.broadcast_to((1 + 3 * weight) / (1 + weight), SHAPE), atol=1e-5)


def test_areas_are_cropped_and_put_back():
    case = Case(cfg=1.0).add(True, 1.0, area=(3, 8, 0, 0)).add(True, 2.0, area=(3, 8, 3, 0))
    case.add(True, 5.0, area=(2, 4, 2, 4))
    out = level_of(case)
    expected = np.concatenate([np.full((3, 8), 1.0), np.full((3, 8), 2.0)])
    expected[2, 4:], expected[3, 4:] = 3.0, 3.5
    np.testing.assert_allclose(out, np.broadcast_to(expected, SHAPE), atol=1e-5)
    sizes = [latent.shape for latent, _, _ in case.network.calls]
    assert sizes == [(4, 4, 3, 8), (2, 4, 2, 4)]                       # equal sizes in one call
    noise = case.arrays["noise"]
    np.testing.assert_allclose(case.network.calls[0][0], np.concatenate([noise[..., :3, :], noise[..., 3:, :]]) / 2 ** 0.5,
                               rtol=1e-6)


def test_an_area_that_reaches_over_the_edge_is_cut_there():
    case = Case(cfg=1.0).add(True, 1.0, area=(100, 100, 2, 3))
    case.denoised(1.0)
    assert case.network.calls[0][0].shape == (2, 4, 4, 5)


def test_where_no_condition_reaches_the_picture_is_zero():
    out = Case(cfg=1.0).add(True, 1.0, area=(6, 4, 0, 0)).denoised(1.0)
    assert (out[..., 4:] == 0).all() and (out[..., :4] != 0).all()


@pytest.mark.parametrize("area", [(2, 2, 6, 0), (2, 2, 0, 8), (2, 2, -1, 0), (0, 2, 0, 0)])
def test_an_area_outside_the_latent_is_one_sentence(area):
    with pytest.raises(EngineError, match=r"^The area of a condition, .* latent cells at .* is not in the latent of 8x6\.$"):
        Case().add(True, 1.0, area=area).run()


def test_conditions_act_between_their_levels_both_included():
    start, end = SIGMAS[1], SIGMAS[2]
    case = Case(cfg=1.0).add(True, 1.0).add(True, 3.0, start=start, end=end)
    case.run()
    assert [len(latent) // 2 for latent, _, _ in case.network.calls] == [1, 2, 2, 1]
    kinds = [rows for _, _, rows in case.network.calls]
    assert kinds[0] is kinds[3] and kinds[1] is kinds[2] and len(set(kinds)) == 2


def test_a_level_at_which_nothing_acts_asks_nothing():
    case = Case().add(True, 1.0, end=SIGMAS[1]).add(False, 0.5, end=SIGMAS[1])
    x = case.run()
    assert len(case.network.calls) == 2 and (x == 0).all()


def test_contexts_repeat_to_a_common_length():
    case = Case().add(True, 1.0, length=14).add(False, 2.0, length=7)
    case.denoised(1.0)
    (_, _, rows), = case.network.calls
    assert rows.context.shape == (4, 14, WIDTH)
    many = Case().add(True, 1.0, length=35).add(False, 2.0, length=7)             # five times as long: a call of its own
    many.denoised(1.0)
    assert [rows.context.shape[1] for _, _, rows in many.network.calls] == [7, 35]


def test_prompts_of_a_batch_go_to_their_rows():
    case = Case(shape=(3, 4, 6, 8), cfg=1.0).add(True, 1.0, batch=2)
    case.arrays["context.0"][1] = 2.0
    case.arrays["y.0"][1] = 0.5
    out = case.arrays["noise"] - case.denoised(1.0)
    scaled = case.arrays["noise"] / 2 ** 0.5                                      # fewer rows than pictures repeat
    np.testing.assert_allclose(out, np.stack([scaled[0] * 0 + 1, scaled[1] * 0.5 + 2, scaled[2] * 0 + 1]), atol=1e-5)


# -- inpainting ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("mask_shape", [(2, 1, 6, 8), (1, 1, 6, 8), (2, 4, 6, 8)])
def test_outside_the_mask_the_latent_stays(mask_shape):
    case = Case().pair()
    mask = np.zeros(mask_shape, np.float32)
    mask[..., 2:5, 1:7] = 1.0
    case.arrays["mask"] = mask
    out = np.broadcast_to(mask, SHAPE) == 0
    x = case.run()
    np.testing.assert_array_equal(x[out], case.arrays["latent"][out])
    for (latent, _, _), sigma in zip(case.network.calls, SIGMAS):
        noised = case.arrays["latent"] + case.arrays["noise"] * sigma
        np.testing.assert_allclose(latent[:2][out], (noised * schedules.c_in(sigma))[out], rtol=1e-5, atol=1e-6)
    assert not np.isclose(x[~out], case.arrays["latent"][~out]).any()


def test_a_soft_mask_mixes():
    case = Case().pair()
    plain = case.denoised(2.0)
    case.arrays["latent"] = case.arrays["noise"] * 0          # so that x is the same inside and outside, but for its scale
    case.arrays["noise"] = case.arrays["noise"] / 2.0
    case.arrays["mask"] = np.full((1, 1, 6, 8), 0.25, np.float32)
    masked = loop.Denoiser(case.network, case.arrays, case.settings)(case.arrays["noise"] * 2.0, 2.0)
    np.testing.assert_allclose(masked, 0.25 * plain, rtol=1e-5, atol=1e-6)


# -- numbers that are none -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("value,name", [(np.nan, "NaN"), (np.inf, "infinite values")])
def test_a_broken_network_is_named_with_its_step(value, name):
    case = Case().pair()

    def predict(latent, timestep, rows):
        out = case.network(latent, timestep, rows)
        if len(case.network.calls) == 3:
            out[1, 2, 3, 4] = value
        return out
    with pytest.raises(EngineError, match=f"^The U-Net returned {name} at step 3 of 4: half precision overflows"):
        loop.sample(predict, case.arrays, case.settings, case.reports.append)
    assert len(case.reports) == 2


def test_a_broken_latent_is_found_before_the_network_runs():
    case = Case().pair()
    case.arrays["latent"][0, 0, 0, 0] = np.nan
    with pytest.raises(EngineError, match="^The sampler gave the U-Net NaN or infinite values at step 1 of 4, before"):
        case.run()
    assert not case.network.calls


def test_a_sampler_that_overflows_is_named():
    """A schedule with a tiny step before a large one: DPMPP2M extrapolates a million-fold."""
    case = Case(sampler="DPMPP2M", sigmas=[1.0, 0.999999, 0.001], cfg=1.0).pair()
    values = iter([1e33, 2e33])
    with np.errstate(all="ignore"), pytest.raises(EngineError, match="^The sampler DPMPP2M ended in NaN or infinite values"):
        loop.sample(lambda latent, t, rows: np.full_like(latent, next(values)), case.arrays, case.settings, print)
