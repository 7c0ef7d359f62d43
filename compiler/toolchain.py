"""Installs Sophgo's compiler (TPU-MLIR) into a virtual environment of Python 3.10, and runs its tools.

    python -m compiler        installs it into .local/compiler, or says that it is there

The wheel exists for Python 3.10 alone and wants old versions of everything, so it never shares an interpreter with
anything else.
"""

import hashlib
import os
import platform
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .errors import CompilerError, DiskFull, ToolFailed

HOW_TO_INSTALL = "run 'python -m compiler' in the pack's folder once (it needs Python 3.10 and about 2 GB of disk)"
PYTHON_VARIABLE = "SOPHGO_COMPILER_PYTHON"
FOLDER = Path(__file__).resolve().parent.parent / ".local" / "compiler"

SYSTEM = ("Linux", "x86_64")  # which the wheel is made for
COMPILER = "tpu_mlir==1.30.2"
# What the compiler needs to read ONNX: fewer than its wheel lists, which pulls gigabytes of CUDA through torch.
REQUIREMENTS = (
    "numpy==1.24.3",
    "onnx==1.14.1",
    "onnxruntime==1.16.3",
    "onnxsim==0.4.17",
    "protobuf==3.20.3",
    "tqdm==4.65.0",
    "pillow==10.0.0",
    "opencv-python-headless==4.8.0.74",
    "psutil==7.0.0",
    "filelock==3.18.0",
    "graphviz==0.20.1",
    "plotly==5.15.0",
    "scipy==1.11.1",
    "pandas==2.0.3",
    "pyyaml==6.0.2",
    "setuptools==65.5.0",  # the wheel imports pkg_resources
)
# The compiler imports torch and onnxruntime_extensions for custom operators only; for an ONNX file without any, two
# modules of a few lines are enough.
STUBS = Path(__file__).resolve().parent / "stubs"
# The wheel bundles glibc 2.35 and puts it first on the library path; on a newer system every child process then dies
# with "GLIBC_2.36 not found". The system's own serves.
BUNDLED_GLIBC = ("libc.so.6", "libm.so.6", "libpthread.so.0")
MARK = hashlib.sha256("\n".join([COMPILER, *REQUIREMENTS, *BUNDLED_GLIBC]).encode()).hexdigest()
# What is printed where memory ran out: by a shell of what the system killed, by C++, by Python.
OUT_OF_MEMORY = re.compile(r"^(Killed|.*std::bad_alloc.*|MemoryError.*|.*Cannot allocate memory.*)$", re.MULTILINE)
REASON = re.compile(r"^.*(\berror: |Assertion .* failed|what\(\): ).*$", re.MULTILINE)  # of the compiler's own end
NEARLY_FULL = 50e6  # bytes free on a disk where a tool failed: then that was the cause


def _candidates() -> Iterator[Path]:
    if chosen := os.environ.get(PYTHON_VARIABLE):
        yield Path(chosen)
        return
    if found := shutil.which("python3.10"):
        yield Path(found)
    if uv := shutil.which("uv"):
        found = _output(uv, "python", "find", "3.10")
        if found:
            yield Path(found)
    if pyenv := shutil.which("pyenv"):
        yield from sorted(Path(_output(pyenv, "root") or "/nowhere").glob("versions/3.10*/bin/python"))


def _output(*command: str) -> str:
    """What a command prints, or nothing if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def find_python() -> Path:
    """A Python 3.10 that runs: the one the environment names, python3.10 on the PATH, or one of uv's or pyenv's."""
    for candidate in _candidates():
        # a pyenv shim may exist and still refuse to run
        if _output(str(candidate), "-c", "import sys; print(sys.version_info[:2])") == "(3, 10)":
            return candidate
    if chosen := os.environ.get(PYTHON_VARIABLE):
        raise CompilerError(f"{PYTHON_VARIABLE} names {chosen}, which is not a Python 3.10 that runs.")
    raise CompilerError(
        "Sophgo's compiler needs Python 3.10, and none was found; "
        f"install one (`uv python install 3.10`) or name one in {PYTHON_VARIABLE}."
    )


def check_system():
    """Raises CompilerError where there is no compiler for: on a box with an ARM processor, for example."""
    here = platform.system(), platform.machine()
    if here != SYSTEM:
        raise CompilerError(
            f"Sophgo's compiler is made for {' '.join(SYSTEM)} and this is {' '.join(here)}: compile on such a machine, "
            "with 'python -m compiler CHECKPOINT', and copy the folder here."
        )


@dataclass(frozen=True)
class Toolchain:
    """The installed compiler. `Toolchain.install()` is the way to one; it costs nothing when nothing is to be done."""

    folder: Path

    @classmethod
    def install(cls, folder: Path = FOLDER, report: Callable[[str], None] = print) -> "Toolchain":
        """Creates the environment in `folder`, or anew if it was made from another list of packages."""
        check_system()
        chain = cls(folder.resolve())
        if chain._installed() == MARK:
            return chain

        base = find_python()
        report(f"Creating the compiler's environment in {chain.folder} with {base}.")
        shutil.rmtree(chain.folder, ignore_errors=True)
        chain.folder.mkdir(parents=True)
        log = chain.folder / "install.log"
        run([base, "-m", "venv", chain.folder / "venv"], log)
        report(f"Downloading {COMPILER} (about 310 MB).")
        run([chain.python, "-m", "pip", "install", "--no-deps", COMPILER], log)
        report(f"Installing the {len(REQUIREMENTS)} packages it needs.")
        run([chain.python, "-m", "pip", "install", *REQUIREMENTS], log)

        package = next((chain.folder / "venv" / "lib").glob("python3.10/site-packages/tpu_mlir"))
        for name in BUNDLED_GLIBC:
            (package / "lib" / "third_party" / name).rename(chain.folder / name)
        chain.tool("model_tool", "--version", log=log)
        chain._stamp.write_text(MARK)
        report("The compiler is ready.")
        return chain

    @property
    def python(self) -> Path:
        return self.folder / "venv" / "bin" / "python"

    @property
    def _stamp(self) -> Path:
        return self.folder / "stamp"

    def _installed(self) -> str:
        """The MARK it was installed by; empty if it is not there, or not whole."""
        return self._stamp.read_text() if self._stamp.exists() else ""

    def check(self):
        """Raises CompilerError, saying how to install it, unless the compiler is there, in this pack's version."""
        check_system()
        if not (installed := self._installed()):
            raise CompilerError(f"Sophgo's compiler is not installed on this server: {HOW_TO_INSTALL}.")
        if installed != MARK:
            raise CompilerError(f"Sophgo's compiler is installed in another version than this one needs: {HOW_TO_INSTALL}.")

    def tool(self, name: str, *arguments: str | Path, log: Path, cwd: Path | None = None):
        """Runs one of the compiler's tools, its words appended to `log`."""
        run([self.python.parent / name, *arguments], log, cwd, self._environment())

    def python_script(
        self, script: Path, *arguments: str | Path, log: Path, cwd: Path | None = None, seconds: float | None = None
    ):
        """Runs a script of ours that uses the compiler's modules; after `seconds` it is ended with a TimeoutError."""
        run([self.python, script, *arguments], log, cwd, self._environment(), seconds)

    def _environment(self) -> dict[str, str]:
        environment = os.environ | {
            # its tools start each other by name; PATH also keeps them in this environment
            "PATH": os.pathsep.join([str(self.python.parent), os.environ.get("PATH", "")]),
            "PYTHONPATH": str(STUBS),
        }
        environment.pop("PYTHONHOME", None)
        return environment


def run(
    command: list[str | Path],
    log: Path,
    cwd: Path | None = None,
    environment: dict[str, str] | None = None,
    seconds: float | None = None,
):
    """Runs a command to its end; a failure is an error that quotes its last words and names the log."""
    arguments, name = [str(c) for c in command], Path(command[0]).name
    killed = _killed_for_memory()
    with log.open("ab") as words:
        begin = words.tell()
        options = {"cwd": cwd, "env": environment, "stdin": subprocess.DEVNULL, "stdout": words, "stderr": words}
        try:
            done = subprocess.run(arguments, timeout=seconds, check=False, **options)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"{name} took longer than {seconds:.0f} s.") from None
    if done.returncode:
        # before what it wrote is removed
        place = cwd or log.parent
        if shutil.disk_usage(place).free < NEARLY_FULL:
            raise DiskFull(f"The disk of {place} became full while {name} ran: make room there and try again.")
        said = log.read_bytes()[begin:].decode(errors="replace")
        if done.returncode == -signal.SIGKILL or OUT_OF_MEMORY.search(said) or _killed_for_memory() > killed:
            raise CompilerError(f"{name} was ended by the system, most likely because memory ran out (log: {log}).")
        # the tools print their own end after that of the one which failed
        reason = match[0] if (match := REASON.search(said)) else said.strip().rpartition("\n")[2] or "it said nothing"
        what = f"{name} failed with exit code {done.returncode}"
        raise ToolFailed(f"{what}: {reason.strip()[:300]} (all of it: {log}).")


def _killed_for_memory() -> int:
    """How many processes Linux has ended for want of memory, since it runs; not every shell says so."""
    try:
        return int(re.search(r"^oom_kill (\d+)$", Path("/proc/vmstat").read_text(), re.MULTILINE)[1])
    except (OSError, TypeError):
        return 0
