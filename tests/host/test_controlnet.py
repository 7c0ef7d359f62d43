"""A stock ControlNet on a compiled U-Net does what it does on the torch U-Net, at each of its places.

The ControlNet (custom_nodes/testing) says something else at each place, and the demo's U-Net is real, so that no two
places can be mixed up unnoticed.
"""
from __future__ import annotations

import numpy as np
import pytest

from compiler.checkpoint import Checkpoint
from compiler.networks import Weights, text_encoder, unet, vae_decoder
from tests.conftest import need
from tests.host.graphs import Graph, latents, load_picture, refusal
from tools.install import DEMO_CHECKPOINT

CONTROLLED, LONG = "takes controlnets", "takes long prompts"
SAMPLING = {"steps": 2, "cfg": 3.0}


@pytest.fixture(scope="module")
def models(base) -> None:
    """ONNX graphs as they are compiled from: with residual inputs; with a context of 154 tokens."""
    need(DEMO_CHECKPOINT.exists(), "the demo's checkpoint is not written: run 'python tools/install.py host'")
    checkpoint = Checkpoint(DEMO_CHECKPOINT)
    for name, options in ((CONTROLLED, {"control": True}), (LONG, {"tokens": 154})):
        folder = base / "models" / "sophgo" / name
        folder.mkdir(parents=True)
        with Weights(folder / "weights") as weights:
            text_encoder(checkpoint.part("text_encoder"), weights).save(folder)
            unet(checkpoint.part("unet"), weights, 64, 64, **options).save(folder)
            vae_decoder(checkpoint.part("vae"), weights, 64, 64).save(folder)


def compiled(graph: Graph, name: str = CONTROLLED) -> tuple:
    """(MODEL, CLIP)."""
    return (graph.SophgoLoadUNet(unet_name=name, device="onnx"),
            graph.SophgoLoadCLIP(clip_name=name, device="onnx", long_prompts="error"))


def conditions(graph: Graph, clip, prompt: str = "a red circle"):
    return graph.prompt(clip, prompt), graph.prompt(clip, "")


def controlled(graph: Graph, base, model, clip, order: str = "0123", strength: float = 0.5, kind: str = "controlnet",
               both: bool = True, batch: int = 1, **sampling):
    """A LATENT by stock ControlNetApply (of the positive alone) or ControlNetApplyAdvanced (of both)."""
    hint = load_picture(graph, base, np.full((64, 64, 3), 128))
    net = graph.TestControlNet(order=order, kind=kind)
    positive, negative = conditions(graph, clip)
    if both:
        applied = graph.ControlNetApplyAdvanced(positive=positive, negative=negative, control_net=net, image=hint,
                                                strength=strength, start_percent=0.0, end_percent=1.0)
        positive, negative = applied[0], applied[1]
    else:
        positive = graph.ControlNetApply(conditioning=positive, control_net=net, image=hint, strength=strength)
    return graph.sample(model, positive, negative, graph.empty(batch=batch), **SAMPLING, **sampling)


def close(got: np.ndarray, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(got, wanted, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.parametrize(("both", "batch"), [(True, 1), (False, 1), (False, 3)])
def test_it_does_what_it_does_on_the_torch_unet(server, base, models, both, batch):
    graph = Graph()
    model, clip = compiled(graph)
    reference = graph.SophgoLoadReference(ckpt_name="shapes.safetensors")
    ours = controlled(graph, base, model, clip, both=both, batch=batch)
    theirs = controlled(graph, base, reference[0], reference[1], both=both, batch=batch)
    without = graph.sample(model, *conditions(graph, clip), graph.empty(batch=batch), **SAMPLING)
    ours, theirs, without = latents(server, ours, theirs, without)
    close(ours, theirs)
    assert np.abs(ours - without).max() > 0.01 * np.abs(without).max(), "the ControlNet does nothing"


def test_two_places_that_are_swapped_make_another_picture_and_the_same_as_in_torch(server, base, models):
    """The first two have the same shape, so only their order tells them apart."""
    graph = Graph()
    model, clip = compiled(graph)
    reference = graph.SophgoLoadReference(ckpt_name="shapes.safetensors")
    straight = controlled(graph, base, model, clip)
    swapped = controlled(graph, base, model, clip, order="1023")
    theirs = controlled(graph, base, reference[0], reference[1], order="1023")
    straight, swapped, theirs = latents(server, straight, swapped, theirs)
    close(swapped, theirs)
    assert np.abs(swapped - straight).max() > 0.01 * np.abs(straight).max()


@pytest.mark.parametrize(("kind", "strength"), [("no middle", 0.5), ("controlnet", 0.0)])
def test_what_a_controlnet_leaves_out_is_zero(server, base, models, kind, strength):
    graph = Graph()
    model, clip = compiled(graph)
    reference = graph.SophgoLoadReference(ckpt_name="shapes.safetensors")
    ours = controlled(graph, base, model, clip, kind=kind, strength=strength)
    theirs = controlled(graph, base, reference[0], reference[1], kind=kind, strength=strength)
    close(*latents(server, ours, theirs))


def test_a_unet_without_these_inputs_refuses(server, base, graph, loaded):
    model, _, _, clip, _ = loaded
    refusal(server, controlled(graph, base, model, clip), "takes no ControlNet residuals", "'controlnet' switched on")


def test_an_adapter_of_another_kind_is_refused(server, base, models):
    graph = Graph()
    model, clip = compiled(graph)
    refusal(server, controlled(graph, base, model, clip, kind="adapter"), "T2I-Adapter", "use a ControlNet")


def test_a_longer_context_takes_longer_prompts(server, base, models):
    """154 tokens: a prompt of two sections passes whole, a short one is repeated, and both are as in torch."""
    graph, words = Graph(), "a small blue star, top left, yellow background " * 12
    reference = graph.SophgoLoadReference(ckpt_name="shapes.safetensors")
    loader = graph.SophgoLoadCheckpoint(model_name=LONG, device="onnx", unet_device="same", long_prompts="error")
    pairs = []
    for prompt in (words, "a red circle"):
        ours = graph.sample(loader[0], *conditions(graph, loader[1], prompt), graph.empty(), **SAMPLING)
        theirs = graph.sample(reference[0], *conditions(graph, reference[1], prompt), graph.empty(), **SAMPLING)
        pairs.append((ours, theirs))
    for ours, theirs in pairs:
        close(*latents(server, ours, theirs))
    longer = graph.sample(loader[0], *conditions(graph, loader[1], words * 3), graph.empty(), **SAMPLING)
    refusal(server, longer, "takes 150")
