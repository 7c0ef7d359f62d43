"""An ONNX file to the compiler's own form, with weights that stay on disk. Runs in the compiler's Python.

    python to_mlir.py FILE.onnx          writes NAME.mlir and its weights into the current folder

The compiler's own model_transform.py reads an ONNX file into memory, and then copies it for each of its simplifications:
a U-Net of 3.4 GB takes ten times that. The graphs made here (compiler/networks) need no simplification, so the
compiler's converter is given the nodes alone, and the weights as files mapped into memory.
"""

import os
import sys
from pathlib import Path

import tpu_mlir  # sets the environment of what it starts, which is where this must run

if "--started" not in sys.argv:
    os.execv(sys.executable, [sys.executable, *sys.argv, "--started"])

import numpy as np  # noqa: E402
import onnx  # noqa: E402
from onnx import numpy_helper  # noqa: E402
from onnx.external_data_helper import ExternalDataInfo, uses_external_data  # noqa: E402
from tpu_mlir.python.utils.mlir_shell import mlir_opt_for_top  # noqa: E402
from transform.OnnxConverter import OnnxConverter  # noqa: E402
from transform.OnnxOpt import ReForm, onnx_opt  # noqa: E402


class Converter(OnnxConverter):
    """Overrides the reading and simplifying; `onnx_opt` stays, which recognises GELU."""

    def load_onnx_model(self, onnx_file, input_shapes, output_names, static_shape=True, dump_final_opt=False):
        self.onnx_file, self.model = onnx_file, onnx.load(onnx_file, load_external_data=False)
        self.input_names = self.get_input_names(self.model)
        self.num_input = len(self.input_names)
        self.input_shape_assign(input_shapes)
        self.input_shapes = self.get_input_shapes(self.model)
        self.input_types, self.output_types = self.get_input_types(self.model), self.get_output_types(self.model)
        for tensor in self.model.graph.initializer:
            self.addWeight(tensor.name, numbers(tensor, Path(onnx_file).parent))
        self.get_output_name(self.model.graph)
        ReForm.get_tensor_value = lambda _, name: self.tensors.get(name)  # its own would look for the file elsewhere
        self.model, self.node_name_mapping = onnx_opt(self.model, False)


def numbers(tensor: onnx.TensorProto, folder: Path) -> np.ndarray:
    """A weight as float32: mapped where it lies in a file of its own."""
    if not uses_external_data(tensor):
        return numpy_helper.to_array(tensor).astype(np.float32)
    place = ExternalDataInfo(tensor)
    return np.memmap(folder / place.location, "<f4", "r", place.offset, tuple(tensor.dims))


def main():
    path = Path(sys.argv[1]).resolve()
    converter = Converter(path.stem, str(path), [], [], "", {})
    converter.generate_mlir(f"{path.stem}_origin.mlir")
    del converter
    mlir_opt_for_top(f"{path.stem}_origin.mlir", f"{path.stem}.mlir")
    for made in Path.cwd().glob(f"{path.stem}*_origin*"):  # the weights a second time
        made.unlink()


assert tpu_mlir  # imported for what it does
main()
