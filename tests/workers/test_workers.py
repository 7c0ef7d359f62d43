"""Real worker processes: what crosses, what stays, and what happens when one is cancelled, killed or left alone."""
from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from engines.assembly import Source
from engines.devices import find_devices
from engines.errors import DeviceError, EngineError, WorkerDied
from engines.workers import Feed, FileVersion, Worker, WorkerSpec
from tests.helpers import onnx_nets

SAIL_STANDIN = Path(__file__).resolve().parents[1] / "helpers" / "sail_standin"


@pytest.fixture
def unet_file(tmp_path):
    return onnx_nets.unet(tmp_path / "unet.onnx")


@pytest.fixture
def worker(request):
    """A worker process of this test's own."""
    worker = Worker(WorkerSpec(request.node.name, "onnx", cancel_seconds=0))
    yield worker
    worker.close()


def feeds(seed: int = 0, timestep: int = 500) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {"latent": rng.standard_normal((2, 4, 8, 8)).astype(np.float32),
            "t": np.full(2, timestep, np.int64),
            "context": rng.standard_normal((2, 77, 64)).astype(np.float32)}


def expected(arrays) -> np.ndarray:
    return onnx_nets.unet_result(arrays["latent"], arrays["t"], arrays["context"])


def run(worker, path, arrays, resident=(), poll=lambda: None) -> np.ndarray:
    inputs = [Feed(name, str(a.dtype), a.shape, a.tobytes(), f"{name}-{hash(a.tobytes())}" if name in resident else "")
              for name, a in arrays.items()]
    (dtype, shape, data), = worker.run(FileVersion.of(path), "main", inputs, [("prediction", "float32", (2, 4, 8, 8))], poll)
    return np.frombuffer(data, dtype).reshape(shape)


def gone(pid: int, seconds: float = 10) -> bool:
    """Whether a process ended; a child of ours may linger as a zombie until it is waited for."""
    for _ in range(int(seconds / 0.05)):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


def test_results_are_the_networks(worker, unet_file):
    arrays = feeds()
    np.testing.assert_allclose(run(worker, unet_file, arrays), expected(arrays), atol=1e-5)


def test_after_the_first_step_only_latent_and_timestep_go_in_and_the_prediction_out(worker, unet_file):
    arrays = feeds()
    run(worker, unet_file, arrays, resident={"context"})
    before = dict(worker.counters)
    for step in range(3):
        arrays["t"] -= 1
        run(worker, unet_file, arrays, resident={"context"})
    moved = {name: worker.counters[name] - before[name] for name in before}
    latent, timestep = arrays["latent"].nbytes, arrays["t"].nbytes
    assert moved == {"calls": 3, "bytes_in": 3 * (latent + timestep), "bytes_out": 3 * latent, "bytes_loaded": 0}


def test_resident_arrays_are_told_apart_by_content_and_come_back_after_eviction(worker, unet_file):
    prompts = [feeds(seed)["context"] for seed in range(3)]
    for context in [*prompts, *prompts]:
        arrays = {**feeds(), "context": context}
        np.testing.assert_allclose(run(worker, unet_file, arrays, {"context"}), expected(arrays), atol=1e-5)
    # The host believes that an array is there and the worker has dropped it: it is sent again, the result is right.
    arrays = {**feeds(), "context": feeds(9)["context"]}
    worker._sent.add(f"context-{hash(arrays['context'].tobytes())}")
    np.testing.assert_allclose(run(worker, unet_file, arrays, {"context"}), expected(arrays), atol=1e-5)


def test_a_killed_worker_is_one_sentence_and_the_next_call_works(worker, unet_file):
    before = run(worker, unet_file, feeds())
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(WorkerDied, match="ended while running 'main'.*starts anew") as error:
        run(worker, unet_file, feeds())
    assert "\n" not in str(error.value)
    np.testing.assert_array_equal(run(worker, unet_file, feeds()), before)
    assert worker.starts == 2


def test_a_cancelled_call_raises_what_poll_raises_and_the_next_call_gets_its_own_answer(tmp_path, unet_file):
    class Cancelled(Exception):
        pass

    def cancel():
        raise Cancelled
    slow = slow_unet(tmp_path)
    for seconds in (0, None):
        worker = Worker(WorkerSpec(f"cancel-{seconds}", "onnx", cancel_seconds=seconds))
        run(worker, unet_file, feeds())
        pid = worker.pid
        started = time.monotonic()
        with pytest.raises(Cancelled):
            run(worker, slow, feeds(), poll=cancel)
        assert time.monotonic() - started < 2, "the call itself takes longer"
        np.testing.assert_allclose(run(worker, unet_file, feeds(3)), expected(feeds(3)), atol=1e-5)
        assert worker.pid == pid if seconds is None else gone(pid)
        worker.close()


def slow_unet(folder: Path) -> Path:
    """A network of the U-Net's interface that multiplies large matrices for some seconds."""
    from onnx import TensorProto, helper, numpy_helper, save
    value = helper.make_tensor_value_info
    weights = numpy_helper.from_array(np.eye(1500, dtype=np.float32), "m")
    names = ["m", *(f"m{i}" for i in range(60))]
    nodes = [helper.make_node("MatMul", [a, "m"], [b]) for a, b in zip(names, names[1:])]
    nodes += [helper.make_node("ReduceMean", [names[-1]], ["s"], keepdims=0), helper.make_node("Cast", ["t"], ["tf"], to=1),
              helper.make_node("ReduceSum", ["tf"], ["ts"], keepdims=0),
              helper.make_node("ReduceSum", ["context"], ["cs"], keepdims=0),
              helper.make_node("Sum", ["latent", "s", "ts", "cs"], ["prediction"])]
    # An input that is never constant keeps the optimiser from doing the work at load time.
    nodes.insert(0, helper.make_node("ReduceSum", ["latent"], ["z0"], keepdims=0))
    nodes.insert(1, helper.make_node("Add", ["eye", "z0"], ["m"]))
    weights.name = "eye"
    graph = helper.make_graph(nodes, "slow", [value("latent", TensorProto.FLOAT, (2, 4, 8, 8)),
                                              value("t", TensorProto.INT64, (2,)),
                                              value("context", TensorProto.FLOAT, (2, 77, 64))],
                              [value("prediction", TensorProto.FLOAT, (2, 4, 8, 8))], [weights])
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), folder / "slow.onnx")
    return folder / "slow.onnx"


def test_an_idle_worker_leaves_and_comes_back(unet_file):
    worker = Worker(WorkerSpec("idle", "onnx", idle_seconds=0.3))
    run(worker, unet_file, feeds())
    assert gone(worker.pid)
    assert worker.pid is None
    run(worker, unet_file, feeds())
    assert worker.starts == 2
    worker.close()


def test_the_process_ends_with_the_last_file_that_anyone_holds(worker, unet_file, tmp_path):
    class Owner:
        pass
    other = onnx_nets.unet(tmp_path / "other.onnx")
    first, second = Owner(), Owner()
    worker.hold(first, FileVersion.of(unet_file))
    worker.hold(second, FileVersion.of(other))
    run(worker, unet_file, feeds())
    run(worker, other, feeds())
    pid = worker.pid
    del first
    gc.collect()
    assert worker.pid == pid and set(worker._models) == {FileVersion.of(other)}
    del second
    gc.collect()
    assert gone(pid)


def test_a_file_replaced_under_the_same_name_is_loaded_anew(worker, unet_file):
    run(worker, unet_file, feeds())
    onnx_nets.unet(unet_file, nan_at=500)
    os.utime(unet_file, ns=(1, 1))
    assert np.isnan(run(worker, unet_file, feeds(timestep=500))).all()


def test_threads_take_turns(worker, unet_file):
    results = {}

    def go(seed):
        results[seed] = run(worker, unet_file, feeds(seed), {"context"})
    threads = [threading.Thread(target=go, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, result in results.items():
        np.testing.assert_allclose(result, expected(feeds(seed)), atol=1e-5)


def test_no_log_or_process_is_left_behind(unet_file, tmp_path):
    worker = Worker(WorkerSpec("clean", "onnx"))
    run(worker, unet_file, feeds())
    about = worker.describe()
    assert Path(about["log"]).exists()
    worker.close()
    assert gone(about["pid"]) and not Path(about["log"]).exists()


@pytest.mark.parametrize("python,words", [
    ("/no/such/python", ["did not start", "/no/such/python"]),
    (f"{sys.executable} -S -c pass", ["did not start"]),
])
def test_an_interpreter_that_does_not_work_is_named(python, words):
    with pytest.raises(DeviceError) as error:
        Worker(WorkerSpec("broken", "onnx", python=python)).describe()
    assert all(word in str(error.value) for word in words), error.value


def test_a_library_that_is_missing_says_how_to_get_it(tmp_path):
    """onnxruntime in an interpreter that has none: a fresh venv without packages."""
    import venv
    venv.create(tmp_path / "empty", with_pip=False, symlinks=True)
    python = tmp_path / "empty" / "bin" / "python"
    with pytest.raises(DeviceError) as error:
        Worker(WorkerSpec("empty", "onnx", python=str(python))).describe()
    assert "did not start" in str(error.value) and "numpy" in str(error.value) or "onnxruntime" in str(error.value)


def test_a_file_that_the_runtime_refuses_is_named(worker, tmp_path):
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(b"nothing")
    with pytest.raises(EngineError, match="'bad.onnx' could not be loaded on"):
        run(worker, bad, feeds())


def test_a_worker_elsewhere_gets_the_file_once(tmp_path, unet_file, monkeypatch):
    """The transfer to another machine, with the other machine's home and interpreter played by this one."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr("engines.workers.PIECE_BYTES", 100)
    fake_ssh = tmp_path / "bin" / "ssh"
    fake_ssh.parent.mkdir()
    fake_ssh.write_text('#!/bin/sh\nfor last; do :; done\nexec sh -c "$last"\n')     # runs the command here
    fake_ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake_ssh.parent}:{os.environ['PATH']}")
    spec = WorkerSpec("box", "onnx", ssh="linaro@box", python=sys.executable)
    results, sent = [], []
    for _ in range(2):
        worker = Worker(spec)
        called = worker._call
        monkeypatch.setattr(worker, "_call", lambda operation, *rest: sent.append(operation) or called(operation, *rest))
        results.append(run(worker, unet_file, feeds()))
        worker.close()
    np.testing.assert_array_equal(*results)
    cached = list((tmp_path / "home" / ".cache" / "sophgo-ascend-nodes").iterdir())
    assert [path.read_bytes() for path in cached] == [unet_file.read_bytes()]
    assert sent.count("receive_file") == -(-unet_file.stat().st_size // 100)      # the second worker found it there


def test_a_transfer_cancelled_half_way_leaves_nothing_in_the_next_one(worker, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    worker.describe()
    send = lambda piece, first, last: worker._call(
        "receive_file", {"name": "x.onnx", "piece": piece, "first": first, "last": last}, "sending", lambda: None)
    assert send(b"half of", True, False) is None
    assert send(b"the ", True, False) is None
    assert Path(send(b"whole", False, True)).read_bytes() == b"the whole"


def test_the_sail_runtime_runs_stages_in_a_worker(tmp_path, monkeypatch):
    """The whole way to a card, with the stand-in for sail in the worker (tests/helpers/sail_standin)."""
    from tests.helpers.bmodel_writer import network, write_bmodel
    monkeypatch.setenv("PYTHONPATH", str(SAIL_STANDIN))
    monkeypatch.syspath_prepend(str(SAIL_STANDIN))
    from sophon import sail
    onnx_nets.unet(tmp_path / "unet.onnx", timestep=onnx_nets.INT32)
    # What this host reads is a real bmodel; what the stand-in opens in the worker is its own kind of file.
    ports = {"latent": (2, 4, 8, 8), "t": (2,), "context": (2, 77, 64)}
    path = tmp_path / "unet.bmodel"
    write_bmodel(path, [network("unet", ports, {"prediction": (2, 4, 8, 8)}, dtypes={"t": "int32"})])
    settings = tmp_path / "sophgo_ascend.toml"
    settings.write_text(f'[[device]]\nname = "card"\nruntime = "sail"\npython = "{sys.executable}"\n')
    source = Source.open("unet", path, [tmp_path])
    unet = source.unet(find_devices(settings, tmp_path), "card", lambda: None)
    assert "sail" in unet.describe() and "BM1684X" in unet.describe()
    spec = {"function": "onnx:unet.onnx", "outputs": [["prediction", "FLOAT32", [[2, 4, 8, 8]]]],
            "inputs": [["latent", "FLOAT32", [[2, 4, 8, 8]]], ["t", "INT32", [[2]]], ["context", "FLOAT32", [[2, 77, 64]]]]}
    sail.write_bmodel(str(path), {"unet": spec})
    arrays = feeds()
    result = unet(arrays["latent"], np.full(2, 500.2, np.float32), arrays["context"])
    np.testing.assert_allclose(result, expected(arrays), atol=1e-5)
    unet.engines[0].worker.close()
