"""A runtime of one file, for the tests of `perform`: its programs do what their names say."""
import os
import time


class Buffer:
    def __init__(self, dtype, shape):
        self.dtype, self.shape, self.data = dtype, shape, b""


class Runtime:
    def __init__(self, options):
        self.models = {}

    def describe(self):
        return {"runtime": "plain", "version": "1", "chip": "", "device": "cpu"}

    def load(self, path, precision="float32"):
        self.models[len(self.models) + 1] = os.path.basename(path) + " " + precision
        return len(self.models)

    def networks(self, model):
        return []

    def unload(self, model):
        self.models[model] = "unloaded"

    def allocate(self, dtype, shape):
        return Buffer(dtype, shape)

    def write(self, buffer, data):
        buffer.data = data

    def read(self, buffer):
        return buffer.data

    def free(self, buffer):
        buffer.data = None

    def perform(self, model, program, buffers, settings, report):
        return getattr(self, program)(model, buffers, report, **settings)

    def close(self):
        pass

    # -- programs ----------------------------------------------------------------------------------------------
    def say(self, model, buffers, report):
        """What the model is."""
        data = self.models[model].encode()
        return [("uint8", (len(data),), data)]

    def join(self, model, buffers, report):
        """All inputs, one after the other in the order of their names."""
        data = b"".join(buffers[name].data for name in sorted(buffers))
        return [("uint8", (len(data),), data)]

    def count(self, model, buffers, report, steps, seconds=0.0):
        for step in range(1, steps + 1):
            time.sleep(seconds)
            report({"step": step, "steps": steps, "preview": ("uint8", (2,), b"ab"), "rest": [1.5, None, True]})
        return self.say(model, buffers, report)

    def sleep(self, model, buffers, report, seconds):
        """Looks neither left nor right."""
        time.sleep(seconds)
        return self.say(model, buffers, report)

    def crash(self, model, buffers, report):
        report({"step": 1})
        os.write(2, b"out of luck\n")
        os._exit(3)

    def fail(self, model, buffers, report, what):
        raise {"sentence": RuntimeError("the prediction of step 3\nis not finite"), "bug": KeyError("step")}[what]

    def babble(self, model, buffers, report):
        """Reports what cannot be sent."""
        report({"step": object()})
