"""Our samplers and sampling loop against ComfyUI's own, with the same network, noise and settings, in this process.

The network is arithmetic in numpy, so that neither side has an advantage. ComfyUI computes levels in float32, we in
float64: that, and the order of additions, is all the difference there may be.
"""
from __future__ import annotations

import sys

import numpy as np
import pytest

from engines.sdxl import loop, schedules
from engines.sdxl.samplers import SAMPLERS, Options, noise_count
from tests.conftest import need
from tools.inprocess import load_comfyui
from tools.install import comfyui

TOLERANCE = 1e-5            # of the largest value of the result
LENGTH, WIDTH, POOLED = 77, 16, 1280
STOCK = {"EulerEDM": "euler", "HeunEDM": "heun", "EulerAncestral": "euler_ancestral",
         "DPMPP2SAncestral": "dpmpp_2s_ancestral", "DPMPP2M": "dpmpp_2m", "LinearMultistep": "lms"}


@pytest.fixture(scope="module")
def comfy():
    """ComfyUI's modules, with its folder on the path only as long as these tests run: it holds names like `utils`."""
    need((comfyui() / "main.py").exists(), "ComfyUI is not installed: run 'python tools/install.py dev'")
    path = list(sys.path)
    load_comfyui()
    import comfy.k_diffusion.sampling
    import comfy.model_base
    import comfy.model_patcher
    import comfy.sample
    import comfy.sampler_helpers
    import comfy.samplers
    import comfy.supported_models
    yield comfy
    sys.path[:] = path


def agree(ours, theirs):
    theirs = np.asarray(theirs)
    assert ours.shape == theirs.shape and ours.dtype == np.float32
    assert np.abs(ours - theirs).max() <= TOLERANCE * max(1.0, np.abs(theirs).max())


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def network(latent, timestep, context, y):
    """A prediction in which every argument and the place count, and which bends enough to tell samplers apart."""
    latent = np.asarray(latent, np.float32)
    rows = lambda values: np.asarray(values, np.float32)[:, None, None, None]
    place = np.sin(np.arange(latent.shape[-1], dtype=np.float32))
    context, y = np.asarray(context), np.asarray(y)
    return (0.8 * np.tanh(latent * rows(1 + 0.3 * np.tanh(y[:, :POOLED].mean(1)))) + rows(0.2 * context.mean((1, 2))) * place
            + rows(0.1 * np.sin(np.asarray(timestep) / 300)) + rows(0.05 * y[:, POOLED:].std(1)))


# -- each sampler against its namesake -----------------------------------------------------------------------------------

class Denoiser:
    """Called as k-diffusion calls a model, and as our samplers do."""

    def __init__(self):
        self.inner_model = self
        self.model_sampling = None

    def __call__(self, x, sigma, **_):
        import torch
        if isinstance(sigma, float):
            return (x / (1 + sigma ** 2) + np.float32(0.3) * np.sin(x)).astype(np.float32)
        return torch.from_numpy(self(x.numpy(), float(sigma[0])))


@pytest.mark.parametrize("options", [
    {}, {"s_churn": 5.0}, {"s_churn": 100.0, "s_tmin": 0.3, "s_tmax": 9.0, "s_noise": 1.003},
    {"eta": 0.4, "s_noise": 0.9}, {"eta": 0.0}], ids=["plain", "churn", "window", "eta", "no noise"])
@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("schedule", [("LegacyDDPM", 1), ("LegacyDDPM", 2), ("LegacyDDPM", 20), ("EDM", 13)])
def test_a_sampler_equals_its_namesake(comfy, name, options, schedule):
    import torch
    sigmas, shape = schedules.schedule(*schedule), (2, 4, 8, 8)
    x = normal(*shape) * np.float32(sigmas[0])
    ours = Options(**options)
    count = noise_count(name, sigmas, ours)
    torch.manual_seed(5)
    noise = [torch.randn(shape) for _ in range(20)]
    draws = iter(noise)
    mine = SAMPLERS[name](Denoiser(), x, sigmas, lambda: next(draws).numpy(), ours, lambda *_: None)
    torch.manual_seed(5)
    known = {"EulerEDM": {"s_churn", "s_tmin", "s_tmax", "s_noise"}, "EulerAncestral": {"eta", "s_noise"}}
    known |= {"HeunEDM": known["EulerEDM"], "DPMPP2SAncestral": known["EulerAncestral"]}
    arguments = {key: value for key, value in options.items() if key in known.get(name, ())}
    if "eta" in known.get(name, ()):
        stock_draws = iter(noise)
        arguments["noise_sampler"] = lambda *_: next(stock_draws)
    function = getattr(comfy.k_diffusion.sampling, f"sample_{STOCK[name]}")
    agree(mine, function(Denoiser(), torch.from_numpy(x), torch.tensor(sigmas), disable=True, **arguments))
    assert count == len(noise) - len(list(draws))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8, 9, 10, 20, 25, 27, 37, 40, 50, 100])
def test_legacy_ddpm_is_the_scheduler_simple(comfy, n):
    sampling = comfy.model_sampling.ModelSamplingDiscrete()
    assert schedules.legacy_ddpm(n) == comfy.samplers.calculate_sigmas(sampling, "simple", n).tolist()


def test_the_table_is_comfyuis(comfy):
    import torch
    sampling = comfy.model_sampling.ModelSamplingDiscrete()
    assert schedules.TABLE.tolist() == sampling.sigmas.tolist()
    levels = np.geomspace(0.01, 30, 999).tolist() + schedules.edm(50)[:-1]
    assert [schedules.timestep(sigma) for sigma in levels] == sampling.timestep(torch.tensor(levels)).tolist()


# -- the whole loop against ComfyUI's sampling ---------------------------------------------------------------------------

@pytest.fixture(scope="module")
def model(comfy):
    """A ModelPatcher of ComfyUI's SDXL around `network`."""
    import torch

    class Arithmetic(torch.nn.Module):
        dtype = torch.float32

        def forward(self, x, timesteps, context=None, y=None, **_):
            return torch.from_numpy(network(x, timesteps, context, y))
    config = comfy.supported_models.SDXL({"disable_unet_model_creation": True, "in_channels": 4, "context_dim": WIDTH,
                                          "adm_in_channels": 2816})
    base = comfy.model_base.SDXL(config, device=torch.device("cpu"))
    base.diffusion_model = Arithmetic()
    base.memory_required = lambda *_, **__: 0.0          # cond and uncond in one call whatever the machine's memory
    return comfy.model_patcher.ModelPatcher(base, torch.device("cpu"), torch.device("cpu"))


def prompt(seed, length=LENGTH, batch=1, **extra):
    """One entry of a CONDITIONING."""
    import torch
    return [torch.from_numpy(0.5 + normal(batch, length, WIDTH, seed=seed)),
            {"pooled_output": torch.from_numpy(0.5 + normal(batch, POOLED, seed=seed + 100)), "width": 1000 + seed, **extra}]


def translate(comfy, model, positive, negative, noise, latent, mask):
    """CONDITIONING -> (arrays, conditions) of loop.sample, by ComfyUI's own functions."""
    import torch
    convert = comfy.sampler_helpers.convert_cond
    conds = {"positive": convert(positive), "negative": convert(negative)}
    conds = comfy.samplers.process_conds(model.model, noise, conds, torch.device("cpu"), latent, mask, 0)
    arrays, conditions = {}, []
    for sign, entries in conds.items():
        for entry in entries:
            always = {key: value for key, value in entry.items() if key not in ("timestep_start", "timestep_end")}
            part = comfy.samplers.get_area_and_mult(always, noise, torch.ones(len(noise)))
            index = len(conditions)
            arrays[f"context.{index}"] = part.conditioning["c_crossattn"].cond.numpy()
            arrays[f"y.{index}"] = part.conditioning["y"].cond.numpy()
            arrays[f"weight.{index}"] = part.mult[:, :1].numpy()
            conditions.append({"positive": sign == "positive", "area": tuple(part.area) if part.area else None,
                               "start": entry.get("timestep_start"), "end": entry.get("timestep_end")})
    return arrays, conditions


def square(top, left, height, width, value=1.0, cells=(12, 10), batch=1):
    import torch
    mask = torch.zeros(batch, *cells)
    mask[:, top:top + height, left:left + width] = value
    return mask


PAIR = {"positive": lambda: [prompt(1)], "negative": lambda: [prompt(2)]}
CASES = {
    "plain": {},
    "cfg 1": {"cfg": 1.0},
    "cfg 0": {"cfg": 0.0},
    "batch": {"batch": 3},
    "combined": {"positive": lambda: [prompt(1), prompt(3), prompt(4)], "negative": lambda: [prompt(2), prompt(5)]},
    "strength": {"positive": lambda: [prompt(1), prompt(3, strength=0.3)]},
    "areas": {"positive": lambda: [prompt(1, area=(6, 10, 0, 0), strength=0.8), prompt(3, area=(6, 10, 6, 0)), prompt(4)]},
    "area alone": {"positive": lambda: [prompt(1, area=(7, 5, 2, 3))]},
    "area over the edge": {"positive": lambda: [prompt(1), prompt(3, area=(64, 64, 5, 4))]},
    "area in percent": {"positive": lambda: [prompt(1), prompt(3, area=("percentage", 0.5, 0.4, 0.25, 0.6))]},
    "masks": {"batch": 2, "positive": lambda: [prompt(1, mask=square(0, 0, 12, 4), mask_strength=0.7),
                                               prompt(3, mask=square(2, 3, 9, 7))]},
    "mask of another size": {"positive": lambda: [prompt(1), prompt(3, mask=square(3, 2, 20, 9, cells=(48, 40)))]},
    "mask with bounds": {"positive": lambda: [prompt(1), prompt(3, mask=square(1, 1, 9, 8), set_area_to_bounds=True)]},
    "mask a picture": {"positive": lambda: [prompt(1), prompt(3, mask=square(1, 1, 9, 8, batch=2))], "batch": 2},
    "times": {"positive": lambda: [prompt(1, start_percent=0.0, end_percent=0.3),
                                   prompt(3, start_percent=0.3, end_percent=1.0), prompt(4, start_percent=0.5)]},
    "times at levels of the schedule": {"positive": lambda: [
        prompt(1), prompt(3, timestep_start=schedules.legacy_ddpm(10)[2], timestep_end=schedules.legacy_ddpm(10)[5])]},
    "no positive at the end": {"cfg": 1.5, "positive": lambda: [prompt(1, end_percent=0.6)]},
    "no negative at the end": {"cfg": 1.5, "negative": lambda: [prompt(2, end_percent=0.6)]},
    "no negative at all": {"cfg": 1.5, "negative": lambda: []},
    "long prompt": {"positive": lambda: [prompt(1, length=2 * LENGTH)]},
    "very long prompt": {"positive": lambda: [prompt(1, length=5 * LENGTH)], "batch": 2},
    "three lengths": {"positive": lambda: [prompt(1, length=2 * LENGTH), prompt(3, length=3 * LENGTH)]},
    "prompts a picture": {"positive": lambda: [prompt(1, batch=2)], "batch": 3},
    "other sizes": {"positive": lambda: [prompt(1, height=512, crop_w=8, target_width=300)]},
    "img2img": {"denoise": 0.6, "latent": True},
    "little denoise": {"denoise": 0.05, "latent": True},
    "a latent and full denoise": {"latent": True},
    "inpaint": {"latent": True, "mask": lambda: square(2, 2, 7, 5)[:, None], "batch": 2},
    "soft inpaint": {"latent": True, "mask": lambda: square(0, 0, 12, 10, 0.3)[:, None] + square(2, 2, 7, 5, 0.6)[:, None],
                     "denoise": 0.7},
    "inpaint masks a picture": {"latent": True, "batch": 2, "mask": lambda: square(2, 2, 7, 5, batch=2)[:, None]},
    "everything": {"latent": True, "batch": 2, "denoise": 0.8, "mask": lambda: square(2, 2, 7, 5)[:, None], "cfg": 7.5,
                   "positive": lambda: [prompt(1, area=(6, 10, 0, 0), end_percent=0.7), prompt(3, mask=square(1, 1, 9, 8)),
                                        prompt(4, length=2 * LENGTH, start_percent=0.2)],
                   "negative": lambda: [prompt(2), prompt(5, area=(5, 5, 1, 1), strength=2.0)]},
}


def compare(comfy, model, name="EulerEDM", steps=10, cfg=5.0, batch=1, denoise=1.0, latent=False, mask=None,
            positive=PAIR["positive"], negative=PAIR["negative"], options=None):
    """The result of our loop and of ComfyUI's KSampler with scheduler "simple", and that they agree."""
    import torch
    shape, options = (batch, 4, 12, 10), options or {}
    noise = torch.from_numpy(normal(*shape, seed=8))
    start = torch.from_numpy(3 * normal(*shape, seed=9)) if latent else torch.zeros(shape)
    positive, negative, mask = positive(), negative(), None if mask is None else mask()
    stock = comfy.samplers.KSampler(model, steps, torch.device("cpu"), STOCK[name], "simple", denoise, model.model_options)
    sampler = comfy.samplers.ksampler(STOCK[name], options)
    torch.manual_seed(11)
    if name in ("EulerAncestral", "DPMPP2SAncestral"):
        sampler.extra_options = {**options, "noise_sampler": lambda *_: torch.randn(shape)}
    theirs = comfy.samplers.sample(model, noise, positive, negative, cfg, torch.device("cpu"), sampler, stock.sigmas,
                                   model.model_options, latent_image=start, denoise_mask=mask, disable_pbar=True, seed=11)

    sigmas = stock.sigmas.tolist()
    scaled = model.model.process_latent_in(start)
    arrays, conditions = translate(comfy, model, positive, negative, noise, scaled, mask)
    torch.manual_seed(11)
    count = noise_count(name, sigmas, Options(**options))
    arrays.update(noise=noise.numpy(), latent=scaled.numpy(), step_noise=torch.randn(count, *shape).numpy())
    if mask is not None:
        arrays["mask"] = comfy.sampler_helpers.prepare_mask(mask, shape, torch.device("cpu")).numpy()
    settings = {"sampler": name, "sigmas": sigmas, "guider": "VanillaCFG", "cfg": cfg, "snap": False, "options": options,
                "preview": False, "conditions": conditions, "max_denoise": schedules.from_pure_noise(sigmas, denoise)}
    mine = loop.sample(lambda latent, t, rows: network(latent, t, rows.context, rows.y), arrays, settings, lambda _: None)
    agree(mine, model.model.process_latent_in(theirs))
    return mine


@pytest.mark.parametrize("case", CASES)
def test_conditions_masks_and_starts(comfy, model, case):
    result = compare(comfy, model, **CASES[case])
    assert np.isfinite(result).all() and result.std() > 0


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("case", ["plain", "everything"])
def test_every_sampler_in_the_loop(comfy, model, name, case):
    compare(comfy, model, name, 20, **CASES[case])


def test_churn_in_the_loop(comfy, model):
    compare(comfy, model, options={"s_churn": 3.0, "s_tmax": 10.0, "s_noise": 1.01}, batch=2)
