"""SDXL on MindSpore is cancelled, killed, freed, its file replaced: ComfyUI goes on, and the next run is as if nothing
had happened, bit for bit. One process serves all of it, and stays where nothing has to be lost."""
from __future__ import annotations

import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import pytest
import websocket
from safetensors.torch import load_file, save_file

from engines.devices import CPU_CANCEL_SECONDS
from tests.host.graphs import TINY_SDXL, Graph, Node, latent, load_latent, plain_sentence, refusal
from tests.host.test_resilience import At, kill
from tests.host.undisturbed import Undisturbed, picture, worker, workers
from tools.comfyui import Server, ServerError

LONG = 500              # steps of a run that does not end by itself before it is disturbed
GENEROUS = 30.0         # seconds; a busy machine is slow, but LONG steps take longer


@pytest.fixture(scope="module")
def undisturbed(server, tiny_sdxl) -> Undisturbed:
    yield Undisturbed(server)
    assert not [child for child in psutil.Process(server.process.pid).children(recursive=True)
                if child.status() == psutil.STATUS_ZOMBIE]


def stock(**changes) -> Node:
    """The run of `picture` by KSampler."""
    graph = Graph()
    model, clip, _ = graph.sdxl()
    return graph.sample(model, *graph.condition(clip, "a cat"), graph.empty(), **changes)


def saved(node: Node) -> Graph:
    node.graph.SaveLatent(samples=node, filename_prefix="disturbed")
    return node.graph


def decoding(server: Server, pictures: int) -> Graph:
    """Decodes a batch, picture by picture."""
    graph = Graph()
    values = np.random.default_rng(0).normal(size=(pictures, 4, 16, 16))
    graph.PreviewImage(images=graph.VAEDecode(samples=load_latent(graph, server.base, values), vae=graph.sdxl()[2]))
    return graph


def kill_idle(process: psutil.Process) -> None:
    """It ends while nobody waits for it, and the server has a moment to notice."""
    kill(process)
    time.sleep(1)


RUNS = {"AscendSDXLSampler": picture, "KSampler": stock}


def interrupted(server: Server, graph: Graph, when) -> float:
    """Run a graph that must end as interrupted, and soon: how many seconds after `when` said so."""
    with pytest.raises(ServerError, match="^interrupted$"):
        server.run(graph, on_event=when)
    seconds = time.monotonic() - when.done
    assert seconds < GENEROUS
    return seconds


class Begun:
    """Do something once, some seconds after a node began."""

    def __init__(self, action, class_type: str, graph: Graph, after: float = 0.3):
        self.action, self.class_type, self.graph, self.after, self.done = action, class_type, graph, after, 0.0

    def __call__(self, kind: str, data: dict) -> None:
        if kind == "executing" and data["node"] and self.graph[data["node"]]["class_type"] == self.class_type:
            time.sleep(self.after)
            self.action()
            self.done = time.monotonic()


# -- cancel --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("node", "step"), [*(("AscendSDXLSampler", step) for step in (1, 2, 9)), ("KSampler", 1),
                                            ("KSampler", 5)])
def test_cancel_at_a_step(server, undisturbed, node, step):
    before = worker(server).pid
    seconds = interrupted(server, saved(RUNS[node](steps=LONG, seed=step)), At(lambda: server.post("/interrupt"), step))
    undisturbed.check()
    assert worker(server).pid == before or seconds > CPU_CANCEL_SECONDS      # so busy a machine: its time was over


def test_cancel_at_the_last_step(server, undisturbed):
    """Too late or just in time: either is fine, and neither reaches the next run."""
    try:
        latent(server, picture(steps=5, seed=1), on_event=At(lambda: server.post("/interrupt"), 5))
    except ServerError as error:
        assert str(error) == "interrupted"
    undisturbed.check()


def test_cancel_while_decoding(server, undisturbed):
    before, graph = worker(server).pid, decoding(server, 200)
    seconds = interrupted(server, graph, Begun(lambda: server.post("/interrupt"), "VAEDecode", graph))
    undisturbed.check()
    assert worker(server).pid == before or seconds > CPU_CANCEL_SECONDS


def test_cancel_of_a_worker_that_hangs(server, undisturbed):
    """Its time to end the step passes, and it is killed; so may be a step of a large model that nobody waits for."""
    def hang():
        worker(server).suspend()
        server.post("/interrupt")
    before = worker(server).pid
    assert interrupted(server, saved(picture(steps=LONG, seed=1)), At(hang, 2)) > CPU_CANCEL_SECONDS
    undisturbed.check()
    assert worker(server).pid != before


def test_cancel_while_it_starts(server, undisturbed):
    kill_idle(worker(server))
    graph = saved(picture(seed=1, steps=LONG))
    interrupted(server, graph, Begun(lambda: server.post("/interrupt"), "AscendSDXLSampler", graph))
    undisturbed.check()


def test_cancel_while_nothing_runs_hits_nothing(server, undisturbed):
    before = worker(server).pid
    server.post("/interrupt")
    undisturbed.check()
    assert worker(server).pid == before


# -- crash ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("node", RUNS)
def test_worker_killed_in_a_run(server, undisturbed, node):
    before = worker(server).pid
    with pytest.raises(ServerError) as refused:
        latent(server, RUNS[node](steps=LONG, seed=1), on_event=At(lambda: worker(server).kill(), 2))
    plain_sentence(str(refused.value), "worker process", "'cpu'", f"pid {before}", "ended", "Run again")
    undisturbed.check()
    assert worker(server).pid != before


def test_worker_killed_between_runs(server, undisturbed):
    """Nobody was waiting for it: the next run starts another one and says nothing."""
    before = worker(server).pid
    kill_idle(worker(server))
    undisturbed.check()
    assert worker(server).pid != before


def test_refusal_is_no_crash(server, base, undisturbed):
    before, graph = worker(server).pid, Graph()
    model, clip, _ = graph.sdxl()
    wide = load_latent(graph, base, np.ones((1, 16, 8, 8)))
    refusal(server, graph.sample_sdxl(model, *graph.condition(clip, "a cat"), wide), "4 channels")
    undisturbed.check()
    assert worker(server).pid == before


# -- several prompts, and the server while it is busy --------------------------------------------------------------
def test_prompts_at_once(server, undisturbed):
    with ThreadPoolExecutor() as pool:
        results = list(pool.map(lambda seed: latent(server, picture(seed)), undisturbed.wanted))
    for result, wanted in zip(results, undisturbed.wanted.values()):
        np.testing.assert_array_equal(result, wanted)
    worker(server)


def test_server_answers_while_it_samples(server, undisturbed):
    def ask():
        began = time.monotonic()
        queue, node = server.get("/queue"), server.get("/object_info/AscendLoadSDXL")
        return len(queue["queue_running"]), "AscendLoadSDXL" in node, time.monotonic() - began
    question = At(ask, 2)
    latent(server, picture(steps=50, seed=1), on_event=question)
    running, listed, seconds = question.answer
    assert running == 1 and listed and seconds < GENEROUS


# -- memory and files ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("what", [{"unload_models": True}, {"unload_models": True, "free_memory": True}],
                         ids=["unload", "free"])
def test_free_ends_the_worker(server, undisturbed, what):
    """Unload Models keeps the graph's MODEL, CLIP and VAE, which load again by themselves."""
    undisturbed.check()
    there = worker(server)
    server.post("/free", what)
    there.wait(GENEROUS)
    assert workers(server) == []
    undisturbed.check()


def test_replaced_file_is_loaded_again(server, base, undisturbed, tmp_path):
    """Another U-Net under the same name, then the first one, then none."""
    checkpoints = base / "models" / "checkpoints"
    replaced = checkpoints / "replaced.safetensors"

    def run() -> np.ndarray:
        graph = Graph()
        model, conditions = graph.sdxl(replaced.name)[0], graph.condition(graph.sdxl()[1], "a cat")
        return latent(server, graph.sample_sdxl(model, *conditions, graph.empty()))
    shutil.copy(checkpoints / TINY_SDXL, replaced)
    first = run()
    tensors = load_file(checkpoints / TINY_SDXL)
    tensors["model.diffusion_model.out.2.bias"] += 1
    save_file(tensors, tmp_path / "other")
    (tmp_path / "other").rename(replaced)
    assert np.abs(run() - first).max() > 1
    shutil.copy(checkpoints / TINY_SDXL, tmp_path / "first")
    (tmp_path / "first").rename(replaced)
    np.testing.assert_array_equal(run(), first)
    replaced.unlink()
    with pytest.raises(ServerError) as refused:
        run()
    plain_sentence(str(refused.value), "no SDXL model", replaced.name)
    undisturbed.check()


# -- the end -------------------------------------------------------------------------------------------------------
def test_killed_server_leaves_no_worker_behind(base, tiny_sdxl, tmp_path):
    """A server of its own, which shows a preview of every step until it is killed in a run."""
    checkpoints = tmp_path / "models" / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / TINY_SDXL).symlink_to(base / "models" / "checkpoints" / TINY_SDXL)
    with Server(tmp_path, arguments=("--preview-method", "latent2rgb")) as other:
        seen = []
        latent(other, picture(steps=4),
               on_event=lambda kind, data: seen.append(data["data"]) if kind == "binary" else None)
        # a preview: type 1 or 4 (with metadata), then among others a JPEG
        assert len([data for data in seen if data[3] in (1, 4) and b"\xff\xd8\xff" in data]) == 4
        there = workers(other)
        with pytest.raises((websocket.WebSocketException, OSError)):
            latent(other, picture(steps=LONG, seed=2), on_event=At(other.process.kill, 2))
        assert there and not psutil.wait_procs(there, timeout=GENEROUS)[1]
