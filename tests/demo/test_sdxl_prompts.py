"""The SDXL demo does what its prompts say, sampled in torch, with both ways of leaving a prompt out."""
import pytest

from tests.conftest import need
from tools.install import DEMO_WEIGHTS, comfyui

PROMPTS = 256
FRESH = 1             # not the prompts by which the model was chosen
STEPS, CFG = 20, 3.0  # as in the shipped workflows


@pytest.mark.parametrize("unconditional", ["encode", "zeros"])
def test_at_least_90_percent_obey_in_everything(unconditional, capsys):
    from demo import nets, score
    from demo.sdxl.score import Networks, scored
    need((comfyui() / "main.py").exists(), "ComfyUI is not installed: run 'python tools/install.py host'")
    need((DEMO_WEIGHTS / "sdxl_unet.safetensors").exists(), "the SDXL demo is not trained")
    clip = nets.tokenizer(comfyui() / "comfy" / "sd1_tokenizer")
    result = scored(Networks.load(), clip, score.random_prompts(PROMPTS, FRESH), STEPS, CFG, unconditional=unconditional)
    with capsys.disabled():
        print(f"\n  SDXL demo, unconditional {unconditional}: {result}")
    assert result.all_right >= 0.90
