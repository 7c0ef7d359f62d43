"""ONNX files through onnxruntime on the CPU: the reference that every compiled engine is compared with.

Runs in the worker (Python 3.8, see the package docstring).
"""
import sys

import numpy as np


class Buffer(object):
    def __init__(self, dtype, shape):
        self.dtype, self.shape, self.array = dtype, tuple(shape), None


class Runtime(object):
    def __init__(self, options):
        try:
            import onnxruntime
        except ImportError:
            raise RuntimeError("onnxruntime is not installed in %s: run '%s -m pip install onnxruntime' to use .onnx "
                               "files" % (sys.executable, sys.executable))
        self.ort = onnxruntime
        self.options = onnxruntime.SessionOptions()
        self.options.log_severity_level = 3
        self.options.intra_op_num_threads = int(options.get("threads", 0))
        self.models = {}
        self.loaded = 0          # files so far: an unloaded model's number is never given again

    def describe(self):
        return {"runtime": "onnxruntime", "version": self.ort.__version__, "chip": "", "device": "cpu"}

    def load(self, path):
        try:
            session = self.ort.InferenceSession(path, self.options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions share no base class
            raise RuntimeError("onnxruntime could not load the file: %s" % error)
        self.loaded += 1
        self.models[self.loaded] = session
        return self.loaded

    def networks(self, model):
        return ["main"]

    def allocate(self, dtype, shape):
        return Buffer(dtype, shape)

    def write(self, buffer, data):
        buffer.array = np.frombuffer(data, buffer.dtype).reshape(buffer.shape)

    def read(self, buffer):
        return buffer.array.tobytes()

    def free(self, buffer):
        buffer.array = None

    def launch(self, model, network, inputs, outputs):
        try:
            results = self.models[model].run([name for name, _ in outputs],
                                             {name: buffer.array for name, buffer in inputs})
        except Exception as error:
            raise RuntimeError("onnxruntime: %s" % error)
        for (_, buffer), array in zip(outputs, results):
            # The shape may only be known now: an ONNX file can leave sizes free.
            buffer.array, buffer.shape, buffer.dtype = array, array.shape, str(array.dtype)

    def unload(self, model):
        del self.models[model]

    def close(self):
        self.models.clear()
