"""Checkpoints and ONNX files to bmodels with Sophgo's TPU-MLIR, which lives in a Python 3.10 of its own.

`toolchain` finds that Python and installs the compiler; `convert` drives its tools on an ONNX file. From a checkpoint:
`client` starts a `job` in that Python, which makes ONNX graphs (`checkpoint`, `networks`), compiles them by `recipes`
and compares each with its reference in the simulator (`verify`). Nothing here imports ComfyUI or torch, and nothing of
the compiler enters this interpreter.
"""
