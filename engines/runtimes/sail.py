"""Run bmodels through Sophgo's Python library, `sophon.sail`.

This file is sent as text to a worker and executed there: Python 3.8, numpy and sail, nothing of this project.
One Runtime holds one device. One call at a time: `launch` releases the GIL, the others hold it.

sail is fast and trusting. What it does not check is checked here, and every error is a RuntimeError of one sentence.
From the sources of sophon-sail 3.10.7 (src/bind.cpp, engine.cpp, graph.cpp, tensor.cpp) and libsophon
(tpu-runtime/src/bmruntime.cpp); every call used here is in the first public sail, 3.9.0, as well:

| sail does                                                   | so this file                                        |
|-------------------------------------------------------------|-----------------------------------------------------|
| unknown graph: a null pointer is followed, the process dies | looks names up in what was read at load             |
| missing tensor: writes past its array of tensors            | demands every input and every output, once          |
| unknown tensor name: silently becomes input 0, for ever     | refuses names the network does not have             |
| takes the dtype from the network, not from the tensor       | compares dtypes                                     |
| output memory too small: the device writes past it          | compares shapes; tries other variants on scratch    |
| `get_input_shape` changes with use                          | reads `get_max_input_shapes`, which does not        |
| refused launch, hung device: a log line, old output stays   | marks the outputs before a launch, looks after it   |
| failed `update_data`, `asnumpy`, `sync_s2d()`: a log line   | copies by `sync_s2d/d2s(tensor, ...)`, which raise  |
| `process(graph, {name: ndarray})`: holds the GIL, casts to  | `process(graph, {name: Tensor}, {name: Tensor})` on |
|   float32, reuses the last data of a missing input, reads   |   device memory (DEVIO): no cast, no copy, no GIL   |
|   FP16 outputs as float32                                   |                                                     |
| `Engine(path, ...)`: leaks when it refuses a file; makes a  | `Engine(handle)` and `load`: neither                |
|   second set of inputs and outputs on the device            |                                                     |

Nothing can be done here about a call that ends the process (an assertion or `exit()` in the vendor's libraries, a
crash over the shapes that a refused launch left uninitialised): the worker dies, and whoever started it sees that.
"""
import contextlib
import os
import sys

import numpy as np

# In the order of sail.Dtype (= bm_data_type_t): the position is the value. There is no int64.
_DTYPES = ("float32", "float16", "int8", "uint8", "int16", "uint16", "int32", "uint32", "bfloat16")
# On this side FP16 and BF16 are two raw bytes an element: numpy has no bfloat16, and sail hands both over as uint16.
_RAW = {name: np.dtype("uint16" if name.endswith("float16") else name) for name in _DTYPES}

_BMODEL_MAGIC = b"\xee\xaa\x55\xff"   # 0xFF55AAEE, little-endian
_MAX_BYTES = 2 ** 31 - 1              # sail counts a tensor's elements and bytes in C ints

_MARKS = (0xA5, 0x5A)                 # no byte equals both
_MARK_ELEMENTS = 16


class Buffer:
    """Device memory for one array. dtype: name; shape: tuple of ints; freed by Runtime.free or Runtime.close."""

    __slots__ = ("dtype", "shape", "size", "tensor")

    def __init__(self, dtype, shape, tensor):
        self.dtype = dtype
        self.shape = shape
        self.size = _count(shape)     # elements
        self.tensor = tensor          # sail.Tensor that owns device memory only; None once freed

    @property
    def nbytes(self):
        return self.size * _RAW[self.dtype].itemsize


class _Network:
    """One network of a loaded file. inputs, outputs: {port name: (dtype, largest shape)}, read once, at load.

    Raises RuntimeError for a dtype outside sail's list (a newer bmodel than this file knows).
    """

    def __init__(self, engine, name, path):
        self.engine = engine
        self.name = name
        self.label = f"network {name!r} of {os.path.basename(path)}"
        self.inputs = self._ports(
            engine.get_input_names(name), engine.get_input_dtype, engine.get_max_input_shapes(name))
        self.outputs = self._ports(
            engine.get_output_names(name), engine.get_output_dtype, engine.get_max_output_shapes(name))
        self.variants = set()         # (input shapes, output shapes) below the largest that have run on scratch memory

    def _ports(self, names, dtype_of, shapes):
        ports = {}
        for port in names:
            value = int(dtype_of(self.name, port))
            if not 0 <= value < len(_DTYPES):
                raise RuntimeError(f"{port!r} of {self.label} has the unknown dtype {value}")
            ports[port] = (_DTYPES[value], tuple(shapes[port]))
        return ports


class Runtime:
    """One Sophgo device, driven through sail.

    options: {"device_id": int}, default 0. Raises RuntimeError if sail cannot be imported or the device opened.
    """

    def __init__(self, options):
        self._handle = None
        self._models = {}             # id -> {network name: _Network}
        self._buffers = set()
        self._next_model = 1
        try:
            from sophon import sail
        except Exception as error:    # a wheel for another Python fails with ImportError, OSError or SystemError
            raise RuntimeError(f"sophon.sail cannot be imported by {sys.executable} ({_words(error)}): "
                               "name an interpreter that has Sophgo's sail wheel") from error
        self._sail = sail
        self._device_id = int(options.get("device_id", 0))
        count = self._count_devices()
        if count is not None and not 0 <= self._device_id < count:   # on the simulator sail would end the process
            raise RuntimeError(f"there is no tpu {self._device_id}: sail finds {self._present()}")
        try:
            # Kept until close: sail remembers the address of this very object, so it must outlive engines and tensors.
            self._handle = sail.Handle(self._device_id)
        except Exception as error:
            raise RuntimeError(f"tpu {self._device_id} cannot be opened (sail: {_words(error)})") from error

    def describe(self):
        """Who computes. memory_mb is the device's total, 0 where sail cannot tell (no PCIe card, simulator)."""
        return {
            "runtime": "sail",
            "version": str(getattr(self._sail, "__version__", "unknown")),   # a build stamp, not a release number
            "chip": self._chip(),
            "device": f"tpu {self._device_id}",
            "devices": self._count_devices() or 0,
            "memory_mb": self._memory_mb()[0],
        }

    # Models

    def load(self, path):
        """Load a bmodel (str path on this machine) and return its id. The weights are on the device afterwards."""
        handle = self._open_handle()
        if not os.path.isfile(path):
            raise RuntimeError(f"there is no file {path} on this machine")
        with open(path, "rb") as file:
            if file.read(4) != _BMODEL_MAGIC:
                raise RuntimeError(f"{path} is not a bmodel")
        try:
            engine = self._sail.Engine(handle)                # DEVIO: tensors stay in device memory
            names = engine.get_graph_names() if engine.load(str(path)) else []
            networks = {name: _Network(engine, name, path) for name in names}
        except Exception as error:
            raise RuntimeError(f"{path} cannot be loaded on {self._name()} (sail: {_words(error)})") from error
        if not networks:
            # sail says only "false"; the reason is a line in the worker's log.
            raise RuntimeError(f"{self._name()} refused {path}: it is damaged, compiled for another chip, or larger "
                               f"than the device memory left{self._memory_left()}")
        model = self._next_model
        self._next_model += 1
        self._models[model] = networks
        return model

    def networks(self, model):
        """Names of the networks in a loaded file, in the file's order."""
        return list(self._model(model))

    def unload(self, model):
        """Give the weights' device memory back. Unloading twice is not an error."""
        self._models.pop(model, None)

    # Memory

    def allocate(self, dtype, shape):
        """Device memory for one array, filled with zero bytes. shape: one or more positive ints."""
        if dtype not in _RAW:
            raise RuntimeError(f"sail has no {dtype} tensors, only {', '.join(_DTYPES)}")
        shape = tuple(int(n) for n in shape)
        if not shape or min(shape) < 1:   # sail makes a tensor without memory and says nothing
            raise RuntimeError(f"a device tensor needs one or more positive sizes, not {shape}")
        if _count(shape) * _RAW[dtype].itemsize > _MAX_BYTES:
            raise RuntimeError(f"{dtype} {shape} is larger than 2 GiB, the largest tensor sail can hold")
        buffer = Buffer(dtype, shape, self._new_tensor(dtype, shape, on_device=True))
        self._buffers.add(buffer)
        return buffer

    def write(self, buffer, data):
        """Copy bytes (C order, little-endian) to the device. len(data) must be the buffer's size in bytes."""
        tensor = self._tensor(buffer)
        given = memoryview(data).nbytes
        if given != buffer.nbytes:
            raise RuntimeError(f"{buffer.dtype} {buffer.shape} takes {buffer.nbytes} bytes, not {given}")
        array = np.frombuffer(data, _RAW[buffer.dtype]).reshape(buffer.shape)
        # Bytes cut from a larger message may start anywhere; sail refuses an array that is not aligned.
        self._upload(tensor, buffer.dtype, np.require(array, requirements="A"), 0)

    def read(self, buffer):
        """Copy the whole buffer from the device: bytes, C order."""
        return self._download(self._tensor(buffer), buffer.dtype, buffer.shape, 0).tobytes()

    def free(self, buffer):
        """Give device memory back. Freeing twice is not an error."""
        self._buffers.discard(buffer)
        buffer.tensor = None

    # Running

    def launch(self, model, network, inputs, outputs):
        """Run a network. inputs, outputs: lists of (port name, Buffer), all of them, in any order. Blocks until done.

        A network compiled in several variants is chosen by its input shapes. sail reports only the largest variant,
        so the first launch of a smaller one is run twice: once into scratch memory, to learn its output shapes.

        sail does not say that a launch failed. Therefore the last 16 elements of every output are overwritten on the
        device before the launch and read back after it: two transfers of at most 64 bytes an output, whatever its
        size (12 microseconds on Sophgo's simulator). If a mark is still there, the network is launched once more with
        the mark's complement, which the same true result cannot equal; only if that stays too is it an error.
        """
        networks = self._model(model)
        if network not in networks:
            raise RuntimeError(f"the model has no network {network!r}, it has {_list(networks)}")
        net = networks[network]
        feeds = self._bind(net, "input", net.inputs, inputs)
        results = self._bind(net, "output", net.outputs, outputs)
        written = {id(buffer) for _, buffer in outputs}
        if len(written) < len(outputs) or any(id(buffer) in written for _, buffer in inputs):
            raise RuntimeError(f"{net.label} was given one buffer for an output and for something else")

        if any(buffer.shape != net.outputs[port][1] for port, buffer in outputs):
            self._try_variant(net, feeds, inputs, outputs)
        for mark in _MARKS:
            for _, buffer in outputs:
                self._set_mark(buffer, mark)
            self._process(net, feeds, results, inputs, outputs)
            untouched = [port for port, buffer in outputs if self._has_mark(buffer, mark)]
            if not untouched:
                return
        raise RuntimeError(f"{net.label} did not write {_list(untouched)} on {self._name()}: the launch failed, or the "
                           f"network was not compiled for {_shapes(inputs)}")

    def close(self):
        """Give everything back. May be called twice; anything else afterwards is a RuntimeError."""
        for buffer in list(self._buffers):
            self.free(buffer)
        self._models.clear()
        self._handle = None

    # How launch keeps its promises

    def _bind(self, net, kind, wanted, given):
        """Check (port, Buffer) pairs against {port: (dtype, largest shape)}; return {port: sail.Tensor}."""
        ports = [port for port, _ in given]
        if sorted(ports) != sorted(wanted):
            raise RuntimeError(f"{net.label} needs the {kind}s {_list(wanted)}, not {_list(ports)}")
        for port, buffer in given:
            dtype, largest = wanted[port]
            fits = len(buffer.shape) == len(largest) and all(n <= m for n, m in zip(buffer.shape, largest))
            if buffer.dtype != dtype or not fits:
                raise RuntimeError(f"{net.label} takes {kind} {port!r} as {dtype} {largest} at most, "
                                   f"not {buffer.dtype} {buffer.shape}")
        return {port: self._tensor(buffer) for port, buffer in given}

    def _try_variant(self, net, feeds, inputs, outputs):
        """Outputs below the largest shape: before they may be written, learn what these inputs give.

        The runtime below sail does not compare the size of output memory with what it writes there.
        """
        variant = (_shapes(inputs), _shapes(outputs))
        if variant not in net.variants:
            scratch = {port: self._new_tensor(*net.outputs[port], on_device=True) for port, _ in outputs}
            self._process(net, feeds, scratch, inputs, outputs)
            net.variants.add(variant)

    def _process(self, net, feeds, results, inputs, outputs):
        """Launch feeds -> results and compare the shapes that came out with those of the output buffers.

        sail's output shapes are those of the last launch; after a refused one (the input shapes are no compiled
        variant) they mean nothing, and may by chance be right: then the marks tell.
        """
        try:
            net.engine.process(net.name, feeds, results)
            shapes = {port: tuple(net.engine.get_output_shape(net.name, port)) for port in results}
        except Exception as error:
            raise RuntimeError(
                f"{net.label} failed on {self._name()} (sail: {_words(error)}){self._memory_left()}") from error
        for port, buffer in outputs:
            if shapes[port] != buffer.shape:
                raise RuntimeError(f"{net.label} was not compiled to turn inputs {_shapes(inputs)} into "
                                   f"output {port!r} {buffer.shape}")

    def _set_mark(self, buffer, mark):
        count = min(buffer.size, _MARK_ELEMENTS)
        raw = _RAW[buffer.dtype]
        self._upload(buffer.tensor, buffer.dtype, np.full(count * raw.itemsize, mark, np.uint8).view(raw),
                     buffer.size - count)

    def _has_mark(self, buffer, mark):
        count = min(buffer.size, _MARK_ELEMENTS)
        tail = self._download(buffer.tensor, buffer.dtype, (count,), buffer.size - count)
        return bool((np.ascontiguousarray(tail).view(np.uint8) == mark).all())

    # sail, call by call

    def _new_tensor(self, dtype, shape, on_device):
        """A sail.Tensor with memory on one side only: on the device (zeros) or in the host (anything)."""
        handle = self._open_handle()
        try:
            return self._sail.Tensor(
                handle, list(shape), getattr(self._sail.Dtype, "BM_" + dtype.upper()), not on_device, on_device)
        except Exception as error:
            raise RuntimeError(f"{self._name()} has no room for {dtype} {tuple(shape)} "
                               f"(sail: {_words(error)}){self._memory_left()}") from error

    def _upload(self, tensor, dtype, array, offset):
        """Host array (contiguous, raw dtype) -> tensor, from element `offset` on. One transfer."""
        host = self._new_tensor(dtype, array.shape, on_device=False)
        try:
            host.update_data(array)                              # a copy in host memory
            tensor.sync_s2d(host, 0, offset, array.size)
        except Exception as error:
            raise RuntimeError(
                f"{array.nbytes} bytes could not be copied to {self._name()} (sail: {_words(error)})") from error

    def _download(self, tensor, dtype, shape, offset):
        """Elements of a tensor, from element `offset` on -> host array of `shape`, raw dtype. One transfer."""
        host = self._new_tensor(dtype, shape, on_device=False)
        try:
            host.sync_d2s(tensor, offset, 0, _count(shape))
            return host.asnumpy()
        except Exception as error:
            raise RuntimeError(
                f"{dtype} {tuple(shape)} could not be copied from {self._name()} (sail: {_words(error)})") from error

    def _open_handle(self):
        if self._handle is None:
            raise RuntimeError(f"tpu {self._device_id} was closed")
        return self._handle

    def _model(self, model):
        self._open_handle()
        if model not in self._models:
            raise RuntimeError(f"model {model} is not loaded")
        return self._models[model]

    def _tensor(self, buffer):
        self._open_handle()
        if buffer.tensor is None:
            raise RuntimeError(f"the {buffer.dtype} {buffer.shape} buffer was freed")
        return buffer.tensor

    # What to call the device; nothing here may fail, it is also asked while an error is being told.

    def _chip(self):
        target = ""
        with contextlib.suppress(Exception):
            target = str(self._handle.get_target())
        # Without a board name (simulator) sail answers "Error", for a new board "NOT 1684, 1684X, ...".
        return target if target.startswith(("BM", "CV", "SG")) else "unknown"

    def _name(self):
        return f"tpu {self._device_id} ({self._chip()})"

    def _count_devices(self):
        """Number of devices, None if sail cannot tell."""
        with contextlib.suppress(Exception):
            return int(self._sail.get_available_tpu_num())
        return None

    def _present(self):
        count = self._count_devices()
        if not count:
            return "no Sophgo device on this machine"
        return "tpu 0" if count == 1 else f"tpu 0 to {count - 1}"

    def _memory_mb(self):
        """(total, used) megabytes, (0, 0) where sail cannot tell."""
        with contextlib.suppress(Exception):
            total, used = self._sail.get_dev_stat(self._device_id)[:2]
            if 0 <= used <= total < 1 << 20:   # the simulator answers with uninitialised memory
                return int(total), int(used)
        return 0, 0

    def _memory_left(self):
        total, used = self._memory_mb()
        return f", {total - used} of {total} MB are free" if total else ""


def _count(shape):
    """Elements in a shape; Python ints, so that nothing overflows."""
    count = 1
    for n in shape:
        count *= int(n)
    return count


def _list(names):
    return ", ".join(repr(name) for name in names) or "none"


def _shapes(pairs):
    """(name, shape) pairs in name order: a key, and readable in a message."""
    return tuple(sorted((name, buffer.shape) for name, buffer in pairs))


def _words(error):
    """What sail said, as one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
