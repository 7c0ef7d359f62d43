"""Whatever goes wrong is one plain sentence on the node, and the next prompt works."""
from __future__ import annotations

import itertools
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.conftest import need
from tests.helpers import bmodel_writer, onnx_nets
from tests.host import expected, watched
from tests.host.graphs import CATS, DOGS, Graph, Node, latent, load_picture, plain_sentence, refusal
from tools.comfyui import ServerError
from tools.install import SIMULATOR

SEEDS = itertools.count(1000)


@pytest.fixture(autouse=True)
def next_prompt_works(server):
    """After every refusal a good prompt gives the right numbers; a seed of its own, so that nothing is cached."""
    yield
    seed = next(SEEDS)
    expected.close(latent(server, Graph().picture(seed=seed)),
                   expected.euler(expected.hidden(CATS), expected.hidden(DOGS), seed=seed))


@pytest.fixture(scope="module")
def models(base) -> Path:
    return base / "models" / "sophgo"


def unet(graph: Graph, name: str, device: str = "auto") -> Node:
    """Sample with this U-Net and the good text encoder."""
    clip = graph.checkpoint()[1]
    return graph.sample(graph.SophgoLoadUNet(unet_name=name, device=device), graph.prompt(clip, CATS),
                        graph.prompt(clip, DOGS), graph.empty())


# -- names ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", [
    "../arithmetic", "arithmetic/../arithmetic", "..\\arithmetic", "/etc/passwd", "C:\\models\\x.onnx", "", ".",
    "arithmetic/", "//arithmetic", "arithmetic\x00", "arithmetic/unet_8x8.onnx\n", " arithmetic", "a" * 5000,
], ids=lambda name: repr(name[:24]))
def test_name_that_is_none(server, graph, name):
    refusal(server, graph.picture(name), "no name of a model file", "arithmetic")


def test_inspect_takes_no_such_name_either(server, graph):
    graph.SophgoInspect(file_name="../arithmetic/unet_8x8.onnx")
    with pytest.raises(ServerError) as refused:
        server.run(graph)
    plain_sentence(str(refused.value), "no name of a model file", "arithmetic")


@pytest.mark.parametrize("name", ["arithmetik", "arithmetic/unet_9x9.onnx", "arithmetic/unet_8x8.onnx/x", "~/x.onnx"])
def test_missing_name_offers_the_nearest(server, graph, name):
    refusal(server, graph.picture(name), f"no '{name}'", "arithmetic")


def test_link_out_of_the_models(server, graph, models, tmp_path):
    shutil.copy(models / "arithmetic" / "unet_8x8.onnx", tmp_path / "secret.onnx")
    (models / "linked.onnx").symlink_to(tmp_path / "secret.onnx")
    refusal(server, unet(graph, "linked.onnx"), "linked.onnx", "leads out")


# -- files ---------------------------------------------------------------------------------------------------------
BROKEN = {
    "empty": lambda good: b"", "truncated": lambda good: good[:len(good) * 2 // 3], "start": lambda good: good[:10],
    "garbage": lambda good: np.random.default_rng(0).bytes(5000), "zeros": lambda good: bytes(5000),
    "pickle": lambda good: pickle.dumps({"state_dict": list(range(500))}), "text": lambda good: b"<html>Not found</html>",
}


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("suffix", ["onnx", "bmodel"])
def test_broken_file(server, graph, models, suffix, kind):
    good = ((models / "arithmetic" / "unet_8x8.onnx").read_bytes() if suffix == "onnx"
            else bmodel_writer.bmodel_bytes([bmodel_writer.unet_demo(8, 8, 64)]))
    name = f"{kind}.{suffix}"
    (models / name).write_bytes(BROKEN[kind](good))
    refusal(server, unet(graph, name), name)


if os.geteuid():          # root may read every file
    def test_unreadable_file(server, graph, models):
        file = Path(shutil.copy(models / "arithmetic" / "unet_8x8.onnx", models / "unreadable.onnx"))
        file.chmod(0)
        refusal(server, unet(graph, "unreadable.onnx"), "unreadable.onnx")


@pytest.mark.parametrize(("file", "held"), [("text_encoder.onnx", "text encoder"), ("vae_decoder.onnx", "VAE decoder")])
def test_wrong_role(server, graph, file, held):
    refusal(server, unet(graph, f"arithmetic/{file}"), file, "holds no U-Net", held)


@pytest.mark.parametrize("missing", ["text_encoder", "unet_8x8", "vae_decoder"])
def test_folder_without_a_stage(server, graph, models, missing):
    folder = onnx_nets.checkpoint(models / f"without_{missing}")
    (folder / f"{missing}.onnx").unlink()
    stage = {"text_encoder": "text encoder", "unet_8x8": "U-Net", "vae_decoder": "VAE decoder"}[missing]
    refusal(server, graph.picture(folder.name), folder.name, f"holds no {stage}", "VAE encoder")


def test_encode_without_an_encoder(server, base, graph, models):
    folder = onnx_nets.checkpoint(models / "without_encoder")
    (folder / "vae_encoder.onnx").unlink()
    vae = graph.checkpoint(folder.name)[2]
    picture = load_picture(graph, base, np.zeros((64, 64, 3)))
    refusal(server, graph.VAEEncode(pixels=picture, vae=vae), "no VAE encoder", "SophgoLoadVAE")


@pytest.mark.parametrize("size", [(7, 64), (64, 7), (1, 1)])
def test_encode_a_picture_of_less_than_one_element(server, base, graph, loaded, size):
    picture = load_picture(graph, base, np.zeros((*size, 3)))
    refusal(server, graph.VAEEncode(pixels=picture, vae=loaded[-1]), f"{size[1]}x{size[0]}", "8")


# -- chips and devices ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("device", ["auto", "simulator"])
def test_file_for_another_chip(server, graph, models, device):
    need(device == "auto" or SIMULATOR.is_dir(), "the simulator is not installed: run 'python tools/install.py simulator'")
    bmodel_writer.write_bmodel(models / "bm1688.bmodel", [bmodel_writer.unet_demo(8, 8, 64)], chip="BM1688")
    refusal(server, unet(graph, "bm1688.bmodel", device), "bm1688.bmodel", "BM1688")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("chip", ["BM1684X", "BM1684"])
def test_file_with_made_up_contents(server, graph, models, chip, dtype):
    """Header and description are right, weights and code are not: the vendor's library has to find out."""
    need(SIMULATOR.is_dir(), "the simulator is not installed: run 'python tools/install.py simulator'")
    net = bmodel_writer.network("unet", {"latent": (2, 4, 8, 8), "t": (2,), "context": (2, 77, 64)},
                                {"prediction": (2, 4, 8, 8)}, {"latent": dtype, "prediction": dtype})
    bmodel_writer.write_bmodel(models / f"{chip}-{dtype}.bmodel", [net], chip=chip)
    refusal(server, unet(graph, f"{chip}-{dtype}.bmodel"), f"{chip}-{dtype}.bmodel")


@pytest.mark.parametrize("device", ["tpu:7", "", "cuda", "onnx "])
def test_absent_device(server, graph, device):
    refusal(server, graph.picture(device=device), f"Device '{device}'", "auto", "onnx")


def test_absent_device_for_the_unet_alone(server, graph):
    model, clip, _ = graph.checkpoint(unet_device="tpu:7")
    refusal(server, graph.sample(model, graph.prompt(clip, ""), graph.prompt(clip, ""), graph.empty()), "tpu:7", "onnx")


def test_onnx_device_is_no_device_for_a_bmodel(server, graph, models):
    bmodel_writer.write_bmodel(models / "tiny.bmodel", [bmodel_writer.unet_demo(8, 8, 64)])
    refusal(server, unet(graph, "tiny.bmodel", "onnx"), "tiny.bmodel", "bmodel file", "'onnx'")


# -- the settings file of the server's owner -----------------------------------------------------------------------
@pytest.mark.parametrize(("text", "words"), [
    ('[onnx]\nthreads = = 2\n', ["line 2"]),
    ('[[device]]\nname = "card"\nruntim = "bmrt"\n', ["runtim", "runtime"]),
    ('[[device]]\nname = "card"\n', ["number 1", "runtime"]),
    ('[[device]]\nname = "card"\nruntime = "cuda"\n', ["bmrt", "sail", "onnx"]),
    ('[[device]]\nname = "card"\nruntime = "bmrt"\ndevice_id = "first"\n', ["device_id"]),
    ('[[device]]\nname = 5\nruntime = "bmrt"\n', ["name"]),
    ('[[device]]\nname = "card"\nruntime = "onnx"\npython = 3\n', ["python"]),
    ('[device]\nname = "card"\nruntime = "bmrt"\n', ["[[device]]"]),
    ('device = "card"\n', ["device"]),
    ('[simulator]\nidle_seconds = "long"\n', ["idle_seconds"]),
    ('[onnx]\nthreads = "many"\n', ["threads"]),
    ('onnx = 4\n', ["onnx"]),
    ('[card]\nname = "card"\n', ["[card]"]),
    ('[[device]]\nname = "auto"\nruntime = "onnx"\n', ["'auto'", "taken"]),
    ('[[device]]\nname = "a"\nruntime = "onnx"\n[[device]]\nname = "a"\nruntime = "sail"\n', ["number 2", "'a'"]),
])
def test_broken_settings(server, base, graph, text, words):
    """The nodes stay, and what runs says which file is wrong and where."""
    with watched.settings(base, text):
        assert "SophgoLoadCheckpoint" in server.get("/object_info/SophgoLoadCheckpoint")
        refusal(server, graph.picture(), "sophgo_ascend.toml", *words)


def test_settings_that_are_no_text(server, base, graph):
    with watched.settings(base, "") as file:
        file.write_bytes(b"\xff\xfe\x00\x00")
        assert "SophgoLoadCheckpoint" in server.get("/object_info/SophgoLoadCheckpoint")
        refusal(server, graph.picture(), "sophgo_ascend.toml")


@pytest.mark.parametrize("python", ["/no/such/python", "/etc/passwd", "/", "/bin/false", "true"])
def test_device_whose_python_does_not_run(server, base, graph, python):
    with watched.settings(base, f'[[device]]\nname = "broken"\nruntime = "onnx"\npython = "{python}"\n'):
        refusal(server, graph.picture(device="broken"), "'broken'", python, "settings")


def test_device_whose_python_has_no_runtime(server, base, graph, tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nexec python3 -S -E "$@"\n')
    python.chmod(0o755)
    with watched.settings(base, f'[[device]]\nname = "bare"\nruntime = "onnx"\npython = "{python}"\n'):
        refusal(server, graph.picture(device="bare"), "'bare'")


@pytest.mark.parametrize("libraries", ["", "/no/such/folder"])
def test_device_without_libraries(server, base, graph, models, tmp_path, libraries):
    bmodel_writer.write_bmodel(models / "tiny.bmodel", [bmodel_writer.unet_demo(8, 8, 64)])
    folder = libraries or str(tmp_path)
    with watched.settings(base, f'[[device]]\nname = "card"\nruntime = "bmrt"\nlibraries = "{folder}"\n'):
        refusal(server, unet(graph, "tiny.bmodel", "card"), "'card'", folder)


def test_device_without_sail(server, base, graph, models):
    bmodel_writer.write_bmodel(models / "tiny.bmodel", [bmodel_writer.unet_demo(8, 8, 64)])
    with watched.settings(base, '[[device]]\nname = "card"\nruntime = "sail"\n'):
        refusal(server, unet(graph, "tiny.bmodel", "card"), "'card'", "sail")


# -- sizes, prompts, families --------------------------------------------------------------------------------------
@pytest.mark.parametrize(("asked", "nearest"), [((96, 64), "128x64"), ((512, 512), "64x64"), ((64, 128), "64x64"),
                                                ((256, 128), "128x64"), ((16, 16), "64x64")])
def test_size_that_was_not_compiled(server, graph, asked, nearest):
    refusal(server, graph.picture(size=asked), f"{asked[0]}x{asked[1]}", "64x64, 128x64", f"use {nearest}")


WORDS = CATS * 3      # 90 tokens, 15 too many


def test_long_prompt_is_an_error_if_asked_for(server, graph):
    model, clip, _ = graph.checkpoint(long_prompts="error")
    refusal(server, graph.sample(model, graph.prompt(clip, WORDS), graph.prompt(clip, ""), graph.empty()),
            "90 tokens", "75", "truncate")


@pytest.mark.parametrize("node", ["CLIPTextEncode", "SophgoTextEncode"])
def test_long_prompt_is_cut_with_a_warning(server, graph, node):
    """The picture is that of the first 75 words, and the node and the log say so."""
    model, clip, _ = graph.checkpoint(long_prompts="truncate")
    encoder = (graph.prompt(clip, WORDS) if node == "CLIPTextEncode"
               else graph.SophgoTextEncode(clip=clip, prompt=WORDS, negative_prompt=DOGS))
    texts = []
    result = latent(server, graph.sample(model, encoder, graph.prompt(clip, DOGS), graph.empty()),
                    on_event=lambda kind, data: texts.append(data["data"]) if kind == "binary" else None)
    expected.close(result, expected.euler(expected.hidden("cat " * 75), expected.hidden(DOGS)))
    said = [text for text in texts if b"Prompt cut" in text]
    # a text message: type 3, length of the node's id, the id, the text
    assert len(said) == 1 and said[0].startswith(b"\0\0\0\3\0\0\0\1" + encoder.id.encode()) and b"90 tokens" in said[0]
    assert "Prompt cut: it has 90 tokens" in server.tail(60)


def test_long_prompt_may_not_be_something_else(server, graph):
    model, clip, _ = graph.checkpoint(long_prompts="nonsense")
    refusal(server, graph.sample(model, graph.prompt(clip, WORDS), graph.prompt(clip, ""), graph.empty()), "nonsense",
            "truncate", "error")


def test_latent_scale_may_not_be_something_else(server, graph):
    vae = graph.SophgoLoadVAE(decoder_name="arithmetic", encoder_name="same", device="auto", latent_scale="nonsense")
    decoded = graph.VAEDecode(samples=graph.empty(), vae=vae)
    refusal(server, graph.VAEEncode(pixels=decoded, vae=vae), "nonsense", "outside", "inside")


def test_textual_inversion(server, base, graph, loaded):
    folder = base / "models" / "embeddings"
    folder.mkdir(exist_ok=True)
    save_file({"emb_params": torch.zeros(2, 768)}, folder / "style.safetensors")
    model, positive, _, clip, _ = loaded
    refusal(server, graph.sample(model, positive, graph.prompt(clip, "cat embedding:style"), graph.empty()), "embedding")


def test_clip_skip(server, graph, loaded):
    model, positive, negative, clip, _ = loaded
    skipped = graph.CLIPSetLastLayer(clip=clip, stop_at_clip_layer=-2)
    refusal(server, graph.sample(model, graph.prompt(skipped, CATS), negative, graph.empty()), "-2", "CLIPSetLastLayer")


def test_text_encoder_of_another_width(server, graph, models):
    onnx_nets.text_encoder(models / "narrow.onnx", width=32)
    clip = graph.SophgoLoadCLIP(clip_name="narrow.onnx", device="auto", long_prompts="truncate")
    model = graph.checkpoint()[0]
    refusal(server, graph.sample(model, graph.prompt(clip, CATS), graph.prompt(clip, ""), graph.empty()), "32 wide", "64")


@pytest.mark.parametrize(("width", "family"), [(1024, "SD 2.x"), (2048, "SDXL")])
def test_other_families(server, graph, models, width, family):
    onnx_nets.unet(models / f"wide{width}.onnx", width=width)
    refusal(server, unet(graph, f"wide{width}.onnx"), f"wide{width}.onnx", family, "SD 1.x")


# -- numbers -------------------------------------------------------------------------------------------------------
def test_nan_names_the_stage_and_the_step(server, graph, models):
    """Schedule 'simple' of 4 steps: timesteps 999, 749, 499, 249."""
    onnx_nets.unet(models / "nan.onnx", nan_at=499)
    refusal(server, unet(graph, "nan.onnx"), "U-Net in nan.onnx", "NaN", "timestep 499", "step 3 of 4")


def test_nan_of_the_sampler_is_not_blamed_on_the_network(server, graph):
    """ComfyUI's 'kl_optimal' divides 0 by 0 when there is one step."""
    refusal(server, graph.picture(scheduler="kl_optimal", steps=1), "sampler", "NaN", "step 1 of 1", "scheduler")


# -- nodes that want to change what is compiled --------------------------------------------------------------------
@pytest.fixture(scope="module")
def lora(base) -> str:
    folder = base / "models" / "loras"
    folder.mkdir(exist_ok=True)
    block = "transformer_blocks_0_attn1_to_q"
    names = f"lora_unet_down_blocks_0_attentions_0_{block}", "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    save_file({f"{name}.{part}.weight": torch.ones(shape) for name in names
               for part, shape in (("lora_up", (8, 2)), ("lora_down", (2, 8)))}, folder / "pixel.safetensors")
    return "pixel.safetensors"


@pytest.mark.parametrize(("model_strength", "clip_strength", "stage"), [
    (1.0, 1.0, "U-Net"), (0.5, 0.0, "U-Net"), (0.0, 1.0, "text encoder")])
def test_lora(server, graph, loaded, lora, model_strength, clip_strength, stage):
    model, positive, negative, clip, _ = loaded
    both = graph.LoraLoader(model=model, clip=clip, lora_name=lora, strength_model=model_strength,
                            strength_clip=clip_strength)
    refusal(server, graph.sample(both[0], graph.prompt(both[1], CATS), negative, graph.empty()), lora, stage, "compiled")


def test_lora_of_no_strength_is_none(server, graph, loaded, lora):
    model, positive, negative, clip, _ = loaded
    both = graph.LoraLoader(model=model, clip=clip, lora_name=lora, strength_model=0.0, strength_clip=0.0)
    expected.close(latent(server, graph.sample(both[0], graph.prompt(both[1], CATS), negative, graph.empty())),
                   expected.euler(expected.hidden(CATS), expected.hidden(DOGS)))


@pytest.mark.parametrize("on", ["conditioning", "clip"])
def test_lora_by_a_hook(server, graph, loaded, lora, on):
    model, positive, negative, clip, _ = loaded
    hooks = graph.CreateHookLora(lora_name=lora, strength_model=1.0, strength_clip=1.0)
    if on == "clip":
        positive = graph.prompt(graph.SetClipHooks(clip=clip, hooks=hooks, apply_to_conds=False, schedule_clip=False), CATS)
    else:
        positive = graph.ConditioningSetProperties(cond_NEW=positive, hooks=hooks, strength=1.0, set_cond_area="default")
    refusal(server, graph.sample(model, positive, negative, graph.empty()), "hook", "compiled")


PATCHES = {
    "FreeU": {"b1": 1.1, "b2": 1.2, "s1": 0.9, "s2": 0.2}, "FreeU_V2": {"b1": 1.3, "b2": 1.4, "s1": 0.9, "s2": 0.2},
    "HyperTile": {"tile_size": 256, "swap_size": 2, "max_depth": 0, "scale_depth": False},
    "TomePatchModel": {"ratio": 0.3}, "SelfAttentionGuidance": {"scale": 0.5, "blur_sigma": 2.0},
    "PerturbedAttentionGuidance": {"scale": 3.0}, "TorchCompileModel": {"backend": "inductor"},
    "UNetSelfAttentionMultiply": {"q": 2.0, "k": 1.0, "v": 1.0, "out": 1.0},
    "PatchModelAddDownscale": {"block_number": 3, "downscale_factor": 2.0, "start_percent": 0.0, "end_percent": 0.35,
                               "downscale_after_skip": True, "downscale_method": "bicubic", "upscale_method": "bicubic"},
}


@pytest.mark.parametrize("node", PATCHES)
def test_patch_of_the_unet(server, graph, loaded, node):
    model, positive, negative, *_ = loaded
    patched = graph.node(node, model=model, **PATCHES[node])
    refusal(server, graph.sample(patched, positive, negative, graph.empty()), "U-Net", "compiled")


def test_merge(server, graph, loaded):
    model, positive, negative, *_ = loaded
    merged = graph.ModelMergeSimple(model1=model, model2=model, ratio=0.5)
    refusal(server, graph.sample(merged, positive, negative, graph.empty()), "ModelMergeSimple", "U-Net", "compiled")


@pytest.mark.parametrize("node", ["ModelSave", "CLIPSave", "VAESave", "CheckpointSave"])
def test_save_as_a_checkpoint(server, graph, loaded, node):
    model, _, _, clip, vae = loaded
    parts = {"ModelSave": {"model": model}, "CLIPSave": {"clip": clip}, "VAESave": {"vae": vae},
             "CheckpointSave": {"model": model, "clip": clip, "vae": vae}}[node]
    graph.node(node, **parts, filename_prefix="saved")
    with pytest.raises(ServerError) as refused:
        server.run(graph)
    plain_sentence(str(refused.value), "compiled")
    assert not list((server.base / "output").glob("saved*"))


def test_controlnet(server, base, graph, loaded):
    """A T2I adapter, the smallest file that ComfyUI's ControlNetLoader takes."""
    write_adapter(base / "models" / "controlnet" / "adapter.safetensors")
    model, positive, negative, *_ = loaded
    net = graph.ControlNetLoader(control_net_name="adapter.safetensors")
    picture = load_picture(graph, base, np.zeros((64, 64, 3)))
    hinted = graph.ControlNetApply(conditioning=positive, control_net=net, image=picture, strength=1.0)
    refusal(server, graph.sample(model, hinted, negative, graph.empty()), "ControlNet")


def write_adapter(file: Path) -> None:
    """Weights of one channel, of the layout of TencentARC's T2I-Adapter; all zero."""
    widths = [1, 2, 4, 4]
    convolutions = {"conv_in": (1, 64, 3)}
    for number in range(8):
        before, width = widths[max(0, number // 2 - (number % 2 == 0))], widths[number // 2]
        if before != width:
            convolutions[f"body.{number}.in_conv"] = (width, before, 1)
        convolutions |= {f"body.{number}.block1": (width, width, 3), f"body.{number}.block2": (width, width, 1)}
    file.parent.mkdir(exist_ok=True)
    save_file({f"{name}.{part}": torch.zeros((out, into, size, size) if part == "weight" else (out,))
               for name, (out, into, size) in convolutions.items() for part in ("weight", "bias")}, file)
