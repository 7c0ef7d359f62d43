"""Starts a compile in the compiler's Python, follows it, and ends it on request. Runs in any Python, ComfyUI's too."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from .errors import CompilerError
from .request import Request
from .toolchain import Toolchain

PACK = Path(__file__).resolve().parent.parent
POLL_SECONDS = 0.1
EXIT_SECONDS = 10.0


def compile_checkpoint(
    request: Request,
    *,
    toolchain: Toolchain,
    progress: Callable[[float, str], None] = lambda share, step: None,
    poll: Callable[[], None] = lambda: None,
) -> dict:
    """Compiles; the report that is also the folder's model.json, or what a dry run found (job.py).

    progress: called with what part of the work is done, 0 to 1, and what is being done. poll: called ten times a second;
    what it raises ends the compile, and nothing is left of it. Raises CompilerError in one sentence.
    """
    toolchain.check()
    try:
        Path(request.folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CompilerError(f"{request.folder}, for '{request.name}', cannot be made: {error.strerror}.") from None
    with tempfile.TemporaryFile() as words, _process(toolchain, words) as process:
        with contextlib.suppress(BrokenPipeError):  # it has ended already, and its last words say why
            process.stdin.write(request.to_json().encode() + b"\n")
            process.stdin.flush()
        lines: queue.Queue[bytes] = queue.Queue()
        threading.Thread(target=_read, args=(process, lines), daemon=True).start()
        done, step = 0.0, {"step": "Starting the compiler", "share": 0.0, "seconds": 1.0}
        began = time.monotonic()
        while True:
            with contextlib.suppress(queue.Empty):
                line = lines.get(timeout=POLL_SECONDS)
                message = json.loads(line) if line else {"error": _last_words(words)}
                if "error" in message:
                    raise CompilerError(message["error"])
                if "step" not in message:
                    return message.get("done", message)
                done, step, began = min(done + step["share"], 1.0), message, time.monotonic()
            poll()
            # never quite to the end of a step, however long it takes
            passed = min((time.monotonic() - began) / max(step["seconds"], 0.1), 0.95)
            progress(min(done + step["share"] * passed, 1.0), step["step"])


@contextlib.contextmanager
def _process(toolchain: Toolchain, words):
    """The job, leading a group of its own, so that all it started ends with it."""
    command = [str(toolchain.python), "-m", "compiler.job"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    process = subprocess.Popen(
        command, cwd=PACK, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=words,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(OSError):
            process.stdin.close()  # it then ends by itself, and removes what it wrote
        patience = time.monotonic() + EXIT_SECONDS
        # asked without collecting it, so that its number, the group's, is no one else's yet
        with contextlib.suppress(ChildProcessError, ProcessLookupError, PermissionError):
            while not os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                if time.monotonic() > patience:
                    break
                time.sleep(0.02)
            os.killpg(process.pid, signal.SIGKILL)  # it, if it did not end, and what it left if it died
        process.wait()
        process.stdout.close()


def _read(process: subprocess.Popen, lines: queue.Queue):
    with contextlib.suppress(ValueError):  # closed under it
        for line in process.stdout:
            lines.put(line)
    lines.put(b"")


def _last_words(words) -> str:
    words.seek(0)
    said = [line.strip() for line in words.read().decode(errors="replace").splitlines() if line.strip()]
    return f"The compiler's process ended without an answer{'; it last said: ' + said[-1][:300] if said else ''}."
