"""Compares compiled networks with their reference: inputs to try, onnxruntime's answer, the simulator's answer."""

import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

from .errors import CompilerError
from .networks import Graph, Value
from .networks.graph import INT64
from .networks.text_encoder import END
from .networks.unet import TIMESTEPS
from .recipes import Parity
from .toolchain import Toolchain

SIMULATE = Path(__file__).resolve().parent / "inside" / "simulate.py"
START = 49406
WORDS = 9  # of the prompt that is tried
TIMESTEP = 601  # which bfloat16 cannot hold
DECODED = 5.5  # standard deviation of SD 1.x's unscaled latents
# As the simulator's loader wants them, and as the compiler's wheel calls them.
LIBRARIES = {
    "libbmlib.so.0": "libbmlib_bm1684x.so.0",
    "libbmrt.so.1.0": "libbmrt.so.1.0",
    "libcmodel.so": "libcmodel_{chip}.so",
}


def inputs(graph: Graph, known: dict[str, np.ndarray], seed: int = 0) -> dict[str, np.ndarray]:
    """Something to try a network with, as a real run has it.

    known: "context" (1,77,D) of a text encoder's reference, "latent" of a VAE encoder's, used where a network takes them.
    """
    rng = np.random.default_rng(seed)
    arrays = {value.name: _array(value, graph.name, rng) for value in graph.inputs}
    if "context" in arrays and "context" in known:
        batch, tokens, _ = arrays["context"].shape
        long = np.tile(known["context"], (1, tokens // known["context"].shape[1], 1))
        # rows that differ, or a mix-up of them would go unseen
        arrays["context"] = np.concatenate([np.roll(long, row, 1) for row in range(batch)])
    if graph.name.startswith("vae_decoder") and known.get("latent", np.empty(0)).shape == arrays["latent"].shape:
        arrays["latent"] = known["latent"]
    return arrays


def _array(value: Value, network: str, rng: np.random.Generator) -> np.ndarray:
    if value.name == "input_ids":
        ids = np.full(value.shape, END, np.int64)
        ids[:, 0] = START
        ids[:, 1 : 1 + WORDS] = rng.integers(256, START, (len(ids), WORDS))
        return ids
    if value.name == "timestep":
        return (TIMESTEP - 37 * np.arange(value.shape[0], dtype=np.int64)) % TIMESTEPS
    if value.name == "picture":  # patches of colour
        small = rng.uniform(-1, 1, (*value.shape[:2], *(side // 8 for side in value.shape[2:])))
        return small.repeat(8, 2).repeat(8, 3).astype(np.float32)
    assert value.dtype != INT64
    scale = DECODED if network.startswith("vae_decoder") else 0.1 if value.name.startswith("residual") else 1.0
    return (scale * rng.standard_normal(value.shape)).astype(np.float32)


def reference(onnx_file: Path, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the ONNX file computes, in float32: outputs by name, in its order. It may take fewer inputs than there are."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(onnx_file), options, providers=["CPUExecutionProvider"])
    feeds = {port.name: feeds[port.name] for port in session.get_inputs()}
    return dict(zip([output.name for output in session.get_outputs()], session.run(None, feeds)))


def simulate(
    bmodel: Path, chip: str, feeds: dict[str, np.ndarray], toolchain: Toolchain, log: Path, patience: float | None = None
) -> tuple[list[np.ndarray], float]:
    """What a bmodel computes in the simulator, outputs in the file's order, and the seconds it took, start included.

    Raises TimeoutError after `patience` seconds.
    """
    package = next(toolchain.folder.glob("venv/lib/python3.10/site-packages/tpu_mlir/lib"))
    with tempfile.TemporaryDirectory(prefix="simulate-", dir=bmodel.parent) as folder:
        for name, source in LIBRARIES.items():
            Path(folder, name).symlink_to(package / source.format(chip=chip))
        ins, outs = Path(folder, "in.npz"), Path(folder, "out.npz")
        np.savez(ins, **feeds)
        began = time.monotonic()
        toolchain.python_script(SIMULATE, folder, bmodel, ins, outs, log=log, cwd=folder, seconds=patience)
        seconds = time.monotonic() - began
        with np.load(outs) as found:
            return [found[f"output_{number}"] for number in range(len(found.files))], seconds


def compare(got: list[np.ndarray], wanted: dict[str, np.ndarray]) -> dict[str, Parity]:
    """Outputs of a bmodel are in the ONNX file's order, whatever the compiler calls them."""
    if [array.shape for array in got] != [array.shape for array in wanted.values()]:
        shapes = ", ".join("x".join(map(str, array.shape)) for array in got)
        raise CompilerError(f"The compiled network gives {shapes}, which is not what its reference gives.")
    return {name: Parity.of(array, reference) for array, (name, reference) in zip(got, wanted.items())}


def up_to(onnx_file: Path, value: Value) -> Path:
    """The part of a network that computes `value`, its only output, as a file beside it."""
    model = onnx.load(onnx_file, load_external_data=False)
    graph, needed, kept = model.graph, {value.name}, []
    for node in reversed(graph.node):
        if needed & set(node.output):
            kept.insert(0, node)
            needed |= set(node.input)
    for field, items in {
        "node": kept,
        "initializer": [tensor for tensor in graph.initializer if tensor.name in needed],
        "input": [item for item in graph.input if item.name in needed],
        "output": [onnx.helper.make_tensor_value_info(value.name, value.dtype, value.shape)],
        "value_info": [item for item in graph.value_info if item.name in needed and item.name != value.name],
    }.items():
        items = [type(item).FromString(item.SerializeToString()) for item in items]
        graph.ClearField(field)
        getattr(graph, field).extend(items)
    path = onnx_file.with_name(f"{onnx_file.stem}_part.onnx")
    onnx.save(model, path)
    return path
