"""Rebuilds the demo's bmodels from its weights, and lets none pass that does not compute what torch computes.

    python -m demo.build [--only shapes-bm1684x-f32]

Export to ONNX, compile, combine, then run every stage in Sophgo's simulator beside torch on the same inputs. A set of
files replaces the shipped one only if all its stages are within tolerance. Needs Python 3.10 for the compiler (see
compiler/toolchain.py) and the simulator's libraries in .local/simulator.
"""

import argparse
import json
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from compiler.convert import combine, convert
from compiler.errors import CompilerError
from compiler.toolchain import Toolchain
from engines.devices import find_devices
from engines.engine import Engine
from engines.errors import EngineError
from engines.files import read_model
from engines.network import ModelFileError
from engines.workers import Worker

from . import export, nets

PACK = Path(__file__).resolve().parent.parent
MODELS = Path(__file__).resolve().parent / "models"
PARITY = "parity.json"

# The least cosine between a compiled stage's output and torch's. bfloat16 keeps 8 bits of each number.
TOLERANCE = {"F32": 0.99999, "BF16": 0.999}


@dataclass(frozen=True)
class Recipe:
    chip: str
    precision: str
    combined: bool  # all stages in one shapes.bmodel
    without_layer_group: tuple[str, ...] = ()  # stages that the layer-group pass miscompiles


SETS = {
    "shapes-bm1684x-f32": Recipe("bm1684x", "F32", combined=True),
    "shapes-bm1684x-bf16": Recipe("bm1684x", "BF16", combined=True),
    "shapes-bm1684-f32": Recipe("bm1684", "F32", combined=False, without_layer_group=("unet",)),
}


@dataclass(frozen=True)
class Parity:
    """How one output of a compiled stage differs from torch's."""

    files: str
    stage: str
    output: str
    cosine: float
    mean: float  # absolute difference
    largest: float  # absolute difference
    seconds: float  # of the simulated call


def build(name: str, onnx: list[Path], folder: Path, toolchain: Toolchain) -> list[Path]:
    """Compiles one set into `folder`."""
    recipe, parts = SETS[name], []
    for path in onnx:
        print(f"{name}: compiling {path.stem}", flush=True)
        plain = path.stem in recipe.without_layer_group
        out = folder / f"{path.stem}.bmodel"
        parts.append(convert(path, recipe.chip, recipe.precision, out, toolchain=toolchain, disable_layer_group=plain))
    if not recipe.combined:
        return parts
    whole = combine(parts, folder / "shapes.bmodel", toolchain=toolchain)
    for part in parts:
        part.unlink()
    return [whole]


def compare(name: str, files: list[Path], stages: dict[str, export.Stage]) -> list[Parity]:
    """Runs every network of `files` in the simulator and sets its outputs beside torch's."""
    devices, rows = find_devices(None, PACK), []
    try:
        for model in map(read_model, files):
            _, spec = devices.choose("simulator", [model])
            for network in model.networks:
                stage, engine = stages[network.name], Engine(model, network, spec)
                roles = engine.binding.inputs.items()
                feeds = {role: stage.inputs[network.inputs[i].name].numpy() for role, i in roles}
                began = time.monotonic()
                answers = engine.run(feeds)
                seconds = time.monotonic() - began
                wanted = dict(zip(stage.outputs, stage(), strict=True))
                for (output, tensor), answer in zip(wanted.items(), _in_order(engine, answers), strict=True):
                    rows.append(Parity(name, stage.name, output, *_difference(answer, tensor.numpy()), round(seconds, 1)))
                    print(_line(rows[-1]), flush=True)
    finally:
        Worker.close_all()
    return rows


def _in_order(engine: Engine, answers: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Outputs in the file's order, which is the order of the ONNX file's."""
    return [answers[role] for role, _ in sorted(engine.binding.outputs.items(), key=lambda item: item[1])]


def _difference(got: np.ndarray, wanted: np.ndarray) -> tuple[float, float, float]:
    """(cosine, mean, largest) with the last two of the absolute difference, computed in float64."""
    if got.shape != wanted.shape:
        raise CompilerError(f"A compiled network gives {got.shape} where torch gives {wanted.shape}.")
    a, b = got.astype(np.float64).ravel(), wanted.astype(np.float64).ravel()
    error = np.abs(a - b)
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b))), float(error.mean()), float(error.max())


def _line(p: Parity) -> str:
    return (
        f"{p.files:20} {p.stage:13} {p.output:18} "
        f"cos {p.cosine:.7f}  mean {p.mean:.1e}  max {p.largest:.1e}  {p.seconds:5.1f} s"
    )


def report(folder: Path, rows: list[Parity]):
    """Adds the rows to the folder's parity.json, in place of what it said of the same files."""
    path = folder / PARITY
    known = json.loads(path.read_text()) if path.exists() else []
    fresh = {row.files for row in rows}
    merged = [row for row in known if row["files"] not in fresh] + [asdict(row) for row in rows]
    path.write_text(json.dumps(sorted(merged, key=lambda row: list(SETS).index(row["files"])), indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=nets.WEIGHTS)
    parser.add_argument("--out", type=Path, default=MODELS)
    parser.add_argument("--work", type=Path, default=PACK / ".local" / "demo" / "build", help="where files are made")
    parser.add_argument("--only", choices=SETS, nargs="+", default=list(SETS))
    args = parser.parse_args()
    try:
        toolchain = Toolchain.install()
        onnx = export.export(args.work / "onnx", args.weights)
        stages = {stage.name: stage for stage in export.stages(args.weights)}
        for name in args.only:
            files = build(name, onnx, args.work / name, toolchain)
            rows = compare(name, files, stages)
            worst, least = min(rows, key=lambda row: row.cosine), TOLERANCE[SETS[name].precision]
            if not worst.cosine >= least:
                raise CompilerError(f"{name}: {worst.stage} differs from torch, cosine {worst.cosine:.6f} < {least}.")
            shutil.rmtree(args.out / name, ignore_errors=True)
            shutil.copytree(args.work / name, args.out / name)
            report(args.out, rows)
    except (CompilerError, EngineError, ModelFileError) as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
