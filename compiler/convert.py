"""ONNX files to bmodels: to the compiler's own form, from there to a chip's, and several bmodels to one."""

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from .errors import CompilerError, ToolFailed
from .request import CHIPS
from .toolchain import Toolchain

TO_MLIR = Path(__file__).resolve().parent / "inside" / "to_mlir.py"


@dataclass(frozen=True)
class Recipe:
    """How a network is compiled for a chip.

    Without the layer-group pass, which plans what stays in the chip's local memory, a file runs slower, but that pass
    miscompiles some networks. With high_precision what is sensitive (norms, softmax, ...) computes in F32.
    """

    precision: str = "F32"
    layer_groups: bool = True
    high_precision: bool = False

    def __str__(self) -> str:
        remedies = [] if self.layer_groups else ["without layer groups"]
        remedies += ["with high-precision operators"] if self.high_precision else []
        return " ".join([self.precision, " and ".join(remedies)]).strip()


def convert(
    onnx: Path, chip: str, precision: str, out: Path, *, toolchain: Toolchain, disable_layer_group: bool = False
) -> Path:
    """Compiles an ONNX file of fixed shapes; the network in the bmodel is called after the ONNX file.

    int64 inputs become int32, and floats stay float32 outside whatever the precision inside. The layer-group pass
    miscompiles the U-Net on the BM1684: compare before trusting (demo/build.py does).
    """
    onnx, out = Path(onnx).resolve(), Path(out).resolve()
    check_target(chip, precision)
    if not onnx.is_file():
        raise CompilerError(f"There is no ONNX file {onnx}.")
    log = out.with_suffix(".log")
    with _workplace(out) as folder:
        names = ("--model_name", onnx.stem, "--model_def", onnx, "--mlir", f"{onnx.stem}.mlir")
        toolchain.tool("model_transform.py", *names, log=log, cwd=folder)
        recipe = Recipe(precision, layer_groups=not disable_layer_group)
        return _deliver(deploy(Path(folder, f"{onnx.stem}.mlir"), chip, recipe, toolchain=toolchain, log=log), out, log)


def check_target(chip: str, precision: str):
    """Raises CompilerError unless `chip`, in lower case, computes in `precision`."""
    if chip not in CHIPS:
        raise CompilerError(f"No chip {chip!r} is known; the compiler is driven for {', '.join(CHIPS)}.")
    if precision not in CHIPS[chip]:
        raise CompilerError(f"{chip} cannot compute in {precision!r}; it offers {', '.join(CHIPS[chip])}.")


def to_mlir(onnx: Path, folder: Path, *, toolchain: Toolchain, log: Path) -> Path:
    """One of our own graphs (compiler/networks) in the compiler's form, in little memory; for every chip."""
    toolchain.python_script(TO_MLIR, Path(onnx).resolve(), log=log, cwd=folder)
    return _made(Path(folder, f"{Path(onnx).stem}.mlir"), log)


def deploy(mlir: Path, chip: str, recipe: Recipe, *, toolchain: Toolchain, log: Path) -> Path:
    """A bmodel beside `mlir`, in place of one from before. Raises ToolFailed where this recipe does not compile."""
    out = mlir.with_suffix(".bmodel")
    out.unlink(missing_ok=True)
    before = {*mlir.parent.iterdir(), out}
    extra = [] if recipe.layer_groups else ["--disable_layer_group"]
    extra += ["--high_precision"] if recipe.high_precision else []
    target = ("--quantize", recipe.precision, "--chip", chip, "--model", out.name)
    try:
        toolchain.tool("model_deploy.py", "--mlir", mlir.name, *target, *extra, log=log, cwd=mlir.parent)
    finally:
        # it leaves the weights as they were in between, which for a U-Net are gigabytes with every recipe
        for path in {*mlir.parent.iterdir()} - before:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return _made(out, log)


def combine(parts: list[Path], out: Path, *, toolchain: Toolchain) -> Path:
    """Puts the networks of several BM1684X files into one, which then carries the chip's kernels (5.6 MB) only once.

    Files for the BM1684 cannot be combined (the tool refuses them).
    """
    out = Path(out).resolve()
    log = out.with_suffix(".log")
    with _workplace(out) as folder:
        whole = Path(folder, "combined.bmodel")
        sources = [Path(p).resolve() for p in parts]
        toolchain.tool("model_tool", "--combine", *sources, "-o", whole, log=log, cwd=folder)
        return _deliver(_made(whole, log), out, log)


def _workplace(out: Path) -> tempfile.TemporaryDirectory:
    """A temporary folder beside `out`: the finished file is renamed into place, so `out` is whole or not there."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".log").unlink(missing_ok=True)
    return tempfile.TemporaryDirectory(prefix=".compiling-", dir=out.parent)


def _made(file: Path, log: Path) -> Path:
    if not file.is_file():
        raise ToolFailed(f"The compiler ended without an error and without a file (its words: {log}).")
    return file


def _deliver(whole: Path, out: Path, log: Path) -> Path:
    """The finished file; the log is of interest only after a failure."""
    log.unlink()
    return whole.replace(out)
