"""What the compiler gets from ComfyUI's objects: SD 1.x with its patches, and a plain sentence for everything else."""
from __future__ import annotations

import json
import subprocess
import textwrap

import pytest

from tests.conftest import need
from tests.host.graphs import plain_sentence
from tools.install import DEMO_CHECKPOINT, PACK, PYTHON

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
BAKING = """
import json, sys, tempfile
from pathlib import Path
from tools.inprocess import load_pack
export, reference = load_pack("nodes.adapters.export"), load_pack("nodes.adapters.reference")
import comfy.model_management, numpy as np, torch
from compiler.checkpoint import Checkpoint
from engines.files import content_hash
torch.set_grad_enabled(False)

def patched(patcher, part):
    patcher, random = patcher.clone(), torch.Generator().manual_seed(0)
    weights = patcher.model.state_dict()
    keys = [name for name in weights if part in name and weights[name].ndim == 2][:20]
    for strength, several, model_strength in ((0.7, keys, 1.0), (-0.3, keys[:5], 0.9)):
        patcher.add_patches({key: ("diff", (0.05 * torch.randn(weights[key].shape, generator=random),)) for key in several},
                            strength, model_strength)
    return patcher

def written(parts):
    with tempfile.TemporaryDirectory() as folder, export.saved(parts, Path(folder), lambda: None) as path:
        checkpoint = Checkpoint(path)
        assert content_hash(path) == export.digest(parts, lambda: None)
        return {name: checkpoint.read(name) for name in checkpoint.tensors}, list(checkpoint.tensors.values())

said = {}
for name in ("float32", "float16", "bfloat16", "float8_e4m3fn"):
    model, clip, vae = reference.load_reference(Path(sys.argv[1]), [])
    model.model.to(getattr(torch, name))
    model, clip.patcher = patched(model, "diffusion_model."), patched(clip.patcher, "text_model.")
    before = {key: weight.clone() for key, weight in model.model.state_dict().items()}
    parts = export.parts_of(model, clip, vae)
    got, tensors = written(parts)
    untouched = all(torch.equal(weight, before[key]) for key, weight in model.model.state_dict().items())
    comfy.model_management.load_models_gpu([model, clip.patcher], force_patch_weights=True)
    wanted = {"model." + key: weight for key, weight in model.model.state_dict().items() if "diffusion_model." in key}
    wanted |= {"cond_stage_model.transformer." + key.removeprefix("clip_l.transformer."): weight
               for key, weight in clip.cond_stage_model.state_dict().items()}
    wanted = {key: weight.float().numpy() for key, weight in wanted.items() if key in got}
    worst = max(float(np.abs(got[key] - weight).max() / np.abs(weight).max()) for key, weight in wanted.items())
    changed = max(float(np.abs(got["model." + key] - weight.float().numpy()).max()) for key, weight in before.items()
                  if "model." + key in wanted)
    again, _ = written(parts)
    said[name] = {"worst": worst, "changed": changed, "untouched": untouched, "compared": len(wanted), "all": len(got),
                  "dtypes": sorted({tensor.dtype for tensor in tensors}),
                  "again": all(np.array_equal(again[key], got[key]) for key in got)}
print(json.dumps(said))
"""
REFUSED = {
    "flux": ("SimpleNamespace", "SD 1.x"), "sdxl": ("SDXL", "SD 1.x"), "sd2": ("SD 2.x", "768 wide"),
    "video": ("a video model", "SD 1.x"), "pix2pix": ("8 latent channels", "9"), "freeu": ("output_block_patch", "FreeU"),
    "attention": ("attn1", "remove it"), "replaced": ("diffusion_model.out", "cannot be compiled in"),
    "clip_g": ("clip_l, clip_g", "CLIP-L alone"), "taesd": ("Linear", "the VAE of an SD 1.x checkpoint"),
}


def answer(script: str, *arguments) -> dict:
    """What the script prints last."""
    done = subprocess.run([PYTHON, "-c", textwrap.dedent(script), *map(str, arguments)], cwd=PACK, capture_output=True,
                          text=True)
    assert not done.returncode, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def said() -> dict:
    return answer(SCRIPT)


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_compiled_is_named(said, case):
    assert isinstance(said[case], str), said[case]
    plain_sentence(said[case], *REFUSED[case])


def test_sd1_is_taken_with_what_shapes_do_not_show(said):
    assert said["supported"] == [["unet", {"heads": 8, "groups": 32}]] == said["inpainting"]
    assert said["multiple"] == 16


def test_patches_are_baked_as_comfyui_applies_them(tmp_path):
    """In float32 bit for bit; of shorter floats only the stored weights' rounding differs, which ComfyUI's patched ones have
    and ours do not. The model itself stays as it is, and it makes no difference whether it is loaded."""
    need(DEMO_CHECKPOINT.exists(), "the demo's checkpoint is not written: run 'python tools/install.py host'")
    said = answer(BAKING, DEMO_CHECKPOINT)
    tolerances = {"float32": 0.0, "float16": 2**-10, "bfloat16": 2**-7, "float8_e4m3fn": 2**-3}
    for name, tolerance in tolerances.items():
        found = said[name]
        assert found["worst"] <= tolerance and found["changed"] > 0.05, (name, found)
        assert found["untouched"] and found["again"]
        assert found["compared"] > 200 and found["all"] > 400
    assert said["float32"]["dtypes"] == said["float8_e4m3fn"]["dtypes"] == ["F32"]
    assert said["float16"]["dtypes"] == ["F16", "F32"] and said["bfloat16"]["dtypes"] == ["BF16", "F32"]
