"""The loop of a worker process: loads models, keeps arrays on the device, runs networks, counts what moves.

Runs in the worker (Python 3.8, see the package docstring). The host's side is `engines.workers`; both sides speak
(number, operation, arguments) -> (number, "ok", answer) or (number, "error", sentence), arrays as
(dtype, shape, bytes). While `perform` runs, (number, "progress", payload) goes to the host any number of times, and
(number, "cancel", None) may come.
"""
import importlib.abc
import importlib.util
import os
import queue
import sys
import tempfile
from collections import OrderedDict

# A prompt's context at SD 1.5 size is 0.5 MB and a full set of zero residuals 60 MB; this leaves room for both and a
# few prompts more. The device's own memory is many times that.
RESIDENT_BYTES = 256 << 20


class Shipped(importlib.abc.MetaPathFinder, importlib.abc.ExecutionLoader):
    """Imports what the host sent: {"engines/errors.py": source, ...}, all of it below one package."""

    def __init__(self, sources):
        self.sources = sources

    def find_spec(self, name, path=None, target=None):
        return importlib.util.spec_from_loader(name, self) if self._file(name) in self.sources else None

    def _file(self, name):
        file = name.replace(".", "/")
        return file + ".py" if file + ".py" in self.sources else file + "/__init__.py"

    def is_package(self, name):
        return self._file(name).endswith("/__init__.py")

    def get_filename(self, name):       # what a traceback shows, with the line from `get_source`
        return self._file(name)

    def get_source(self, name):
        return self.sources[self._file(name)]


class Cancelled(RuntimeError):
    """The host no longer waits for the running call."""


class Host(object):
    """The other end of the channel. A thread of execnet's receives, so that a cancel is known while a call runs."""

    def __init__(self, channel):
        self.channel = channel
        self.calls = queue.Queue()      # (number, operation, arguments) in the order they came; None when it is over
        self.number = 0                 # of the call being answered; numbers only grow
        self.cancelled = 0              # no call up to this number is waited for
        channel.setcallback(self._receive, endmarker=None)

    def _receive(self, message):
        if message is None:
            self.cancelled = float("inf")
            self.calls.put(None)
        elif message[1] == "cancel":
            self.cancelled = message[0]
        else:
            self.calls.put(message)

    def report(self, payload):
        """Tell the host how far the running call is. Raises when the host no longer waits for it, or is gone."""
        if self.number <= self.cancelled:
            raise Cancelled("the call was cancelled")
        self.channel.send((self.number, "progress", payload))

    def answer(self, status, answer):
        self.channel.send((self.number, status, answer))

    def __iter__(self):
        for self.number, operation, arguments in iter(self.calls.get, None):
            yield operation, arguments


class Session(object):
    """One device, its loaded models, and the arrays that stay on it from call to call."""

    def __init__(self, runtime, report):
        self.runtime = runtime
        self.report = report
        self.scratch = {}               # (model, network, port, dtype, shape) -> buffer that every call overwrites
        self.resident = OrderedDict()   # digest -> (buffer, bytes), least recently used first
        self.counters = {"calls": 0, "bytes_in": 0, "bytes_out": 0, "bytes_loaded": 0}
        self.upload = None              # a model file that is arriving in pieces

    def describe(self):
        return dict(self.runtime.describe(), python="%d.%d.%d" % sys.version_info[:3], pid=os.getpid())

    # -- models ------------------------------------------------------------------------------------------------
    def load(self, path, options):
        model = self.runtime.load(path, **options)
        files = [os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names] or [path]
        self.counters["bytes_loaded"] += sum(os.path.getsize(file) for file in files if os.path.exists(file))
        return {"model": model, "networks": self.runtime.networks(model)}

    def unload(self, model):
        for key in [k for k in self.scratch if k[0] == model]:
            self.runtime.free(self.scratch.pop(key))
        self.runtime.unload(model)

    def cached_file(self, name):
        """The path of a file sent before (named by its content hash), or None. For workers on another machine."""
        path = os.path.join(self._cache(), name)
        return path if os.path.exists(path) else None

    def receive_file(self, name, piece, first, last):
        """Take the next piece of a model file; after the last one it exists under its content hash.

        `first` begins anew: a transfer that was cancelled half way must leave nothing in the next one.
        """
        path = os.path.join(self._cache(), name)
        if first:
            if self.upload is not None:
                self.upload.close()
            self.upload = open(path + ".part", "wb")
        self.upload.write(piece)
        if not last:
            return None
        self.upload.close()
        os.replace(path + ".part", path)
        self.upload = None
        return path

    @staticmethod
    def _cache():
        folder = os.path.join(os.path.expanduser("~"), ".cache", "sophgo-ascend-nodes")
        os.makedirs(folder, exist_ok=True)
        return folder

    # -- arrays ------------------------------------------------------------------------------------------------
    def _buffer(self, key, dtype, shape):
        key = key + (dtype, tuple(shape))
        if key not in self.scratch:
            self.scratch[key] = self.runtime.allocate(dtype, tuple(shape))
        return self.scratch[key]

    def _write(self, buffer, data):
        self.runtime.write(buffer, data)
        self.counters["bytes_in"] += len(data)

    def _evict(self, wanted):
        total = sum(size for _, size in self.resident.values())
        for digest in list(self.resident):
            if total <= RESIDENT_BYTES:
                return
            if digest not in wanted:
                buffer, size = self.resident.pop(digest)
                self.runtime.free(buffer)
                total -= size

    def _missing(self, inputs):
        return [digest for _, _, _, data, digest in inputs if digest and data is None and digest not in self.resident]

    def _feeds(self, model, purpose, inputs):
        """[(name, buffer)] with each input on the device."""
        feeds = []
        for name, dtype, shape, data, digest in inputs:
            if not digest:
                buffer = self._buffer((model, purpose, name), dtype, shape)
                self._write(buffer, data)
            elif digest in self.resident:
                self.resident.move_to_end(digest)
                buffer = self.resident[digest][0]
            else:
                buffer = self.runtime.allocate(dtype, tuple(shape))
                self._write(buffer, data)
                self.resident[digest] = (buffer, len(data))
            feeds.append((name, buffer))
        self._evict(set(item[4] for item in inputs))
        return feeds

    def _answer(self, outputs):
        self.counters["calls"] += 1
        self.counters["bytes_out"] += sum(len(data) for _, _, data in outputs)
        return {"outputs": outputs, "counters": dict(self.counters)}

    def run(self, model, network, inputs, outputs):
        """inputs: [(name, dtype, shape, data, digest)]; data None asks for the resident array named by digest.

        outputs: [(name, dtype, shape)]. Answers {"outputs": [(dtype, shape, bytes)], "counters": ...}, or
        {"missing": [digest]} when a named array is not (or no longer) here: nothing has run then, send it again.
        """
        missing = self._missing(inputs)
        if missing:
            return {"missing": missing}
        feeds = self._feeds(model, network, inputs)
        results = [(name, self._buffer((model, network, name), dtype, shape)) for name, dtype, shape in outputs]
        self.runtime.launch(model, network, feeds, results)
        return self._answer([(buffer.dtype, tuple(buffer.shape), self.runtime.read(buffer)) for _, buffer in results])

    def perform(self, model, program, inputs, settings):
        """As `run`, but the runtime decides what comes out, and reports its progress meanwhile."""
        missing = self._missing(inputs)
        if missing:
            return {"missing": missing}
        feeds = self._feeds(model, program, inputs)
        return self._answer(self.runtime.perform(model, program, dict(feeds), settings, self.report))

    def close(self):
        for buffer, _ in self.resident.values():
            self.runtime.free(buffer)
        self.resident.clear()
        for buffer in self.scratch.values():
            self.runtime.free(buffer)
        self.scratch.clear()
        self.runtime.close()


def _redirect_output():
    """Vendor libraries print on stdout and stderr; keep that in a file whose end explains a crash."""
    handle, path = tempfile.mkstemp(prefix="sophgo-ascend-", suffix=".log")
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.close(handle)
    return path


def _sentence(error):
    text = " ".join(str(error).split())
    return text if isinstance(error, RuntimeError) and text else "%s: %s" % (type(error).__name__, text)


def serve(channel):
    """Answer the host until the channel closes. The first message is (runtime, {file: source}, its options)."""
    runtime, sources, options = channel.receive()
    sys.meta_path.insert(0, Shipped(sources))
    host = Host(channel)
    log = _redirect_output()
    if options.get("nice"):
        os.nice(options["nice"])
    session = None
    try:
        try:
            module = importlib.import_module("engines.runtimes." + runtime)
            session = Session(module.Runtime(options), host.report)
            host.answer("ok", dict(session.describe(), log=log))
        except Exception as error:
            host.answer("error", _sentence(error))
            return
        for operation, arguments in host:
            try:
                host.answer("ok", getattr(session, operation)(**arguments))
            except Exception as error:
                host.answer("error", _sentence(error))
    finally:
        if session is not None:
            session.close()
        try:
            os.unlink(log)
        except OSError:
            pass


if __name__ == "__channelexec__":
    serve(channel)  # noqa: F821  (execnet puts it there)
