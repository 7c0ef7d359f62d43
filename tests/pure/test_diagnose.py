"""Every classic fault, planted, is recognised as itself and as nothing else; healthy networks have no finding.

Around the networks a fault is planted into what a recorded run gives them, inside one into a network that is called.
"""
from dataclasses import replace

import numpy as np
import pytest

from engines.alignment.causes import CAUSES, bfloat16, float16
from engines.alignment.compare import Pair, forced, pairs
from engines.alignment.diagnose_networks import diagnose_networks
from engines.alignment.diagnose_runs import diagnose_runs
from engines.errors import NotFinite
from tests.helpers import toy_networks
from tests.helpers.toy_networks import END, RESIDUALS, SCALE, START, Network, networks, run

PHOTO = np.random.default_rng(3).uniform(-1, 1, (1, 3, 64, 64)).astype(np.float32)


def test_every_cause_is_planted():
    assert {cause for _, cause, _ in RUNS.values()} | {cause for *_, cause, _ in INSIDE.values()} | {
        "residual_order", "residual_ignored", "overflow"} == set(CAUSES)


# -- around the networks -----------------------------------------------------------------------------------------------
def of_runs(tmp_path, before=lambda stage, inputs: inputs, after=lambda stage, outputs: outputs, more=None, **kind):
    reference = run(tmp_path / "reference.npz", **kind)
    return diagnose_runs(pairs(reference, run(tmp_path / "candidate.npz", before, after, **{**kind, **(more or {})})))


def to(stage, argument, change):
    """A fault: `change` what a stage is given as `argument`."""
    def before(found, inputs):
        return {**inputs, argument: change(inputs[argument])} if found == stage else inputs
    return before


def padded_with(token):
    def change(ids):
        ids = np.array(ids)
        for row in ids:
            row[list(row).index(END) + 1:] = token
        return ids
    return change


def reordered(**sources):
    def before(stage, inputs):
        return {**inputs, **{name: inputs[other] for name, other in sources.items()}} if stage == "unet" else inputs
    return before


RUNS = {
    "timesteps one too high": (to("unet", "timestep", lambda t: t + 1), "timestep_shift", ["off by one", "1000", "999"]),
    "timesteps one too low": (to("unet", "timestep", lambda t: t - 1), "timestep_shift", ["998"]),
    "fractional timesteps": (to("unet", "timestep", lambda t: t - 0.0625), "timestep_fraction", ["998.9375", "999"]),
    "timesteps as bfloat16": (to("unet", "timestep", bfloat16), "cast", ["16-bit", "1000"]),
    "ids as float16": (to("text_encoder", "ids", lambda ids: float16(ids).astype(int)), "cast", ["float16", "49408"]),
    "latent as integers": (to("unet", "latent", np.trunc), "cast", ["latent", "whole number"]),
    "latent as bfloat16": (to("unet", "latent", bfloat16), "cast", ["latent", "bfloat16"]),
    "padded with 0": (to("text_encoder", "ids", padded_with(0)), "padding", ["token 0", "49407"]),
    "decoder scale twice": (to("vae_decoder", "latent", lambda x: x / SCALE), "latent_scale", ["twice", "VAE decoder"]),
    "decoder scale missing": (to("vae_decoder", "latent", lambda x: x * SCALE), "latent_scale", ["not applied"]),
    "U-Net scale twice": (to("unet", "latent", lambda x: x * np.float32(SCALE)), "latent_scale", ["twice", "U-Net"]),
    "contexts exchanged": (to("unet", "context", lambda c: c[::-1]), "conditions", ["exchanged", "uncondition first"]),
    "other prompt": (to("text_encoder", "ids", lambda ids: np.where(ids == 5, 8, ids)), "other_run", ["prompts", "token 8"]),
    "other timesteps": (to("unet", "timestep", lambda t: t // 2), "other_run", ["schedules"]),
}


@pytest.mark.parametrize("fault", RUNS)
def test_fault_around_the_networks(tmp_path, fault):
    before, cause, words = RUNS[fault]
    findings = of_runs(tmp_path, before)
    assert [finding.cause for finding in findings] == [cause], findings
    said = findings[0].sentence
    assert all(word in said for word in words) and said.endswith(".") and len(said) < 400, said


@pytest.mark.parametrize(("sources", "words"), [
    ({"residual.0": "residual.1", "residual.1": "residual.0"}, ["residual.0 as residual.1", "residual.1 as residual.0"]),
    ({"residual.mid": "residual.4", "residual.4": "residual.5", "residual.5": "residual.mid"},
     ["residual.mid as residual.5"]),
])
def test_residuals_in_another_order_around_the_network(tmp_path, sources, words):
    finding, = of_runs(tmp_path, reordered(**sources), residuals=True)
    assert finding.cause == "residual_order" and all(word in finding.sentence for word in words), finding.sentence


def test_encoder_scale(tmp_path):
    """A VAE encoder that scales its answer itself: the sampler scales it once more."""
    findings = of_runs(tmp_path, after=lambda stage, out: {"latent": out["latent"] * np.float32(SCALE)}
                       if stage == "vae_encoder" else out, picture=PHOTO)
    assert ("latent_scale", "vae_encoder") in {(f.cause, f.stage) for f in findings}
    assert "twice" in next(f.sentence for f in findings if f.stage == "vae_encoder")
    assert {f.cause for f in findings} == {"latent_scale"}


@pytest.mark.parametrize(("scale", "words"), [(1.0, "not applied at all"), (SCALE ** 2, "applied twice")])
def test_scale_of_a_picture_in_a_noisy_latent(tmp_path, scale, words):
    """Image to image: only the picture's part of the latent is out of scale."""
    findings = of_runs(tmp_path, picture=PHOTO, more={"scale": scale})
    assert [(f.cause, f.stage) for f in findings] == [("latent_scale", "unet")] and words in findings[0].sentence


def test_other_size(tmp_path):
    reference, wider = run(tmp_path / "a.npz"), run(tmp_path / "b.npz", width=16)
    finding, = diagnose_runs(pairs(reference, wider))
    assert finding.cause == "other_run" and "[2, 4, 8, 16]" in finding.sentence


def test_other_seed(tmp_path):
    finding, = of_runs(tmp_path, more={"seed": 1})
    assert finding.cause == "other_run" and "seed" in finding.sentence


def test_reference_with_fractional_timesteps(tmp_path):
    reference = run(tmp_path / "a.npz", to("unet", "timestep", lambda t: t - 0.25))
    candidate = run(tmp_path / "b.npz", to("unet", "timestep", lambda t: np.rint(t - 0.25)))
    finding, = diagnose_runs(pairs(reference, candidate))
    assert finding.cause == "timestep_fraction" and "rounds them" in finding.sentence


def test_overflow_in_a_run_names_its_first_call(tmp_path):
    def overflow(stage, outputs):
        overflow.calls += stage == "unet"
        return {name: array * np.nan for name, array in outputs.items()} if overflow.calls == 3 else outputs
    overflow.calls = 0
    finding, = of_runs(tmp_path, after=overflow)
    assert (finding.cause, finding.stage, finding.step) == ("overflow", "unet", 3) and "step 3 of 5" in finding.sentence


@pytest.mark.parametrize(("computes_in", "causes"), [("bfloat16", []), ("float16", ["cast"]), (None, ["cast"])])
def test_a_torch_network_in_16_bits_is_given_them_rightly(tmp_path, computes_in, causes):
    """It is not blamed for its own type, but is for another one."""
    reference, candidate = run(tmp_path / "a.npz"), run(tmp_path / "b.npz", to("unet", "latent", bfloat16))
    told = [Pair(pair.number, pair.reference, replace(pair.candidate, facts={**pair.candidate.facts, "dtype": computes_in}))
            for pair in pairs(reference, candidate)]
    assert [finding.cause for finding in diagnose_runs(told)] == causes


def test_nan_in_residuals_is_no_order(tmp_path):
    findings = of_runs(tmp_path, to("unet", "residual.1", lambda r: r * np.nan), residuals=True)
    assert [finding.cause for finding in findings] == ["overflow"] and "residual.1" in findings[0].sentence


def test_nan_that_came_from_before(tmp_path):
    finding, = of_runs(tmp_path, to("unet", "context", lambda c: c * np.nan))
    assert finding.cause == "overflow" and "was given" in finding.sentence and "context" in finding.sentence


KINDS = {"text to image": {}, "image to image": {"picture": PHOTO}, "ControlNet": {"residuals": True},
         "apart": {"apart": True}}
HALVES = {"exact": lambda array: array, "bfloat16": bfloat16, "float16": float16}


@pytest.mark.parametrize("precision", HALVES)
@pytest.mark.parametrize("kind", KINDS)
def test_healthy_runs(tmp_path, precision, kind):
    def after(stage, outputs):
        return {name: HALVES[precision](array) for name, array in outputs.items()}
    assert of_runs(tmp_path, after=after, **KINDS[kind]) == []


# -- inside a network --------------------------------------------------------------------------------------------------
def of_networks(tmp_path, stage, network, **kind):
    reference = run(tmp_path / "reference.npz", **kind)
    found = networks(**{stage: network})
    return diagnose_networks(reference, found, list(forced(reference, found)))


def changed(stage, argument, change, precision="exact"):
    return Network(toy_networks.HEALTHY[stage], lambda inputs: {**inputs, argument: change(inputs[argument])},
                   lambda outputs: {name: HALVES[precision](array) for name, array in outputs.items()})


def swapped(*order):
    def change(inputs):
        return {**inputs, **{name: inputs[other] for name, other in zip(order, [*order[1:], order[0]])}}
    return change


INSIDE = {
    "timesteps one too high": ("unet", "timestep", lambda t: t + 1, "timestep_shift", ["t-1"]),
    "timesteps one too low": ("unet", "timestep", lambda t: t - 1, "timestep_shift", ["t+1"]),
    "timestep as bfloat16": ("unet", "timestep", bfloat16, "cast", ["cannot tell timestep", "16-bit"]),
    "timestep stale": ("unet", "timestep", lambda t: t * 0 + 500, "timestep_ignored", ["no effect"]),
    "contexts exchanged": ("unet", "context", lambda c: c[::-1], "conditions", ["halves of the context"]),
    "latent as integers": ("unet", "latent", np.trunc, "cast", ["truncates its latent"]),
    "latent rounded": ("unet", "latent", np.rint, "cast", ["rounds its latent"]),
    "scale in the decoder too": ("vae_decoder", "latent", lambda x: x / SCALE, "latent_scale", ["applied twice"]),
    "no scale in the decoder": ("vae_decoder", "latent", lambda x: x * SCALE, "latent_scale", ["not applied at all"]),
    "ids as bfloat16": ("text_encoder", "ids", bfloat16, "cast", [str(START), str(END)]),
    "ids as float16": ("text_encoder", "ids", float16, "cast", ["cannot tell token"]),
}


@pytest.mark.parametrize("precision", HALVES)
@pytest.mark.parametrize("fault", INSIDE)
def test_fault_inside_a_network(tmp_path, fault, precision):
    """Also where the network computes in half precision, whose own error is there too."""
    stage, argument, change, cause, words = INSIDE[fault]
    findings = of_networks(tmp_path, stage, changed(stage, argument, change, precision))
    assert [(finding.cause, finding.stage) for finding in findings] == [(cause, stage)], findings
    said = findings[0].sentence
    assert all(word in said for word in words) and said.endswith(".") and len(said) < 400, said


@pytest.mark.parametrize(("order", "words"), [
    (("residual.1", "residual.2"), ["residual.1 as residual.2", "residual.2 as residual.1"]),
    (("residual.mid", "residual.4", "residual.5"), ["residual.mid as residual.5"]),
])
def test_residuals_in_another_order_inside(tmp_path, order, words):
    finding, = of_networks(tmp_path, "unet", Network(toy_networks.unet, swapped(*order)), residuals=True)
    assert finding.cause == "residual_order" and all(word in finding.sentence for word in words), finding.sentence


def test_all_residuals_backwards_inside(tmp_path):
    """Where each group of one shape is read from its end."""
    backwards = {"residual.0": "residual.2", "residual.2": "residual.0", "residual.4": "residual.mid",
                 "residual.mid": "residual.4"}
    finding, = of_networks(tmp_path, "unet", Network(toy_networks.unet, lambda inputs: {
        **inputs, **{name: inputs[other] for name, other in backwards.items()}}), residuals=True)
    assert finding.cause == "residual_order" and "residual.0 as residual.2" in finding.sentence


def test_residuals_that_are_ignored(tmp_path):
    finding, = of_networks(tmp_path, "unet", Network(toy_networks.unet, lambda inputs: {
        name: array for name, array in inputs.items() if name not in RESIDUALS}), residuals=True)
    assert finding.cause == "residual_ignored"


def test_encoder_that_scales_its_answer(tmp_path):
    finding, = of_networks(tmp_path, "vae_encoder", Network(toy_networks.vae_encoder, after=lambda out: {
        "latent": out["latent"] * np.float32(SCALE)}), picture=PHOTO)
    assert finding.cause == "latent_scale" and "applied twice" in finding.sentence


class Overflowing(Network):
    """Not finite from a call on; by an answer, or as a stage refuses it."""

    def __init__(self, stage, first, refuses, layer=None):
        super().__init__(toy_networks.HEALTHY[stage])
        self.first, self.refuses = first, refuses
        if layer:
            self.locate = lambda call: layer

    def __call__(self, call):
        out = super().__call__(call)
        if self.calls >= self.first and self.refuses:
            raise NotFinite("The U-Net in x returned NaN.")
        return {name: array + (np.nan if self.calls >= self.first else 0) for name, array in out.items()}


@pytest.mark.parametrize("refuses", [False, True])
@pytest.mark.parametrize("stage", ["unet", "vae_decoder"])
def test_overflow_inside_names_stage_and_step(tmp_path, stage, refuses):
    first = 4 if stage == "unet" else 1
    finding, = of_networks(tmp_path, stage, Overflowing(stage, first, refuses, "middle_block.1"))
    assert (finding.cause, finding.stage) == ("overflow", stage) and "layer 'middle_block.1'" in finding.sentence
    assert ("at step 4 of 5" in finding.sentence) == (stage == "unet")


@pytest.mark.parametrize("precision", HALVES)
@pytest.mark.parametrize("kind", [*KINDS, "one step"])
def test_healthy_networks(tmp_path, precision, kind):
    reference = run(tmp_path / "reference.npz", **KINDS.get(kind, {"steps": 1}))
    found = {stage: changed(stage, first, np.array if first == "ids" else HALVES[precision], precision)
             for stage in toy_networks.HEALTHY for call in reference.of(stage)[:1] for first in list(call.inputs)[:1]}
    rows = list(forced(reference, found))
    before = {stage: network.calls for stage, network in found.items()}
    assert diagnose_networks(reference, found, rows) == []
    spent = {stage: network.calls - before[stage] for stage, network in found.items()}
    assert max(spent.values()) <= (0 if precision == "exact" else 26 if kind == "ControlNet" else 12), spent


def test_a_network_that_refuses_what_it_is_tried_with(tmp_path):
    """Inputs that no run gives may overflow: it is not explained, and nothing fails."""
    def picky(inputs):
        if inputs["timestep"][0] not in (999, 799, 599, 399, 199) or not (inputs["latent"] % 1).any():
            raise NotFinite("The U-Net in x returned NaN.")
        return inputs
    assert of_networks(tmp_path, "unet", Network(toy_networks.unet, picky, lambda out: {
        "prediction": out["prediction"] * np.float32(1.1)})) == []


def test_a_network_that_is_wrong_in_another_way_is_not_explained(tmp_path):
    """Other weights: no classic cause, and none is made up."""
    assert of_networks(tmp_path, "unet", Network(toy_networks.unet, after=lambda out: {
        "prediction": np.roll(out["prediction"], 1, 2) * 0.9})) == []
