"""From stock models to a folder of bmodels and a picture, all in the graph."""
from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import save_file
from websocket import WebSocketException

from compiler.errors import CompilerError
from compiler.toolchain import Toolchain
from compiler.workplace import LOCK, PREFIX, remove_abandoned, workplace
from engines.files import content_hash, find_models, list_models
from tests.conftest import need
from tests.host.graphs import Graph, latents, pictures, plain_sentence
from tools.comfyui import Server, ServerError
from tools.install import CHIPS, DEMO_CHECKPOINT, DEMO_ONNX, SIMULATOR

NAME = "from the graph"
SETTINGS = {"chip": "BM1684X", "model_precision": "F32", "clip_precision": "F32", "vae_precision": "F32", "sizes": "64x64",
            "batch_size": 2, "controlnet": False, "context_length": 77, "verify_minutes": 20.0, "dry_run": False}
SAMPLING = {"steps": 2, "cfg": 3.0}
LORA = "red.safetensors"


@pytest.fixture(scope="module", autouse=True)
def parts():
    need(DEMO_CHECKPOINT.exists(), "the demo's checkpoint is not written: run 'python tools/install.py host'")
    need(all((SIMULATOR / chip / "libcmodel.so").exists() for chip in CHIPS),
         "Sophgo's simulator is not installed: run 'python tools/install.py simulator'")
    try:
        Toolchain.install()
    except CompilerError as error:
        need(False, str(error))


@pytest.fixture(scope="module")
def lora(base) -> str:
    """Changes two weights, one of the U-Net's and one of the text encoder's, so that a run without it differs."""
    folder = base / "models" / "loras"
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, (out, into) in {"lora_unet_middle_block_1_transformer_blocks_0_attn2_to_v": (64, 64),
                              "lora_te1_text_model_encoder_layers_0_mlp_fc1": (256, 64)}.items():
        tensors[f"{name}.lora_up.weight"] = torch.randn(out, 2, generator=generator)
        tensors[f"{name}.lora_down.weight"] = torch.randn(2, into, generator=generator) / 4
    save_file(tensors, folder / LORA)
    return LORA


def reference(graph: Graph, lora: str | None = None) -> list:
    """[MODEL, CLIP, VAE] of stock torch."""
    loader = graph.SophgoLoadReference(ckpt_name="shapes.safetensors")
    model, clip = loader[0], loader[1]
    if lora:
        patched = graph.LoraLoader(model=model, clip=clip, lora_name=lora, strength_model=0.8, strength_clip=0.6)
        model, clip = patched[0], patched[1]
    return [model, clip, loader[2]]


def compiling(graph: Graph, model=None, clip=None, vae=None, **changes):
    given = {name: part for name, part in (("model", model), ("clip", clip), ("vae", vae)) if part is not None}
    return graph.SophgoCompile(name=changes.pop("name", "never"), **{**SETTINGS, **changes}, **given)


def picture(graph: Graph, model, clip, vae):
    """(LATENT, IMAGE) of a prompt."""
    positive, negative = graph.prompt(clip, "a red circle on a white background"), graph.prompt(clip, "")
    sampled = graph.sample(model, positive, negative, graph.empty(), **SAMPLING)
    return sampled, graph.VAEDecode(samples=sampled, vae=vae)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_a_stock_model_with_a_lora_becomes_bmodels_that_draw_the_same(server, base, lora, subtests):
    """The one heavy test: everything is compiled, verified in the simulator, loaded and sampled."""
    folder = base / "models" / "sophgo" / NAME
    graph = Graph()
    node = compiling(graph, *reference(graph, lora), name=NAME)
    texts = []

    def watch(kind, data):
        if kind == "progress" and data.get("node") == node.id:
            texts.append(data["value"] / data["max"])
    said = server.run(graph, watch, seconds=1800)[node.id]["text"][0]

    with subtests.test("it says what it did, and how far it was"):
        for words in ("text_encoder.bmodel", "unet_64x64.bmodel", "vae_encoder_64x64.bmodel", "vae_decoder_64x64.bmodel",
                      "prediction cosine 1.00000", "for BM1684X"):
            assert words in said
        assert "not verified" not in said and texts == sorted(texts) and len(texts) > 5 and texts[-1] <= 1

    with subtests.test("model.json tells where it comes from and what was measured"):
        told = json.loads((folder / "model.json").read_text())
        hashes = {file["file"]: file["sha256"] for file in told["source"]["files"]}
        assert hashes == {DEMO_CHECKPOINT.name: content_hash(DEMO_CHECKPOINT),
                          LORA: content_hash(base / "models" / "loras" / LORA)}
        loader, patcher = told["source"]["nodes"]
        assert loader == {"node": "SophgoLoadReference", "settings": {"ckpt_name": "shapes.safetensors"}}
        assert patcher["node"] == "LoraLoader" and patcher["settings"]["strength_model"] == 0.8
        assert told["source"]["patches"] == {"text_encoder": {"weights": 1, "strengths": [0.6]},
                                             "unet": {"weights": 1, "strengths": [0.8]}}
        assert len(told["weights_sha256"]) == 64 and all(file["verified"] for file in told["files"])
        assert told["versions"]["compiler"] == "tpu_mlir 1.30.2" and told["options"]["sizes"] == [[64, 64]]

    with subtests.test("nothing else is left"):
        assert {path.suffix for path in folder.iterdir()} == {".bmodel", ".onnx", ".weights", ".json"}
        assert not [path for path in folder.parent.iterdir() if path.name.startswith(".")]

    with subtests.test("the loaders offer it without a restart"):
        listed = server.get("/object_info/SophgoLoadCheckpoint")["SophgoLoadCheckpoint"]["input"]["required"]
        assert NAME in listed["model_name"][1]["options"]

    with subtests.test("it draws what the patched torch model draws"):
        graph = Graph()
        compiled, image = picture(graph, *graph.checkpoint(NAME))
        onnx, _ = picture(graph, *graph.checkpoint(NAME, "onnx"))
        torch_patched, torch_image = picture(graph, *reference(graph, lora))
        torch_plain, _ = picture(graph, *reference(graph))
        compiled, onnx, patched, plain = latents(server, compiled, onnx, torch_patched, torch_plain, seconds=1800)
        assert cosine(compiled, patched) > 0.99999 and cosine(onnx, patched) > 0.999999
        assert cosine(patched, plain) < 0.999, "the LoRA does nothing, so this shows nothing"
        levels = pictures(server, image) - pictures(server, torch_image)
        assert np.abs(levels).mean() < 0.5

    with subtests.test("the inspector shows it"):
        graph = Graph()
        node = graph.SophgoInspect(file_name=NAME)
        text = server.run(graph)[node.id]["text"][0]
        for words in ("compiled by tpu_mlir", "prediction cosine 1.00000", "LoraLoader", "device memory", "picture 64x64"):
            assert words in text

    with subtests.test("the same again changes nothing"):
        before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
        graph = Graph()
        node = compiling(graph, *reference(graph, lora), name=NAME)
        assert server.run(graph)[node.id]["text"][0] == said
        assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before

    with subtests.test("the name is taken now"):
        graph = Graph()
        said = failure(server, compiling(graph, *reference(graph), name=NAME))
        plain_sentence(said, f"There is a '{NAME}' already")


def failure(server, node) -> str:
    """What a compile that must fail says."""
    with pytest.raises(ServerError) as refused:
        server.run(node.graph)
    return str(refused.value)


def test_a_folder_of_the_packs_own_is_not_hidden(server):
    graph = Graph()
    said = failure(server, compiling(graph, *reference(graph), name=DEMO_ONNX.name))
    plain_sentence(said, f"There is a '{DEMO_ONNX.name}' already")


def test_a_dry_run_only_says_what_it_would_take(server, base):
    graph = Graph()
    node = compiling(graph, *reference(graph), name="dry", sizes="64x64 128x64", dry_run=True)
    said = server.run(graph)[node.id]["text"][0]
    for words in ("text_encoder", "unet_128x64", "In all about", "of memory"):
        assert words in said
    assert not (base / "models" / "sophgo" / "dry").exists()


def test_a_cancelled_compile_leaves_nothing(server, base):
    graph, reached = Graph(), []
    node = compiling(graph, *reference(graph), name="cancelled")

    def watch(kind, data):
        if kind == "progress" and data.get("node") == node.id and data["value"] > 20 and not reached:
            reached.append(time.monotonic())
            server.post("/interrupt")
    with pytest.raises(ServerError, match="interrupted"):
        server.run(graph, watch)
    assert time.monotonic() - reached[0] < 15
    models = base / "models" / "sophgo"
    assert not [path.name for path in models.iterdir() if path.name.startswith(".") or path.name == "cancelled"]


def test_one_name_is_compiled_once_at_a_time_and_what_was_abandoned_is_removed(server, base):
    models = base / "models" / "sophgo"
    abandoned = models / f"{PREFIX}abandoned"
    abandoned.mkdir(parents=True)
    (abandoned / LOCK).touch()
    busy = workplace(models, "busy")           # as a shell's compile would hold it
    try:
        graph = Graph()
        said = failure(server, compiling(graph, *reference(graph), name="busy"))
        plain_sentence(said, "'busy' is being compiled already")
        assert busy.exists() and not abandoned.exists() and not list(models.glob(f"{PREFIX}weights-*"))
    finally:
        shutil.rmtree(busy)


def test_a_server_that_is_killed_leaves_no_process_and_no_folder_for_long(tmp_path):
    """Nothing of the server can clean up: what it had started ends by itself, and the next compile removes the rest."""
    models = tmp_path / "models" / "sophgo"
    graph = Graph()
    node = compiling(graph, *reference(graph), name="killed")
    running = Server(tmp_path)
    with running:
        def kill(kind, data):
            if kind == "progress" and data.get("node") == node.id and data["value"] > 50:
                running.process.kill()
        with pytest.raises((WebSocketException, OSError)):
            running.run(graph, kill)
        running.process.wait()
    deadline = time.monotonic() + 20
    while (left := compilers(models)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left
    assert all(path.name.startswith(PREFIX) for path in models.iterdir())
    assert not list_models([models]) and not find_models(models)
    remove_abandoned(models)
    assert not list(models.iterdir())


def compilers(folder: Path) -> list[psutil.Process]:
    """Processes that work in a folder, or on files of it."""
    return [process for process in psutil.process_iter(["cmdline", "cwd"])
            if any(str(folder) in said for said in [process.info["cwd"] or "", *(process.info["cmdline"] or [])])]


@pytest.mark.parametrize(("before", "words"), [
    (lambda graph, model: graph.ModelSamplingDiscrete(model=model, sampling="v_prediction", zsnr=False),
     "ModelSamplingDiscrete works on the sampling"),
    (lambda graph, model: graph.RescaleCFG(model=model, multiplier=0.7), "RescaleCFG works on the sampling"),
    (lambda graph, model: graph.EasyCache(model=model, reuse_threshold=0.2, start_percent=0.15, end_percent=0.95,
                                          verbose=False), "(easycache) works on the sampling"),
])
def test_what_is_not_in_the_unet_is_told(server, before, words):
    graph = Graph()
    node = compiling(graph, before(graph, reference(graph)[0]), dry_run=True)
    assert words in server.run(graph)[node.id]["text"][0]


@pytest.mark.parametrize(("changes", "words"), [
    ({"name": "CON"}, ["Windows keeps"]),
    ({"name": "../up"}, ["no name for a folder"]),
    ({"sizes": "64x72"}, ["64x72", "multiples of 16", "64x64"]),
    ({"sizes": "large"}, ["'large' is no picture size"]),
    ({"chip": "BM1690"}, ["'bm1690' is no chip", "BM1684X"]),
    ({"chip": "BM1684", "model_precision": "F16"}, ["The U-Net was asked for in F16", "BM1684 computes in F32"]),
    ({"context_length": 100}, ["A context of 100 tokens"]),
])
def test_what_cannot_be_compiled_is_said_at_once(server, changes, words):
    graph = Graph()
    began = time.monotonic()
    plain_sentence(failure(server, compiling(graph, *reference(graph), **changes)), *words)
    assert time.monotonic() - began < 30


def test_nothing_connected(server):
    plain_sentence(failure(server, compiling(Graph())), "connect a MODEL, a CLIP, a VAE")


def test_a_compiled_model_is_not_compiled_again(server):
    graph = Graph()
    model, clip, vae = graph.checkpoint()
    for part, words in (({"model": model}, "MODEL"), ({"clip": clip}, "CLIP"), ({"vae": vae}, "VAE")):
        plain_sentence(failure(server, compiling(graph, **part)), f"The {words} is", "which is compiled")
        del graph[list(graph)[-1]]


def test_what_is_no_weight_is_refused(server):
    graph = Graph()
    model, *_ = reference(graph)
    freeu = graph.FreeU(model=model, b1=1.1, b2=1.2, s1=0.9, s2=0.2)
    said = failure(server, compiling(graph, model=freeu))
    plain_sentence(said, "FreeU changes", "output_block_patch", "cannot be compiled in")
