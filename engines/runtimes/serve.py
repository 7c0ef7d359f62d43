"""The loop of a worker process: loads models, keeps arrays on the device, runs networks, counts what moves.

Runs in the worker (Python 3.8, see the package docstring). The host's side is `engines.workers`; both sides speak
(number, operation, arguments) -> (number, "ok", answer) or (number, "error", sentence), arrays as
(dtype, shape, bytes).
"""
import os
import sys
import tempfile
import types
from collections import OrderedDict

# A prompt's context at SD 1.5 size is 0.5 MB and a full set of zero residuals 60 MB; this leaves room for both and a
# few prompts more. The device's own memory is many times that.
RESIDENT_BYTES = 256 << 20


class Session(object):
    """One device, its loaded models, and the arrays that stay on it from call to call."""

    def __init__(self, runtime):
        self.runtime = runtime
        self.scratch = {}               # (model, network, port, dtype, shape) -> buffer that every call overwrites
        self.resident = OrderedDict()   # digest -> (buffer, bytes), least recently used first
        self.counters = {"calls": 0, "bytes_in": 0, "bytes_out": 0, "bytes_loaded": 0}
        self.upload = None              # a model file that is arriving in pieces

    def describe(self):
        return dict(self.runtime.describe(), python="%d.%d.%d" % sys.version_info[:3], pid=os.getpid())

    # -- models ------------------------------------------------------------------------------------------------
    def load(self, path):
        model = self.runtime.load(path)
        self.counters["bytes_loaded"] += os.path.getsize(path)
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

    def run(self, model, network, inputs, outputs):
        """inputs: [(name, dtype, shape, data, digest)]; data None asks for the resident array named by digest.

        outputs: [(name, dtype, shape)]. Answers {"outputs": [(dtype, shape, bytes)], "counters": ...}, or
        {"missing": [digest]} when a named array is not (or no longer) here: nothing has run then, send it again.
        """
        digests = set(item[4] for item in inputs if item[4])
        missing = [item[4] for item in inputs if item[4] and item[3] is None and item[4] not in self.resident]
        if missing:
            return {"missing": missing}
        feeds = []
        for name, dtype, shape, data, digest in inputs:
            if not digest:
                buffer = self._buffer((model, network, name), dtype, shape)
                self._write(buffer, data)
            elif digest in self.resident:
                self.resident.move_to_end(digest)
                buffer = self.resident[digest][0]
            else:
                buffer = self.runtime.allocate(dtype, tuple(shape))
                self.resident[digest] = (buffer, len(data))
                self._write(buffer, data)
            feeds.append((name, buffer))
        self._evict(digests)
        results = [(name, self._buffer((model, network, name), dtype, shape)) for name, dtype, shape in outputs]
        self.runtime.launch(model, network, feeds, results)
        self.counters["calls"] += 1
        answer = []
        for _, buffer in results:
            data = self.runtime.read(buffer)
            self.counters["bytes_out"] += len(data)
            answer.append((buffer.dtype, tuple(buffer.shape), data))
        return {"outputs": answer, "counters": dict(self.counters)}

    def close(self):
        for buffer, _ in self.resident.values():
            self.runtime.free(buffer)
        self.resident.clear()
        for buffer in self.scratch.values():
            self.runtime.free(buffer)
        self.scratch.clear()
        self.runtime.close()


def _module(name, source):
    module = types.ModuleType(name)
    sys.modules[name] = module
    exec(compile(source, name, "exec"), module.__dict__)
    return module


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
    """Answer the host until the channel closes. The first message is (runtime source, options)."""
    source, options = channel.receive()
    log = _redirect_output()
    if options.get("nice"):
        os.nice(options["nice"])
    session = None
    try:
        try:
            session = Session(_module("worker_runtime", source).Runtime(options))
            channel.send((0, "ok", dict(session.describe(), log=log)))
        except Exception as error:
            channel.send((0, "error", _sentence(error)))
            return
        for number, operation, arguments in channel:
            try:
                channel.send((number, "ok", getattr(session, operation)(**arguments)))
            except Exception as error:
                channel.send((number, "error", _sentence(error)))
    finally:
        if session is not None:
            session.close()
        try:
            os.unlink(log)
        except OSError:
            pass


if __name__ == "__channelexec__":
    serve(channel)  # noqa: F821  (execnet puts it there)
