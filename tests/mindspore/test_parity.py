"""Every stage on MindSpore against torch: diffusers' and transformers' own networks on the same weights, in float32."""
from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from engines.sdxl import schedules
from engines.sdxl.checkpoint import open_checkpoint
from engines.sdxl.stages import open_sdxl
from tests.helpers.sdxl_models import write_single
from tests.mindspore.conftest import ROWS

MOST, COSINE = 1e-4, 0.999999
SAMPLED = 1e-3                  # five steps carry the differences of ten calls
BATCH, LENGTH = 2, 77


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def compare(got: np.ndarray, expected: torch.Tensor) -> None:
    expected = expected.numpy()
    assert got.shape == expected.shape
    a, b = got.ravel().astype(np.float64), expected.ravel().astype(np.float64)
    assert np.abs(a - b).max() <= MOST
    assert a @ b / np.sqrt((a @ a) * (b @ b)) >= COSINE


@pytest.fixture(scope="module")
def conditioning(torch_sdxl) -> tuple[np.ndarray, np.ndarray]:
    config = torch_sdxl.unet.config
    return (random(BATCH, LENGTH, config.cross_attention_dim, seed=1),
            random(BATCH, config.projection_class_embeddings_input_dim, seed=2))


def torch_unet(unet, latent, timestep, context, y) -> torch.Tensor:
    """diffusers' U-Net makes the vector from two inputs; zero of one and the whole of the other is the vector itself."""
    original, given = unet.add_embedding.forward, torch.as_tensor(y)
    try:
        unet.add_embedding.forward = lambda made: original(given)
        width = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
        unused = {"text_embeds": torch.zeros(len(given), width), "time_ids": torch.zeros(len(given), 6)}
        return unet(torch.as_tensor(latent), torch.as_tensor(timestep), torch.as_tensor(context),
                    added_cond_kwargs=unused).sample
    finally:
        unet.add_embedding.forward = original


# -- text encoders -------------------------------------------------------------------------------------------------
def tokens() -> np.ndarray:
    """START, words, END, padding: two rows of different length; END is the highest id, as CLIP's is."""
    ids = np.zeros((BATCH, LENGTH), np.int32)
    for row, words in zip(ids, (9, 75)):
        row[0], row[1:words + 1], row[words + 1] = ROWS - 2, np.arange(words) * 7 % (ROWS - 2), ROWS - 1
    return ids


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2"])
@pytest.mark.parametrize("layer", [-2, -1, 0])
def test_text_encoders(sdxl, torch_sdxl, part, layer):
    stage = sdxl.text_encoder_2 if part == "text_encoder_2" else sdxl.text_encoder_1
    hidden, pooled = stage(tokens(), layer)
    out = getattr(torch_sdxl, part)(torch.from_numpy(tokens()).long(), output_hidden_states=True)
    compare(hidden, out.hidden_states[layer] if layer else out.last_hidden_state)
    compare(pooled, out.text_embeds if part == "text_encoder_2" else out.pooler_output)


# -- U-Net ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [(16, 16), (9, 9), (10, 15), (24, 8)])
def test_unet(sdxl, torch_sdxl, conditioning, size):
    """9 and 15 are halved to sizes that double to another: the skip connections then say what to grow to."""
    latent, timestep = random(BATCH, 4, *size), np.array([999, 7], np.float32)
    compare(sdxl.unet(latent, timestep, *conditioning), torch_unet(torch_sdxl.unet, latent, timestep, *conditioning))


def test_unet_with_a_longer_context(sdxl, torch_sdxl, conditioning):
    context, y = conditioning
    context = np.concatenate([context, context[::-1]], 1)
    latent, timestep = random(BATCH, 4, 8, 8), np.array([500, 500], np.float32)
    compare(sdxl.unet(latent, timestep, context, y), torch_unet(torch_sdxl.unet, latent, timestep, context, y))


def test_half_precision_on_the_cpu_is_float32_with_rounded_weights(torch_sdxl, conditioning, worker, tmp_path):
    file = write_single(torch_sdxl, tmp_path / "half.safetensors", "float16")
    unet = open_sdxl(open_checkpoint(file), worker.spec, "float16").unet
    latent, timestep = random(BATCH, 4, 8, 8), np.array([500, 500], np.float32)
    rounded = copy.deepcopy(torch_sdxl.unet).half().float()
    compare(unet(latent, timestep, *conditioning), torch_unet(rounded, latent, timestep, *conditioning))


# -- VAE -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [(8, 8), (9, 5)])
def test_vae_decoder(sdxl, torch_sdxl, size):
    latent = random(1, 4, *size)
    compare(sdxl.decoder(latent), torch_sdxl.vae.decode(torch.from_numpy(latent)).sample)


def test_vae_encoder(sdxl, torch_sdxl):
    picture = np.tanh(random(BATCH, 3, 64, 40))
    compare(sdxl.encoder(picture), torch_sdxl.vae.encode(torch.from_numpy(picture)).latent_dist.mean)


# -- sampling ------------------------------------------------------------------------------------------------------
def test_five_euler_steps_with_guidance(sdxl, torch_sdxl, conditioning):
    """Against the loop written out on torch's U-Net: d = (x - D) / sigma, x += d (sigma_next - sigma)."""
    context, y = conditioning
    sigmas, cfg = schedules.DISCRETIZATIONS["LegacyDDPM"](5), 5.0
    noise = random(1, 4, 16, 16, seed=3)
    arrays = {"noise": noise, "latent": np.zeros_like(noise), "context.0": context[:1], "y.0": y[:1],
              "context.1": context[1:], "y.1": y[1:]}
    settings = {"sampler": "EulerEDM", "sigmas": list(sigmas), "guider": "VanillaCFG", "cfg": cfg, "snap": True,
                "max_denoise": True, "options": {}, "preview": False,
                "conditions": [{"positive": True, "area": None}, {"positive": False, "area": None}]}
    reports = []
    got = sdxl.unet.sample(arrays, settings, reports.append)
    assert [(report["step"], report["steps"]) for report in reports] == [(i, 5) for i in range(1, 6)]

    x = torch.from_numpy(noise) * (1 + sigmas[0] ** 2) ** 0.5
    for sigma, following in zip(sigmas, sigmas[1:]):
        _, index = schedules.snap(sigma)
        scaled = (x / (1 + sigma ** 2) ** 0.5).repeat(2, 1, 1, 1)
        positive, negative = torch_unet(torch_sdxl.unet, scaled, torch.full((2,), float(index)), context, y).chunk(2)
        x = x + (negative + cfg * (positive - negative)) * (following - sigma)
    assert np.abs(got - x.numpy()).max() <= SAMPLED
