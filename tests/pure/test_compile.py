"""Compiling, without a compiler: what is asked for, in which order recipes are tried, and what the job's process tells."""
from __future__ import annotations

import dataclasses
import json
import os
import platform
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from compiler.client import compile_checkpoint
from compiler.convert import Recipe
from compiler.errors import CompilerError
from compiler.recipes import Attempt, Parity, first_bad_block, recipes
from compiler.request import Request, parse_sizes
from compiler.summary import estimate_brief, estimate_text, folder_text, made, report_brief, report_text
from compiler.toolchain import MARK, Toolchain


# -- requests ----------------------------------------------------------------------------------------------------------
def request(tmp_path: Path, **changes) -> Request:
    return Request(**{"checkpoint": "sd15.safetensors", "name": "sd15", "folder": str(tmp_path), **changes})


def test_a_request_travels_whole(tmp_path):
    asked = request(tmp_path, kinds=("unet",), sizes=((512, 768), (64, 64)), precisions={"unet": "F32"}, control=True)
    assert Request.from_json(asked.to_json()) == asked
    assert asked.of(Path("/x"), {"a": 1}).source == {"a": 1}


@pytest.mark.parametrize(("changes", "words"), [
    ({"name": ""}, "no name for a folder"), ({"name": "../x"}, "no name for a folder"), ({"name": ".x"}, "no name for a"),
    ({"name": "a/b"}, "no name for a folder"), ({"name": "x" * 200}, "no name for a folder"), ({"name": "x."}, "no name"),
    ({"name": "nul"}, "Windows keeps"), ({"name": "COM1.bmodels"}, "Windows keeps"), ({"name": "模" * 81}, "80 at most"),
    ({"name": "\N{CJK UNIFIED IDEOGRAPH-20000}" * 79}, "no name for a folder"),        # 316 bytes
    ({"name": "there"}, "There is a 'there' already: choose another name"),
    ({"kinds": ()}, "connect a MODEL, a CLIP, a VAE"),
    ({"chip": "bm1688"}, "choose BM1684X and BM1684"),
    ({"chip": "bm1684", "precisions": {"vae": "F16"}}, "The VAE was asked for in F16 and the BM1684 computes in F32"),
    ({"precisions": {"unet": "INT8"}}, "The U-Net was asked for in INT8"),
    ({"batch": 0}, "A batch of 0"), ({"batch": 99}, "A batch of 99"),
    ({"tokens": 78}, "choose 77, 154, 231"), ({"tokens": 77 * 20}, "A context of 1540 tokens"),
    ({"sizes": ()}, "No picture size was given"),
    ({"sizes": ((512, 500),)}, "512x500 was asked for, and sizes must be multiples of 64 .* use 512x512, the nearest"),
    ({"sizes": ((0, 64),)}, "use 64x64"), ({"sizes": ((64, 9999),)}, "up to 4096: use 64x4096"),
    ({"sizes": tuple((64 * i, 64) for i in range(1, 10))}, "9 sizes were asked for"),
])
def test_what_cannot_be_compiled_is_said_in_one_sentence(tmp_path, changes, words):
    (tmp_path / "there").mkdir()
    with pytest.raises(CompilerError, match=words) as error:
        request(tmp_path, **changes).check(64)
    assert "\n" not in str(error.value) and str(error.value).endswith(".")


@pytest.mark.parametrize("name", ["sd15", "SD 1.5 (LoRA 0.8)", "模型", "a_b-c+d", "console", "nul-free"])
def test_names_that_people_give(tmp_path, name):
    request(tmp_path, name=name).check(64)


def test_sizes_as_people_write_them():
    assert parse_sizes(" 512x512, 768X512 768*512,64×64") == ((512, 512), (768, 512), (64, 64))
    for text in ("512", "512 x 512", "axb", "512x512x3", "999999x64"):
        with pytest.raises(CompilerError, match="is no picture size"):
            parse_sizes(text)


def test_auto_is_the_best_of_each_chip(tmp_path):
    assert [request(tmp_path).precision(kind) for kind in ("text_encoder", "unet", "vae")] == ["F16", "BF16", "BF16"]
    assert request(tmp_path, chip="bm1684").precision("unet") == "F32"
    assert request(tmp_path, precisions={"unet": "F32"}).precision("unet") == "F32"


# -- recipes -----------------------------------------------------------------------------------------------------------
def test_remedies_come_in_order():
    assert [str(recipe) for recipe in recipes("unet", "bm1684x", "F16")] == [
        "F16", "F16 without layer groups", "BF16", "F16 with high-precision operators", "F32", "F32 without layer groups"]
    assert [str(recipe) for recipe in recipes("vae_decoder", "bm1684", "F32")] == ["F32", "F32 without layer groups"]
    assert [str(recipe) for recipe in recipes("unet", "bm1684", "F32")] == ["F32 without layer groups"]


def test_parity():
    numbers = np.array([1.0, 2.0, 3.0], np.float32)
    assert Parity.of(numbers, numbers) == Parity(pytest.approx(1.0), 0.0, 0.0)
    assert Parity.of(numbers + [0, 0, 0.3], numbers).largest == pytest.approx(0.3)
    for bad in (np.array([1, np.nan, 3]), np.array([1, np.inf, 3]), np.zeros(3)):
        assert not Attempt(Recipe(), {"out": Parity.of(bad, numbers)}).good
    assert not Attempt(Recipe()).good, "what was not compared is not good"


def test_each_precision_has_its_tolerance():
    parity = {"a": Parity(0.9999999, 0, 0), "b": Parity(0.9995, 0, 0)}
    assert not Attempt(Recipe("F32"), parity).good
    assert Attempt(Recipe("BF16"), parity).good and Attempt(Recipe("F16"), parity).cosine == 0.9995


@pytest.mark.parametrize("bad", range(7))
def test_the_first_bad_block_is_found_by_halving(bad):
    blocks, tried = [f"block.{number}" for number in range(7)], []

    def good(name: str) -> bool:
        tried.append(name)
        return blocks.index(name) < bad
    assert first_bad_block(blocks, good) == f"block.{bad}" and len(tried) <= 3


# -- the job's process, by a stand-in ----------------------------------------------------------------------------------
def toolchain(folder: Path, script: str) -> Toolchain:
    """One whose Python is a shell script."""
    chain = Toolchain(folder)
    chain.python.parent.mkdir(parents=True)
    chain.python.write_text("#!/bin/sh\nread request\n" + script)
    chain.python.chmod(0o755)
    (folder / "stamp").write_text(MARK)
    return chain


def run(tmp_path: Path, script: str, **how):
    return compile_checkpoint(request(tmp_path / "models"), toolchain=toolchain(tmp_path / "chain", script), **how)


def line(**message) -> str:
    return f"echo '{json.dumps(message)}'\n"


def test_progress_goes_up_to_the_answer(tmp_path):
    seen = []
    script = (line(step="one", share=0.25, seconds=0.2) + "sleep 0.6\n" + line(step="two", share=0.75, seconds=100)
              + "sleep 0.3\n" + line(done={"name": "sd15"}) + "cat >/dev/null")
    assert run(tmp_path, script, progress=lambda share, step: seen.append((share, step))) == {"name": "sd15"}
    shares = [share for share, _ in seen]
    assert shares == sorted(shares) and 0.2 < max(share for share, step in seen if step == "one") < 0.25
    assert {step for _, step in seen} >= {"one", "two"} and all(0.25 <= share < 0.3 for share, step in seen if step == "two")


@pytest.mark.parametrize(("script", "words"), [
    (line(error="It is too large."), "It is too large."),
    ("echo 'Segmentation fault' >&2; exit 139", "ended without an answer; it last said: Segmentation fault"),
    ("exit 0", "ended without an answer"),
])
def test_what_goes_wrong_is_one_sentence(tmp_path, script, words):
    with pytest.raises(CompilerError, match=words) as error:
        run(tmp_path, script)
    assert "\n" not in str(error.value)


def test_without_a_compiler_the_command_is_named(tmp_path):
    with pytest.raises(CompilerError, match="is not installed on this server: run 'python -m compiler'"):
        compile_checkpoint(request(tmp_path), toolchain=Toolchain(tmp_path / "nothing"))


def test_where_there_is_no_compiler_for_the_way_round_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    for what in (lambda: Toolchain.install(tmp_path), Toolchain(tmp_path).check):
        with pytest.raises(CompilerError, match="for Linux x86_64 and this is Linux aarch64: compile on such a machine"):
            what()


def test_a_compiler_from_before_an_update_is_to_be_installed_anew(tmp_path):
    chain = toolchain(tmp_path / "chain", "")
    (chain.folder / "stamp").write_text("of another list of packages")
    with pytest.raises(CompilerError, match="in another version than this one needs: run 'python -m compiler'"):
        compile_checkpoint(request(tmp_path), toolchain=chain)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "models").write_text("a file")
    with pytest.raises(CompilerError, match="models, for 'sd15', cannot be made: File exists."):
        run(tmp_path, "exit 0")


def test_a_cancel_ends_the_job_and_what_it_started(tmp_path):
    """The stand-in ends with its stdin, as the job does, and reports so; its child is of its group."""
    script = f"sleep 100 &\necho $! >{tmp_path}/child\n" + line(step="x", share=1, seconds=1) + (
        f"cat >/dev/null\necho bye >{tmp_path}/bye\nkill 0")

    def poll():
        if (tmp_path / "child").exists():
            raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, script, poll=poll)
    assert (tmp_path / "bye").exists()
    child = int((tmp_path / "child").read_text())
    for _ in range(50):
        if not Path(f"/proc/{child}").exists():
            return
        time.sleep(0.1)
    os.kill(child, signal.SIGKILL)
    pytest.fail("the child outlived the cancel")


# -- texts -------------------------------------------------------------------------------------------------------------
def test_the_texts_say_what_counts():
    cost = {"name": "unet_512x512", "build": 30, "transform": 60, "deploy": 200, "simulate": 40_000, "verified": False,
            "memory": 12e9, "result": 5e9}
    text = estimate_text({"costs": [cost], "disk": 20e9, "memory": 16e9})
    for words in ("unet_512x512", "5 min", "11 h, not done: over the budget", "12.0 GB", "20.0 GB", "16.0 GB"):
        assert words in text
    assert estimate_brief({"costs": [cost], "disk": 20e9, "memory": 16e9}).splitlines()[1:] == [
        "unet_512x512: 5 min, comparing 11 h, not done: over the budget"]
    text = report_text(model_json())
    for words in ("'sd15' for BM1684X", "| 1.7 GB |", "cosine 0.9999000", "not verified", "- Put it behind.",
                  "- unet.bmodel: F16: cosine 0.50000 did not do, BF16 did"):
        assert words in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(line) for line in tables}) == 1 and set(tables[1]) == {"|", "-"}
    assert report_brief(model_json()).splitlines() == [
        "'sd15' for BM1684X, 3.4 GB", "press R, and the loaders offer it", "unet.bmodel: BF16, cosine 0.999900",
        "unet.bmodel: BF16, not verified", "unet.bmodel: F16: cosine 0.50000 did not do, BF16 did", "Put it behind."]


def model_json(**changes) -> dict:
    good, bad = ({"recipe": name, "seconds": 1, "parity": {"prediction": dataclasses.asdict(Parity(cosine, 0.1, 0.2))}}
                 for name, cosine in (("BF16", 0.9999), ("F16", 0.5)))
    file = {"file": "unet.bmodel", "recipe": "BF16", "precision": "BF16", "bytes": 1_700_000_000, "verified": True,
            "attempts": [bad, good]}
    return {"format": 1, "name": "sd15", "chip": "BM1684X", "versions": {"compiler": "tpu_mlir 1.30.2"},
            "weights_sha256": "ab" * 32, "source": {"notes": ["Put it behind."]},
            "files": [file, {**file, "verified": False, "attempts": [{"recipe": "BF16", "parity": {}}]}], **changes}


def test_a_folder_tells_what_it_was_made_from(tmp_path):
    source = {"nodes": [{"node": "CheckpointLoaderSimple", "settings": {"ckpt_name": "sd15.safetensors"}},
                        {"node": "LoraLoader", "settings": {"lora_name": "red.safetensors", "strength_model": 0.8}}],
              "files": [{"file": "red.safetensors", "folder": "loras", "sha256": "0123456789abcdef" * 4}]}
    (tmp_path / "model.json").write_text(json.dumps(model_json(source=source)))
    text = folder_text(tmp_path)
    assert "- from CheckpointLoaderSimple (ckpt_name sd15.safetensors)" in text
    assert "- from LoraLoader (lora_name red.safetensors, strength_model 0.8, sha256 0123456789ab...)" in text
    assert not folder_text(tmp_path / "nothing")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format": 1}', '{"format": 1, "files": 3}', "[" * 100_000,
                                  json.dumps({"format": 1, "name": 1, "files": [{}]}), '"' + " " * (1 << 20) + '"'])
def test_a_strangers_model_json_does_no_harm(tmp_path, text):
    (tmp_path / "sd15").mkdir()
    (tmp_path / "sd15" / "model.json").write_text(text)
    assert folder_text(tmp_path / "sd15") == "model.json: damaged, or not written by this pack"
    assert made(request(tmp_path)) is None


def test_the_same_compile_is_recognised(tmp_path):
    asked = request(tmp_path, precisions={"unet": "F32"})
    asked.out.mkdir()
    for options, known in ((asked.options, True), ({**asked.options, "batch": 1}, False)):
        (asked.out / "model.json").write_text(json.dumps(model_json(options=options)))
        assert bool(made(asked)) == known
    assert not made(request(tmp_path, name="other")) and not made(request(tmp_path, name="a\0b"))
