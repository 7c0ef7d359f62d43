"""SDXL on MindSpore: an Ascend NPU, or the CPU with the kernels of `kernels`.

Runs in the worker, with `engines.errors` and `engines.sdxl` beside it: Python 3.9, numpy below 2, mindspore, mindone.
A model is a checkpoint; its networks are text_encoder, text_encoder_2, unet, vae_decoder and vae_encoder, and its
program is "sample", a whole sampling run (engines.sdxl.loop). mindone is imported by the first load.
"""
from __future__ import annotations

import gc
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

INSTALL = "run 'python tools/install.py mindspore' in the pack's folder, or install it there"
TARGETS = {"cpu": "CPU", "ascend": "Ascend"}
PRECISIONS = ("float32", "float16", "bfloat16")


class Buffer:
    """An array of the host's, and, once a network needed it there, on the device."""

    def __init__(self, dtype: str, shape: tuple[int, ...]):
        self.dtype, self.shape = dtype, tuple(shape)
        self.array = None           # numpy, None until written
        self.kept = {}              # {dtype: tensor}

    def tensor(self, dtype):
        if dtype not in self.kept:
            from mindspore import Tensor
            self.kept[dtype] = Tensor.from_numpy(self.array).astype(dtype)
        return self.kept[dtype]

    def set(self, array) -> None:
        self.array, self.kept = array, {}


class Runtime:
    """options: "target" ("ascend" or "cpu"), "device_id" (of an NPU), "threads" (on the CPU; 0: all)."""

    def __init__(self, options: Mapping[str, object]):
        self.target = str(options.get("target", "cpu"))
        self.device_id = int(options.get("device_id", 0))
        self.models: dict[int, dict] = {}
        self.loaded = 0             # checkpoints so far: an unloaded model's number is never given again
        check_interpreter()
        threads = int(options.get("threads", 0))
        os.environ.setdefault("GLOG_v", "3")            # errors only: the log's last line explains a crash
        if threads:
            os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = str(threads)
        import mindspore
        self.mindspore = mindspore
        self._open(threads)

    def _open(self, threads: int) -> None:
        ms = self.mindspore
        if self.target not in TARGETS:
            raise RuntimeError(f"MindSpore's target is 'ascend' or 'cpu', not '{self.target}'.")
        with one_sentence(f"MindSpore cannot use device {self.device_id}"):
            if self.target == "ascend":
                if not ms.hal.is_available("Ascend"):
                    raise RuntimeError(f"MindSpore {ms.__version__} in {sys.executable} finds no Ascend NPU: install the "
                                       "driver and the CANN toolkit that belong to it, or choose the device 'cpu'.")
                ms.set_device("Ascend", self.device_id)
            else:
                ms.set_device("CPU")
                if threads:
                    ms.set_context(runtime_num_threads=threads)
                # The CPU runs each operator at once: errors name the one that failed, and it is many times faster.
                ms.runtime.launch_blocking()
                from . import kernels
                kernels.install()
            (ms.Tensor([1.0], ms.float32) + 1).asnumpy()        # a device that is not there fails here

    def describe(self) -> dict[str, object]:
        ms, chip = self.mindspore, "CPU"
        if self.target == "ascend":
            try:
                chip = str(ms.hal.get_device_name(self.device_id))
            except Exception:       # of whatever kind: it is only a name
                chip = "Ascend"
        device = "cpu" if self.target == "cpu" else f"ascend:{self.device_id}"
        return {"runtime": "MindSpore", "version": ms.__version__, "chip": chip, "device": device}

    # -- models ------------------------------------------------------------------------------------------------
    def load(self, path: str, precision: str = "float32") -> int:
        """A checkpoint's networks in this precision, the VAE in float32: at most one parameter exists twice meanwhile."""
        if precision not in PRECISIONS:
            raise RuntimeError(f"The precision is one of {', '.join(PRECISIONS)}, not '{precision}'.")
        if precision == "bfloat16" and self.target == "cpu":
            raise RuntimeError("MindSpore's CPU back end does not compute in bfloat16: choose precision float32, or float16 "
                               "for half the memory.")
        from ...sdxl.checkpoint import PARTS, open_checkpoint
        from . import networks
        with one_sentence("The checkpoint could not be loaded"):
            checkpoint = open_checkpoint(Path(path))
            checkpoint.require(*PARTS)
            if self.target == "cpu":
                from . import layers
                layers.install(networks.mindone())
            config, parameters = checkpoint.configs, checkpoint.parameters
            model = {part: networks.TextEncoder(config[part], parameters(part), precision, title)
                     for part, title in (("text_encoder", "first text encoder"), ("text_encoder_2", "second text encoder"))}
            computing = "float32" if self.target == "cpu" else precision
            model["unet"] = networks.UNet(config["unet"], parameters("unet"), precision, computing)
            model["vae_decoder"], model["vae_encoder"] = networks.vae_halves(config["vae"], parameters("vae"))
        self.loaded += 1
        self.models[self.loaded] = model
        return self.loaded

    def networks(self, model: int) -> list[str]:
        return list(self.models[model])

    def unload(self, model: int) -> None:
        del self.models[model]
        gc.collect()            # layers know their parents, so that counting references alone keeps them
        if self.target == "ascend":
            self.mindspore.runtime.empty_cache()        # a freed tensor stays in MindSpore's pool otherwise

    # -- arrays ------------------------------------------------------------------------------------------------
    def allocate(self, dtype: str, shape: tuple[int, ...]) -> Buffer:
        return Buffer(dtype, shape)

    def write(self, buffer: Buffer, data: bytes) -> None:
        import numpy as np
        buffer.set(np.frombuffer(data, buffer.dtype).reshape(buffer.shape))

    def read(self, buffer: Buffer) -> bytes:
        return buffer.array.tobytes()

    def free(self, buffer: Buffer) -> None:
        buffer.set(None)

    # -- work --------------------------------------------------------------------------------------------------
    def launch(self, model: int, network: str, inputs: list, outputs: list) -> None:
        with one_sentence(f"MindSpore failed in '{network}'"):
            if network not in self.models[model]:
                raise RuntimeError(f"There is no network '{network}'; there are {', '.join(self.models[model])}.")
            results = self.models[model][network](dict(inputs))
            for name, buffer in outputs:
                if name not in results:
                    raise RuntimeError(f"'{network}' has no output '{name}'; it has {', '.join(results)}.")
                array = results[name]
                buffer.set(array)
                buffer.shape, buffer.dtype = array.shape, array.dtype.name

    def perform(self, model: int, program: str, inputs: Mapping[str, Buffer], settings: Mapping[str, object],
                report: Callable[[dict], None]) -> list[tuple[str, tuple[int, ...], bytes]]:
        """The program "sample": the latent of a whole run, see engines.sdxl.loop.sample for inputs, settings, reports."""
        if program != "sample":
            raise RuntimeError(f"MindSpore's models have the program 'sample', not '{program}'.")
        from mindspore import Tensor

        from ...sdxl import loop
        unet = self.models[model]["unet"]
        kept = {}       # conditioning stays on the device from step to step

        def predict(latent, timestep, rows):
            if rows not in kept:
                unet.check(latent, timestep, rows.context, rows.y)
                kept[rows] = [Tensor.from_numpy(array).astype(unet.dtype) for array in (rows.context, rows.y)]
            with one_sentence("MindSpore failed in the U-Net"):
                return unet.predict(latent, timestep, *kept[rows])

        x = loop.sample(predict, {name: buffer.array for name, buffer in inputs.items()}, settings, report)
        return [(x.dtype.name, x.shape, x.tobytes())]

    def close(self) -> None:
        self.models.clear()


def check_interpreter() -> None:
    """Say what is missing or too new before MindSpore does so in its own words. Raises RuntimeError."""
    for package, name in (("mindspore", "MindSpore"), ("numpy", "numpy"), ("mindone", "mindone")):
        if importlib.util.find_spec(package) is None:
            raise RuntimeError(f"{name} is not installed in {sys.executable}: {INSTALL}.")
    numpy = importlib.metadata.version("numpy")
    if int(numpy.split(".")[0]) >= 2:
        raise RuntimeError(f"MindSpore needs numpy below 2 and {sys.executable} has {numpy}: "
                           f"run '{sys.executable} -m pip install \"numpy<2\"'.")


@contextmanager
def one_sentence(what: str) -> Iterator[None]:
    """MindSpore's exceptions are of many kinds, and pages long: the first line says it."""
    try:
        yield
    except RuntimeError as error:
        if "\n" not in str(error).strip():
            raise
        raise RuntimeError(sentence(what, error)) from error
    except Exception as error:
        raise RuntimeError(sentence(what, error)) from error


def sentence(what: str, error: Exception) -> str:
    text = str(error).strip()
    said = text.lower()
    if isinstance(error, MemoryError) or "memory" in said and any(word in said for word in ("alloc", "enough", "out of")):
        return f"{what}: not enough memory; use a smaller picture or batch, or load the model with precision float16."
    first = text.splitlines()[0].strip() if text else "no reason given"
    return f"{what}: {type(error).__name__}: {first}"
