"""Cancel, crash, free, shut down, replace files: ComfyUI goes on, and the next prompt gives the right numbers."""
from __future__ import annotations

import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import psutil
import pytest
from onnx import numpy_helper

from tests.helpers import onnx_nets
from tests.host import expected, watched
from tests.host.graphs import CATS, DOGS, Graph, latent, latents, plain_sentence
from tools.comfyui import Server, ServerError

CAT, DOG = expected.hidden(CATS), expected.hidden(DOGS)
SLOW = 1.0             # seconds that a U-Net run takes where something happens in its middle
GENEROUS = 10.0        # seconds; a busy machine is slow, but does not wait for all of the slow steps


@pytest.fixture(scope="module")
def device(server, base, tmp_path_factory):
    device = watched.Watched(tmp_path_factory.mktemp("watched"))
    with watched.settings(base, device.settings):
        yield device
    assert not [child for child in psutil.Process(server.process.pid).children(recursive=True)
                if child.status() == psutil.STATUS_ZOMBIE]


@pytest.fixture
def slow(device):
    device.slow(SLOW)
    yield device
    device.slow(0)


def workers(server: Server) -> list[psutil.Process]:
    """The server's worker processes: it has no other children."""
    return psutil.Process(server.process.pid).children(recursive=True)


def watched_worker(server: Server) -> psutil.Process:
    [found] = [process for process in workers(server) if "WATCHED" in process.environ()]
    return found


def kill(worker: psutil.Process) -> None:
    """The server may leave a zombie until it next looks after its workers."""
    worker.kill()
    while worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)


def works(server: Server, device: str = watched.NAME, seed: int = 77) -> None:
    expected.close(latent(server, Graph().picture(device=device, seed=seed)), expected.euler(CAT, DOG, seed=seed))


class At:
    """Do something once, when a step of sampling is reported as done: the next one has begun or is about to."""

    def __init__(self, action, step: int = 1):
        self.action, self.step, self.done, self.answer = action, step, 0.0, None

    def __call__(self, kind: str, data: dict) -> None:
        if kind == "progress" and data["value"] == self.step and not self.done:
            self.answer = self.action()
            self.done = time.monotonic()


def chain(graph: Graph, steps: int):
    """SophgoUNetStep by SophgoUNetStep."""
    model, clip, _ = graph.checkpoint(device=watched.NAME)
    positive, negative, node = graph.prompt(clip, CATS), graph.prompt(clip, DOGS), graph.empty()
    for step in range(steps):
        node = graph.SophgoUNetStep(model=model, positive=positive, negative=negative, latent_image=node, step=step,
                                    steps=steps, cfg=5.0, sampler_name="euler", scheduler="simple", seed=1, add_noise=True)
    return node


# -- cancel --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("sampling", ["KSampler", "SophgoUNetStep"])
def test_cancel_in_the_middle_of_a_step(server, slow, sampling):
    """Ends as interrupted at once, although the step takes its time; 20 would take 20 s."""
    graph = Graph()
    node = graph.picture(device=watched.NAME, steps=20, seed=5) if sampling == "KSampler" else chain(graph, 20)
    cancel = At(lambda: server.post("/interrupt"))
    with pytest.raises(ServerError, match="^interrupted$"):
        latent(server, node, on_event=cancel)
    assert time.monotonic() - cancel.done < GENEROUS
    slow.slow(0)
    works(server, seed=6)
    assert len(workers(server)) <= 2      # this device and perhaps "onnx" of other tests


def test_cancel_does_not_wait_for_the_step(server, slow):
    slow.slow(2 * GENEROUS)
    slow.forget()
    with ThreadPoolExecutor() as pool:
        run = pool.submit(latent, server, Graph().picture(device=watched.NAME, steps=1, seed=9))
        while not (slow.unet_runs() or run.done()):
            time.sleep(0.01)
        server.post("/interrupt")
        with pytest.raises(ServerError, match="^interrupted$"):
            run.result(GENEROUS)
    kill(watched_worker(server))      # it is still at that step
    slow.slow(0)
    works(server, seed=10)


def test_cancel_while_nothing_runs_hits_nothing(server, device):
    works(server, seed=7)
    server.post("/interrupt")
    works(server, seed=8)


def test_cancelled_runs_leave_no_stale_answer(server, slow):
    """The abandoned step's answer arrives later and must not be taken for that of the next call."""
    slow.slow(0.5)
    for seed in (11, 12):
        with pytest.raises(ServerError, match="interrupted"):
            latent(server, Graph().picture(device=watched.NAME, steps=20, seed=seed), on_event=At(
                lambda: server.post("/interrupt")))
        works(server, seed=seed)


# -- crash ---------------------------------------------------------------------------------------------------------
def test_worker_killed_in_the_middle_of_a_step(server, slow):
    pids = []

    def kill_it():
        worker = watched_worker(server)
        pids.append(worker.pid)
        worker.kill()
    with pytest.raises(ServerError) as refused:
        latent(server, Graph().picture(device=watched.NAME, steps=20, seed=21), on_event=At(kill_it))
    plain_sentence(str(refused.value), "worker process", "'watched'", f"pid {pids[0]}", "ended", "Run again")
    slow.slow(0)
    works(server, seed=22)
    assert watched_worker(server).pid != pids[0]


def test_worker_killed_between_prompts(server, device):
    """Nobody was waiting for it: the next prompt starts another one and says nothing."""
    works(server, seed=31)
    kill(watched_worker(server))
    works(server, seed=32)


def test_refusal_is_no_crash(server, device):
    """The same process goes on."""
    works(server, seed=33)
    before = watched_worker(server).pid
    with pytest.raises(ServerError, match="compiled for pictures"):
        latent(server, Graph().picture(device=watched.NAME, size=(512, 512)))
    works(server, seed=34)
    assert watched_worker(server).pid == before


# -- several prompts, and the server while it is busy --------------------------------------------------------------
def test_two_prompts_at_once(server, device):
    seeds = (41, 42, 43)
    with ThreadPoolExecutor() as pool:
        results = list(pool.map(lambda seed: latent(server, Graph().picture(device=watched.NAME, seed=seed)), seeds))
    for seed, result in zip(seeds, results):
        expected.close(result, expected.euler(CAT, DOG, seed=seed))


def test_server_answers_while_a_step_runs(server, slow):
    def ask():
        begin = time.monotonic()
        queue = server.get("/queue")
        nodes = server.get("/object_info/SophgoLoadCheckpoint")
        return len(queue["queue_running"]), "SophgoLoadCheckpoint" in nodes, time.monotonic() - begin
    question = At(ask)
    latent(server, Graph().picture(device=watched.NAME, steps=3, seed=51), on_event=question)
    running, listed, seconds = question.answer
    assert running == 1 and listed and seconds < GENEROUS


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_progress(server, device, sampler):
    reported = []
    latent(server, Graph().picture(device=watched.NAME, steps=6, seed=52, sampler_name=sampler),
           on_event=lambda kind, data: reported.append((data["value"], data["max"])) if kind == "progress" else None)
    assert reported == [(step, 6) for step in range(1, 7)]


def test_progress_of_a_chain(server, device):
    reported = []
    latent(server, chain(Graph(), 4),
           on_event=lambda kind, data: reported.append((data["value"], data["max"])) if kind == "progress" else None)
    assert reported == [(step, 4) for step in range(1, 5)]


# -- memory --------------------------------------------------------------------------------------------------------
def test_free_ends_the_workers(server, device):
    works(server, seed=61)
    there = workers(server)
    assert there
    server.post("/free", {"unload_models": True, "free_memory": True})
    psutil.wait_procs(there, timeout=GENEROUS)
    assert workers(server) == []
    works(server, seed=62)


def test_unload_models_keeps_the_graph(server, device):
    """ComfyUI keeps MODEL and CLIP and only wants their memory: they load again by themselves."""
    works(server, seed=63)
    worker = watched_worker(server)
    server.post("/free", {"unload_models": True})
    worker.wait(GENEROUS)
    works(server, seed=64)


def test_another_text_encoder_beside_a_loaded_unet(server, base, device):
    """The first encoder is unloaded, the U-Net stays, and the new one does not get in its way."""
    folder = base / "models" / "sophgo" / "exchanged"
    for name in ("one", "two", "three"):
        onnx_nets.text_encoder(folder / f"{name}.onnx")
    for number, name in enumerate(("one", "two", "three", "one")):
        graph = Graph()
        model = graph.SophgoLoadUNet(unet_name="arithmetic/unet_8x8.onnx", device=watched.NAME)
        clip = graph.SophgoLoadCLIP(clip_name=f"exchanged/{name}.onnx", device=watched.NAME, long_prompts="error")
        result = latent(server, graph.sample(model, graph.prompt(clip, CATS), graph.prompt(clip, DOGS), graph.empty(),
                                             seed=70 + number))
        expected.close(result, expected.euler(CAT, DOG, seed=70 + number))


def test_replaced_file_is_loaded_again(server, base, device):
    models = base / "models" / "sophgo"
    onnx_nets.unet(models / "first.onnx")
    strange = onnx.load(models / "first.onnx")
    for tensor in strange.graph.initializer:
        if tensor.name == "half":
            tensor.CopyFrom(numpy_helper.from_array(np.float32(0.25), "half"))
    onnx.save(strange, models / "second.onnx")

    def run(name: str) -> np.ndarray:
        graph = Graph()
        clip = graph.checkpoint(device=watched.NAME)[1]
        model = graph.SophgoLoadUNet(unet_name=name, device=watched.NAME)
        return latent(server, graph.sample(model, graph.prompt(clip, CATS), graph.prompt(clip, DOGS), graph.empty()))
    first, second = run("first.onnx"), run("second.onnx")
    expected.close(first, expected.euler(CAT, DOG))
    (models / "replaced.onnx").write_bytes((models / "first.onnx").read_bytes())
    np.testing.assert_array_equal(run("replaced.onnx"), first)
    (models / "replaced.onnx").write_bytes((models / "second.onnx").read_bytes())
    np.testing.assert_array_equal(run("replaced.onnx"), second)
    (models / "first.onnx").rename(models / "replaced.onnx")
    np.testing.assert_array_equal(run("replaced.onnx"), first)


# -- the end -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL], ids=["interrupted", "killed"])
def test_server_leaves_no_worker_behind(server, tmp_path, end):
    """A server of its own, with previews, ends in the middle of a step."""
    onnx_nets.checkpoint(tmp_path / "models" / "sophgo" / "arithmetic")
    device = watched.Watched(tmp_path)
    (tmp_path / "user").mkdir()
    with Server(tmp_path, arguments=("--preview-method", "latent2rgb")) as other, \
            watched.settings(tmp_path, device.settings):
        previews = []
        graph = Graph().picture(device=watched.NAME, seed=91)
        latent(other, graph, on_event=lambda kind, data: previews.append(data["data"]) if kind == "binary" else None)
        # a preview: type 1 or 4 (with metadata), then among others a JPEG
        assert len([data for data in previews if data[3] in (1, 4) and b"\xff\xd8\xff" in data]) == 4
        device.slow(30)
        began = threading.Event()
        run = threading.Thread(target=lambda: attempt(other, began), daemon=True)
        run.start()
        assert began.wait(GENEROUS)
        there = workers(other)
        assert there
        other.process.send_signal(end)
        assert not psutil.wait_procs(there, timeout=GENEROUS)[1]
        other.process.wait(GENEROUS)
        run.join(GENEROUS)


def attempt(server: Server, began: threading.Event) -> None:
    """Sample until the server is gone; `began` once a step runs."""
    def watch(kind: str, data: dict) -> None:
        if kind == "executing" and data["node"] and server_node(graph, data["node"]) == "KSampler":
            began.set()
    graph = Graph()
    node = graph.picture(device=watched.NAME, seed=92)
    try:
        latents(server, node, on_event=watch)
    except Exception:                       # how a client notices that its server is gone is not the point
        pass


def server_node(graph: Graph, id: str) -> str:
    return graph[id]["class_type"]
