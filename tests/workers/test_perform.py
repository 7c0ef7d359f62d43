"""Programs that run long in a worker: what they report, how they are cancelled, and what is sent for a runtime."""
from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engines import workers
from engines.errors import EngineError, WorkerDied
from engines.workers import Feed, FileVersion, Worker, WorkerSpec
from tests.workers.test_workers import gone

ROOT = Path(__file__).resolve().parents[2]
RUNTIMES = ROOT / "tests" / "helpers" / "runtimes"


class Cancelled(Exception):
    pass


@pytest.fixture
def pack(tmp_path, monkeypatch):
    """The folder whose sources are sent to workers, with the runtimes of the tests in it."""
    pack = shutil.copytree(workers.ENGINES, tmp_path / "engines", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(RUNTIMES, pack / "runtimes", dirs_exist_ok=True)
    monkeypatch.setattr(workers, "ENGINES", pack)
    monkeypatch.setitem(workers.SHIPPED, "parcel", ("errors.py", "runtimes/plain.py", "runtimes/parcel"))
    return pack


@pytest.fixture
def start(pack, request):
    started = []

    def start(runtime="plain", **spec) -> Worker:
        started.append(Worker(WorkerSpec(request.node.name, runtime, **spec)))
        return started[-1]
    yield start
    for worker in started:
        worker.close()


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "model.bin"
    path.write_bytes(b"weights")
    return FileVersion.of(path)


def perform(worker, file, program, poll=workers.NO_POLL, progress=lambda payload: None, inputs=(), **settings) -> str:
    (_, _, data), = worker.perform(file, program, inputs, settings, poll, progress)
    return data.decode()


def feed(name: str, data: bytes, digest: str = "") -> Feed:
    return Feed(name, "uint8", (len(data),), data, digest)


def cancel():
    raise Cancelled


class Stop:
    """A progress that remembers what came; its `poll` raises once step `at` was reported."""

    def __init__(self, at: int):
        self.at, self.steps = at, []

    def progress(self, payload: dict) -> None:
        self.steps.append(payload["step"])

    def poll(self) -> None:
        if self.at in self.steps:
            raise Cancelled


def test_reports_come_in_order_with_all_they_hold_and_the_result_after_them(start, model):
    reports = []
    assert perform(start(), model, "count", progress=reports.append, steps=50) == "model.bin float32"
    assert [report["step"] for report in reports] == list(range(1, 51))
    assert reports[0] == {"step": 1, "steps": 50, "preview": ("uint8", (2,), b"ab"), "rest": [1.5, None, True]}


def test_options_reach_load_and_two_precisions_of_a_file_are_two_models(start, model):
    worker = start()
    half = FileVersion.of(model.path, precision="float16")
    assert [perform(worker, file, "say") for file in (model, half, model)] == [
        "model.bin float32", "model.bin float16", "model.bin float32"]
    assert worker.counters["bytes_loaded"] == 2 * len(b"weights")
    worker.unload(half)
    assert perform(worker, model, "say") == "model.bin float32"
    assert worker.starts == 1 and FileVersion.of(model.path, a=1, b=2) == FileVersion.of(model.path, b=2, a=1)


def test_a_folder_is_a_model_that_is_loaded_anew_when_anything_in_it_changes(start, tmp_path):
    folder = tmp_path / "pipeline"
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "weights").write_bytes(b"1234")
    (folder / "index.json").write_bytes(b"{}")
    (folder / "lost").symlink_to(tmp_path / "nowhere")
    worker, before = start(), FileVersion.of(folder)
    assert perform(worker, before, "say") == "pipeline float32"
    assert worker.counters["bytes_loaded"] == 6
    assert FileVersion.of(folder) == before
    os.utime(folder / "unet" / "weights", ns=(1, before.modified + 1))
    assert FileVersion.of(folder).modified == before.modified + 1


def test_a_folder_is_not_sent_to_another_machine(start, tmp_path):
    worker = start()
    worker.describe()
    with pytest.raises(EngineError, match="^a folder is not sent to another machine; use a single file.$"):
        worker._sent_file(tmp_path, workers.NO_POLL)


def test_what_stays_on_the_device_is_sent_once(start, model):
    worker = start()
    inputs = [feed("a", b"context", "d1"), feed("b", b"more", "d2"), feed("c", b"x")]
    moved = []
    for _ in range(3):
        assert perform(worker, model, "join", inputs=inputs) == "contextmorex"
        moved.append(worker.counters["bytes_in"])
    assert moved == [12, 13, 14]
    assert worker.counters["calls"] == 3 and worker.counters["bytes_out"] == 3 * 12
    # The host believes that an array is there, and the worker never had it.
    worker._sent.add("d3")
    assert perform(worker, model, "join", inputs=[*inputs, feed("d", b"!", "d3")]) == "contextmorex!"


@pytest.mark.parametrize("seconds", [3.0, None])
def test_a_program_cancelled_at_a_step_ends_there_and_its_model_stays_loaded(start, model, seconds):
    worker, stop = start(cancel_seconds=seconds), Stop(at=3)
    perform(worker, model, "say")
    pid, started = worker.pid, time.monotonic()
    with pytest.raises(Cancelled):
        perform(worker, model, "count", stop.poll, stop.progress, steps=1000, seconds=0.1)
    assert time.monotonic() - started < 2 and stop.steps == [1, 2, 3]
    assert perform(worker, model, "say") == "model.bin float32"
    assert worker.pid == pid and worker.counters["bytes_loaded"] == len(b"weights")


def test_what_progress_raises_cancels_too(start, model):
    worker, stop = start(cancel_seconds=3.0), Stop(at=2)

    def progress(payload):
        stop.progress(payload)
        stop.poll()
    with pytest.raises(Cancelled):
        perform(worker, model, "count", progress=progress, steps=1000, seconds=0.05)
    assert stop.steps == [1, 2] and perform(worker, model, "say") and worker.starts == 1


def test_poll_is_called_while_reports_stream_without_a_pause(start, model):
    worker, stop = start(cancel_seconds=3.0), Stop(at=500)
    with pytest.raises(Cancelled):
        perform(worker, model, "count", stop.poll, stop.progress, steps=10 ** 6)
    assert stop.steps == list(range(1, 501))
    assert perform(worker, model, "count", steps=2) and worker.starts == 1


def test_a_program_that_does_not_look_is_killed_where_nothing_is_lost_by_it(start, model):
    worker, polls = start(cancel_seconds=0.3), iter([None, None])

    def poll():
        if next(polls, "over"):
            raise Cancelled
    perform(worker, model, "say")
    pid, started = worker.pid, time.monotonic()
    with pytest.raises(Cancelled):
        perform(worker, model, "sleep", poll, seconds=60)
    assert time.monotonic() - started < 3 and gone(pid)
    assert perform(worker, model, "say") == "model.bin float32" and worker.starts == 2


def test_elsewhere_it_is_left_to_finish_and_its_late_answer_is_dropped(start, model):
    worker = start()
    perform(worker, model, "say")
    pid = worker.pid
    with pytest.raises(Cancelled):
        perform(worker, model, "sleep", cancel, seconds=0.5)
    reports = []
    assert perform(worker, model, "join", inputs=[feed("a", b"own")]) == "own"
    assert perform(worker, model, "count", progress=reports.append, steps=2) == "model.bin float32"
    assert [report["step"] for report in reports] == [1, 2] and worker.pid == pid


def test_a_cancel_that_comes_too_late_is_ignored(start, model):
    """The worker ends just when the host gives up: the answer and the cancel cross."""
    worker = start()
    perform(worker, model, "count", steps=2)
    worker._channel.send((1, "cancel", None))
    worker._channel.send((2, "cancel", None))
    assert perform(worker, model, "count", steps=3) == "model.bin float32"
    with pytest.raises(Cancelled):      # it ended before anyone polled
        perform(worker, model, "count", progress=lambda payload: time.sleep(0.3) or cancel(), steps=1)
    assert perform(worker, model, "count", steps=3) == "model.bin float32" and worker.starts == 1


def test_a_worker_that_ends_while_it_is_cancelled_is_no_error_of_the_next_call(start, model):
    worker = start(cancel_seconds=3.0)

    def poll():
        os.kill(worker.pid, signal.SIGKILL)
        raise Cancelled
    with pytest.raises(Cancelled):
        perform(worker, model, "sleep", poll, seconds=60)
    assert perform(worker, model, "say") == "model.bin float32" and worker.starts == 2


def test_a_crash_in_a_program_is_one_sentence_and_the_next_call_works(start, model):
    worker = start()
    with pytest.raises(WorkerDied, match="ended while performing 'crash'; it last said: out of luck. Run again") as error:
        perform(worker, model, "crash")
    assert "\n" not in str(error.value)
    assert perform(worker, model, "say") == "model.bin float32"


@pytest.mark.parametrize("program,settings,sentence", [
    ("fail", {"what": "sentence"}, "the prediction of step 3 is not finite"),
    ("fail", {"what": "bug"}, "KeyError: 'step'"),
    ("babble", {}, "DumpError: can't serialize <class 'object'>"),
    ("nothing", {}, "AttributeError: 'Runtime' object has no attribute 'nothing'"),
])
def test_an_error_in_a_program_is_one_sentence_and_the_worker_goes_on(start, model, program, settings, sentence):
    worker = start()
    with pytest.raises(EngineError) as error:
        perform(worker, model, program, **settings)
    assert str(error.value) == sentence
    assert perform(worker, model, "say") == "model.bin float32" and worker.starts == 1


def test_a_package_is_imported_in_the_worker_under_the_names_it_has_here(start, model):
    worker = start("parcel")
    names = perform(worker, model, "where")
    assert names.splitlines()[:3] == ["engines.runtimes.parcel", "engines.errors", "engines.runtimes.parcel.late"]
    assert 'engines/runtimes/parcel/late.py", line 8, in trip' in names and "mind the step" in names
    with pytest.raises(EngineError, match="^This device does not do that.$"):
        perform(worker, model, "refuse")


def test_an_engines_package_that_is_installed_there_is_not_mistaken_for_this_one(start, model, tmp_path, monkeypatch):
    (tmp_path / "installed" / "engines").mkdir(parents=True)
    (tmp_path / "installed" / "engines" / "__init__.py").write_text("raise SystemExit('the wrong one')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "installed"))
    assert perform(start("parcel"), model, "where")


def test_only_what_a_runtime_needs_is_sent():
    assert [*workers._sources("onnx")] == ["engines/__init__.py", "engines/runtimes/__init__.py", "engines/runtimes/onnx.py"]


def test_a_worker_whose_host_is_gone_stops_at_its_next_report(pack, model):
    script = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from engines import workers
workers.ENGINES = Path({str(pack)!r})
worker = workers.Worker(workers.WorkerSpec("orphan", "plain"))
print(worker.describe()["pid"], flush=True)
worker.perform(workers.FileVersion.of(Path({str(model.path)!r})), "count", [], {{"steps": 1000, "seconds": 0.1}},
               progress=lambda payload: print(payload["step"], flush=True))
"""
    host = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    pid = int(host.stdout.readline())
    assert host.stdout.readline() == "1\n"
    host.kill()
    host.wait()
    host.stdout.close()
    assert gone(pid, seconds=4)      # execnet itself would interrupt it after five
