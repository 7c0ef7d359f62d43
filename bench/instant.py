"""A worker runtime that answers at once, so that what remains is the pack's own cost. Runs in a worker."""


class Buffer(object):
    def __init__(self, dtype, shape):
        self.dtype, self.shape = dtype, tuple(shape)
        size = {"float32": 4, "float16": 2, "bfloat16": 2, "int32": 4}[dtype]
        for side in shape:
            size *= side
        self.data = bytes(size)


class Runtime(object):
    def __init__(self, options):
        pass

    def describe(self):
        return {"runtime": "instant", "version": "0", "chip": "BM1684X", "device": "none"}

    def load(self, path):
        return 1

    def networks(self, model):
        return []

    def allocate(self, dtype, shape):
        return Buffer(dtype, shape)

    def write(self, buffer, data):
        buffer.data = data

    def read(self, buffer):
        return buffer.data

    def free(self, buffer):
        pass

    def launch(self, model, network, inputs, outputs):
        pass

    def unload(self, model):
        pass

    def close(self):
        pass
