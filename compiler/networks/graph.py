"""An ONNX graph under construction: every value knows its shape, and weights go to a file beside the graph."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from onnx import ModelProto, TensorProto, checker, helper, numpy_helper, save

from ..checkpoint import Part
from ..errors import CompilerError

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
OPSET, IR = 17, 8  # what the compiler's own onnx and onnxruntime read
INLINE_BYTES = 1024  # weights up to this size stay in the graph
PAGE = 4096  # larger ones begin on a page, so that they can be mapped
PRODUCER = "sophgo-ascend-nodes"


@dataclass(frozen=True)
class Value:
    """What a node gives: float32 unless said otherwise."""

    name: str
    shape: tuple[int, ...]
    dtype: int = FLOAT


class Weights:
    """A file of weights, float32, one after the other. Graphs of several sizes share it: the same name, the same place.

    `close` it before anything reads it. Without a path nothing is written.
    """

    def __init__(self, path: Path | None):
        self.path = Path(path or "none")
        self.places: dict[str, tuple[int, int]] = {}
        self.file = self.path.open("wb") if path else None

    def put(self, name: str, array: np.ndarray) -> tuple[int, int]:
        """(offset, bytes) of the array in the file, which takes it only the first time."""
        if self.file is None:
            return 0, array.nbytes
        if name not in self.places:
            self.file.seek(-(-self.file.tell() // PAGE) * PAGE)
            self.places[name] = self.file.tell(), array.nbytes
            np.ascontiguousarray(array, "<f4").tofile(self.file)
        return self.places[name]

    def close(self):
        if self.file is not None:
            self.file.close()

    def __enter__(self) -> "Weights":
        return self

    def __exit__(self, *error):
        self.close()


class Graph:
    """Layers by name, as the checkpoint has them: `graph.conv(x, "input_blocks.0.0")`.

    `macs` counts multiplications, `parameters` numbers in weights. `blocks` are (name, value) where one block ends and
    the next begins, in order, to look for the first that goes wrong.
    """

    def __init__(self, name: str, part: Part, weights: Weights):
        self.name, self.part, self.weights = name, part, weights
        self.nodes, self.initializers, self.inputs, self.outputs = [], {}, [], []
        self.infos: dict[str, Value] = {}
        self.blocks: list[tuple[str, Value]] = []
        self.macs = self.parameters = 0
        self._scope: list[str] = []
        self._taken: set[str] = set()

    # -- plumbing ----------------------------------------------------------------------------------------------
    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Names within begin with `name`, so that a node tells where it belongs."""
        self._scope.append(name)
        yield
        self._scope.pop()

    def mark(self, name: str, value: Value) -> Value:
        self.blocks.append((name, value))
        return value

    def input(self, name: str, shape: Sequence[int], dtype: int = FLOAT) -> Value:
        value = Value(name, tuple(shape), dtype)
        self.inputs.append(value)
        return value

    def output(self, name: str, value: Value) -> Value:
        """Gives the last node's result a name of its own."""
        self.nodes[-1].output[0] = name
        self.infos.pop(value.name)
        named = Value(name, value.shape, value.dtype)
        self.outputs.append(named)
        return named

    def op(self, kind: str, inputs: Sequence[Value | str], shape: Sequence[int], dtype: int = FLOAT, **attributes) -> Value:
        name = self._unique("/".join([*self._scope, kind]))
        names = [value if isinstance(value, str) else value.name for value in inputs]
        self.nodes.append(helper.make_node(kind, names, [name], name, **attributes))
        self.infos[name] = value = Value(name, tuple(int(side) for side in shape), dtype)
        return value

    def _unique(self, name: str) -> str:
        number, candidate = 1, name
        while candidate in self._taken:
            number += 1
            candidate = f"{name}_{number}"
        self._taken.add(candidate)
        return candidate

    def constant(self, name: str, array: np.ndarray) -> Value:
        """Numbers that are the graph's own, with a name that tells which."""
        if name not in self.initializers:
            self.initializers[name] = self._tensor(name, np.asarray(array))
        dtype = INT64 if np.asarray(array).dtype == np.int64 else FLOAT
        return Value(name, np.asarray(array).shape, dtype)

    def weight(self, name: str, change=None, kind: str = "") -> Value:
        """A tensor of the checkpoint; `change` makes what the graph takes of it, `kind` names what it then is."""
        own = name + kind
        if own not in self.initializers:
            array = self.part.read(name)
            self.initializers[own] = self._tensor(own, array if change is None else change(array))
            self.parameters += math.prod(self.initializers[own].dims)
        return Value(own, tuple(self.initializers[own].dims))

    def _tensor(self, name: str, array: np.ndarray) -> TensorProto:
        if array.nbytes <= INLINE_BYTES or array.dtype != np.float32:
            return numpy_helper.from_array(array, name)
        offset, size = self.weights.put(name, array)
        tensor = TensorProto(name=name, data_type=FLOAT, dims=array.shape, data_location=TensorProto.EXTERNAL)
        for key, value in {"location": self.weights.path.name, "offset": offset, "length": size}.items():
            tensor.external_data.add(key=key, value=str(value))
        return tensor

    # -- arithmetic --------------------------------------------------------------------------------------------
    def add(self, a: Value, b: Value) -> Value:
        return self.op("Add", [a, b], np.broadcast_shapes(a.shape, b.shape))

    def multiply(self, a: Value, b: Value) -> Value:
        return self.op("Mul", [a, b], np.broadcast_shapes(a.shape, b.shape))

    def scale(self, x: Value, factor: float) -> Value:
        return self.multiply(x, self.constant(f"number.{factor:g}", np.array(factor, np.float32)))

    def reshape(self, x: Value, shape: Sequence[int]) -> Value:
        sizes = np.array(shape, np.int64)
        return self.op("Reshape", [x, self.constant("shape." + "x".join(map(str, shape)), sizes)], shape, x.dtype)

    def transpose(self, x: Value, order: Sequence[int]) -> Value:
        return self.op("Transpose", [x], [x.shape[axis] for axis in order], x.dtype, perm=list(order))

    def matmul(self, a: Value, b: Value) -> Value:
        shape = (*np.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1])
        self.macs += math.prod(shape) * a.shape[-1]
        return self.op("MatMul", [a, b], shape)

    def concat(self, values: Sequence[Value], axis: int) -> Value:
        shape = list(values[0].shape)
        shape[axis] = sum(value.shape[axis] for value in values)
        return self.op("Concat", values, shape, axis=axis)

    def cut(self, x: Value, axis: int, start: int, stop: int) -> Value:
        names = [self.constant(f"index.{number}", np.array([number], np.int64)) for number in (start, stop, axis)]
        shape = [stop - start if i == axis else side for i, side in enumerate(x.shape)]
        return self.op("Slice", [x, *names], shape)

    def lookup(self, table: Value, ids: Value) -> Value:
        """Rows of the table: in bfloat16 an id is no exact number, so whatever depends on one is looked up."""
        return self.op("Gather", [table, ids], (*ids.shape, *table.shape[1:]), axis=0)

    # -- layers ------------------------------------------------------------------------------------------------
    def conv(self, x: Value, name: str, stride: int = 1, pads: Sequence[int] | None = None) -> Value:
        """pads: top, left, bottom, right; by default those that keep the size at stride 1."""
        weight, bias = self.weight(f"{name}.weight"), self.weight(f"{name}.bias")
        out, taken, *kernel = weight.shape
        self._fits(name, taken, x.shape[1])
        pads = [side // 2 for side in kernel] * 2 if pads is None else list(pads)
        sides = [(x.shape[2 + i] + pads[i] + pads[2 + i] - kernel[i]) // stride + 1 for i in range(2)]
        self.macs += x.shape[0] * math.prod(weight.shape) * math.prod(sides)
        attributes = {"kernel_shape": kernel, "strides": [stride] * 2, "pads": pads, "dilations": [1, 1], "group": 1}
        return self.op("Conv", [x, weight, bias], (x.shape[0], out, *sides), **attributes)

    def linear(self, x: Value, name: str, rows: slice = slice(None)) -> Value:
        """rows: of the layer's outputs, where it computes several things at once."""
        kind = "" if rows == slice(None) else f".{rows.start}:{rows.stop}"
        turned = lambda w: w.reshape(w.shape[:2])[rows].T  # a 1x1 convolution's weights have two sides more
        weight = self.weight(f"{name}.weight", turned, f".turned{kind}")
        self._fits(name, weight.shape[0], x.shape[-1])
        product = self.matmul(x, weight)
        if f"{name}.bias" not in self.part:
            return product
        return self.add(product, self.weight(f"{name}.bias", lambda b: b[rows], kind))

    def group_norm(self, x: Value, name: str, groups: int, eps: float) -> Value:
        """As torch exports it, which the compiler recognises: the norm of `groups` instances, then scale and shift."""
        batch, channels, *sides = x.shape
        if channels % groups:
            raise CompilerError(
                f"'{self.part.checkpoint.path.name}' cannot be SD 1.x: its '{name}' has {channels} channels, which "
                f"{groups} groups do not divide."
            )
        parted = self.reshape(x, (batch, groups, math.prod(x.shape[1:]) // groups))
        ones, zeros = (self.constant(f"{n}.{groups}", np.full(groups, n, np.float32)) for n in (1, 0))
        normal = self.op("InstanceNormalization", [parted, ones, zeros], parted.shape, epsilon=eps)
        column = lambda w: w.reshape(-1, *[1] * len(sides))
        scaled = self.multiply(self.reshape(normal, x.shape), self.weight(f"{name}.weight", column))
        return self.add(scaled, self.weight(f"{name}.bias", column))

    def layer_norm(self, x: Value, name: str) -> Value:
        weight, bias = self.weight(f"{name}.weight"), self.weight(f"{name}.bias")
        self._fits(name, weight.shape[0], x.shape[-1])
        return self.op("LayerNormalization", [x, weight, bias], x.shape, axis=-1, epsilon=1e-5)

    def silu(self, x: Value, slope: float = 1.0) -> Value:
        """x * sigmoid(slope * x)."""
        steep = x if slope == 1 else self.scale(x, slope)
        return self.multiply(x, self.op("Sigmoid", [steep], x.shape))

    def gelu(self, x: Value) -> Value:
        """x/2 * (1 + erf(x/sqrt 2)), in the steps that the compiler recognises."""
        root = self.constant("root.2", np.array(math.sqrt(2), np.float32))
        bent = self.op("Erf", [self.op("Div", [x, root], x.shape)], x.shape)
        return self.scale(self.multiply(x, self.add(bent, self.constant("number.1", np.array(1, np.float32)))), 0.5)

    def softmax(self, x: Value) -> Value:
        return self.op("Softmax", [x], x.shape, axis=-1)

    def attention(self, q: Value, k: Value, v: Value, heads: int, mask: Value | None = None) -> Value:
        """q (B,N,C), k and v (B,M,C) -> (B,N,C) by matrix products.

        In 16 bits the compiler would make one operator of a product that is scaled and then masked. It builds that one's
        kernel with the system's cmake and gcc, which may not be there, and in bfloat16 it gave NaN.
        """
        (batch, length, width), others = q.shape, k.shape[1]
        self._fits("heads", 0, width % heads)
        depth = width // heads
        q = self.transpose(self.reshape(q, (batch, length, heads, depth)), (0, 2, 1, 3))
        k = self.transpose(self.reshape(k, (batch, others, heads, depth)), (0, 2, 3, 1))
        v = self.transpose(self.reshape(v, (batch, others, heads, depth)), (0, 2, 1, 3))
        if mask is None:
            scores = self.scale(self.matmul(q, k), depth**-0.5)
        else:
            scores = self.add(self.matmul(self.scale(q, depth**-0.5), k), mask)
        mixed = self.matmul(self.softmax(scores), v)
        return self.reshape(self.transpose(mixed, (0, 2, 1, 3)), (batch, length, width))

    def twice(self, x: Value) -> Value:
        """Twice the height and width, each number four times."""
        batch, channels, height, width = x.shape
        scales = self.constant("twice", np.array([1, 1, 2, 2], np.float32))
        attributes = {"coordinate_transformation_mode": "asymmetric", "mode": "nearest", "nearest_mode": "floor"}
        return self.op("Resize", [x, "", scales], (batch, channels, 2 * height, 2 * width), **attributes)

    def _fits(self, name: str, taken: int, given: int):
        if taken != given:
            raise CompilerError(
                f"'{self.part.checkpoint.path.name}' cannot be SD 1.x: its '{name}' takes {taken} channels where "
                f"{given} come in."
            )

    # -- the end -----------------------------------------------------------------------------------------------
    def model(self) -> ModelProto:
        info = lambda value: helper.make_tensor_value_info(value.name, value.dtype, value.shape)
        sides = [[info(value) for value in values] for values in (self.inputs, self.outputs, self.infos.values())]
        graph = helper.make_graph(self.nodes, self.name, *sides[:2], list(self.initializers.values()), value_info=sides[2])
        opset = [helper.make_opsetid("", OPSET)]
        return helper.make_model(graph, opset_imports=opset, ir_version=IR, producer_name=PRODUCER)

    def save(self, folder: Path) -> Path:
        """<name>.onnx in `folder`, where the weights are too, after the checks."""
        model, path = self.model(), Path(folder) / f"{self.name}.onnx"
        check(model)
        save(model, path)
        self.weights.file.flush()
        checker.check_model(str(path))
        return path


def check(model: ModelProto):
    """Raises CompilerError if a graph has what accelerators' compilers stumble on (see the package)."""
    graph = model.graph
    kinds = {node.op_type for node in graph.node}
    if wrong := kinds & {"Einsum", "Expand", "Tile", "Shape", "If", "Loop", "Scan", "SequenceConstruct", "Sin", "Cos"}:
        raise CompilerError(f"The graph of {graph.name} has {', '.join(sorted(wrong))}, which it must not have.")
    for value in (*graph.input, *graph.output):
        sides = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        if not value.type.HasField("tensor_type") or not all(sides):
            raise CompilerError(f"The graph of {graph.name} has '{value.name}', which is no tensor of a fixed size.")
        if value.name in ("timestep", "input_ids") and value.type.tensor_type.elem_type != INT64:
            raise CompilerError(f"The graph of {graph.name} takes '{value.name}' as floats, which lose whole numbers.")
