"""A compile as the compiler's Python does it: what it will take, which recipe is accepted, and that nothing is left."""
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import save_file

from compiler import job, plan, verify
from compiler import toolchain as tools
from compiler.checkpoint import Checkpoint
from compiler.client import compile_checkpoint
from compiler.convert import Recipe, deploy
from compiler.errors import CompilerError, DiskFull, ToolFailed
from compiler.networks import Weights, unet
from compiler.request import Request
from compiler.summary import estimate_text, report_text
from compiler.toolchain import Toolchain
from compiler.workplace import workplace
from demo import checkpoint as demo
from tests.conftest import need
from tests.helpers.sd15 import write_sparse
from tools.install import PACK


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Checkpoint:
    return Checkpoint(demo.write(tmp_path_factory.mktemp("checkpoint") / "shapes.safetensors"))


@pytest.fixture
def request_of(checkpoint, tmp_path):
    """Requests of the demo's checkpoint."""
    folder = tmp_path / "models"
    folder.mkdir()
    return lambda **changes: Request(**{"checkpoint": str(checkpoint.path), "name": "shapes", "folder": str(folder),
                                        "sizes": ((64, 64),), **changes})


@pytest.fixture(scope="module")
def toolchain() -> Toolchain:
    try:
        return Toolchain.install()
    except CompilerError as error:
        need(False, str(error))


# -- what it takes -----------------------------------------------------------------------------------------------------
def test_each_network_has_its_cost_and_the_budget_is_spent_in_order(checkpoint, request_of):
    asked = request_of(sizes=((64, 64), (128, 64)))
    costs = list(plan.costs(asked, checkpoint))
    assert [cost.name for cost in costs] == ["text_encoder", "unet_64x64", "unet_128x64", "vae_encoder_64x64",
                                             "vae_decoder_64x64", "vae_encoder_128x64", "vae_decoder_128x64"]
    assert all(cost.verified for cost in costs) and costs[2].simulate > costs[1].simulate
    tight = list(plan.costs(request_of(budget=costs[0].simulate + costs[1].simulate + 0.1), checkpoint))
    assert [cost.verified for cost in tight] == [True, True, False, False]
    assert not any(cost.verified for cost in plan.costs(request_of(budget=0), checkpoint))


def test_sizes_are_multiples_of_what_the_unet_halves(checkpoint, request_of):
    """The demo's U-Net has two levels: 16 pixels."""
    plan.check(request_of(sizes=((80, 64),)), checkpoint)
    plan.check(request_of(sizes=((72, 64),), kinds=("vae",)), checkpoint)
    with pytest.raises(CompilerError, match="multiples of 16"):
        plan.check(request_of(sizes=((72, 64),)), checkpoint)


@pytest.mark.parametrize(("short", "words"), [
    ("memory", "Compiling text_encoder needs about .* of memory and 100 MB are free"),
    ("disk", "Compiling 'shapes' needs about .* of disk in .* and 100 MB are free"),
])
def test_too_little_memory_or_disk_is_said_before_anything_starts(checkpoint, request_of, monkeypatch, short, words):
    free = {"memory": 1e12, "disk": 1e12, short: 100e6}
    monkeypatch.setattr(plan, "free_memory", lambda: free["memory"])
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1e12, 0, free["disk"]))
    with pytest.raises(CompilerError, match=words):
        plan.refuse_if_too_large(request_of(), list(plan.costs(request_of(), checkpoint)))


def test_what_the_real_sd15_takes(tmp_path):
    """As measured (docs/compile.md), to a quarter."""
    checkpoint = Checkpoint(write_sparse(tmp_path / "sd15.safetensors"))
    asked = Request(str(checkpoint.path), "sd15", str(tmp_path), budget=0)
    costs = {cost.name: cost for cost in plan.costs(asked, checkpoint)}
    assert list(costs) == ["text_encoder", "unet_512x512", "vae_encoder_512x512", "vae_decoder_512x512"]
    memory = {name: cost.memory / 1e9 for name, cost in costs.items()}
    assert memory["text_encoder"] == pytest.approx(1.1, rel=0.25) and memory["unet_512x512"] == pytest.approx(5.5, rel=0.25)
    assert max(memory.values()) == memory["unet_512x512"] and plan.disk(list(costs.values())) < 15e9
    assert 60 < costs["unet_512x512"].seconds < 300 and not any(cost.verified for cost in costs.values())
    (wide,) = plan.costs(Request(str(checkpoint.path), "sd15", str(tmp_path), kinds=("unet",), chip="bm1684"), checkpoint)
    assert wide.memory / 1e9 == pytest.approx(10.5, rel=0.25)
    # its reference computes with all the scores of its first attention
    long, short = (next(plan.costs(Request(str(checkpoint.path), "sd15", str(tmp_path), kinds=("unet",), budget=budget),
                                   checkpoint)) for budget in (1e6, 0))
    assert long.memory > short.memory
    assert job.estimates(asked)["disk"] == plan.disk(list(costs.values())) + checkpoint.path.stat().st_size, "to be written"
    text = estimate_text({"costs": [vars(cost) for cost in costs.values()], "disk": 14e9, "memory": 24e9})
    assert "unet_512x512" in text and "not done: over the budget" in text


def test_free_memory_is_some():
    assert 1e8 < plan.free_memory() < 1e14


def test_a_disk_that_becomes_full_is_said_so(request_of, monkeypatch):
    asked = request_of()
    assert "became full" in job.sentence(OSError(errno.ENOSPC, "No space left on device"), asked)
    assert "failed unexpectedly: PermissionError" in job.sentence(PermissionError(errno.EACCES, "no"), asked)
    assert job.sentence(CompilerError("A tool failed."), asked) == "A tool failed."
    assert "became full while 'shapes' was compiled" in job.sentence(DiskFull("The disk of /tmp/x became full."), asked)
    monkeypatch.setattr(job.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1e12, 1e12, 0))
    assert "became full" in job.sentence(RuntimeError("A write failed."), asked)      # which is then the cause
    assert job.sentence(CompilerError("The name is taken."), asked) == "The name is taken."


@pytest.mark.parametrize(("script", "free", "words"), [
    ("exit 3", 1e12, "sh failed with exit code 3: it said nothing"),
    ("echo 'no such layer'; exit 3", 1e12, "sh failed with exit code 3: no such layer"),
    ("echo 'no such layer'; exit 3", 1e6, "The disk of .* became full while sh ran: make room there"),
    # a tool's words come after those of the shell that it started, when it ends
    ("echo Killed; seq 99; exit 1", 1e12, "was ended by the system, most likely because memory ran out"),
    ("echo 'net.mlir:9:1: error: no such layer'; echo RuntimeError; exit 3", 1e12, "exit code 3: net.mlir:9:1: error: no"),
    ("echo 'a/Killed.cpp'; exit 3", 1e12, "sh failed with exit code 3: a/Killed.cpp"),
    ("echo \"what():  std::bad_alloc\" >&2; exit 1", 1e12, "because memory ran out"),
    ("kill -9 $$", 1e12, "because memory ran out"),
])
def test_why_a_tool_failed_is_said(tmp_path, monkeypatch, script, free, words):
    monkeypatch.setattr(tools.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1e13, 1e13, free))
    (tmp_path / "log").write_text("of the tool before:\nKilled\nerror: forgotten\n")
    with pytest.raises(CompilerError, match=words) as error:
        tools.run(["sh", "-c", script], tmp_path / "log", tmp_path)
    assert isinstance(error.value, ToolFailed) == ("exit code" in words), "what another recipe may do about"


def test_deploy_leaves_the_bmodel_alone(tmp_path):
    """model_deploy.py leaves gigabytes, also where it fails."""
    chain, mlir = Toolchain(tmp_path / "chain"), tmp_path / "work" / "net.mlir"
    tool = chain.python.parent / "model_deploy.py"
    for folder in (tool.parent, mlir.parent):
        folder.mkdir(parents=True)
    mlir.touch()
    weights = mlir.with_name("net_weight.npz")
    weights.touch()
    tool.write_text("#!/bin/sh\nmkdir net\ntouch net/final.mlir net_tpu.npz\ntest $6 = bm1684x && touch net.bmodel\n")
    tool.chmod(0o755)
    made = deploy(mlir, "bm1684x", Recipe("F16"), toolchain=chain, log=tmp_path / "log")
    assert {*mlir.parent.iterdir()} == {mlir, weights, made}
    with pytest.raises(ToolFailed):
        deploy(mlir, "bm1684", Recipe("F32"), toolchain=chain, log=tmp_path / "log")
    assert {*mlir.parent.iterdir()} == {mlir, weights}, "nor is the bmodel from before taken for this one's"


# -- one folder a compile ----------------------------------------------------------------------------------------------
def test_a_compile_has_its_folder_alone(tmp_path):
    work = workplace(tmp_path, "sd15")
    (work / "result").mkdir()
    with pytest.raises(CompilerError, match="'sd15' is being compiled already, in .*: wait for that, or choose another"):
        workplace(tmp_path, "sd15")
    assert (work / "result").exists() and workplace(tmp_path, "other").exists()


def test_what_a_killed_compile_left_goes_with_the_next(tmp_path):
    """Its lock ended with its process."""
    code = "from pathlib import Path; from compiler.workplace import workplace; import os, sys; " + (
        "work = workplace(Path(sys.argv[1]), 'old'); (work / 'x').touch(); os._exit(9)")
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=PACK)
    assert (tmp_path / ".compiling-old" / "x").exists()
    (tmp_path / ".compiling-another's").mkdir()        # of no compile from a checkpoint
    assert {path.name for path in workplace(tmp_path, "new").parent.iterdir()} == {".compiling-new", ".compiling-another's"}


# -- accepting ---------------------------------------------------------------------------------------------------------
class FakeCompiler:
    """In place of the compiler and the simulator: which recipes and blocks come out right is said beforehand."""

    def __init__(self, monkeypatch, good: set[str], bad_block: str = "", failing: set[str] = frozenset()):
        self.good, self.bad_block, self.tried, self.seconds, self.failing = good, bad_block, [], 1.0, failing
        monkeypatch.setattr(job, "to_mlir", lambda onnx, folder, **_: folder / f"{onnx.stem}.mlir")
        monkeypatch.setattr(job, "deploy", self.deploy)
        monkeypatch.setattr(verify, "simulate", self.simulate)
        monkeypatch.setattr(job, "tell", lambda message: None)

    def deploy(self, mlir, chip, recipe, **_):
        self.tried.append(str(recipe))
        if str(recipe) in self.failing:
            raise ToolFailed(f"model_deploy.py failed with exit code 1: {recipe} (all of it: x.log).")
        path = mlir.with_suffix(".bmodel")
        path.write_text(str(recipe))
        return path

    def simulate(self, bmodel, chip, feeds, toolchain, log, patience):
        if self.seconds > patience:
            raise TimeoutError
        reference = next(bmodel.parents[1].glob(f"result/{bmodel.stem}.onnx"))
        answers = list(verify.reference(reference, feeds).values())
        if bmodel.stem.endswith("_part"):
            (name,) = [output.name for output in onnxruntime.InferenceSession(reference).get_outputs()]
            right = name.split("/")[0] < self.bad_block
        else:
            right = bmodel.read_text() in self.good
        return [answer if right else answer + np.abs(answer).max() for answer in answers], self.seconds


def whole(request: Request, tmp_path) -> dict:
    work = tmp_path / "work"
    work.mkdir()
    return job.Job(request, Toolchain(tmp_path), work, tmp_path / "log").run()


def test_the_first_recipe_that_computes_the_same_is_taken_and_told(request_of, monkeypatch, tmp_path):
    fake = FakeCompiler(monkeypatch, good={"BF16", "F16 without layer groups"})
    report = whole(request_of(kinds=("unet",), precisions={"unet": "F16"}), tmp_path)
    assert fake.tried == ["F16", "F16 without layer groups"]
    (file,) = report["files"]
    assert file["recipe"] == "F16 without layer groups" and file["verified"] and file["precision"] == "F16"
    assert [attempt["recipe"] for attempt in file["attempts"]] == fake.tried
    assert file["attempts"][1]["parity"]["prediction"]["cosine"] == pytest.approx(1)
    written = json.loads((request_of().out / "model.json").read_text())
    assert written == json.loads(json.dumps(report)) and written["weights_sha256"] and written["options"]["batch"] == 2
    assert {path.name for path in request_of().out.iterdir()} == {"model.json", "unet.weights", "unet_64x64.bmodel",
                                                                  "unet_64x64.onnx"}


def test_if_none_is_right_the_recipes_and_the_block_are_named(request_of, monkeypatch, tmp_path):
    """Everything from the middle block on is wrong."""
    fake = FakeCompiler(monkeypatch, good=set(), bad_block="middle_block")
    with pytest.raises(CompilerError) as error:
        whole(request_of(kinds=("unet",), chip="bm1684"), tmp_path)
    said = str(error.value)
    assert said.startswith("The U-Net 64x64 compiled for BM1684 does not compute what its reference does "
                           "(F32 without layer groups cosine 0.")
    assert "it goes wrong in 'middle_block'" in said and "\n" not in said
    assert len(fake.tried) <= 1 + 4, "halving"
    assert not request_of().out.exists()


@pytest.mark.parametrize("budget", [1000.0, 1.0])
def test_a_recipe_that_does_not_compile_is_followed_by_the_next(request_of, monkeypatch, tmp_path, budget):
    fake = FakeCompiler(monkeypatch, good={"F16 without layer groups"}, failing={"F16"})
    report = whole(request_of(kinds=("unet",), precisions={"unet": "F16"}, budget=budget), tmp_path)
    (file,) = report["files"]
    assert fake.tried == ["F16", "F16 without layer groups"] and file["recipe"] == fake.tried[1]
    assert file["verified"] == (budget > 1) and "exit code 1: F16" in file["attempts"][0]["failure"]
    assert "F16: not compiled did not do, F16 without layer groups did" in report_text(report)


def test_if_none_compiles_the_first_failure_is_told(request_of, monkeypatch, tmp_path):
    FakeCompiler(monkeypatch, good=set(), failing={"F32", "F32 without layer groups"})
    with pytest.raises(CompilerError, match="exit code 1: F32 without layer groups"):
        whole(request_of(kinds=("unet",), chip="bm1684"), tmp_path)


def test_a_block_that_cannot_be_found_is_not_named(request_of, monkeypatch, tmp_path):
    """Parts that take longer than the budget, or that do not compile."""
    fake = FakeCompiler(monkeypatch, good=set())

    def slow(*parts):
        fake.seconds = 1e6
        return real(*parts)
    real = job.verify.up_to
    monkeypatch.setattr(job.verify, "up_to", slow)
    with pytest.raises(CompilerError, match=r"\(F32 without layer groups cosine 0.\d+\); use another precision"):
        whole(request_of(kinds=("unet",), chip="bm1684"), tmp_path)


def test_a_folder_that_appears_meanwhile_is_not_overwritten(request_of, monkeypatch, tmp_path):
    FakeCompiler(monkeypatch, good=set())
    real = job.Job.report

    def late(self, *parts):
        self.request.out.mkdir()
        (self.request.out / "mine").touch()
        return real(self, *parts)
    monkeypatch.setattr(job.Job, "report", late)
    with pytest.raises(CompilerError, match="There is a 'shapes' by now"):
        whole(request_of(kinds=("unet",), budget=1.0), tmp_path)
    assert [path.name for path in request_of().out.iterdir()] == ["mine"]


def test_without_time_to_compare_it_is_not_verified(request_of, monkeypatch, tmp_path):
    FakeCompiler(monkeypatch, good=set())
    (file,) = whole(request_of(kinds=("unet",), budget=1.0), tmp_path)["files"]
    assert not file["verified"] and file["recipe"] == "BF16"


def test_a_simulation_that_takes_too_long_is_given_up(request_of, monkeypatch, tmp_path):
    fake = FakeCompiler(monkeypatch, good=set())
    fake.seconds = 1000.0
    (file,) = whole(request_of(kinds=("unet",), budget=100.0), tmp_path)["files"]
    assert not file["verified"] and len(fake.tried) == 1


def test_a_part_of_a_network_computes_its_blocks_result(checkpoint, tmp_path):
    with Weights(tmp_path / "unet.weights") as weights:
        graph = unet(checkpoint.part("unet"), weights, 64, 64)
        path = graph.save(tmp_path)
    feeds = verify.inputs(graph, {})
    names = [name for name, _ in graph.blocks]
    assert names == [*(f"input_blocks.{i}" for i in range(4)), "middle_block", *(f"output_blocks.{i}" for i in range(4))]
    shapes = []
    for name, value in graph.blocks:
        ((got, array),) = verify.reference(verify.up_to(path, value), feeds).items()
        assert got == value.name and array.shape == value.shape and name in got
        shapes.append(array.shape[1:])
    assert shapes == [(32, 8, 8), (32, 8, 8), (32, 4, 4), (64, 4, 4), (64, 4, 4), (64, 4, 4), (64, 8, 8), (32, 8, 8),
                      (32, 8, 8)]


def test_what_networks_are_tried_with(checkpoint):
    graph = unet(checkpoint.part("unet", dry=True), Weights(None), 64, 64, batch=3, tokens=154, control=True)
    context = np.random.default_rng(0).standard_normal((1, 77, 64)).astype(np.float32)
    arrays = verify.inputs(graph, {"context": context})
    assert {name: array.shape for name, array in arrays.items()} == {value.name: value.shape for value in graph.inputs}
    assert arrays["timestep"].tolist() == [601, 564, 527]
    np.testing.assert_array_equal(arrays["context"][0, :77], context[0])
    assert not np.array_equal(arrays["context"][0], arrays["context"][1])


# -- the real process --------------------------------------------------------------------------------------------------
def test_the_shell_says_what_it_would_take(toolchain, checkpoint, tmp_path):
    command = [sys.executable, "-m", "compiler", str(checkpoint.path), "--out", str(tmp_path), "--sizes", "64x64"]
    done = subprocess.run([*command, "--dry-run"], cwd=PACK, capture_output=True, text=True, check=True)
    for words in ("text_encoder", "unet_64x64", "vae_decoder_64x64", "In all about", "of disk while it runs"):
        assert words in done.stdout
    assert not list(tmp_path.iterdir())
    done = subprocess.run([*command, "--sizes", "65x64"], cwd=PACK, capture_output=True, text=True)
    assert done.returncode == 1 and "multiples of 8" in done.stderr and "Traceback" not in done.stderr


def test_another_model_is_refused_by_the_job(toolchain, tmp_path):
    name = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    save_file({name: torch.zeros(64, 2048)}, tmp_path / "sdxl.safetensors")
    asked = Request(str(tmp_path / "sdxl.safetensors"), "sdxl", str(tmp_path / "models"), kinds=("unet",))
    with pytest.raises(CompilerError, match="'sdxl.safetensors' is SDXL"):
        compile_checkpoint(asked, toolchain=toolchain)
    assert not list((tmp_path / "models").iterdir())


def test_a_compile_needs_no_compiler_of_the_system(toolchain, request_of, tmp_path, monkeypatch):
    """Fused attention would: its kernel is built by cmake and gcc, and kept in ~/.ppl."""
    folder, home = tmp_path / "bin", tmp_path / "home"
    folder.mkdir()
    home.mkdir()
    for name in ("sh", "mv", "rm"):
        (folder / name).symlink_to(shutil.which(name))
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("HOME", str(home))
    report = compile_checkpoint(request_of(kinds=("text_encoder",), budget=0), toolchain=toolchain)
    (file,) = report["files"]
    assert file["recipe"] == "F16" and len(file["attempts"]) == 1
    assert not list(home.iterdir())


def started_by_this() -> list[int]:
    """The jobs, by their process ids."""
    listed = subprocess.run(["ps", "-o", "pid,args", "--ppid", str(os.getpid())], capture_output=True, text=True).stdout
    return [int(line.split()[0]) for line in listed.splitlines() if "compiler.job" in line]


def cancel():
    raise KeyboardInterrupt


@pytest.mark.parametrize(("how", "raised"), [
    (cancel, KeyboardInterrupt),
    (lambda: os.kill(started_by_this()[0], signal.SIGTERM), CompilerError),     # as at a shutdown
    (lambda: os.kill(started_by_this()[0], signal.SIGKILL), CompilerError),
])
def test_a_compile_that_is_ended_leaves_nothing(toolchain, request_of, how, raised):
    steps, asked, ended = [], request_of(), []

    def poll():
        if steps and "reading it into the compiler" in steps[-1] and not ended:
            ended.append(how)
            time.sleep(0.3)             # a tool has started
            how()
    with pytest.raises(raised) as error:
        compile_checkpoint(asked, toolchain=toolchain, progress=lambda share, step: steps.append(step), poll=poll)
    if raised is CompilerError:
        assert "ended without an answer" in str(error.value)
    time.sleep(0.5)
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert asked.folder not in listed, "a tool still runs"
    workplace(asked.out.parent, "next")         # which sweeps up where the compile was killed and could not
    assert [path.name for path in asked.out.parent.iterdir()] == [".compiling-next"]
