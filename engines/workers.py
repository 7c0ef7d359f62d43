"""Worker processes: one a device, each in the interpreter that can import its vendor library.

A worker is an execnet gateway running `runtimes.serve`. It may hold its GIL, pin its numpy or crash; the host only
ever waits on a channel. A `Worker` here is the supervisor of one such process: it starts it when first needed, loads
the files that calls name, closes it when idle (a simulator burns both cores while open) or when nothing is loaded,
notices its death, and starts it again on the next call.
"""
from __future__ import annotations

import contextlib
import itertools
import os
import shlex
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import DeviceError, EngineError, WorkerDied

ENGINES = Path(__file__).parent
# What a runtime needs beside its one file, below this folder. A worker imports these under the same names as here.
SHIPPED = {"mindspore": ("errors.py", "sdxl", "runtimes/mindspore")}
POLL_SECONDS = 0.05          # how soon a cancel is noticed while the device is busy
EXIT_SECONDS = 3.0           # how long a worker may take to leave before it is killed
PIECE_BYTES = 4 << 20        # of a model file on its way to another machine
NO_POLL: Callable[[], None] = lambda: None
Answer = list[tuple[str, tuple[int, ...], bytes]]      # arrays as (dtype, shape, bytes)


@dataclass(frozen=True)
class WorkerSpec:
    """How to start one worker. Two devices with equal specs share a worker."""

    name: str                            # what a workflow and the log call the device
    runtime: str                         # a file or folder of engines/runtimes: "bmrt", "sail", "onnx", "mindspore"
    options: tuple[tuple[str, object], ...] = ()   # for the runtime
    python: str = ""                     # empty: the host's own interpreter
    ssh: str = ""                        # "user@host"; empty: this machine
    idle_seconds: float | None = None    # close when unused for so long; None keeps it open
    cancel_seconds: float | None = None  # how long a cancelled call may go on before the process is killed; None lets
                                         # it end, as a card must finish its step; 0 is for what starts again at once


@dataclass(frozen=True)
class FileVersion:
    """A model file or folder as it is now, and how to load it: what is replaced under the same name is loaded anew."""

    path: Path
    modified: int                        # nanoseconds; of a folder the newest of all that is in it
    options: tuple[tuple[str, object], ...] = ()   # for the runtime's `load`: two precisions are two models

    @classmethod
    def of(cls, path: Path, **options: object) -> FileVersion:
        inside = (part for part in path.rglob("*") if part.exists()) if path.is_dir() else ()    # links may lead nowhere
        modified = max(part.stat().st_mtime_ns for part in (path, *inside))
        return cls(path, modified, tuple(sorted(options.items())))


@dataclass(frozen=True)
class Feed:
    """One input of a call. With a `digest` it stays on the device and later calls only name it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: bytes
    digest: str = ""


class Worker:
    """The supervisor of one worker process. One call at a time; safe to use from any thread."""

    _pool: dict[WorkerSpec, Worker] = {}
    _pool_lock = threading.RLock()     # re-entrant: garbage collection may run _drop while it is held

    @classmethod
    def of(cls, spec: WorkerSpec) -> Worker:
        """The one worker of this spec in this process; it starts when first called."""
        with cls._pool_lock:
            if spec not in cls._pool:
                cls._pool[spec] = cls(spec)
            return cls._pool[spec]

    @classmethod
    def close_all(cls) -> None:
        with cls._pool_lock:
            workers = list(cls._pool.values())
        for worker in workers:
            worker.close()

    def __init__(self, spec: WorkerSpec):
        self.spec = spec
        self.counters: dict[str, int] = {}       # as the process last told them; they start anew with the process
        self.starts = 0
        self._lock = threading.Lock()
        self._group = self._channel = None
        self._numbers = itertools.count(1)
        self._models: dict[FileVersion, int] = {}      # the model in the running process
        self._sent: set[str] = set()             # digests the running process has seen
        self._released: deque[FileVersion] = deque()   # their last user is gone; unloaded at the next safe moment
        self._holders: dict[FileVersion, int] = {}
        self._about: dict[str, object] = {}
        self._timer: threading.Timer | None = None
        self._last_used = 0.0

    # -- what the stages use -----------------------------------------------------------------------------------
    def describe(self) -> dict[str, object]:
        """{"runtime", "version", "chip", "device", "python", "pid", "log"}; starts the process if it never ran."""
        with self._busy():
            if not self._about:
                self._start()
            return dict(self._about)

    def hold(self, owner: object, file: FileVersion) -> None:
        """Keep `file` loaded (once any call needed it) as long as `owner` lives."""
        with self._pool_lock:
            self._holders[file] = self._holders.get(file, 0) + 1
        weakref.finalize(owner, self._drop, file)

    def run(self, file: FileVersion, network: str, inputs: Sequence[Feed],
            outputs: Sequence[tuple[str, str, tuple[int, ...]]], poll: Callable[[], None] = NO_POLL) -> Answer:
        """Run one network: outputs as (dtype, shape, bytes) in the order asked for.

        `poll` is called about every 50 ms while the device works; what it raises abandons the call (the device
        finishes or is closed, and the next call starts clean). Raises EngineError in one sentence.
        """
        return self._compute("run", file, inputs, {"network": network, "outputs": list(outputs)},
                             f"running '{network}'", poll)

    def perform(self, file: FileVersion, program: str, inputs: Sequence[Feed], settings: dict[str, object],
                poll: Callable[[], None] = NO_POLL, progress: Callable[[dict], None] = lambda payload: None) -> Answer:
        """Let the runtime do something long with a model, a whole sampling loop: what it returns, as `run` does.

        `progress` gets what the program reports, in order, in this thread; `poll` is called between as in `run`. What
        either raises cancels: a program stops where it reports next, and its models stay loaded. Settings and reports
        are of str, bytes, numbers, None, lists, tuples, dicts.
        """
        return self._compute("perform", file, inputs, {"program": program, "settings": settings},
                             f"performing '{program}'", poll, progress)

    def has(self, file: FileVersion) -> bool:
        """Whether the process that runs now has `file` loaded."""
        return self._channel is not None and file in self._models

    def unload(self, file: FileVersion) -> None:
        """Free what `file` holds on the device; a later call loads it again. The process ends with its last file."""
        with self._busy():
            self._released.append(file)

    def close(self) -> None:
        """End the process if it runs; the next call starts a new one."""
        with self._lock:
            self._stop(EXIT_SECONDS)

    @property
    def pid(self) -> int | None:
        """The process that runs now, or None."""
        return self._about.get("pid") if self._channel is not None else None

    # -- the process -------------------------------------------------------------------------------------------
    @contextlib.contextmanager
    def _busy(self):
        with self._lock:
            self._cancel_timer()
            try:
                yield
            finally:
                self._unload_released()
                self._arm_timer()

    def _start(self) -> None:
        if self._channel is not None:
            if self._group[0].hasreceiver():
                return
            self._stop(0)         # it ended while nobody waited for it, so nobody need hear of it
        import execnet  # here: importing the pack must stay cheap
        self._group = execnet.Group()
        # A server has nobody to type a password: ssh must fail rather than ask.
        where = f"ssh=-o BatchMode=yes -o ConnectTimeout=10 {self.spec.ssh}" if self.spec.ssh else "popen"
        python = self.spec.python if self.spec.ssh else shlex.quote(self.spec.python or sys.executable)
        try:
            gateway = self._group.makegateway(f"{where}//python={python or 'python3'}")
            self._channel = gateway.remote_exec((ENGINES / "runtimes" / "serve.py").read_text(encoding="utf-8"))
            self._channel.send((self.spec.runtime, _sources(self.spec.runtime), dict(self.spec.options)))
            self._about = self._answer(0, "starting", NO_POLL)
        except (OSError, EOFError, execnet.HostNotFound, ValueError) as error:
            self._stop(0)
            raise DeviceError(f"Device '{self.spec.name}' did not start: {self._origin()} could not be run "
                              f"({error}); check the accelerator settings file.") from error
        except WorkerDied as error:
            raise DeviceError(f"Device '{self.spec.name}' did not start: {self._origin()} ended while it loaded its "
                              "libraries, which may not fit this machine.") from error
        except EngineError as error:
            self._stop(0)
            raise DeviceError(f"Device '{self.spec.name}' did not start in {self._origin()}: "
                              f"{str(error).rstrip('.')}.") from error
        self.starts += 1

    def _origin(self) -> str:
        python = self.spec.python or sys.executable
        return f"{python} on {self.spec.ssh}" if self.spec.ssh else python

    def _stop(self, patience: float) -> None:
        """Let the process leave by itself within `patience` seconds, then kill it. Needs the lock."""
        group, channel, self._group, self._channel = self._group, self._channel, None, None
        self._models, self._sent, self.counters = {}, set(), {}
        self._cancel_timer()
        if channel is not None and patience:
            channel.close()                   # ends the loop of `serve`, which then gives the device back
        if group is not None:
            group.terminate(timeout=patience)
        log = self._about.pop("log", None)
        if log and not self.spec.ssh:
            with contextlib.suppress(OSError):
                os.unlink(log)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _arm_timer(self) -> None:
        self._last_used = time.monotonic()
        if self._channel is not None and self.spec.idle_seconds is not None:
            self._timer = threading.Timer(self.spec.idle_seconds, self._close_if_idle)
            self._timer.daemon = True
            self._timer.start()

    def _close_if_idle(self) -> None:
        with self._lock:
            if time.monotonic() - self._last_used >= self.spec.idle_seconds:
                self._stop(EXIT_SECONDS)

    # -- files -------------------------------------------------------------------------------------------------
    def _drop(self, file: FileVersion) -> None:
        """A holder is gone. Runs wherever garbage is collected, perhaps inside a call of this very worker."""
        with self._pool_lock:
            self._holders[file] -= 1
            if self._holders[file]:
                return
            del self._holders[file]
        self._released.append(file)
        if self._lock.acquire(blocking=False):
            try:
                self._unload_released()
            finally:
                self._lock.release()

    def _unload_released(self) -> None:
        while self._released:
            model = self._models.pop(self._released.popleft(), None)
            if model is None:
                continue
            if not self._models:
                self._stop(EXIT_SECONDS)      # nothing loaded: leave the device to others
                return
            with contextlib.suppress(EngineError):
                self._call("unload", {"model": model}, "unloading", NO_POLL)

    def _loaded(self, file: FileVersion, poll: Callable[[], None]) -> int:
        self._start()
        if file not in self._models:
            path = file.path
            try:
                there = self._sent_file(path, poll) if self.spec.ssh else str(path)
                # A load that nobody waits for would keep its memory on the card: a cancel is noticed right after it.
                patient = NO_POLL if self.spec.cancel_seconds is None else poll
                arguments = {"path": there, "options": dict(file.options)}
                self._models[file] = self._call("load", arguments, f"loading {path.name}", patient)["model"]
            except WorkerDied as error:
                raise WorkerDied(f"{error} If it ends there each time, the file is damaged.") from None
            except EngineError as error:
                raise EngineError(f"'{path.name}' could not be loaded on '{self.spec.name}': {error}") from error
        return self._models[file]

    def _sent_file(self, path: Path, poll: Callable[[], None]) -> str:
        """Bring a file to a worker on another machine, once: it is kept there under its content hash."""
        from .files import content_hash
        if path.is_dir():
            raise EngineError("a folder is not sent to another machine; use a single file.")
        name = content_hash(path) + path.suffix
        there = self._call("cached_file", {"name": name}, "looking for the file", poll)
        if there is None:
            size = path.stat().st_size
            with path.open("rb") as file:
                while file.tell() < size:
                    first = file.tell() == 0
                    arguments = {"name": name, "piece": file.read(PIECE_BYTES), "first": first, "last": file.tell() >= size}
                    there = self._call("receive_file", arguments, f"sending {path.name}", poll)
        return there

    # -- calls -------------------------------------------------------------------------------------------------
    def _compute(self, operation: str, file: FileVersion, inputs: Sequence[Feed], arguments: dict, doing: str,
                 poll: Callable[[], None], progress: Callable[[dict], None] | None = None) -> Answer:
        with self._busy():
            model = self._loaded(file, poll)
            while True:
                sent = [(f.name, f.dtype, f.shape, None if f.digest in self._sent else f.data, f.digest) for f in inputs]
                answer = self._call(operation, {"model": model, "inputs": sent, **arguments}, doing, poll, progress)
                if "missing" not in answer:
                    break
                self._sent.difference_update(answer["missing"])
            self._sent.update(f.digest for f in inputs if f.digest)
            self.counters = answer["counters"]
            return answer["outputs"]

    def _call(self, operation: str, arguments: dict, doing: str, poll: Callable[[], None],
              progress: Callable[[dict], None] | None = None):
        number = next(self._numbers)
        try:
            self._channel.send((number, operation, arguments))
        except OSError:      # execnet says so when the process is already gone
            raise self._died(doing) from None
        return self._answer(number, doing, poll, progress)

    def _answer(self, number: int, doing: str, poll: Callable[[], None], progress: Callable[[dict], None] | None = None):
        while True:
            try:
                got, status, answer = self._channel.receive(timeout=POLL_SECONDS)
            except self._channel.TimeoutError:
                got = None
            except (EOFError, self._channel.RemoteError):
                raise self._died(doing) from None
            # What has another number is about a call that was cancelled.
            if got == number and status == "error":
                raise EngineError(answer)
            if got == number and status == "ok":
                return answer
            try:
                if got == number:
                    progress(answer)
                poll()
            except BaseException:
                self._cancel(number)
                raise

    def _cancel(self, number: int) -> None:
        """Ask the worker to leave a call, which a program does where it reports; kill it if it may not go on so long."""
        patience = self.spec.cancel_seconds
        try:
            self._channel.send((number, "cancel", None))
            until = time.monotonic() + (patience or 0)
            while (left := until - time.monotonic()) > 0:
                got, status, _ = self._channel.receive(timeout=left)
                if got == number and status != "progress":
                    return
        except self._channel.TimeoutError:
            pass
        except (OSError, EOFError, self._channel.RemoteError):
            patience = 0         # it ended meanwhile; nobody waits for it, so nobody need hear of it
        if patience is not None:
            self._stop(0)

    def _died(self, doing: str) -> WorkerDied:
        pid, said = self._about.get("pid"), self._last_words()
        self._stop(0)
        return WorkerDied(f"The worker process of device '{self.spec.name}' (pid {pid}) ended while {doing}"
                          f"{said}. Run again: it starts anew by itself.")

    def _last_words(self) -> str:
        log = self._about.get("log")
        if not log or self.spec.ssh:
            return ""
        try:
            lines = Path(str(log)).read_text(errors="replace").strip().splitlines()
        except OSError:
            return ""
        return f"; it last said: {lines[-1].strip()}" if lines else ""


def _sources(runtime: str) -> dict[str, str]:
    """What a worker of this runtime imports from the pack: {"engines/errors.py": its text, ...}."""
    parts = [ENGINES / part for part in SHIPPED.get(runtime, (f"runtimes/{runtime}.py",))]
    files = [file for part in parts for file in (sorted(part.rglob("*.py")) if part.is_dir() else [part])]
    packages = [ENGINES / "__init__.py", ENGINES / "runtimes" / "__init__.py"]
    return {file.relative_to(ENGINES.parent).as_posix(): file.read_text(encoding="utf-8") for file in (*packages, *files)}
