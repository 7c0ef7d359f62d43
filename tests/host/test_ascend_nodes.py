"""SDXL on MindSpore's CPU back end in a real ComfyUI: our sampler, stock samplers and torch give the same numbers.

The model is tiny and random, so that its latents have a standard deviation of about 100; the tolerance is absolute.
"""
from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from tests.helpers.sdxl_models import write_folder
from tests.host.expected import schedule
from tests.host.graphs import TINY_SDXL, latent, latents, load_latent, load_picture, pictures
from tools.inprocess import load_pack

TOLERANCE = 1e-3
SCALE = 0.13025
CAT, DOG = "a cat on a (red:1.3) mat", "a dog"

pytestmark = pytest.mark.usefixtures("tiny_sdxl")


@pytest.fixture
def sdxl(graph):
    """(model, positive, negative, clip, vae) in `graph`."""
    model, clip, vae = graph.sdxl()
    return model, *graph.condition(clip, CAT, DOG), clip, vae


def agree(server, *nodes) -> list[np.ndarray]:
    """Run the nodes' graph: LATENTs that must be alike."""
    first, *others = latents(server, *nodes)
    assert np.isfinite(first).all() and first.std() > 1
    for other in others:
        np.testing.assert_allclose(other, first, rtol=0, atol=TOLERANCE)
    return [first, *others]


# -- sampling ------------------------------------------------------------------------------------------------------
def test_euler_is_ksampler_s(server, graph, sdxl):
    """The numbers the help page states: 20 steps, `euler` with `simple`."""
    model, positive, negative, *_ = sdxl
    agree(server, graph.sample_sdxl(model, positive, negative, graph.empty(), steps=20),
          graph.sample(model, positive, negative, graph.empty(), steps=20))


def test_noise_of_every_step_is_ksampler_s(server, graph, sdxl):
    model, positive, negative, *_ = sdxl
    agree(server, graph.sample_sdxl(model, positive, negative, graph.empty(), sampler_name="EulerAncestral"),
          graph.sample(model, positive, negative, graph.empty(), sampler_name="euler_ancestral"))


@pytest.mark.parametrize("guider", ["VanillaCFG", "Identity"])
def test_without_guidance(server, graph, sdxl, guider):
    model, positive, negative, *_ = sdxl
    agree(server, graph.sample_sdxl(model, positive, negative, graph.empty(), cfg=1.0 if guider == "VanillaCFG" else 5.0,
                                    guider=guider),
          graph.sample(model, positive, negative, graph.empty(), cfg=1.0))


def test_image_to_image_in_a_mask(server, base, graph, sdxl):
    """Two pictures of a batch, denoised by half, made anew on the right only."""
    model, positive, negative, *_ = sdxl
    start = np.random.default_rng(1).normal(size=(2, 4, 8, 8)) * 5
    levels = np.zeros((64, 64, 4))
    levels[:, :32, 3] = 255                                  # LoadImage's mask is where alpha is 0
    masked = graph.SetLatentNoiseMask(samples=load_latent(graph, base, start), mask=load_picture(graph, base, levels)[1])
    result, _ = agree(server, graph.sample_sdxl(model, positive, negative, masked, denoise=0.5),
                      graph.sample(model, positive, negative, masked, denoise=0.5))
    np.testing.assert_allclose(result[..., :3], start[..., :3], atol=1e-4)
    assert np.abs(result - start)[..., 5:].mean() > 1


def test_a_row_of_a_batch_has_its_own_noise(server, graph, sdxl):
    """The second picture of a batch alone is the same picture, since latents know their place (batch_index)."""
    model, positive, negative, *_ = sdxl
    batch = graph.empty(batch=2)
    alone = graph.LatentFromBatch(samples=batch, batch_index=1, length=1)
    for noise in ("comfy", "numpy"):
        both, second = latents(server, graph.sample_sdxl(model, positive, negative, batch, noise=noise, steps=2),
                               graph.sample_sdxl(model, positive, negative, alone, noise=noise, steps=2))
        np.testing.assert_allclose(second[0], both[1], rtol=0, atol=TOLERANCE)
        assert np.abs(both[0] - both[1]).max() > 1


@pytest.mark.parametrize("seed", [1, 2 ** 40 + 1])
def test_noise_of_numpy(server, base, graph, sdxl, seed):
    """The article's: np.random.seed(seed), then randn; given to KSampler as a latent that needs no more noise."""
    model, positive, negative, *_ = sdxl
    if seed < 2 ** 32:
        np.random.seed(seed)
        drawn = np.random.randn(1, 4, 8, 8)
    else:
        drawn = np.random.RandomState([seed % 2 ** 32, seed >> 32]).randn(1, 4, 8, 8)
    noisy = load_latent(graph, base, drawn * np.sqrt(1 + schedule(2)[0] ** 2) / SCALE)
    agree(server, graph.sample_sdxl(model, positive, negative, graph.empty(), seed=seed, noise="numpy", steps=2),
          graph.sample_part(model, positive, negative, noisy, add_noise="disable", steps=2))


def test_nothing_to_denoise(server, base, graph, sdxl):
    model, positive, negative, *_ = sdxl
    start = np.random.default_rng(2).normal(size=(1, 4, 8, 8))
    result = latent(server, graph.sample_sdxl(model, positive, negative, load_latent(graph, base, start), denoise=0.0))
    np.testing.assert_array_equal(result, start.astype(np.float32))


def test_churn_snapping_and_schedules_make_a_difference(server, graph, sdxl):
    """Each of what the help page says KSampler does otherwise; none of it may be lost on the way to the worker."""
    model, positive, negative, *_ = sdxl
    settings = [{}, {"s_churn": 3.0}, {"s_churn": 3.0, "snap_sigmas": False}, {"s_churn": 3.0, "s_noise": 1.1},
                {"s_churn": 3.0, "s_tmax": 1.0}, {"discretization": "EDM"}, {"discretization": "DiffusersDDPM"}]
    results = latents(server, *(graph.sample_sdxl(model, positive, negative, graph.empty(), steps=3, cfg=1.0, **setting)
                                for setting in settings))
    for i, one in enumerate(results):
        assert np.isfinite(one).all() and all(np.abs(one - other).max() > 0.01 for other in results[:i]), settings[i]


# -- conditions ----------------------------------------------------------------------------------------------------
def test_conditions_of_either_kind_work_in_either_sampler(server, graph, sdxl):
    """AscendSDXLConditioner is CLIPTextEncodeSDXL with height first in nobody's mind but the model's."""
    model, _, _, clip, _ = sdxl
    sizes = {"width": 100, "height": 80, "crop_w": 8, "crop_h": 16, "target_width": 64, "target_height": 72}
    stock = [graph.CLIPTextEncodeSDXL(clip=clip, text_g=text, text_l=text, **sizes) for text in (CAT, DOG)]
    ours = graph.condition(clip, CAT, DOG, original_width=100, original_height=80, crop_top=16, crop_left=8,
                           target_width=64, target_height=72)
    agree(server, graph.sample_sdxl(model, *stock, graph.empty()), graph.sample(model, *stock, graph.empty()),
          graph.sample_sdxl(model, *ours, graph.empty()), graph.sample(model, *ours, graph.empty()))


def test_plain_prompts_have_the_latent_s_size(server, graph, sdxl):
    model, _, _, clip, _ = sdxl
    plain = [graph.prompt(clip, text) for text in (CAT, DOG)]
    ours = graph.condition(clip, CAT, DOG, original_width=128, original_height=64, target_width=128, target_height=64)
    agree(server, graph.sample_sdxl(model, *plain, graph.empty(128, 64), steps=2),
          graph.sample_sdxl(model, *ours, graph.empty(128, 64), steps=2))


def test_areas_masks_strengths_and_times(server, base, graph, sdxl):
    """Conditions of different sizes, lengths and vectors, each where and when it acts, as in KSampler."""
    model, positive, negative, clip, _ = sdxl
    levels = np.zeros((64, 64, 4))
    levels[:, :32, 3] = np.linspace(0, 255, 32)              # LoadImage's mask is where alpha is 0
    parts = [
        graph.ConditioningSetArea(conditioning=graph.prompt(clip, CAT), width=64, height=64, x=32, y=48, strength=0.7),
        graph.ConditioningSetMask(conditioning=graph.prompt(clip, DOG), mask=load_picture(graph, base, levels)[1],
                                  strength=1.5, set_cond_area="default"),
        graph.ConditioningSetTimestepRange(conditioning=graph.prompt(clip, "much of it, " * 40), start=0.0, end=0.4),
    ]
    for part in parts:
        positive = graph.ConditioningCombine(conditioning_1=positive, conditioning_2=part)
    agree(server, graph.sample_sdxl(model, positive, negative, graph.empty(128, 128), steps=3),
          graph.sample(model, positive, negative, graph.empty(128, 128), steps=3))


def test_zeros_are_what_zeroing_gives(server, graph, sdxl):
    """As long as the prompt, so that both share a call: of zeros any number means the same."""
    model, _, _, clip, _ = sdxl
    long = CAT * 20
    positive, zeros = graph.condition(clip, long, unconditional="zeros")
    short = graph.ConditioningZeroOut(conditioning=graph.condition(clip, "")[1])
    agree(server, graph.sample_sdxl(model, positive, zeros, graph.empty()),
          graph.sample(model, positive, short, graph.empty()))


# -- text encoders and VAE, beside torch ---------------------------------------------------------------------------
@pytest.fixture(scope="module")
def clips(base, tiny_sdxl):
    """The CLIP of the tiny model, and ComfyUI's own with the same weights, both made in this process."""
    path = list(sys.path)                # ComfyUI's folder holds names like `utils`
    adapters, library = load_pack("nodes.adapters.sdxl"), load_pack("nodes.library")
    stages, checkpoint = load_pack("engines.sdxl.stages"), load_pack("engines.sdxl.checkpoint")
    file = checkpoint.open_checkpoint(base / "models" / "checkpoints" / TINY_SDXL)
    ours = adapters.as_clip(stages.open_sdxl(file, library.devices().choose_worker("mindspore", "cpu")), [])
    yield ours, stock_clip(tiny_sdxl)
    load_pack("engines.workers").Worker.close_all()
    sys.path[:] = path


def stock_clip(tiny_sdxl):
    import comfy.sd
    from comfy import sdxl_clip
    from comfy.supported_models_base import ClipTarget
    parts = {"l": "text_encoder", "g": "text_encoder_2"}
    layers = tiny_sdxl.text_encoder.config.num_hidden_layers
    configs = {f"clip_{name}_model_config": getattr(tiny_sdxl, part).config.to_dict() for name, part in parts.items()}
    configs["clip_l_model_config"]["num_hidden_layers"] = layers + 1        # one more, since it wants three
    clip = comfy.sd.CLIP(ClipTarget(sdxl_clip.SDXLTokenizer, sdxl_clip.SDXLClipModel),
                         model_options={**configs, "dtype": torch.float32})
    first = clip.cond_stage_model.clip_l
    first.num_layers = layers
    del first.transformer.text_model.encoder.layers[layers]
    for name, part in parts.items():
        getattr(clip.cond_stage_model, f"clip_{name}").load_sd(tiny_sdxl.state(part))
    return clip


@pytest.mark.parametrize("skip", [None, -1, -2, -3, -24])
@pytest.mark.parametrize("text", [CAT, "", "a (very:0.3) long prompt, " * 40], ids=["weights", "empty", "long"])
def test_clip_is_stock_s(clips, text, skip):
    """Sections, weights and layers; from -3 on the first encoder has none left, and both take the last one, normed."""
    results = []
    for clip in clips:
        clip = clip.clone()
        if skip is not None:
            clip.clip_layer(skip)
        (context, options), = clip.encode_from_tokens_scheduled(clip.tokenize(text))
        results.append((context, options["pooled_output"]))
    for ours, stock in zip(*results):
        torch.testing.assert_close(ours, stock, rtol=0, atol=1e-4)
    assert results[0][0].shape == (1, 77 * (3 if "long" in text else 1), 192)


@pytest.mark.parametrize("unconditional", ["encode", "zeros"])
def test_conditioner_takes_stock_clips(clips, unconditional):
    sizes = {"width": 100, "height": 80, "crop_w": 8, "crop_h": 16, "target_width": 64, "target_height": 72}
    conditions = load_pack("nodes.adapters.sdxl").conditions
    ours, stock = (conditions(clip, CAT, "" if unconditional == "zeros" else DOG, sizes, unconditional) for clip in clips)
    for (mine,), (theirs,) in zip(ours, stock):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-4)
        assert sizes.items() <= mine[1].items() and (mine[0].any() or unconditional == "zeros")
    assert bool(ours[1][0][0].any()) is bool(ours[1][0][1]["pooled_output"].any()) is (unconditional == "encode")


def test_vae_is_torch_s(server, base, graph, tiny_sdxl, sdxl):
    vae = sdxl[-1]
    values = np.random.default_rng(3).normal(size=(2, 4, 8, 12)).astype(np.float32)
    decoded = graph.AscendVAEDecode(samples=load_latent(graph, base, values), vae=vae)
    wanted = tiny_sdxl.vae.decode(torch.from_numpy(values)).sample
    got = pictures(server, decoded)
    wanted = (((wanted + 1) / 2).clamp(0, 1).movedim(1, -1).numpy() * 255).astype(int)
    assert np.abs(got - wanted).max() <= 1                   # one level of 255: a value just below a step
    np.testing.assert_array_equal(got, pictures(server, graph.VAEDecode(samples=load_latent(graph, base, values), vae=vae)))


def test_encoding_gives_the_mean(server, base, graph, tiny_sdxl, sdxl):
    """70x75 pixels are cut to 64x72; with an alpha channel, or several in a batch, as well."""
    levels = np.random.default_rng(4).integers(0, 256, (70, 75, 3))
    picture = load_picture(graph, base, levels)
    ours, stock = latents(server, graph.AscendVAEEncode(pixels=picture, vae=sdxl[-1]),
                          graph.VAEEncode(pixels=picture, vae=sdxl[-1]))
    pixels = torch.from_numpy(levels[3:67, 1:73] / 127.5 - 1).float().movedim(-1, 0)[None]     # about the middle
    np.testing.assert_allclose(ours, tiny_sdxl.vae.encode(pixels).latent_dist.mean.numpy(), atol=1e-4)
    np.testing.assert_array_equal(ours, stock)


def test_tiled_decoding_takes_the_tiles_asked_for(server, base, graph, sdxl):
    values = np.random.default_rng(5).normal(size=(1, 4, 40, 8)).astype(np.float32)
    tiled = graph.VAEDecodeTiled(samples=load_latent(graph, base, values), vae=sdxl[-1], tile_size=256, overlap=64,
                                 temporal_size=64, temporal_overlap=8)
    assert pictures(server, tiled).shape == (1, 320, 64, 3)


# -- the loader ----------------------------------------------------------------------------------------------------
def test_loader_offers_files_and_folders_and_says_what_it_loaded(server, base, graph, tiny_sdxl):
    write_folder(tiny_sdxl, base / "models" / "diffusers" / "pipelines" / "tiny")
    (base / "models" / "checkpoints" / "other.pt").touch()
    node = server.get("/object_info/AscendLoadSDXL")["AscendLoadSDXL"]["input"]["required"]
    offered = node["model_name"][1]["options"] if node["model_name"][0] == "COMBO" else node["model_name"][0]
    assert TINY_SDXL in offered and "pipelines/tiny" in offered and "other.pt" not in offered
    texts = []
    _, _, vae = graph.sdxl("pipelines/tiny")
    graph.PreviewImage(images=graph.AscendVAEDecode(samples=graph.empty(), vae=vae))
    server.run(graph, on_event=lambda kind, data: texts.append(data["data"]) if kind == "binary" else None)
    assert any(b"SDXL: tiny (CPU) on cpu, MindSpore" in text and b"float32" in text for text in texts), texts


def test_progress_of_every_step(server, graph, sdxl):
    model, positive, negative, *_ = sdxl
    seen = []
    node = graph.sample_sdxl(model, positive, negative, graph.empty(), steps=3, seed=77)
    latent(server, node, on_event=lambda kind, data: seen.append(data) if kind == "progress" else None)
    assert [(data["value"], data["max"]) for data in seen if data["node"] == node.id] == [(1, 3), (2, 3), (3, 3)]


def test_latents_cross_to_other_nodes(server, graph, sdxl):
    """An SDXL latent in a Sophgo VAE and in one step of any sampler; a Sophgo latent in the SDXL VAE."""
    model, positive, negative, _, vae = sdxl
    made = graph.sample_sdxl(model, positive, negative, graph.empty(), steps=1)
    other_model, other_clip, other_vae = graph.checkpoint()
    step = graph.SophgoUNetStep(model=model, positive=positive, negative=negative, latent_image=graph.empty(), step=0,
                                steps=1, cfg=5.0, sampler_name="euler", scheduler="simple", seed=1, add_noise=True)
    agree(server, made, step)
    again = graph.sample_sdxl(model, positive, negative, step, steps=1)        # its record of calls is not taken along
    prompt = graph.prompt(other_clip, "cat")
    sampled = graph.sample(other_model, prompt, prompt, again, denoise=0.5)
    for samples, decoder in ((made, other_vae), (sampled, vae)):
        assert pictures(server, graph.SophgoVAEDecode(samples=samples, vae=decoder, overlap=16)).shape == (1, 64, 64, 3)
