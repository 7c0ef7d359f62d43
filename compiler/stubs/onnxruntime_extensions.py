"""Stands in for onnxruntime_extensions inside the compiler, which declares custom operators with it at import."""


class _Anything:
    def __getattr__(self, name):
        return self

    def __call__(self, **options):
        return lambda function: function


onnx_op = PyOp = PyOrtFunction = _Anything()
