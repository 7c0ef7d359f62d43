"""The SDXL demo's folder is what diffusers itself would load and run: the same networks as nets.py's, to the last bit."""
import pytest

from tests.conftest import need
from tools.install import DEMO_SDXL, DEMO_WEIGHTS, comfyui

PROMPT = "a small blue star in the top left corner"


@pytest.fixture(scope="module")
def pipeline():
    import torch
    from diffusers import StableDiffusionXLPipeline
    need(DEMO_SDXL.exists(), "the SDXL demo is not built: run 'python tools/install.py mindspore'")
    return StableDiffusionXLPipeline.from_pretrained(DEMO_SDXL, dtype=torch.float32)


@pytest.fixture(scope="module")
def networks():
    from demo.sdxl.score import Networks
    need((DEMO_WEIGHTS / "sdxl_unet.safetensors").exists(), "the SDXL demo is not trained")
    return Networks.load()


def test_diffusers_loads_the_networks_that_were_trained(pipeline, networks):
    import torch
    for part in ("text_encoder", "text_encoder_2", "unet", "vae"):
        wanted, got = getattr(networks, part).state_dict(), getattr(pipeline, part).state_dict()
        assert wanted.keys() == got.keys()
        assert all(torch.equal(wanted[name], got[name]) for name in wanted), part


def test_and_they_compute_the_same(pipeline, networks):
    """Which the parameters alone do not say: heads, activations and scales are in the configs."""
    import torch
    draw = torch.Generator().manual_seed(0)
    latent, context, pooled = (torch.randn(shape, generator=draw) for shape in ((2, 4, 8, 8), (2, 77, 160), (2, 96)))
    added = {"text_embeds": pooled, "time_ids": torch.full((2, 6), 64)}
    ids = torch.tensor([[49406, 736, 49407] + [0] * 74])
    calls = {
        "text_encoder": lambda network: network(ids, output_hidden_states=True).hidden_states[-2],
        "text_encoder_2": lambda network: network(ids).text_embeds,
        "unet": lambda network: network(latent, 500, context, added_cond_kwargs=added).sample,
        "vae": lambda network: network.decode(latent).sample,
    }
    with torch.no_grad():
        for part, call in calls.items():
            torch.testing.assert_close(call(getattr(networks, part)), call(getattr(pipeline, part)), atol=1e-5, rtol=1e-5)
    from demo.sdxl.nets import LATENT_SCALE
    assert pipeline.vae.config.scaling_factor == LATENT_SCALE


def test_its_tokenizers_pad_as_the_encoders_were_trained(pipeline):
    from demo import nets, score
    from demo.vocabulary import END, PAD_2, TOKENS
    clip = nets.tokenizer(comfyui() / "comfy" / "sd1_tokenizer")
    for tokenizer, pad in ((pipeline.tokenizer, END), (pipeline.tokenizer_2, PAD_2)):
        ids = tokenizer(PROMPT, padding="max_length", max_length=TOKENS).input_ids
        assert ids == score.ids_of(clip, PROMPT, pad)[0].tolist()
