"""Whatever cannot be done with SDXL on MindSpore is one plain sentence on the node, and the next prompt works."""
from __future__ import annotations

import importlib.metadata
import json
import os
import re
import venv
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers import onnx_nets
from tests.helpers.sdxl_models import TinySDXL, write_folder, write_single
from tests.host import watched
from tests.host.graphs import TINY_SDXL, Graph, Node, latents, load_latent, load_picture, plain_sentence, refusal
from tests.host.test_bad_input import PATCHES, write_adapter
from tests.host.undisturbed import CAT, DOG, Undisturbed, worker
from tools.comfyui import ServerError
from tools.install import MINDSPORE, PACK, PYTHON

SAMPLERS = ("sample_sdxl", "sample")       # AscendSDXLSampler, KSampler
ENCODERS = ("text_encoder", "text_encoder_2")


@pytest.fixture(scope="module")
def undisturbed(server, tiny_sdxl) -> Undisturbed:
    return Undisturbed(server)


@pytest.fixture(autouse=True)
def next_prompt_works(server, undisturbed):
    yield
    undisturbed.check()


@pytest.fixture
def sdxl(graph):
    """(model, positive, negative, clip, vae) in `graph`. A prompt that names the loader keeps the model loaded."""
    model, clip, vae = graph.sdxl()
    return model, *graph.condition(clip, CAT, DOG), clip, vae


@pytest.fixture(scope="module")
def small() -> TinySDXL:
    """Too few tokens for a prompt, but a small file."""
    return TinySDXL(rows=100)


@pytest.fixture(scope="module")
def checkpoints(base) -> Path:
    return base / "models" / "checkpoints"


def refused(server, graph: Graph, *words: str) -> str:
    """Run a graph with an output node of its own, which must fail with one plain sentence that has all of `words`."""
    with pytest.raises(ServerError) as error:
        server.run(graph)
    return plain_sentence(str(error.value), *words)


def show(graph: Graph, image: Node) -> Graph:
    graph.PreviewImage(images=image)
    return graph


# -- files ---------------------------------------------------------------------------------------------------------
def other_model(path: Path, tensor: str, *shape: int) -> None:
    save_file({tensor: torch.zeros(shape, dtype=torch.float16)}, path)


def eight_bits(small: TinySDXL, path: Path) -> None:
    write_single(small, path)
    save_file({name: tensor.to(torch.float8_e4m3fn) for name, tensor in load_file(path).items()}, path)


def cut(small: TinySDXL, path: Path) -> None:
    os.truncate(write_single(small, path), path.stat().st_size * 2 // 3)


FILES = {
    "sd15.safetensors": (lambda small, path: other_model(
        path, "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight", 320, 768),
        ["Stable Diffusion 1.x", "SDXL"]),
    "sd3.safetensors": (lambda small, path: other_model(
        path, "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", 4608, 1536), ["Stable Diffusion 3", "SDXL"]),
    "fp8.safetensors": (eight_bits, ["8-bit floats", "float16"]),
    "cut.safetensors": (cut, ["cut short", "download"]),
    "pickle.ckpt": (lambda small, path: torch.save(small.state("vae"), path), ["pickle", "MindSpore"]),
    "half.safetensors": (lambda small, path: write_single(small, path, parts=("text_encoder", "unet", "vae")),
                         ["no second text encoder"]),
    "page.safetensors": (lambda small, path: path.write_text("<html>Not found</html>" * 9), ["safetensors"]),
    "empty.ckpt": (lambda small, path: path.touch(), ["empty"]),
}


@pytest.mark.parametrize("name", FILES)
def test_file(server, graph, sdxl, small, checkpoints, name):
    """The sentence begins with the file's name."""
    write, words = FILES[name]
    write(small, checkpoints / name)
    _, positive, negative, *_ = sdxl
    said = refusal(server, graph.sample_sdxl(graph.sdxl(name)[0], positive, negative, graph.empty()), *words)
    assert said.startswith(name)


def test_folder_of_another_pipeline(server, base, graph, sdxl, small):
    folder = write_folder(small, base / "models" / "diffusers" / "other")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": "StableDiffusionPipeline"}))
    _, positive, negative, *_ = sdxl
    refusal(server, graph.sample_sdxl(graph.sdxl("other")[0], positive, negative, graph.empty()), "other",
            "StableDiffusionPipeline")


@pytest.mark.parametrize("name", ["../checkpoints/" + TINY_SDXL, "/etc/passwd", "tiny", "", "a" * 5000, TINY_SDXL + "\n"],
                         ids=lambda name: repr(name[:24]))
def test_name_that_is_none(server, graph, sdxl, name):
    _, positive, negative, *_ = sdxl
    refusal(server, graph.sample_sdxl(graph.sdxl(name)[0], positive, negative, graph.empty()), "no SDXL model", "there are")


# -- choices that there are not: ComfyUI does not check them in a workflow that comes in over the API ---------------------
@pytest.mark.parametrize(("device", "words"), [
    ("ascend:7", ["not on this server", "auto, cpu"]), ("", ["not on this server"]), ("npu", ["not on this server"]),
    ("onnx", ["does not run SDXL", "auto, cpu"])])
def test_absent_device(server, graph, sdxl, device, words):
    _, positive, negative, *_ = sdxl
    refusal(server, graph.sample_sdxl(graph.sdxl(device=device)[0], positive, negative, graph.empty()),
            f"Device '{device}'", *words)


@pytest.mark.parametrize(("precision", "words"), [("int8", ["precision", "'float16'"]), ("", ["precision", "'float16'"]),
                                                  ("bfloat16", ["bfloat16", "float32"])])
def test_precision(server, graph, sdxl, precision, words):
    """MindSpore's CPU back end computes in no bfloat16."""
    _, positive, negative, *_ = sdxl
    refusal(server, graph.sample_sdxl(graph.sdxl(precision=precision)[0], positive, negative, graph.empty()), *words)


@pytest.mark.parametrize(("setting", "instead"), [("sampler_name", "EulerEDM"), ("discretization", "LegacyDDPM"),
                                                  ("guider", "VanillaCFG"), ("noise", "comfy")])
def test_setting_of_the_sampler(server, graph, sdxl, setting, instead):
    model, positive, negative, *_ = sdxl
    refusal(server, graph.sample_sdxl(model, positive, negative, graph.empty(), **{setting: "euler_a"}),
            setting, "'euler_a'", instead)


@pytest.mark.parametrize(("changes", "words"), [
    ({"unconditional": "nothing"}, ["unconditional", "'encode'"]),
    ({"unconditional": "zeros", "negative_prompt": DOG}, ["negative_prompt", "'encode'"])])
def test_setting_of_the_conditioner(server, graph, sdxl, changes, words):
    model, _, _, clip, _ = sdxl
    refusal(server, graph.sample_sdxl(model, *graph.condition(clip, CAT, **changes), graph.empty()), *words)

# -- models and nodes that the sampler cannot take along --------------------------------------------------------------
def test_model_of_another_loader(server, graph, sdxl):
    _, positive, negative, *_ = sdxl
    refusal(server, graph.sample_sdxl(graph.checkpoint()[0], positive, negative, graph.empty()),
            "AscendLoadSDXL", "KSampler")


@pytest.mark.parametrize(("node", "inputs", "words"), [
    ("RescaleCFG", {"multiplier": 0.7}, ["RescaleCFG", "guidance"]), ("DifferentialDiffusion", {}, ["mask"]),
    ("ModelSamplingDiscrete", {"sampling": "eps", "zsnr": False}, ["ModelSamplingDiscrete", "model_sampling"]),
    ("EasyCache", {"reuse_threshold": 0.2, "start_percent": 0.1, "end_percent": 0.9, "verbose": False}, ["wraps"])])
def test_node_that_takes_part_in_each_step(server, graph, sdxl, node, inputs, words):
    model, positive, negative, *_ = sdxl
    patched = graph.node(node, model=model, **inputs)
    refusal(server, graph.sample_sdxl(patched, positive, negative, graph.empty()), *words, "KSampler")


def test_ksampler_takes_what_takes_part_in_each_step(server, graph, sdxl):
    """As the sentence says."""
    model, positive, negative, *_ = sdxl
    plain, none, much = latents(server, *(
        graph.sample(one, positive, negative, graph.empty())
        for one in (model, *(graph.RescaleCFG(model=model, multiplier=multiplier) for multiplier in (0.0, 1.0)))))
    np.testing.assert_allclose(none, plain, atol=1e-3)
    assert np.abs(much - plain).max() > 0.1


@pytest.mark.parametrize(("node", "sampler"), [*((node, "sample") for node in PATCHES), ("FreeU", "sample_sdxl"),
                                               ("SelfAttentionGuidance", "sample_sdxl")])
def test_patch_of_the_unet(server, graph, sdxl, node, sampler):
    model, positive, negative, *_ = sdxl
    patched = graph.node(node, model=model, **PATCHES[node])
    refusal(server, getattr(graph, sampler)(patched, positive, negative, graph.empty()), "U-Net", TINY_SDXL, "MindSpore")


@pytest.fixture(scope="module")
def lora(base) -> str:
    folder = base / "models" / "loras"
    folder.mkdir(exist_ok=True)
    save_file({f"lora_{name}.{part}.weight": torch.ones(shape)
               for name in ("unet_down_blocks_1_attentions_0_proj_in", "te1_text_model_encoder_layers_0_self_attn_q_proj")
               for part, shape in (("lora_up", (64, 2)), ("lora_down", (2, 64)))}, folder / "sdxl.safetensors")
    return "sdxl.safetensors"


@pytest.mark.parametrize(("model_strength", "clip_strength", "stage"), [(1.0, 0.0, "U-Net"), (0.0, 1.0, "CLIP")])
def test_lora(server, graph, sdxl, lora, model_strength, clip_strength, stage):
    model, _, _, clip, _ = sdxl
    both = graph.LoraLoader(model=model, clip=clip, lora_name=lora, strength_model=model_strength,
                            strength_clip=clip_strength)
    refusal(server, graph.sample_sdxl(both[0], *graph.condition(both[1], CAT), graph.empty()), lora, stage, "MindSpore",
            "CheckpointSave")


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_lora_by_a_hook(server, graph, sdxl, lora, sampler):
    model, positive, negative, *_ = sdxl
    hooks = graph.CreateHookLora(lora_name=lora, strength_model=1.0, strength_clip=1.0)
    positive = graph.ConditioningSetProperties(cond_NEW=positive, hooks=hooks, strength=1.0, set_cond_area="default")
    refusal(server, getattr(graph, sampler)(model, positive, negative, graph.empty()), "hook")


def test_lora_by_a_hook_of_the_clip(server, graph, sdxl, lora):
    model, _, negative, clip, _ = sdxl
    hooks = graph.CreateHookLora(lora_name=lora, strength_model=1.0, strength_clip=1.0)
    hooked = graph.SetClipHooks(clip=clip, hooks=hooks, apply_to_conds=False, schedule_clip=False)
    refusal(server, graph.sample(model, graph.condition(hooked, CAT)[0], negative, graph.empty()), "hook", "MindSpore")


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_controlnet(server, base, graph, sdxl, sampler):
    write_adapter(base / "models" / "controlnet" / "adapter.safetensors")
    model, positive, negative, *_ = sdxl
    net = graph.ControlNetLoader(control_net_name="adapter.safetensors")
    picture = load_picture(graph, base, np.zeros((64, 64, 3)))
    hinted = graph.ControlNetApply(conditioning=positive, control_net=net, image=picture, strength=1.0)
    refusal(server, getattr(graph, sampler)(model, hinted, negative, graph.empty()), "ControlNet")


def test_weights_are_neither_merged_nor_saved(server, graph, sdxl):
    model, *_, clip, vae = sdxl
    graph.CheckpointSave(model=graph.ModelMergeSimple(model1=model, model2=model, ratio=0.5), clip=clip, vae=vae,
                         filename_prefix="saved")
    refused(server, graph, "ModelMergeSimple", "U-Net", "MindSpore")
    assert not list((server.base / "output").glob("saved*"))


# -- conditioning --------------------------------------------------------------------------------------------------
@pytest.fixture
def other_clip(base, graph):
    """other_clip(width, pooled): a CLIP of one text encoder."""
    def load(width: int, pooled: bool = True) -> Node:
        name = f"clip_{width}_{pooled}.onnx"
        onnx_nets.text_encoder(base / "models" / "sophgo" / name, width=width, pooled=pooled)
        return graph.SophgoLoadCLIP(clip_name=name, device="auto", long_prompts="truncate")
    return load


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(("width", "pooled", "words"), [
    (192, False, ["pooled", "AscendSDXLConditioner"]),          # as wide as the model's, without the pooled text
    (768, True, ["768 wide", "192", TINY_SDXL]),                # of SD 1.5
    (192, True, ["vector is 1728 wide", "1664", TINY_SDXL]),    # the pooled text of another encoder
])
def test_conditioning_of_another_model(server, graph, sdxl, other_clip, width, pooled, words, sampler):
    model, _, negative, *_ = sdxl
    prompt = graph.prompt(other_clip(width, pooled), CAT)
    refusal(server, getattr(graph, sampler)(model, prompt, negative, graph.empty()), *words)


def test_conditioner_with_a_clip_of_another_model(server, graph, sdxl, other_clip):
    model, *_ = sdxl
    refusal(server, graph.sample_sdxl(model, *graph.condition(other_clip(768), CAT), graph.empty()), "CLIP", "SDXL",
            "AscendLoadSDXL")


def test_textual_inversion(server, base, graph, sdxl):
    folder = base / "models" / "embeddings"
    folder.mkdir(exist_ok=True)
    save_file({"clip_l": torch.zeros(2, 768), "clip_g": torch.zeros(2, 1280)}, folder / "sdxl-style.safetensors")
    model, _, _, clip, _ = sdxl
    conditions = graph.condition(clip, "a cat embedding:sdxl-style")
    refusal(server, graph.sample_sdxl(model, *conditions, graph.empty()), "embedding")


def test_condition_that_is_filled_in_elsewhere(server, graph, sdxl):
    model, positive, negative, *_ = sdxl
    both = graph.ConditioningSetDefaultCombine(cond=positive, cond_DEFAULT=negative)
    refusal(server, graph.sample_sdxl(model, both, negative, graph.empty()), "ConditioningSetDefaultCombine", "KSampler")


def test_area_outside_the_picture(server, graph, sdxl):
    model, positive, negative, *_ = sdxl
    area = graph.ConditioningSetArea(conditioning=positive, width=64, height=64, x=640, y=0, strength=1.0)
    refusal(server, graph.sample_sdxl(model, area, negative, graph.empty()), "(640, 0)", "64x64", "ConditioningSetArea")


# -- latents and pictures ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_latent_of_16_channels(server, base, graph, sdxl, sampler):
    model, positive, negative, *_ = sdxl
    wide = load_latent(graph, base, np.ones((1, 16, 8, 8)))
    refusal(server, getattr(graph, sampler)(model, positive, negative, wide), "4 channels", "x16x8x8")


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_latent_of_a_video(server, graph, sdxl, sampler):
    model, positive, negative, *_ = sdxl
    video = graph.EmptyHunyuanLatentVideo(width=64, height=64, length=5, batch_size=1)
    refusal(server, getattr(graph, sampler)(model, positive, negative, video), "channels", "x4x2x8x8")


@pytest.mark.parametrize("node", ["AscendVAEDecode", "VAEDecode"])
@pytest.mark.parametrize("shape", [(1, 16, 8, 8), (1, 4, 2, 8, 8)])
def test_decoding_another_model_s_latent(server, base, graph, sdxl, node, shape):
    image = graph.node(node, samples=load_latent(graph, base, np.ones(shape)), vae=sdxl[-1])
    refused(server, show(graph, image), "VAE decoder", "4 channels", "x".join(map(str, shape)))


@pytest.mark.parametrize("size", [(7, 64), (1, 1)])
def test_encoding_a_picture_of_less_than_one_element(server, base, graph, sdxl, size):
    picture = load_picture(graph, base, np.zeros((*size, 3)))
    refusal(server, graph.AscendVAEEncode(pixels=picture, vae=sdxl[-1]), f"{size[1]}x{size[0]}", "8")


def test_size_that_is_no_multiple_of_8(server, base, graph, sdxl):
    """A picture is cut, and the node says so; an empty latent of 100x76 has 12x9 elements, which the U-Net halves twice."""
    model, positive, negative, _, vae = sdxl
    encoded = graph.AscendVAEEncode(pixels=load_picture(graph, base, np.full((76, 100, 3), 128)), vae=vae)
    texts = []
    cut, ours, stock = latents(server, encoded, *(
        getattr(graph, sampler)(model, positive, negative, graph.empty(100, 76)) for sampler in SAMPLERS),
        on_event=lambda kind, data: texts.append(data["data"]) if kind == "binary" else None)
    assert cut.shape == ours.shape == (1, 4, 9, 12)
    np.testing.assert_allclose(ours, stock, rtol=0, atol=1e-3)
    assert [text for text in texts if encoded.id.encode() in text and b"100x76 cropped to 96x72" in text]


# -- numbers -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_nan_of_the_latent_is_not_blamed_on_the_network(server, base, graph, sdxl, sampler):
    model, positive, negative, *_ = sdxl
    nothing = load_latent(graph, base, np.full((1, 4, 8, 8), np.nan))
    refusal(server, getattr(graph, sampler)(model, positive, negative, nothing), "sampler", "NaN", "step 1 of 4", "latent")


def test_nan_of_the_latent_is_not_blamed_on_the_vae(server, base, graph, sdxl):
    nothing = load_latent(graph, base, np.full((1, 4, 8, 8), np.nan))
    said = refused(server, show(graph, graph.AscendVAEDecode(samples=nothing, vae=sdxl[-1])), "VAE decoder", "NaN",
                   "latent", "nodes before it")
    assert "damaged" not in said


def test_guidance_that_is_no_number(server, graph, sdxl):
    """JSON's NaN passes ComfyUI's limits."""
    model, positive, negative, *_ = sdxl
    refusal(server, graph.sample_sdxl(model, positive, negative, graph.empty(), cfg=float("nan")), "NaN")


@pytest.fixture(scope="module")
def nan(checkpoints) -> str:
    """A model whose U-Net and VAE give NaN."""
    model = TinySDXL(rows=100)
    for norm in (model.unet.conv_norm_out, model.vae.decoder.conv_norm_out, model.vae.encoder.conv_norm_out):
        norm.weight[0] = torch.nan
    return write_single(model, checkpoints / "nan.safetensors").name


@pytest.mark.parametrize(("sampler", "where"), [
    ("sample_sdxl", "step 1 of 4"), ("sample", "timestep 999, step 1 of 4")])
def test_nan_of_the_unet_names_the_step(server, graph, sdxl, nan, sampler, where):
    _, positive, negative, *_ = sdxl
    refusal(server, getattr(graph, sampler)(graph.sdxl(nan)[0], positive, negative, graph.empty()), "U-Net", "NaN", where)


@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_nan_of_the_vae_names_its_half(server, base, graph, sdxl, nan, half):
    vae = graph.sdxl(nan)[2]
    if half == "encoder":
        latent = graph.AscendVAEEncode(pixels=load_picture(graph, base, np.zeros((64, 64, 3))), vae=vae)
        refusal(server, latent, "VAE encoder", nan, "NaN", "damaged")
    else:
        image = graph.AscendVAEDecode(samples=graph.empty(), vae=vae)
        refused(server, show(graph, image), "VAE decoder", nan, "NaN", "damaged")


# -- the settings file of the server's owner -----------------------------------------------------------------------
SETTINGS = [
    ('[mindspore]\nthreads = "many"\n', ["[mindspore]", "threads", "whole number"]),
    ('[mindspore]\nthreads = -1\n', ["[mindspore]", "threads = -1", "below 0"]),
    ('[mindspore]\npython = 3\n', ["[mindspore]", "python"]),
    ('[mindspore]\ncpu = "no"\n', ["[mindspore]", "cpu", "true or false"]),
    ('[mindspore]\ntarget = "cpu"\n', ["[mindspore]", "target", "threads"]),
    ('[[mindspore]]\npython = "python3"\n', ["mindspore", "[mindspore]"]),
    ('mindspore = "cpu"\n', ["mindspore"]),
    ('[[device]]\nname = "npu"\nruntime = "mindspore"\ntarget = "gpu"\n', ["number 1", "gpu", "ascend"]),
    ('[[device]]\nname = "npu"\nruntime = "mindspore"\ndevice_id = "first"\n', ["number 1", "device_id"]),
    ('[[device]]\nname = "npu"\nruntime = "mindspore"\ndevice_id = -1\n', ["number 1", "device_id = -1", "below 0"]),
    ('[[device]]\nname = "npu"\nruntime = "mindspore"\nthreads = 2\n', ["number 1", "threads"]),
    ('[[device]]\nname = "npu"\nruntime = "Mindspore"\n', ["number 1", "mindspore"]),
]


def test_settings(server, base, subtests):
    """The loader stays, and what runs says which file is wrong and where."""
    for text, words in SETTINGS:
        with subtests.test(text), watched.settings(base, text):
            assert "AscendLoadSDXL" in server.get("/object_info/AscendLoadSDXL")
            refused(server, decoded(), "sophgo_ascend.toml", *words)


def decoded(device: str = "auto") -> Graph:
    graph = Graph()
    return show(graph, graph.AscendVAEDecode(samples=graph.empty(), vae=graph.sdxl(device=device)[2]))


def environment(folder: Path, **packages: str) -> Path:
    """The interpreter of a new venv; these packages, version and perhaps code of each, are all that is installed."""
    venv.create(folder, symlinks=True)
    [site] = folder.glob("lib/python3*/site-packages")
    for name, what in packages.items():
        version, _, code = what.partition(" ")
        (site / name).mkdir()
        (site / name / "__init__.py").write_text(code)
        (site / f"{name}-{version}.dist-info").mkdir()
        (site / f"{name}-{version}.dist-info" / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")
    return folder / "bin" / "python"


def with_numpy_2(folder: Path) -> Path:
    """The interpreter of a venv that has the real MindSpore and, before its own, ComfyUI's numpy."""
    python = environment(folder)
    [site] = folder.glob("lib/python3*/site-packages")
    [mindspore] = MINDSPORE.glob("lib/python3*/site-packages")
    (site / "mindspore.pth").write_text(str(mindspore))
    for part in Path(np.__file__).parents[1].glob("numpy*"):
        (site / part.name).symlink_to(part)
    return python


INSTALL = "python tools/install.py mindspore"
INTERPRETERS = {
    "bare": (environment, {}, ["MindSpore is not installed", INSTALL]),
    "new": (with_numpy_2, {}, ["numpy below 2", f"has {np.__version__}", 'pip install "numpy<2"']),
    "old": (environment, {"mindspore": "2.10.0"}, ["numpy", INSTALL]),
    "half": (environment, {"mindspore": "2.10.0", "numpy": "1.26.4"}, ["mindone is not installed", INSTALL]),
    "torn": (environment, {"mindspore": "2.10.0 import no_such_module", "numpy": "1.26.4", "mindone": "0.5.0"},
             ["no_such_module"]),
    "dead": (environment, {"mindspore": "2.10.0 import os; os.abort()", "numpy": "1.26.4", "mindone": "0.5.0"},
             ["ended while it loaded its libraries"]),
}


def test_interpreters(server, base, subtests, tmp_path):
    """What MindSpore's interpreter lacks, and which command puts it there; nothing of MindSpore's own confusion."""
    pythons = {name: make(tmp_path / name, **packages) for name, (make, packages, _) in INTERPRETERS.items()}
    table = '[[device]]\nname = "{}"\nruntime = "mindspore"\npython = "{}"\n'
    settings = [table.format(name, python) for name, python in {**pythons, "gone": "/no/such/python"}.items()]
    with watched.settings(base, "".join([*settings, '[[device]]\nname = "npu"\nruntime = "mindspore"\n'])):
        for name, (_, _, words) in INTERPRETERS.items():
            with subtests.test(name):
                refused(server, decoded(name), f"'{name}'", str(pythons[name]), *words)
        refused(server, decoded("gone"), "'gone'", "/no/such/python", "settings")
        refused(server, decoded("npu"), "'npu'", "finds no Ascend NPU", "'cpu'")
    with watched.settings(base, f'[mindspore]\npython = "{pythons["bare"]}"\n'):
        refused(server, decoded(), "'cpu'", INSTALL)
    with watched.settings(base, "[mindspore]\ncpu = false\n"):
        refused(server, decoded(), "No device for SDXL", INSTALL, "[mindspore]", "cpu = false")


# -- ComfyUI's own environment -------------------------------------------------------------------------------------
def test_comfyui_s_environment_is_untouched(server):
    """It has the versions that were asked for, although MindSpore runs beside it and needs others."""
    [site] = PYTHON.parents[1].glob("lib/python3*/site-packages")
    installed = {one.name.lower().replace("_", "-"): one.version
                 for one in importlib.metadata.distributions(path=[str(site)])}
    asked = re.findall(r"^([\w-]+)==(\S+)", (PACK / "tools" / "requirements-host.txt").read_text().lower(), re.MULTILINE)
    assert {"numpy", "transformers"} <= set(dict(asked)) and not {"mindspore", "mindone"} & set(installed)
    assert {name: installed.get(name) for name, _ in asked} == dict(asked)
    for process, there in ((psutil.Process(server.process.pid), False), (worker(server), True)):
        files = [file.path for file in process.memory_maps() if file.path.startswith(str(MINDSPORE.resolve()))]
        assert bool(files) is there, files
