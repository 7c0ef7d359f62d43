"""Every stock node that takes a MODEL, CLIP, VAE or CONDITIONING works on ours, with the right numbers.

The networks are arithmetic (tests/helpers/onnx_nets.py), so that the expected numbers come from numpy (expected.py).
"""
from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from tests.helpers import onnx_nets
from tests.host import expected
from tests.host.expected import close, hidden
from tests.host.graphs import CATS, DOGS, Graph, latent, latents, load_latent, load_picture, pictures, refusal

CAT, DOG = hidden(CATS), hidden(DOGS)


def choices(server, node: str, name: str) -> list[str]:
    return server.get(f"/object_info/{node}")[node]["input"]["required"][name][0]


# -- samplers ------------------------------------------------------------------------------------------------------
def test_ksampler_by_hand(server, graph, loaded):
    model, positive, negative, *_ = loaded
    close(latent(server, graph.sample(model, positive, negative, graph.empty())), expected.euler(CAT, DOG))


def test_every_sampler(server, subtests):
    names = choices(server, "KSampler", "sampler_name")
    assert len(names) > 30
    for name in names:
        with subtests.test(name):
            graph = Graph()
            result = latent(server, graph.picture(sampler_name=name, scheduler="karras", size=(128, 64)))
            assert result.shape == (1, 4, 8, 16) and np.isfinite(result).all() and result.std() > 0


def test_every_scheduler(server, subtests):
    names = choices(server, "KSampler", "scheduler")
    assert len(names) > 5
    for name in names:
        with subtests.test(name):
            result = latent(server, Graph().picture(scheduler=name))
            assert np.isfinite(result).all() and result.std() > 0


def test_two_halves_equal_the_whole(server, graph, loaded):
    model, positive, negative, *_ = loaded
    whole = graph.sample(model, positive, negative, graph.empty())
    half = graph.sample_part(model, positive, negative, graph.empty(), end_at_step=2)
    halves = graph.sample_part(model, positive, negative, half, start_at_step=2, add_noise="disable")
    whole, half, halves = latents(server, whole, half, halves)
    # a latent leaves and enters the sampler by a multiplication with 0.18215
    np.testing.assert_allclose(halves, whole, rtol=1e-5, atol=1e-4)
    assert np.abs(half - whole).max() > 1


@pytest.mark.parametrize("guider", ["BasicGuider", "CFGGuider"])
def test_sampler_custom_advanced(server, graph, loaded, guider):
    model, positive, negative, *_ = loaded
    guide = (graph.BasicGuider(model=model, conditioning=positive) if guider == "BasicGuider"
             else graph.CFGGuider(model=model, positive=positive, negative=negative, cfg=5.0))
    sigmas = graph.BasicScheduler(model=model, scheduler="simple", steps=4, denoise=1.0)
    sampled = graph.SamplerCustomAdvanced(
        noise=graph.RandomNoise(noise_seed=1), guider=guide, sampler=graph.KSamplerSelect(sampler_name="euler"),
        sigmas=sigmas, latent_image=graph.empty())
    output, denoised = latents(server, sampled[0], sampled[1])
    close(output, expected.euler(CAT, DOG, cfg=1.0 if guider == "BasicGuider" else 5.0))
    close(denoised, output)


@pytest.mark.parametrize("cfg", [0.0, 1.0, 7.5])
def test_cfg(server, cfg):
    close(latent(server, Graph().picture(cfg=cfg)), expected.euler(CAT, DOG, cfg=cfg))


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5])
def test_rows_of_a_batch_do_not_mix(server, base, graph, loaded, batch):
    """The U-Net takes two rows a call, so that an odd batch is padded: row k equals the same latent alone."""
    model, positive, negative, *_ = loaded
    rows = np.random.default_rng(batch).normal(size=(batch, 4, 8, 8)) * 10
    together = load_latent(graph, base, rows)

    def run(node):
        return graph.sample_part(model, positive, negative, node, add_noise="disable", start_at_step=1)
    alone = [run(graph.LatentFromBatch(samples=together, batch_index=row, length=1)) for row in range(batch)]
    result, *alone = latents(server, run(together), *alone)
    np.testing.assert_array_equal(result, np.concatenate(alone))
    assert len(np.unique(result[:, 0, 0, 0])) == batch


def test_image_to_image_after_latent_upscale(server, base, graph, loaded):
    model, positive, negative, *_ = loaded
    small = np.random.default_rng(0).normal(size=(1, 4, 8, 8))
    large = graph.LatentUpscale(samples=load_latent(graph, base, small), upscale_method="nearest-exact", width=128,
                                height=64, crop="disabled")
    result = latent(server, graph.sample(model, positive, negative, large, denoise=0.5))
    close(result, expected.euler(CAT, DOG, (1, 4, 8, 16), sigmas=expected.schedule(8)[4:],
                                 picture=np.repeat(small, 2, axis=3)))


# -- conditioning --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("text", "words"), [
    ("", []), (CATS + DOGS, [CATS, DOGS]), (f"({CATS}:1.3) {DOGS}", [(CATS, 1.3), DOGS]),
    (f"{DOGS} ({CATS}:0.2)", [DOGS, (CATS, 0.2)]), (f"({CATS})", [(CATS, 1.1)]),
])
def test_prompt_weights(server, text, words):
    close(latent(server, Graph().picture(positive=text, cfg=1.0)), expected.euler(hidden(*words), DOG, cfg=1.0))


def test_conditioning_average(server, graph, loaded):
    model, positive, negative, *_ = loaded
    mixed = graph.ConditioningAverage(conditioning_to=positive, conditioning_from=negative,
                                      conditioning_to_strength=0.25)
    close(latent(server, graph.sample(model, mixed, negative, graph.empty())),
          expected.euler(CAT / 4 + DOG * 3 / 4, DOG))


def test_conditioning_combine(server, graph, loaded):
    """Two conditions over the whole picture: the mean of their predictions."""
    model, positive, negative, *_ = loaded
    both = graph.ConditioningCombine(conditioning_1=positive, conditioning_2=negative)
    close(latent(server, graph.sample(model, both, negative, graph.empty())), expected.euler((CAT + DOG) / 2, DOG))


def test_conditioning_concat_of_equal_prompts_is_exact(server, graph, loaded):
    model, positive, negative, *_ = loaded
    twice = graph.ConditioningConcat(conditioning_to=positive, conditioning_from=positive)
    close(latent(server, graph.sample(model, twice, negative, graph.empty())), expected.euler(CAT, DOG))


def test_conditioning_concat_of_two_prompts_is_refused(server, graph, loaded):
    model, positive, negative, *_ = loaded
    longer = graph.ConditioningConcat(conditioning_to=positive, conditioning_from=negative)
    refusal(server, graph.sample(model, longer, negative, graph.empty()), "154 tokens", "77")


def halves(graph: Graph, base, left, right):
    """Conditioning of one prompt for the left half of a 64x64 picture and another for the right half."""
    levels = np.zeros((64, 64, 4))
    levels[:, :32, 3] = 255                                  # LoadImage's mask is where alpha is 0: the right half
    mask = load_picture(graph, base, levels)[1]
    parts = [graph.ConditioningSetMask(conditioning=prompt, mask=half, strength=1.0, set_cond_area="default")
             for prompt, half in ((left, graph.InvertMask(mask=mask)), (right, mask))]
    return graph.ConditioningCombine(conditioning_1=parts[0], conditioning_2=parts[1])


def test_conditioning_set_mask(server, base, graph, loaded):
    """"cat" left and "dog" right: each half is as if the whole picture were it."""
    model, positive, negative, *_ = loaded
    result = latent(server, graph.sample(model, halves(graph, base, positive, negative), negative, graph.empty()))
    close(result[..., :4], expected.euler(CAT, DOG)[..., :4])
    close(result[..., 4:], expected.euler(DOG, DOG)[..., 4:])


def test_conditioning_zero_out(server, graph, loaded):
    model, positive, *_ = loaded
    nothing = graph.ConditioningZeroOut(conditioning=positive)
    close(latent(server, graph.sample(model, positive, nothing, graph.empty())), expected.euler(CAT, 0 * CAT))


def area(graph: Graph, prompt, width: int, x: int):
    return graph.ConditioningSetArea(conditioning=prompt, width=width, height=64, x=x, y=0, strength=1.0)


def test_conditioning_set_area_of_a_compiled_size(server, graph, loaded):
    """A 64x64 part of a 128x64 picture, and the model folder has U-Nets of both sizes."""
    model, positive, negative, *_ = loaded
    both = graph.ConditioningCombine(conditioning_1=area(graph, positive, 64, 0),
                                     conditioning_2=area(graph, negative, 64, 64))
    result = latent(server, graph.sample(model, both, negative, graph.empty(128, 64)))
    close(result[..., :8], expected.euler(CAT, DOG, (1, 4, 8, 16))[..., :8])
    close(result[..., 8:], expected.euler(DOG, DOG, (1, 4, 8, 16))[..., 8:])


def test_conditioning_set_area_of_another_size(server, graph, loaded):
    model, positive, negative, *_ = loaded
    both = graph.ConditioningCombine(conditioning_1=area(graph, positive, 96, 0), conditioning_2=negative)
    refusal(server, graph.sample(model, both, negative, graph.empty(128, 64)), "ConditioningSetArea", "96x64", "64x64",
            "128x64", "ConditioningSetMask")


def test_conditioning_timestep_range(server, graph, loaded):
    """"cat" for the first half of the noise schedule, "dog" from then on."""
    model, positive, negative, *_ = loaded
    first = graph.ConditioningSetTimestepRange(conditioning=positive, start=0.0, end=0.5)
    second = graph.ConditioningSetTimestepRange(conditioning=negative, start=0.5, end=1.0)
    both = graph.ConditioningCombine(conditioning_1=first, conditioning_2=second)
    result = latent(server, graph.sample(model, both, negative, graph.empty()))
    close(result, expected.euler(lambda sigma: CAT if sigma > expected.SIGMAS[500] else DOG, DOG))


# -- the VAE -------------------------------------------------------------------------------------------------------
SIZES = [(64, 64), (64, 128), (72, 200), (8, 8), (136, 40)]      # compiled, two tiles, odd, less than a tile, both


def decoded(values: np.ndarray) -> np.ndarray:
    """What the arithmetic decoder draws, as 8-bit levels (B,H,W,3)."""
    picture = values[:, :3].repeat(8, axis=2).repeat(8, axis=3).transpose(0, 2, 3, 1)
    return (np.clip((picture + 1) / 2, 0, 1) * 255).astype(int)


def decoders(graph: Graph, vae, samples) -> dict:
    return {"VAEDecode": lambda: graph.VAEDecode(samples=samples, vae=vae),
            "VAEDecodeTiled": lambda: graph.VAEDecodeTiled(samples=samples, vae=vae, tile_size=512, overlap=64,
                                                           temporal_size=64, temporal_overlap=8),
            "SophgoVAEDecode": lambda: graph.SophgoVAEDecode(samples=samples, vae=vae, overlap=16)}


def encoders(graph: Graph, vae, pixels) -> dict:
    return {"VAEEncode": lambda: graph.VAEEncode(pixels=pixels, vae=vae),
            "VAEEncodeTiled": lambda: graph.VAEEncodeTiled(pixels=pixels, vae=vae, tile_size=512, overlap=64,
                                                           temporal_size=64, temporal_overlap=8),
            "SophgoVAEEncode": lambda: graph.SophgoVAEEncode(pixels=pixels, vae=vae, overlap=16)}


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[1]}x{size[0]}")
@pytest.mark.parametrize("node", ["VAEDecode", "VAEDecodeTiled", "SophgoVAEDecode"])
def test_decode_any_size(server, base, graph, loaded, node, size):
    values = np.random.default_rng(1).uniform(-1.1, 1.1, (2, 4, size[0] // 8, size[1] // 8))
    got = pictures(server, decoders(graph, loaded[-1], load_latent(graph, base, values))[node]())
    wanted = decoded(values)
    assert got.shape == wanted.shape and np.abs(got - wanted).max() <= 1      # one level: float32 just below a step


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[1]}x{size[0]}")
@pytest.mark.parametrize("node", ["VAEEncode", "VAEEncodeTiled", "SophgoVAEEncode"])
def test_encode_any_size(server, base, graph, loaded, node, size):
    levels = np.random.default_rng(2).integers(0, 256, (*size, 3))
    got = latent(server, encoders(graph, loaded[-1], load_picture(graph, base, levels))[node]())
    averages = (levels / 127.5 - 1).reshape(size[0] // 8, 8, size[1] // 8, 8, 3).mean((1, 3)).transpose(2, 0, 1)
    np.testing.assert_allclose(got, averages[None, [0, 1, 2, 0]], atol=1e-5)


def test_picture_of_an_odd_size_is_cropped(server, base, graph, loaded):
    levels = np.random.default_rng(3).integers(0, 256, (70, 75, 3))
    got = latent(server, graph.VAEEncode(pixels=load_picture(graph, base, levels), vae=loaded[-1]))
    whole = latent(server, graph.VAEEncode(pixels=load_picture(graph, base, levels[3:67, 1:73]), vae=loaded[-1]))
    np.testing.assert_array_equal(got, whole)      # ComfyUI crops about the middle


def test_decoded_and_encoded_again(server, base, graph, loaded):
    """In float32 all the way: what tiles blend is the exact picture."""
    values = np.random.default_rng(4).uniform(-1, 1, (1, 4, 9, 25)).astype(np.float32)
    values[:, 3] = values[:, 0]
    again = graph.VAEEncode(pixels=graph.VAEDecode(samples=load_latent(graph, base, values), vae=loaded[-1]),
                            vae=loaded[-1])
    np.testing.assert_allclose(latent(server, again), values, atol=1e-6)


@pytest.mark.parametrize("node", ["SophgoVAEDecode", "VAEDecode"])
def test_our_vae_nodes_take_a_stock_vae(server, base, graph, node):
    """ComfyUI's own VAE without a network: a latent is the picture."""
    stock = graph.VAELoader(vae_name="pixel_space")
    levels = np.random.default_rng(5).integers(0, 256, (16, 24, 3))
    encoded = encoders(graph, stock, load_picture(graph, base, levels))[node.replace("Decode", "Encode")]()
    got = pictures(server, decoders(graph, stock, encoded)[node]())
    assert np.abs(got[0] - levels).max() <= 1


# -- inpainting ----------------------------------------------------------------------------------------------------
def half_masked(graph: Graph, base) -> tuple:
    """(the picture's levels, IMAGE, MASK of its right half)."""
    levels = np.random.default_rng(6).integers(0, 256, (64, 64, 4))
    levels[..., 3] = 255
    levels[:, 32:, 3] = 0
    image = load_picture(graph, base, levels)
    return levels, image[0], image[1]


def test_set_latent_noise_mask(server, base, graph, loaded):
    model, positive, negative, _, vae = loaded
    _, image, mask = half_masked(graph, base)
    encoded = graph.VAEEncode(pixels=image, vae=vae)
    masked = graph.SetLatentNoiseMask(samples=encoded, mask=mask)
    before, after = latents(server, encoded, graph.sample(model, positive, negative, masked))
    np.testing.assert_allclose(after[..., :4], before[..., :4], atol=1e-5)
    assert np.abs(after[..., 4:] - before[..., 4:]).min() > 0.1


def test_vae_encode_for_inpaint(server, base, graph, loaded):
    model, positive, negative, _, vae = loaded
    levels, image, mask = half_masked(graph, base)
    encoded = graph.VAEEncodeForInpaint(pixels=image, vae=vae, mask=mask, grow_mask_by=0)
    before, after = latents(server, encoded, graph.sample(model, positive, negative, encoded))
    np.testing.assert_allclose(after[..., :4], before[..., :4], atol=1e-5)
    np.testing.assert_allclose(before[..., 4:], 0, atol=0.01)        # the masked half is grey
    assert np.abs(after[..., 4:]).min() > 0.1


def test_inpaint_model_conditioning(server, base, graph, loaded):
    """A 9-channel U-Net whose prediction is made of its last four channels: the masked picture's latent."""
    folder = onnx_nets.checkpoint(base / "models" / "sophgo" / "inpaint", channels=9)
    read_channels(folder / "unet_8x8.onnx", 5, 9)
    model, clip, vae = graph.checkpoint("inpaint")
    levels, image, mask = half_masked(graph, base)
    conditioned = graph.InpaintModelConditioning(
        positive=graph.prompt(clip, CATS), negative=graph.prompt(clip, DOGS), vae=vae, pixels=image, mask=mask,
        noise_mask=False)
    sampled = graph.sample(model, conditioned[0], conditioned[1], conditioned[2], steps=1, cfg=1.0)
    encoded = levels[..., :3] / 255
    encoded[:, 32:] = 0.5
    masked = (encoded * 2 - 1).reshape(8, 8, 8, 8, 3).mean((1, 3)).transpose(2, 0, 1)[None, [0, 1, 2, 0]]
    sigma = expected.SIGMAS[-1]
    x = expected.noise((1, 4, 8, 8)) * np.sqrt(1 + sigma ** 2) + masked_latent_image(levels) * expected.LATENT_SCALE
    prediction = onnx_nets.unet_result(masked * expected.LATENT_SCALE, np.array([999]), CAT[None])
    close(latent(server, sampled), (x - sigma * prediction) / expected.LATENT_SCALE)


def read_channels(path, start: int, end: int) -> None:
    """Make an arithmetic U-Net read other channels of its latent than the first four."""
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        if tensor.name in ("zero", "four"):
            tensor.CopyFrom(numpy_helper.from_array(np.array([start if tensor.name == "zero" else end]), tensor.name))
    onnx.save(model, path)


def masked_latent_image(levels: np.ndarray) -> np.ndarray:
    """InpaintModelConditioning's own latent: of the whole picture."""
    return (levels[..., :3] / 127.5 - 1).reshape(8, 8, 8, 8, 3).mean((1, 3)).transpose(2, 0, 1)[None, [0, 1, 2, 0]]


# -- nodes that patch a model --------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["eps", "v_prediction"])
def test_model_sampling_discrete(server, graph, loaded, kind):
    model, positive, negative, *_ = loaded
    patched = graph.ModelSamplingDiscrete(model=model, sampling=kind, zsnr=False)
    result = latent(server, graph.sample(patched, positive, negative, graph.empty()))
    close(result, expected.euler(CAT, DOG, v_prediction=kind == "v_prediction"))


def test_rescale_cfg(server, base, graph, loaded):
    """Guidance that differs over the picture spreads its values more than the prompt alone; this node takes that back."""
    model, positive, negative, *_ = loaded
    both = halves(graph, base, positive, negative)

    def spread(node):
        return graph.sample(node, both, negative, graph.empty(), steps=1, cfg=20.0)
    plain, none, all = latents(server, spread(model), *(
        spread(graph.RescaleCFG(model=model, multiplier=amount)) for amount in (0.0, 1.0)))
    close(none, plain)
    assert all.std() < plain.std() * 0.99


def test_two_checkpoints_in_one_graph(server, base, graph, loaded):
    """The second checkpoint takes its timestep as one float for the whole batch, and has another file name."""
    onnx_nets.checkpoint(base / "models" / "sophgo" / "second", batch=1, timestep_shape=(1,), timestep=onnx_nets.FLOAT)
    model, positive, negative, clip, vae = loaded
    other, other_clip, _ = graph.checkpoint("second")
    first = graph.sample(model, positive, negative, graph.empty())
    second = graph.sample(other, graph.prompt(other_clip, DOGS), negative, graph.empty(), seed=2)
    crossed = graph.sample(other, positive, negative, first, denoise=0.5)
    first, second, crossed = latents(server, first, second, crossed)
    close(first, expected.euler(CAT, DOG))
    close(second, expected.euler(DOG, DOG, seed=2))
    close(crossed, expected.euler(CAT, DOG, sigmas=expected.schedule(8)[4:], picture=first))


def test_text_encode_node_gives_both_prompts(server, graph, loaded):
    model, _, _, clip, _ = loaded
    both = graph.SophgoTextEncode(clip=clip, prompt=f"({CATS}:1.3)", negative_prompt=DOGS)
    close(latent(server, graph.sample(model, both[0], both[1], graph.empty())), expected.euler(hidden((CATS, 1.3)), DOG))


def test_loaders_of_single_files(server, graph):
    """U-Net, CLIP and VAE one by one, each from its own file."""
    model = graph.SophgoLoadUNet(unet_name="arithmetic/unet_8x8.onnx", device="onnx")
    clip = graph.SophgoLoadCLIP(clip_name="arithmetic/text_encoder.onnx", device="auto", long_prompts="error")
    vae = graph.SophgoLoadVAE(decoder_name="arithmetic/vae_decoder.onnx", encoder_name="arithmetic/vae_encoder.onnx",
                              device="auto", latent_scale="outside")
    sampled = graph.sample(model, graph.prompt(clip, CATS), graph.prompt(clip, DOGS), graph.empty())
    wanted = expected.euler(CAT, DOG)
    close(latent(server, sampled), wanted)
    assert np.abs(pictures(server, graph.VAEDecode(samples=sampled, vae=vae)) - decoded(wanted)).max() <= 1


@pytest.mark.parametrize("where", ["outside", "inside"])
def test_latent_scale_inside_the_network(server, base, graph, where):
    """A decoder with the scale inside takes scaled latents, so that it gets each value times 0.18215."""
    vae = graph.SophgoLoadVAE(decoder_name="arithmetic", encoder_name="same", device="auto", latent_scale=where)
    values = np.random.default_rng(7).uniform(-4, 4, (1, 4, 8, 8))
    got = pictures(server, graph.VAEDecode(samples=load_latent(graph, base, values), vae=vae))
    assert np.abs(got - decoded(values * (expected.LATENT_SCALE if where == "inside" else 1))).max() <= 1
