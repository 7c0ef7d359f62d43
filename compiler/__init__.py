"""ONNX files to bmodels with Sophgo's TPU-MLIR, which lives in a Python 3.10 of its own.

`toolchain` finds that Python and installs the compiler; `convert` drives it. Neither imports ComfyUI or torch, and
nothing of the compiler enters this interpreter.
"""

from .convert import CHIPS, combine, convert
from .errors import CompilerError
from .toolchain import Toolchain, find_python

__all__ = ["CHIPS", "CompilerError", "Toolchain", "combine", "convert", "find_python"]
