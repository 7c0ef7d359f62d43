"""One ONNX file to one bmodel, and several bmodels to one."""

import tempfile
from pathlib import Path

from .errors import CompilerError
from .toolchain import Toolchain

# The precisions each chip can be compiled for without calibration. The BM1684 has no 16-bit floats.
CHIPS = {"bm1684x": ("F32", "F16", "BF16"), "bm1684": ("F32",)}


def convert(
    onnx: Path, chip: str, precision: str, out: Path, *, toolchain: Toolchain, disable_layer_group: bool = False
) -> Path:
    """Compiles an ONNX file of fixed shapes; the network in the bmodel is called after the ONNX file.

    int64 inputs become int32, and floats stay float32 outside whatever the precision inside. Without the layer-group
    pass a file runs slower, but that pass miscompiles the U-Net on the BM1684: compare before trusting (demo/build.py
    does).
    """
    onnx, out = Path(onnx).resolve(), Path(out).resolve()
    if chip not in CHIPS:
        raise CompilerError(f"No chip {chip!r} is known; the compiler is driven for {', '.join(CHIPS)}.")
    if precision not in CHIPS[chip]:
        raise CompilerError(f"{chip} cannot compute in {precision!r}; it offers {', '.join(CHIPS[chip])}.")
    if not onnx.is_file():
        raise CompilerError(f"There is no ONNX file {onnx}.")
    name = onnx.stem
    with _workplace(out) as folder:
        log, mlir, whole = out.with_suffix(".log"), f"{name}.mlir", Path(folder, f"{name}.bmodel")
        names = ("--model_name", name, "--model_def", onnx, "--mlir", mlir)
        toolchain.tool("model_transform.py", *names, log=log, cwd=folder)
        extra = ("--disable_layer_group",) if disable_layer_group else ()
        target = ("--quantize", precision, "--chip", chip, "--model", whole.name)
        toolchain.tool("model_deploy.py", "--mlir", mlir, *target, *extra, log=log, cwd=folder)
        return _deliver(whole, out, log)


def combine(parts: list[Path], out: Path, *, toolchain: Toolchain) -> Path:
    """Puts the networks of several BM1684X files into one, which then carries the chip's kernels (5.6 MB) only once.

    Files for the BM1684 cannot be combined (the tool refuses them).
    """
    out = Path(out).resolve()
    with _workplace(out) as folder:
        log, whole = out.with_suffix(".log"), Path(folder, "combined.bmodel")
        sources = [Path(p).resolve() for p in parts]
        toolchain.tool("model_tool", "--combine", *sources, "-o", whole, log=log, cwd=folder)
        return _deliver(whole, out, log)


def _workplace(out: Path) -> tempfile.TemporaryDirectory:
    """A temporary folder beside `out`: the finished file is renamed into place, so `out` is whole or not there."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".log").unlink(missing_ok=True)
    return tempfile.TemporaryDirectory(prefix=".compiling-", dir=out.parent)


def _deliver(whole: Path, out: Path, log: Path) -> Path:
    """The finished file; the log is of interest only after a failure."""
    if not whole.is_file():
        raise CompilerError(f"The compiler ended without an error and without a file (its words: {log}).")
    log.unlink()
    return whole.replace(out)
