"""The sail runtime against a stand-in with sail's traps, and against the real sail where it is installed.

The stand-in needs no Sophgo library and no device (tests/helpers/sail_standin). Where `sophon.sail` can be imported
and finds a device, the tests that need no bmodel run on it too; SAIL_TEST_BMODEL=path adds one launch.
"""
import ast
import contextlib
import importlib
import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "engines" / "runtimes" / "sail.py"
STANDIN = ROOT / "tests" / "helpers" / "sail_standin"

try:
    REAL = importlib.import_module("sophon.sail")
except Exception:
    REAL = None


def runtime_class():
    """The Runtime of sail.py, made the way a worker makes it: from text, in an empty module."""
    module = types.ModuleType("sail_runtime")
    exec(compile(SOURCE.read_text(encoding="utf-8"), str(SOURCE), "exec"), module.__dict__)
    return module.Runtime


@pytest.fixture
def sail(monkeypatch):
    """The stand-in, freshly imported as sophon.sail."""
    for name in [n for n in sys.modules if n.split(".")[0] == "sophon"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(STANDIN))
    module = importlib.import_module("sophon.sail")
    yield module
    for name in ("sophon.sail", "sophon"):
        sys.modules.pop(name, None)


@pytest.fixture
def runtime(sail):
    runtime = runtime_class()({"device_id": 0})
    yield runtime
    runtime.close()


def real_device() -> bool:
    with contextlib.suppress(Exception):   # no sail, or sail without a driver
        return REAL.get_available_tpu_num() > 0
    return False


@pytest.fixture(params=["stand-in"] + ["real"] * real_device())
def any_runtime(request):
    """A runtime on the stand-in and, where there is one, on a real device."""
    if request.param == "stand-in":
        yield request.getfixturevalue("runtime")
        return
    runtime = runtime_class()({"device_id": 0})
    yield runtime
    runtime.close()


@contextlib.contextmanager
def refused(*words):
    """A RuntimeError of one line that contains all of `words`."""
    with pytest.raises(RuntimeError) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


GRAPHS = {
    "unet": {
        "function": "mix",
        "inputs": [["latent", "FLOAT32", [[2, 4, 8, 8]]], ["t", "INT32", [[1]]], ["context", "FLOAT32", [[2, 77, 16]]]],
        "outputs": [["noise", "FLOAT32", [[2, 4, 8, 8]]]],
    },
    "half": {"function": "add", "inputs": [["a", "FLOAT16", [[4, 8]]], ["b", "FLOAT16", [[4, 8]]]],
             "outputs": [["sum", "FLOAT16", [[4, 8]]]]},
    "brain": {"function": "add", "inputs": [["a", "BFLOAT16", [[4, 8]]], ["b", "BFLOAT16", [[4, 8]]]],
              "outputs": [["sum", "BFLOAT16", [[4, 8]]]]},
    "two": {"function": "identity", "inputs": [["a", "FLOAT32", [[3]]], ["b", "FLOAT32", [[3]]]],
            "outputs": [["x", "FLOAT32", [[3]]], ["y", "FLOAT32", [[3]]]]},
    "bytes": {"function": "identity", "inputs": [["a", "INT8", [[4]]]], "outputs": [["x", "INT8", [[4]]]]},
    "sizes": {"function": "identity", "inputs": [["a", "FLOAT32", [[1, 4, 8, 8], [1, 4, 16, 16]]]],
              "outputs": [["x", "FLOAT32", [[1, 4, 8, 8], [1, 4, 16, 16]]]]},
    "hangs": {"function": "identity", "fault": "hangs",
              "inputs": [["a", "FLOAT32", [[100]]]], "outputs": [["x", "FLOAT32", [[100]]]]},
    "stops": {"function": "identity", "fault": "stops",
              "inputs": [["a", "FLOAT32", [[100]]]], "outputs": [["x", "FLOAT32", [[100]]]]},
}


@pytest.fixture
def model(sail, runtime, tmp_path):
    """Id of a loaded file with all of GRAPHS."""
    path = str(tmp_path / "sd.bmodel")
    sail.write_bmodel(path, GRAPHS)
    return runtime.load(path)


def put(runtime, array, dtype=None):
    """A buffer with the array in it; dtype where numpy's name is not the device's."""
    buffer = runtime.allocate(dtype or array.dtype.name, array.shape)
    runtime.write(buffer, array.tobytes())
    return buffer


def get(runtime, buffer, dtype=np.float32):
    return np.frombuffer(runtime.read(buffer), dtype).reshape(buffer.shape)


def unet_arrays(seed=0):
    rng = np.random.default_rng(seed)
    return {"latent": rng.standard_normal((2, 4, 8, 8), np.float32), "t": np.array([7], np.int32),
            "context": rng.standard_normal((2, 77, 16), np.float32)}


def unet_truth(arrays):
    return arrays["latent"] + np.float32(7) + np.float32(arrays["context"].mean())


# The file itself

def test_is_python_38_and_needs_only_numpy_and_sail():
    tree = ast.parse(SOURCE.read_text(encoding="utf-8"), feature_version=(3, 8))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import)]
    assert {name.name for node in imports for name in node.names} == {"contextlib", "numpy", "os", "sys"}
    # sail is asked for when a device is opened, not when the file is read
    froms = {node.module: node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert set(froms) == {"sophon"} and froms["sophon"] not in tree.body


# Opening a device

def test_describe(sail, runtime, monkeypatch):
    assert runtime.describe() == {"runtime": "sail", "version": sail.__version__, "chip": "BM1684X", "device": "tpu 0",
                                  "devices": 1, "memory_mb": 1024}
    monkeypatch.setattr(sail, "get_dev_stat", lambda dev_id: [-1135134688, 5, 0])   # the simulator's answer
    assert runtime.describe()["memory_mb"] == 0
    # where these are missing or fail; the simulator also says "Error" for the chip
    monkeypatch.delattr(sail, "get_dev_stat")
    monkeypatch.delattr(sail, "get_available_tpu_num")
    monkeypatch.setattr(sail.Handle, "get_target", lambda self: "Error")
    assert {"chip": "unknown", "devices": 0, "memory_mb": 0}.items() <= runtime.describe().items()


def test_no_sail(sail, monkeypatch):
    monkeypatch.setitem(sys.modules, "sophon.sail", None)
    monkeypatch.delattr(sys.modules["sophon"], "sail")
    with refused("sophon.sail", sys.executable):
        runtime_class()({})


@pytest.mark.parametrize(("count", "present"), [("2", "tpu 0 to 1"), ("0", "no Sophgo device")])
def test_absent_device(sail, monkeypatch, count, present):
    monkeypatch.setenv("SAIL_STANDIN_DEVICES", count)
    monkeypatch.setattr(sail, "Handle", lambda dev_id: pytest.fail("asked for a device that is not there"))
    for absent in (5, -1):
        with refused(f"no tpu {absent}", present):
            runtime_class()({"device_id": absent})


def test_device_that_cannot_be_opened(sail, monkeypatch):
    monkeypatch.delattr(sail, "get_available_tpu_num")
    monkeypatch.setattr(sail, "Handle", lambda dev_id: sail_error(sail))
    with refused("tpu 1 cannot be opened (sail: init device failure)"):
        runtime_class()({"device_id": 1})


def sail_error(sail):
    raise sail.SailDeviceError("init device failure")


def test_close_twice(any_runtime):
    buffer = any_runtime.allocate("float32", (4,))
    any_runtime.close()
    any_runtime.close()
    for call in (lambda: any_runtime.allocate("float32", (4,)), lambda: any_runtime.read(buffer),
                 lambda: any_runtime.load("x.bmodel"), lambda: any_runtime.networks(1)):
        with refused("closed"):
            call()


def test_close_gives_all_memory_back(sail, runtime, tmp_path):
    sail.write_bmodel(str(tmp_path / "m.bmodel"), GRAPHS, weight_mb=1)
    runtime.load(str(tmp_path / "m.bmodel"))
    put(runtime, np.ones(1000, np.float32))
    assert sail.standin.used == (1 << 20) + 4000
    runtime.close()
    assert sail.standin.used == 0


# Files

def test_load(runtime, model):
    assert runtime.networks(model) == list(GRAPHS)


def test_missing_file(any_runtime, tmp_path):
    with refused("no file", "absent.bmodel"):
        any_runtime.load(str(tmp_path / "absent.bmodel"))


def test_file_that_is_no_bmodel(any_runtime, tmp_path):
    (tmp_path / "picture.bmodel").write_bytes(b"\x89PNG" + bytes(100))
    with refused("picture.bmodel is not a bmodel"):
        any_runtime.load(str(tmp_path / "picture.bmodel"))


@pytest.mark.parametrize("fault", ["damaged", "chip", "size"])
def test_refused_file(sail, runtime, tmp_path, fault):
    path = tmp_path / "other.bmodel"
    sail.write_bmodel(str(path), GRAPHS, chip="BM1684" if fault == "chip" else "BM1684X",
                      weight_mb=2000 if fault == "size" else 0)
    if fault == "damaged":
        path.write_bytes(path.read_bytes()[:200])
    with refused("tpu 0 (BM1684X) refused", "other.bmodel", "another chip", "1024 of 1024 MB are free"):
        runtime.load(str(path))
    assert sail.standin.used == 0


def test_load_that_says_false(sail, runtime, tmp_path, monkeypatch):
    """A false from load counts, whatever the engine knows by then."""
    load = sail.Engine.load
    monkeypatch.setattr(sail.Engine, "load", lambda self, path: load(self, path) and False)
    sail.write_bmodel(str(tmp_path / "m.bmodel"), GRAPHS)
    with refused("refused"):
        runtime.load(str(tmp_path / "m.bmodel"))


def test_unload(sail, runtime, tmp_path):
    sail.write_bmodel(str(tmp_path / "m.bmodel"), GRAPHS, weight_mb=700)
    model = runtime.load(str(tmp_path / "m.bmodel"))
    assert sail.standin.used == 700 << 20   # the weights, and no second set of inputs and outputs
    runtime.unload(model)
    runtime.unload(model)
    assert sail.standin.used == 0
    with refused("not loaded"):
        runtime.launch(model, "unet", [], [])


# Memory

@pytest.mark.parametrize("dtype", [
    "float32", "float16", "bfloat16", "int8", "uint8", "int16", "uint16", "int32", "uint32"])
def test_round_trip(any_runtime, dtype):
    buffer = any_runtime.allocate(dtype, [2, 3])
    assert (buffer.dtype, buffer.shape) == (dtype, (2, 3))
    data = bytes(range(200, 200 + buffer.nbytes))
    assert any_runtime.read(buffer) == bytes(buffer.nbytes)
    any_runtime.write(buffer, data)
    assert any_runtime.read(buffer) == data


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, lambda data: memoryview(b"x" + data)[1:]])
def test_write_takes_any_bytes(any_runtime, kind):
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    buffer = any_runtime.allocate("float32", (2, 3))
    any_runtime.write(buffer, kind(array.tobytes()))   # the last one is not aligned
    assert any_runtime.read(buffer) == array.tobytes()


@pytest.mark.parametrize("size", [0, 23, 25, 48])
def test_write_of_another_size(any_runtime, size):
    buffer = any_runtime.allocate("float32", (2, 3))
    with refused("24 bytes", f"not {size}"):
        any_runtime.write(buffer, bytes(size))


@pytest.mark.parametrize(("dtype", "shape", "words"), [
    ("int64", (1,), "sail has no int64"), ("bool", (1,), "sail has no bool"), ("float32", (), "positive sizes"),
    ("float32", (2, 0), "positive sizes"), ("float32", (1 << 16, 1 << 15), "larger than 2 GiB")])
def test_allocate_refuses(any_runtime, dtype, shape, words):
    with refused(words):
        any_runtime.allocate(dtype, shape)


def test_out_of_memory(sail, runtime, monkeypatch):
    monkeypatch.setenv("SAIL_STANDIN_MEMORY_MB", "8")
    with refused("no room for float32 (3, 1048576)", "8 of 8 MB are free"):
        runtime.allocate("float32", (3, 1 << 20))
    kept = runtime.allocate("float32", (1 << 20,))
    assert sail.standin.used == kept.nbytes


def test_free(sail, any_runtime):
    buffer = any_runtime.allocate("float32", (4,))
    any_runtime.free(buffer)
    any_runtime.free(buffer)
    assert sail.standin.used == 0
    with refused("freed"):
        any_runtime.read(buffer)
    with refused("freed"):
        any_runtime.write(buffer, bytes(16))


def test_failed_copies_are_errors(sail, runtime):
    buffer = put(runtime, np.ones(4, np.float32))
    sail.standin.fail_copies = True
    with refused("copied to tpu 0"):
        runtime.write(buffer, bytes(16))
    with refused("copied from tpu 0"):
        runtime.read(buffer)


# Launching

def test_launch(runtime, model):
    arrays = unet_arrays()
    inputs = [(name, put(runtime, array)) for name, array in reversed(arrays.items())]
    noise = runtime.allocate("float32", (2, 4, 8, 8))
    runtime.launch(model, "unet", inputs, [("noise", noise)])
    np.testing.assert_allclose(get(runtime, noise), unet_truth(arrays), rtol=1e-6)


def test_two_byte_floats(runtime, model):
    numbers = np.linspace(-3, 3, 32, dtype=np.float32).reshape(4, 8)
    half = numbers.astype(np.float16)
    total = runtime.allocate("float16", (4, 8))
    runtime.launch(model, "half", [("a", put(runtime, half)), ("b", put(runtime, half))], [("sum", total)])
    np.testing.assert_array_equal(get(runtime, total, np.float16), half + half)

    brain = (numbers.view(np.uint32) >> 16).astype(np.uint16)            # truncated to bfloat16
    total = runtime.allocate("bfloat16", (4, 8))
    runtime.launch(model, "brain", [("a", put(runtime, brain, "bfloat16")), ("b", put(runtime, brain, "bfloat16"))],
                   [("sum", total)])
    exact = (brain.astype(np.uint32) << 16).view(np.float32) * 2         # twice a bfloat16 is a bfloat16
    np.testing.assert_array_equal(get(runtime, total, np.uint16), (exact.view(np.uint32) >> 16).astype(np.uint16))


def test_residency(sail, runtime, model):
    """What was written once stays; a step moves its own input, the marks, and the result."""
    arrays = unet_arrays()
    fixed = {name: put(runtime, arrays[name]) for name in ("t", "context")}
    latent, noise = (runtime.allocate("float32", (2, 4, 8, 8)) for _ in range(2))
    sail.standin.reset_counters()
    for step in range(5):
        arrays["latent"] = unet_arrays(step)["latent"]
        runtime.write(latent, arrays["latent"].tobytes())
        runtime.launch(model, "unet", [("latent", latent), *fixed.items()], [("noise", noise)])
        np.testing.assert_allclose(get(runtime, noise), unet_truth(arrays), rtol=1e-6)
    assert sail.standin.launches == 5
    assert sail.standin.copies == 5 * [("s2d", latent.nbytes), ("s2d", 64), ("d2s", 64), ("d2s", noise.nbytes)]


def test_unknown_network(runtime, model):
    with refused("no network 'unnet'", "'unet'"):
        runtime.launch(model, "unnet", [], [])


@pytest.mark.parametrize(("change", "words"), [
    (lambda i, o: i.pop(0), "needs the inputs 'latent', 't', 'context', not 't', 'context'"),
    (lambda i, o: i.pop(2), "not 'latent', 't'"),
    (lambda i, o: i.append(("extra", i[0][1])), "'extra'"),
    (lambda i, o: i.__setitem__(0, ("latents", i[0][1])), "'latents'"),
    (lambda i, o: i.append(i[1]), "not 'latent', 't', 'context', 't'"),
    (lambda i, o: o.clear(), "needs the outputs 'noise', not none"),
    (lambda i, o: o.__setitem__(0, ("nois", o[0][1])), "'nois'"),
])
def test_names_must_match(sail, runtime, model, change, words):
    inputs = [(name, put(runtime, array)) for name, array in unet_arrays().items()]
    outputs = [("noise", runtime.allocate("float32", (2, 4, 8, 8)))]
    good = list(inputs), list(outputs)
    change(inputs, outputs)
    with refused("network 'unet' of sd.bmodel", words):
        runtime.launch(model, "unet", inputs, outputs)
    assert sail.standin.launches == 0
    runtime.launch(model, "unet", *good)


@pytest.mark.parametrize(("port", "dtype", "shape"), [
    ("latent", "int32", (2, 4, 8, 8)), ("latent", "float16", (2, 4, 8, 8)), ("t", "float32", (1,)),
    ("latent", "float32", (2, 4, 8, 9)), ("latent", "float32", (2, 256)), ("context", "float32", (2, 78, 16)),
    ("noise", "int32", (2, 4, 8, 8)), ("noise", "float32", (2, 4, 9, 8)), ("noise", "float32", (512,))])
def test_dtypes_and_shapes_must_match(sail, runtime, model, port, dtype, shape):
    buffers = {name: put(runtime, array) for name, array in unet_arrays().items()}
    buffers["noise"] = runtime.allocate("float32", (2, 4, 8, 8))
    buffers[port] = runtime.allocate(dtype, shape)
    noise = buffers.pop("noise")
    with refused(f"{port!r} as", f"not {dtype} {shape}"):
        runtime.launch(model, "unet", list(buffers.items()), [("noise", noise)])
    assert sail.standin.launches == 0


def test_outputs_share_nothing(sail, runtime, model):
    a, b, x = (put(runtime, np.ones(3, np.float32)) for _ in range(3))
    for outputs in ([("x", a), ("y", x)], [("x", x), ("y", x)]):
        with refused("one buffer for an output and for something else"):
            runtime.launch(model, "two", [("a", a), ("b", b)], outputs)
    runtime.launch(model, "two", [("a", a), ("b", a)], [("x", b), ("y", x)])   # inputs may share
    assert sail.standin.launches == 1


def test_freed_and_foreign(runtime, model):
    a, x = put(runtime, np.zeros(4, np.int8)), runtime.allocate("int8", (4,))
    runtime.free(a)
    with refused("freed"):
        runtime.launch(model, "bytes", [("a", a)], [("x", x)])


# Launches that fail and do not say so

@pytest.mark.parametrize("network", ["hangs", "stops"])
def test_old_output_is_not_taken_for_new(sail, runtime, model, network):
    a, x = put(runtime, np.ones(100, np.float32)), put(runtime, np.full(100, 2, np.float32))
    with refused(f"network '{network}'", "did not write 'x'"):
        runtime.launch(model, network, [("a", a)], [("x", x)])


def test_refused_launch(sail, runtime, model):
    a, b, x, y = (put(runtime, np.full(3, n, np.float32)) for n in range(4))
    ports = [("a", a), ("b", b)], [("x", x), ("y", y)]
    sail.standin.fail_launches = 2
    with refused("did not write 'x', 'y'"):
        runtime.launch(model, "two", *ports)
    sail.standin.fail_launches = 1    # one failure is made good by the second launch
    runtime.launch(model, "two", *ports)
    assert get(runtime, x).tolist() == [0, 0, 0]
    assert get(runtime, y).tolist() == [1, 1, 1]


@pytest.mark.parametrize("byte", [0xA5, 0x5A])
def test_a_result_may_look_like_a_mark(sail, runtime, model, byte):
    a, x = put(runtime, np.full(4, byte, np.uint8).view(np.int8)), runtime.allocate("int8", (4,))
    runtime.launch(model, "bytes", [("a", a)], [("x", x)])
    assert runtime.read(x) == bytes([byte] * 4)


def test_launch_that_raises(sail, runtime, model, monkeypatch):
    def fail(*_):
        raise RuntimeError("BMRuntime internal error.\nand more")
    monkeypatch.setattr(sail.Engine, "process", fail)
    a, x = put(runtime, np.zeros(4, np.int8)), runtime.allocate("int8", (4,))
    with refused("network 'bytes' of sd.bmodel failed on tpu 0 (BM1684X) (sail: BMRuntime internal error.)"):
        runtime.launch(model, "bytes", [("a", a)], [("x", x)])


# Networks compiled for several sizes

def square(runtime, size, value=1.0):
    return put(runtime, np.full((1, 4, size, size), value, np.float32))


def test_variants(sail, runtime, model):
    for size, launches in ((8, 2), (8, 1), (16, 1), (8, 1)):   # the first small one is tried on scratch memory
        a, x = square(runtime, size, size), square(runtime, size, 0)
        sail.standin.reset_counters()
        runtime.launch(model, "sizes", [("a", a)], [("x", x)])
        assert sail.standin.launches == launches
        assert (get(runtime, x) == size).all()
    assert sail.standin.damage == 0


@pytest.mark.parametrize(("given", "wanted", "words"), [
    (16, 8, "was not compiled to turn inputs"),    # would be written past the output's memory
    (8, 16, "was not compiled to turn inputs"),
    (12, 12, "was not compiled"), (12, 16, "was not compiled for"), (12, 8, "was not compiled")])
def test_variants_that_are_none(sail, runtime, model, given, wanted, words):
    with refused("network 'sizes'", words):
        runtime.launch(model, "sizes", [("a", square(runtime, given))], [("x", square(runtime, wanted))])
    assert sail.standin.damage == 0


def test_scratch_memory_is_given_back(sail, runtime, model):
    a, x = square(runtime, 8), square(runtime, 8)
    used = sail.standin.used
    runtime.launch(model, "sizes", [("a", a)], [("x", x)])
    assert sail.standin.used == used


# The stand-in is as treacherous as what it stands for

@pytest.fixture
def engine(sail, tmp_path):
    sail.write_bmodel(str(tmp_path / "m.bmodel"), GRAPHS)
    return sail.Engine(str(tmp_path / "m.bmodel"), 0, sail.IOMode.SYSIO)


def tensor(sail, array, dtype="FLOAT32"):
    tensor = sail.Tensor(sail.Handle(0), list(array.shape), sail.Dtype["BM_" + dtype], False, True)
    tensor.update_data(array)
    return tensor


def test_standin_arrays(sail, engine):
    arrays = unet_arrays()
    np.testing.assert_allclose(engine.process("unet", arrays)["noise"], unet_truth(arrays), rtol=1e-6)
    second = engine.process("unet", {"latent": arrays["latent"] + 1})["noise"]      # the rest is what was left there
    np.testing.assert_allclose(second, unet_truth(arrays) + 1, rtol=1e-6)
    assert engine.process("sizes", {"a": np.ones((1, 4, 8, 8))})["x"].dtype == np.float32
    assert engine.get_input_shape("sizes", "a") == [1, 4, 8, 8]
    assert engine.get_max_input_shapes("sizes")["a"] == [1, 4, 16, 16]
    turned = np.arange(256, dtype=np.float32).reshape(1, 4, 8, 8).transpose(0, 1, 3, 2)
    before = turned.copy()
    engine.process("sizes", {"a": turned})
    assert not np.array_equal(turned, before)
    with pytest.raises(sail.SailEngineError):
        engine.process("half", {"a": np.ones((4, 8)), "b": np.ones((4, 8))})
    with pytest.raises(sail.SailEngineError):
        engine.process("unet", {"latents": arrays["latent"]})


def test_standin_tensors(sail, engine, tmp_path):
    engine = sail.Engine(sail.Handle(0))
    assert not engine.load(str(tmp_path / "absent.bmodel"))
    assert engine.load(str(tmp_path / "m.bmodel"))
    a, x = tensor(sail, np.zeros((1, 4, 16, 16), np.float32)), tensor(sail, np.ones((1, 4, 8, 8), np.float32))
    engine.process("sizes", {"a": a}, {"x": x})
    assert sail.standin.damage == 3072                                              # three quarters, next door
    engine.process("sizes", {"a": tensor(sail, np.ones((1, 4, 12, 12), np.float32))}, {"x": x})
    assert engine.get_output_shape("sizes", "x") == [1, 4, 16, 16]                  # of the launch before
    assert not x.asnumpy().any()
    with pytest.raises(sail.ProcessDied):
        engine.process("two", {"b": a}, {"x": x, "y": x})
    engine.process("bytes", {"q": tensor(sail, np.ones(4, np.int8), "INT8")}, {"x": x})
    assert engine._graphs["bytes"].index["inputs"] == {"a": 0, "q": 0}
    with pytest.raises(sail.ProcessDied):
        engine.process("unnet", {}, {})
    for array, dtype in ((np.ones(4, np.int64), "INT32"), (np.ones(4, np.float16), "FLOAT16")):
        with pytest.raises(sail.SailTensorError):
            tensor(sail, array, dtype)
    empty = sail.Tensor(sail.Handle(0), [0], sail.Dtype.BM_FLOAT32, True, True)
    assert not empty.is_dev_data_valid()
    with pytest.raises(sail.SailEngineError):
        engine.process("sizes", {"a": empty}, {"x": x})


def test_standin_half_outputs_are_garbage(sail, tmp_path):
    spec = {"function": "identity", "inputs": [["a", "FLOAT32", [[8]]]], "outputs": [["x", "FLOAT16", [[8]]]]}
    sail.write_bmodel(str(tmp_path / "h.bmodel"), {"g": spec})
    engine = sail.Engine(str(tmp_path / "h.bmodel"), 0, sail.IOMode.SYSIO)
    assert not np.allclose(engine.process("g", {"a": np.ones(8, np.float32)})["x"], 1)


def test_standin_can_really_crash(engine, tmp_path):
    script = "from sophon import sail; e = sail.Engine(0); e.get_input_names('nothing')"
    ended = subprocess.run([sys.executable, "-c", script], check=False,
                           env={**os.environ, "PYTHONPATH": str(STANDIN), "SAIL_STANDIN_REAL_CRASH": "1"})
    assert ended.returncode == -signal.SIGSEGV


def test_standin_runs_onnx(sail, runtime, tmp_path):
    import onnx
    a, x = (onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [3]) for n in "ax")
    graph = onnx.helper.make_graph([onnx.helper.make_node("Neg", ["a"], ["x"])], "g", [a], [x])
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    (tmp_path / "neg.onnx").write_bytes(proto.SerializeToString())
    spec = {"function": "onnx:neg.onnx", "inputs": [["a", "FLOAT32", [[3]]]], "outputs": [["x", "FLOAT32", [[3]]]]}
    sail.write_bmodel(str(tmp_path / "neg.bmodel"), {"g": spec})
    a, x = put(runtime, np.arange(3, dtype=np.float32)), runtime.allocate("float32", (3,))
    runtime.launch(runtime.load(str(tmp_path / "neg.bmodel")), "g", [("a", a)], [("x", x)])
    assert get(runtime, x).tolist() == [0, -1, -2]


# On a device

if real_device() and "SAIL_TEST_BMODEL" in os.environ:
    def test_real_launch():
        """The first network of the file at its largest size, twice on zeros: the same finite output."""
        runtime = runtime_class()({"device_id": 0})
        model = runtime.load(os.environ["SAIL_TEST_BMODEL"])
        name = runtime.networks(model)[0]
        network = runtime._models[model][name]
        inputs, outputs = ([(port, runtime.allocate(*form)) for port, form in ports.items()]
                           for ports in (network.inputs, network.outputs))
        results = []
        for _ in range(2):
            runtime.launch(model, name, inputs, outputs)
            results.append([runtime.read(buffer) for _, buffer in outputs])
        assert results[0] == results[1]
        with refused("needs the inputs"):
            runtime.launch(model, name, inputs[1:], outputs)
        runtime.close()
