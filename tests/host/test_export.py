"""What the compiler gets from ComfyUI's objects: SD 1.x with its patches, and a plain sentence for everything else."""
from __future__ import annotations

import json
import subprocess
import textwrap

import pytest

from tests.host.graphs import plain_sentence
from tools.install import PACK, PYTHON

# In a process of its own: ComfyUI's modules have names such as `nodes` and `utils`.
SCRIPT = """
import json, sys, types
from tools.inprocess import load_pack
export = load_pack("nodes.adapters.export")
import comfy.model_base, comfy.model_patcher, comfy.sd, comfy.supported_models, torch

def model(family, base=comfy.model_base.BaseModel, **config):
    config = family({"in_channels": 4, **config})
    config.custom_operations, config.unet_config["dtype"] = None, torch.float32
    with torch.device("meta"):
        return patcher(base(config, device=torch.device("cpu")))

def patcher(module):
    return comfy.model_patcher.ModelPatcher(module, torch.device("cpu"), torch.device("cpu"))

SMALL = {"image_size": 32, "model_channels": 32, "num_res_blocks": [1, 1], "channel_mult": [1, 2], "num_heads": 4,
         "transformer_depth": [1, 0], "transformer_depth_output": [1, 1, 0, 0], "transformer_depth_middle": 1,
         "out_channels": 4, "use_spatial_transformer": True, "context_dim": 768, "num_head_channels": -1}
families = comfy.supported_models

def sd(**changes):
    return model(families.SD15, **{**SMALL, **changes})

def patched(change):
    changed = sd()
    change(changed)
    return {"model": changed}

def clip(**parts):
    holder = torch.nn.Module()
    for name in parts:
        holder.add_module(name, torch.nn.Linear(1, 1))
    return {"clip": types.SimpleNamespace(patcher=patcher(holder), cond_stage_model=holder, layer_idx=None)}

flux = types.SimpleNamespace(model=types.SimpleNamespace(diffusion_model=torch.nn.Linear(1, 1)))
taesd = types.SimpleNamespace(patcher=None, first_stage_model=torch.nn.Linear(1, 1), latent_channels=4)
cases = {
    "flux": lambda: {"model": flux},
    "sdxl": lambda: {"model": sd(context_dim=2048, num_classes="sequential", adm_in_channels=16)},
    "sd2": lambda: {"model": sd(context_dim=1024)},
    "video": lambda: {"model": sd(use_temporal_resblock=True, context_dim=1024, video_kernel_size=[3, 1, 1],
                                  merge_strategy="learned")},
    "pix2pix": lambda: {"model": sd(in_channels=8)},
    "freeu": lambda: patched(lambda m: m.set_model_output_block_patch(lambda *a: a)),
    "attention": lambda: patched(lambda m: m.set_model_attn1_replace(lambda *a: a, "input", 1)),
    "replaced": lambda: patched(lambda m: m.add_object_patch("diffusion_model.out", 1)),
    "clip_g": lambda: clip(clip_l=1, clip_g=1),
    "taesd": lambda: {"vae": taesd},
    "supported": lambda: {"model": sd()},
    "inpainting": lambda: {"model": sd(in_channels=9)},
}
said = {}
for name, case in cases.items():
    try:
        said[name] = [[part.kind, part.conventions] for part in export.parts_of(**case())]
    except export.EngineError as error:
        said[name] = str(error)
said["multiple"] = export.size_multiple(sd())
print(json.dumps(said))
"""
REFUSED = {
    "flux": ("SimpleNamespace", "SD 1.x"), "sdxl": ("SDXL", "SD 1.x"), "sd2": ("SD 2.x", "768 wide"),
    "video": ("a video model", "SD 1.x"), "pix2pix": ("8 latent channels", "9"), "freeu": ("output_block_patch", "FreeU"),
    "attention": ("attn1", "remove it"), "replaced": ("diffusion_model.out", "cannot be compiled in"),
    "clip_g": ("clip_l, clip_g", "CLIP-L alone"), "taesd": ("Linear", "the VAE of an SD 1.x checkpoint"),
}


@pytest.fixture(scope="module")
def said() -> dict:
    done = subprocess.run([PYTHON, "-c", textwrap.dedent(SCRIPT)], cwd=PACK, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_compiled_is_named(said, case):
    assert isinstance(said[case], str), said[case]
    plain_sentence(said[case], *REFUSED[case])


def test_sd1_is_taken_with_what_shapes_do_not_show(said):
    assert said["supported"] == [["unet", {"heads": 8, "groups": 32}]] == said["inpainting"]
    assert said["multiple"] == 16
