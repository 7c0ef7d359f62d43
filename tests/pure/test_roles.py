"""Which stage a network is, from shapes and positions, for every family of bmodels there is."""
from dataclasses import replace

import pytest

from engines.network import ModelFileError, Network
from engines.roles import Binding, family, identify
from tests.helpers.bmodel_writer import (
    WILD,
    controlnet,
    network,
    residual_shapes,
    text_encoder,
    unet_article,
    unet_controlled,
    unet_demo,
    unet_sdxl,
    vae_decoder,
    vae_encoder,
    variants,
)

DENOISER = {"latent": 0, "timestep": 1, "context": 2}


def test_unet_of_the_article_and_of_the_demos():
    for net in (unet_article(), unet_demo(), unet_article(channels=9), unet_demo(8, 8, 64), unet_demo(d=1024)):
        assert identify(net) == Binding("unet", DENOISER, {"prediction": 0})


def test_arguments_are_found_in_any_order():
    net = network("n", {"t": (), "c": (2, 77, 768), "x": (2, 4, 64, 64)}, {"y": (2, 4, 64, 64)})
    assert identify(net).inputs == {"latent": 2, "timestep": 0, "context": 1}


@pytest.mark.parametrize("size", [64, 8])
def test_controlled_unet_has_the_mid_residual_first(size):
    binding = identify(unet_controlled(size, size))
    assert binding.role == "unet"
    assert binding.inputs == DENOISER | {"residual.mid": 3} | {f"residual.{n}": 4 + n for n in range(12)}


def test_controlled_unet_with_the_mid_residual_last():
    shapes = [*residual_shapes(2, 64, 64), (2, 1280, 8, 8)]
    net = network("n", {"x": (2, 4, 64, 64), "t": (1,), "c": (2, 77, 768)}
                  | {f"r{n}": shape for n, shape in enumerate(shapes)}, {"y": (2, 4, 64, 64)})
    assert identify(net).inputs == DENOISER | {f"residual.{n}": 3 + n for n in range(12)} | {"residual.mid": 15}


def test_residuals_all_alike_follow_their_names_then_the_custom():
    def net(*names: str) -> Network:
        return network("n", {"x": (2, 4, 8, 8), "t": (1,), "c": (2, 77, 64)} | dict.fromkeys(names, (2, 32, 8, 8)),
                       {"y": (2, 4, 8, 8)})
    assert identify(net("r0", "r1", "middle")).inputs["residual.mid"] == 5
    assert identify(net("r0", "r1", "r2")).inputs["residual.mid"] == 3


def test_two_level_unet_takes_fewer_residuals():
    shapes = [(2, 64, 4, 4), (2, 32, 8, 8), (2, 32, 8, 8), (2, 32, 4, 4), (2, 64, 4, 4)]
    net = network("n", {"x": (2, 4, 8, 8), "t": (1,), "c": (2, 77, 64)}
                  | {f"r{n}": shape for n, shape in enumerate(shapes)}, {"y": (2, 4, 8, 8)})
    assert identify(net).inputs == DENOISER | {"residual.mid": 3} | {f"residual.{n}": 4 + n for n in range(4)}


def test_sdxl():
    assert identify(unet_sdxl()) == Binding("unet", DENOISER | {"y": 3, "time_ids": 4}, {"prediction": 0})
    one = network("n", {"x": (1, 4, 128, 128), "t": (1,), "c": (1, 77, 2048), "y": (1, 2816)}, {"o": (1, 4, 128, 128)})
    assert identify(one).inputs == DENOISER | {"y": 3}


@pytest.mark.parametrize("image_last, places", [(True, (0, 1, 2, 3)), (False, (0, 3, 1, 2))])
@pytest.mark.parametrize("size", [64, 8])
def test_controlnet(size, image_last, places):
    binding = identify(controlnet(size, size, image_last=image_last))
    assert binding.role == "controlnet"
    assert binding.inputs == dict(zip(("latent", "timestep", "context", "image"), places))
    assert binding.outputs == {f"residual.{n}": n for n in range(12)} | {"residual.mid": 12}


def test_text_encoders():
    assert identify(text_encoder()) == Binding("text_encoder", {"ids": 0}, {"hidden": 0})
    assert identify(text_encoder(64, "last")) == Binding("text_encoder", {"ids": 0}, {"hidden": 0, "pooled": 1})
    assert identify(text_encoder(1024, "first")) == Binding("text_encoder", {"ids": 0}, {"hidden": 1, "pooled": 0})


def test_text_encoder_that_gives_every_hidden_state():
    states = {"hidden_states.0": (1, 77, 768), "text_embeds": (1, 768), "last_hidden_state": (1, 77, 768)}
    assert identify(network("n", {"ids": (1, 77)}, states)).outputs == {"hidden": 2, "pooled": 1}


@pytest.mark.parametrize("size", [(64, 64), (8, 8), (64, 96)])
def test_vae(size):
    assert identify(vae_decoder(*size)) == Binding("vae_decoder", {"latent": 0}, {"image": 0})
    for channels in (4, 8):
        assert identify(vae_encoder(*size, channels)) == Binding("vae_encoder", {"image": 0}, {"moments": 0})


def test_free_sizes_fit_and_names_break_the_tie():
    free = (-1, -1, -1, -1)
    unet = network("main_graph", {"sample": free, "timestep": (-1,), "context": (-1, -1, 768)}, {"out_sample": free})
    assert identify(unet).inputs == DENOISER
    assert identify(network("main_graph", {"latent_sample": free}, {"sample": free})).role == "vae_decoder"
    assert identify(network("main_graph", {"sample": free}, {"latent_sample": free})).role == "vae_encoder"
    assert identify(network("vae_encoder", {"x": free}, {"y": free})).role == "vae_encoder"
    with pytest.raises(ModelFileError):
        identify(network("main_graph", {"x": free}, {"y": free}))
    assert identify(network("n", {"x": (-1, 4, -1, -1)}, {"y": (-1, 3, -1, -1)})).role == "vae_decoder"


def test_all_variants_must_be_the_same_stage():
    assert identify(WILD["many sizes"]).role == "unet"
    with pytest.raises(ModelFileError):
        identify(variants(vae_decoder(), replace(vae_encoder(), name="vae_decoder")))


@pytest.mark.parametrize("net, words", [
    (network("resnet", {"data": (1, 3, 224, 224)}, {"prob": (1, 1000)}), "'data' (1x3x224x224)"),
    (network("odd", {"x": (1, 4, 64, 64)}, {"y": (1, 3, 256, 256)}), "'y' (1x3x256x256)"),
    (network("lcm", {"x": (1, 4, 64, 64), "t": (1,), "c": (1, 77, 768), "w": (1, 256)}, {"y": (1, 4, 64, 64)}),
     "'w' (1x256)"),
    (network("one residual", {"x": (1, 4, 64, 64), "t": (), "c": (1, 77, 768), "r": (1, 320, 64, 64)},
             {"y": (1, 4, 64, 64)}), "'t' (one number)"),
    (network("two outputs", {"x": (1, 4, 64, 64), "t": (1,), "c": (1, 77, 768)},
             {"y": (1, 4, 64, 64), "z": (1, 4, 64, 64)}), "and 'z'"),
    (network("smaller", {"x": (1, 4, 64, 64), "t": (1,), "c": (1, 77, 768)}, {"y": (1, 4, 32, 32)}), "gives 'y'"),
    (network("masked", {"ids": (1, 77), "mask": (1, 77)}, {"h": (1, 77, 768)}), "'ids' (1x77) and 'mask' (1x77)"),
    (Network("empty", (), ()), "takes nothing and gives nothing"),
    (network("many", {f"p{n}": (2, 2) for n in range(9)}, {"y": (1,)}), "and 5 more"),
])
def test_what_is_no_stage_is_said_in_words(net, words):
    with pytest.raises(ModelFileError) as caught:
        identify(net)
    message = str(caught.value)
    assert repr(net.name) in message and words in message and "\n" not in message
    assert "text encoder, U-Net, ControlNet, VAE decoder or VAE encoder" in message


def test_family():
    nets = {"sd1": [unet_article(), unet_demo(8, 8, 64), controlnet(), unet_controlled()], "sd2": [unet_demo(d=1024)],
            "sdxl": [unet_sdxl()], None: [text_encoder(), text_encoder(1024), vae_decoder(), vae_encoder()]}
    for expected, group in nets.items():
        for net in group:
            assert family(identify(net), net) == expected
