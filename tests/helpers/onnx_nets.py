"""Tiny ONNX networks with the interfaces of Stable Diffusion's stages, whose results can be computed by hand.

Every row of a result depends on that row's inputs alone, so a padded batch that leaks, a swapped pair or a wrong
timestep changes numbers that a test knows.
"""
from __future__ import annotations

from pathlib import Path

import numpy as np
from onnx import TensorProto, checker, helper, numpy_helper, save

FLOAT, INT32, INT64 = TensorProto.FLOAT, TensorProto.INT32, TensorProto.INT64


def _save(path: Path, nodes: list, inputs: list, outputs: list, constants: dict) -> Path:
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, path.stem, inputs, outputs, tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    checker.check_model(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    save(model, path)
    return path


def _value(name: str, shape: tuple, dtype: int = FLOAT):
    return helper.make_tensor_value_info(name, dtype, shape)


def unet(path: Path, size=(8, 8), batch=2, width=64, tokens=77, channels=4, timestep_shape=None, timestep=INT64,
         nan_at: float | None = None) -> Path:
    """prediction = latent[:, :4] / 2 + timestep / 1000 + mean of the row's context; NaN at timestep `nan_at`."""
    times = (batch,) if timestep_shape is None else timestep_shape
    nodes = [
        helper.make_node("Slice", ["latent", "zero", "four", "one"], ["first"]),
        helper.make_node("Mul", ["first", "half"], ["halved"]),
        helper.make_node("Cast", ["t"], ["float_t"], to=FLOAT),
        helper.make_node("Reshape", ["float_t", "column"], ["t4"]),
        helper.make_node("Mul", ["t4", "thousandth"], ["shift"]),
        helper.make_node("ReduceMean", ["context"], ["mean"], axes=[1, 2], keepdims=0),
        helper.make_node("Reshape", ["mean", "column"], ["mean4"]),
        helper.make_node("Add", ["halved", "shift"], ["sum"]),
        helper.make_node("Add", ["sum", "mean4"], ["clean"]),
    ]
    constants = {"zero": np.array([0]), "four": np.array([4]), "one": np.array([1]), "half": np.float32(0.5),
                 "thousandth": np.float32(1e-3), "column": np.array([-1, 1, 1, 1])}
    if nan_at is None:
        nodes.append(helper.make_node("Identity", ["clean"], ["prediction"]))
    else:
        nodes += [helper.make_node("Equal", ["t4", "bad_t"], ["is_bad"]),
                  helper.make_node("Where", ["is_bad", "nan", "clean"], ["prediction"])]
        constants |= {"bad_t": np.float32(nan_at), "nan": np.float32("nan")}
    return _save(path, nodes,
                 [_value("latent", (batch, channels, *size)), _value("t", times, timestep),
                  _value("context", (batch, tokens, width))],
                 [_value("prediction", (batch, 4, *size))], constants)


def unet_result(latent: np.ndarray, timestep: np.ndarray, context: np.ndarray) -> np.ndarray:
    """What `unet` computes, for any batch."""
    shift = timestep.astype(np.float32) / 1000 + context.mean((1, 2))
    return latent[:, :4] / 2 + shift.reshape(-1, 1, 1, 1)


def text_encoder(path: Path, width=64, batch=1, pooled=True, integers=INT64) -> Path:
    """hidden[b, k] = (token id + position) / 50000 in every channel; pooled = its last row."""
    position = np.arange(77, dtype=np.float32).reshape(1, 77, 1)
    nodes = [
        helper.make_node("Cast", ["input_ids"], ["ids"], to=FLOAT),
        helper.make_node("Unsqueeze", ["ids", "last"], ["ids3"]),
        helper.make_node("Add", ["ids3", "position"], ["placed"]),
        helper.make_node("Mul", ["placed", "ones"], ["hidden"]),
    ]
    constants = {"last": np.array([2]), "position": position, "ones": np.full((1, 1, width), 1 / 50000, np.float32)}
    outputs = [_value("hidden", (batch, 77, width))]
    if pooled:
        nodes.append(helper.make_node("Gather", ["hidden", "end"], ["pooled"], axis=1))
        constants["end"] = np.array(76)
        outputs.append(_value("pooled", (batch, width)))
    return _save(path, nodes, [_value("input_ids", (batch, 77), integers)], outputs, constants)


def vae_decoder(path: Path, size=(8, 8), batch=1) -> Path:
    """image = the first three latent channels, each element drawn as 8x8 pixels."""
    nodes = [
        helper.make_node("Slice", ["latent", "zero", "three", "one"], ["rgb"]),
        helper.make_node("Resize", ["rgb", "", "scales"], ["image"], mode="nearest",
                         coordinate_transformation_mode="asymmetric", nearest_mode="floor"),
    ]
    constants = {"zero": np.array([0]), "three": np.array([3]), "one": np.array([1]),
                 "scales": np.array([1, 1, 8, 8], np.float32)}
    return _save(path, nodes, [_value("latent", (batch, 4, *size))],
                 [_value("image", (batch, 3, size[0] * 8, size[1] * 8))], constants)


def vae_encoder(path: Path, size=(64, 64), batch=1) -> Path:
    """mean = the 8x8 averages of R, G, B and R again; log variance = -30."""
    nodes = [
        helper.make_node("AveragePool", ["image"], ["rgb"], kernel_shape=[8, 8], strides=[8, 8]),
        helper.make_node("Slice", ["rgb", "zero", "one", "one"], ["red"]),
        helper.make_node("Concat", ["rgb", "red"], ["mean"], axis=1),
        helper.make_node("Mul", ["mean", "nothing"], ["zeros"]),
        helper.make_node("Sub", ["zeros", "thirty"], ["variance"]),
        helper.make_node("Concat", ["mean", "variance"], ["moments"], axis=1),
    ]
    constants = {"zero": np.array([0]), "one": np.array([1]), "nothing": np.float32(0), "thirty": np.float32(30)}
    return _save(path, nodes, [_value("image", (batch, 3, *size))],
                 [_value("moments", (batch, 8, size[0] // 8, size[1] // 8))], constants)


def checkpoint(folder: Path, sizes=((8, 8),), **unet_options) -> Path:
    """A folder with all four stages; one U-Net a size."""
    text_encoder(folder / "text_encoder.onnx")
    for height, width in sizes:
        unet(folder / f"unet_{height}x{width}.onnx", (height, width), **unet_options)
    vae_decoder(folder / "vae_decoder.onnx")
    vae_encoder(folder / "vae_encoder.onnx")
    return folder
