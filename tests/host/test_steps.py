"""A chain of SophgoUNetStep is one KSampler run: the same numbers bit for bit, and no U-Net call more."""
from __future__ import annotations

import numpy as np
import pytest

from tests.host import watched
from tests.host.graphs import CATS, DOGS, Graph, latent, latents, load_latent, load_picture, refusal

STEPS = 5


@pytest.fixture(scope="module")
def device(server, base, tmp_path_factory):
    device = watched.Watched(tmp_path_factory.mktemp("watched"))
    with watched.settings(base, device.settings):
        yield device


class Run:
    """One graph with a model and two prompts; whole and in steps."""

    def __init__(self, **settings):
        self.graph = Graph()
        self.model, clip, self.vae = self.graph.checkpoint(device=watched.NAME)
        self.prompts = self.graph.prompt(clip, CATS), self.graph.prompt(clip, DOGS)
        self.settings = {"seed": 3, "steps": STEPS, "sampler_name": "euler", "scheduler": "simple", "cfg": 5.0} | settings

    def whole(self, start):
        return self.graph.sample(self.model, *self.prompts, start, **self.settings)

    def part(self, start, **changes):
        settings = {**self.settings, **changes}
        return self.graph.sample_part(self.model, *self.prompts, start, noise_seed=settings.pop("seed"), **settings)

    def step(self, start, step: int, **changes):
        positive, negative = self.prompts
        return self.graph.SophgoUNetStep(model=self.model, positive=positive, negative=negative, latent_image=start,
                                         step=step, **{**self.settings, "add_noise": True, **changes})

    def chain(self, start, steps=range(STEPS), **changes):
        for step in steps:
            start = self.step(start, step, **changes)
        return start



@pytest.fixture
def equal(server):
    """Run two nodes of a graph and compare their latents bit for bit."""
    def compare(*nodes) -> np.ndarray:
        first, second = latents(server, *nodes)
        np.testing.assert_array_equal(first, second)
        assert np.isfinite(first).all() and first.std() > 0
        return first
    return compare


@pytest.mark.parametrize("cfg", [1.0, 5.0])
def test_every_sampler_in_steps(server, device, subtests, cfg):
    info = server.get("/object_info/KSampler")["KSampler"]["input"]["required"]
    schedulers = info["scheduler"][0]
    for number, name in enumerate(name for name in info["sampler_name"][0] if name != "dpm_adaptive"):
        with subtests.test(name):
            def run(of):
                device.forget()
                run = Run(sampler_name=name, scheduler=schedulers[number % len(schedulers)], cfg=cfg)
                return latent(server, of(run)(run.graph.empty())), device.unet_runs()
            whole, whole_runs = run(lambda run: run.whole)
            chain, chain_runs = run(lambda run: run.chain)
            np.testing.assert_array_equal(chain, whole)
            assert np.isfinite(whole).all() and whole.std() > 0
            assert chain_runs == whole_runs >= STEPS - 1      # some samplers end with a step that needs no model


@pytest.mark.parametrize("steps", [2, 7])
def test_every_scheduler_in_steps(server, device, subtests, steps):
    """Some schedulers make a step more than asked for: 'ddim_uniform' 8 of 7."""
    for scheduler in server.get("/object_info/KSampler")["KSampler"]["input"]["required"]["scheduler"][0]:
        with subtests.test(scheduler):
            run = Run(scheduler=scheduler, steps=steps, sampler_name="dpmpp_2m")
            whole, chain = latents(server, run.whole(run.graph.empty()), run.chain(run.graph.empty(), range(steps)))
            np.testing.assert_array_equal(chain, whole)


def test_scheduler_with_fewer_levels_than_steps(equal, device):
    """'beta' has 387 noise levels for 400 steps; like KSamplerAdvanced, steps beyond them leave the latent alone."""
    run = Run(scheduler="beta", steps=400, cfg=1.0)
    start = run.part(run.graph.empty(), end_at_step=385)
    equal(run.part(start, start_at_step=385, add_noise="disable"), run.chain(start, range(385, 389), add_noise=False))


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_sde", "dpmpp_2m", "uni_pc", "lms"])
class TestStarts:
    def test_noise_mask(self, equal, base, device, sampler):
        run = Run(sampler_name=sampler)
        levels = np.random.default_rng(1).integers(0, 256, (64, 64, 4))
        levels[:, :32, 3] = 255
        picture = load_picture(run.graph, base, levels)
        encoded = run.graph.VAEEncode(pixels=picture, vae=run.vae)
        masked = run.graph.SetLatentNoiseMask(samples=encoded, mask=picture[1])
        equal(run.whole(masked), run.chain(masked))

    def test_batch(self, equal, device, sampler):
        run = Run(sampler_name=sampler)
        result = equal(run.whole(run.graph.empty(batch=2)), run.chain(run.graph.empty(batch=2)))
        assert np.abs(result[0] - result[1]).max() > 0.1

    def test_later_step(self, equal, base, device, sampler):
        """Image to image: as KSamplerAdvanced with start_at_step."""
        run = Run(sampler_name=sampler)
        start = load_latent(run.graph, base, np.random.default_rng(2).normal(size=(1, 4, 8, 8)))
        equal(run.part(start, start_at_step=2, return_with_leftover_noise="disable"), run.chain(start, range(2, STEPS)))

    def test_without_noise(self, equal, base, device, sampler):
        run = Run(sampler_name=sampler)
        start = load_latent(run.graph, base, np.random.default_rng(3).normal(size=(1, 4, 8, 8)) * 50)
        equal(run.part(start, add_noise="disable"), run.chain(start, add_noise=False))


def test_patched_model(equal, device):
    """A node that works on the guidance, and a sampler that does too."""
    run = Run(sampler_name="euler_cfg_pp")
    run.model = run.graph.RescaleCFG(model=run.model, multiplier=0.7)
    equal(run.whole(run.graph.empty()), run.chain(run.graph.empty()))


def test_in_between(server, device):
    """After step 3 of 5 a latent is what KSamplerAdvanced leaves there; the last estimate is the result."""
    run = Run()
    steps = [run.graph.empty()]
    for step in range(STEPS):
        steps.append(run.step(steps[-1], step))
    left, after, result, estimate, early = latents(
        server, run.part(steps[0], end_at_step=3), steps[3], steps[5], steps[5][1], steps[2][1])
    np.testing.assert_array_equal(after, left)
    np.testing.assert_allclose(estimate, result, rtol=1e-5)      # Euler's last step: x + (estimate - x)
    assert np.isfinite(early).all() and np.abs(early - result).max() > 0.1


def test_another_sampler_in_the_middle(equal, device):
    """A new run begins there, with no memory of the first: as two KSamplerAdvanced."""
    run = Run(sampler_name="dpmpp_2m")
    first = run.part(run.graph.empty(), end_at_step=2)
    parts = run.part(first, start_at_step=2, add_noise="disable", sampler_name="lms")
    chain = run.chain(run.graph.empty(), range(2))
    equal(parts, run.chain(chain, range(2, STEPS), sampler_name="lms", add_noise=False))


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "euler_ancestral"])
def test_latent_changed_in_the_middle(equal, device, sampler):
    """What was recorded belongs to another latent now: a new run begins, and nothing of the old one shows."""
    run = Run(sampler_name=sampler)
    half = run.chain(run.graph.empty(), range(2))
    changed = run.graph.LatentMultiply(samples=half, multiplier=0.5)
    equal(run.part(changed, start_at_step=2, add_noise="disable"),
          run.chain(changed, range(2, STEPS), add_noise=False))


def test_latent_copied_in_the_middle(equal, device):
    """A node that changes nothing does not end the run."""
    run = Run(sampler_name="dpmpp_2m")
    half = run.chain(run.graph.empty(), range(2))
    copied = run.graph.LatentMultiply(samples=half, multiplier=1.0)
    equal(run.whole(run.graph.empty()), run.chain(copied, range(2, STEPS)))


@pytest.mark.parametrize("between", ["VAE", "RepeatLatentBatch"])
def test_other_shapes_and_new_latents_in_the_middle(server, device, between):
    run = Run(sampler_name="dpmpp_2m")
    half = run.chain(run.graph.empty(), range(2))
    if between == "VAE":
        other = run.graph.VAEEncode(pixels=run.graph.VAEDecode(samples=half, vae=run.vae), vae=run.vae)
    else:
        other = run.graph.RepeatLatentBatch(samples=half, amount=2)
    parts, chain = latents(server, run.part(other, start_at_step=2, add_noise="disable"),
                           run.chain(other, range(2, STEPS), add_noise=False))
    np.testing.assert_array_equal(parts, chain)


@pytest.mark.parametrize(("changes", "words"), [
    ({"step": 5}, ["Step 5", "5 steps", "0 to 4"]),
    ({"step": 9999}, ["Step 9999"]),
    ({"sampler_name": "dpm_adaptive"}, ["dpm_adaptive", "KSampler"]),
    ({"sampler_name": "nonsense"}, ["no sampler 'nonsense'", "euler"]),
    ({"scheduler": "nonsense"}, ["no scheduler 'nonsense'", "karras"]),
])
def test_refused(server, device, changes, words):
    run = Run()
    refusal(server, run.step(run.graph.empty(), **{"step": 0, **changes}), *words)
