"""What tests run in MindSpore's interpreter, where there is no torch: arrays in, arrays out, through .npz files."""
from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def kernels(arrays: dict[str, np.ndarray], cases: dict) -> dict[str, np.ndarray]:
    """Each case (kernel, arrays, keywords, keywords that are arrays) on "case/0", ... and "case/keyword" -> "case"."""
    from mindspore import Tensor, mint, set_device

    set_device("CPU")
    before = (mint.nn.functional.linear, mint.nn.Linear.construct, mint.arange)
    from engines.runtimes.mindspore import kernels as ours
    from engines.runtimes.mindspore import networks  # noqa: F401  (what an NPU imports must change nothing either)
    results = {"untouched": np.array(before == (mint.nn.functional.linear, mint.nn.Linear.construct, mint.arange))}
    for case, (name, count, keywords, others) in cases.items():
        wrap = (lambda array: array) if name == "attention" else Tensor
        result = getattr(ours, name)(*(wrap(arrays[f"{case}/{i}"]) for i in range(count)), **keywords,
                                     **{key: wrap(arrays[f"{case}/{key}"]) for key in others})
        results[case] = result if name == "attention" else result.asnumpy()
    return results


def parameters(arrays: dict[str, np.ndarray], models: dict) -> dict[str, np.ndarray]:
    """Load each model, label: (path, precision), and give every parameter as "label/part/name"."""
    from engines.runtimes.mindspore import Runtime, networks

    runtime, results = Runtime({"target": "cpu"}), {}
    for label, (path, precision) in models.items():
        found = runtime.models[runtime.load(path, precision)]
        parts = {part: found[part].weights for part in ("text_encoder", "text_encoder_2")}
        parts["unet"] = networks.named_parameters(found["unet"].net)
        parts["vae"] = networks.named_parameters(found["vae_decoder"].vae)
        for part, given in parts.items():
            results |= {f"{label}/{part}/{name}": parameter.asnumpy() for name, parameter in given.items()}
    return results


def loads(arrays: dict[str, np.ndarray], paths: list[str], precision: str) -> dict[str, np.ndarray]:
    """Load one model after the other; of the last load the process' memory "before", its "peak", "after" and "unloaded"."""
    from engines.runtimes.mindspore import Runtime

    runtime, results = Runtime({"target": "cpu"}), {}
    for path in paths:
        Path("/proc/self/clear_refs").write_text("5")       # the peak is counted from here
        results["before"] = memory("VmRSS")
        model = runtime.load(path, precision)
        results["peak"], results["after"] = memory("VmHWM"), memory("VmRSS")
        runtime.unload(model)
        results["unloaded"] = memory("VmRSS")
    return results


def memory(key: str) -> np.ndarray:
    return np.array(int(re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) << 10)


def modules(arrays: dict[str, np.ndarray], moved: bool = False) -> dict[str, np.ndarray]:
    """The names of the modules that mindone's networks bring; `moved`: as if one of them were elsewhere."""
    from engines.runtimes.mindspore import modules as ours

    if moved:
        ours.BARE += ("mindone.diffusers.no_such_package",)
    assert ours.mindone().UNet2DConditionModel.__name__ == "UNet2DConditionModel"
    return {"loaded": np.array(sorted(sys.modules))}


def starved(arrays: dict[str, np.ndarray], path: str) -> dict[str, np.ndarray]:
    """Encode a large picture where memory is short: what it "says", and whether a small one is encoded "then"."""
    import resource

    from engines.runtimes.mindspore import Buffer, Runtime
    runtime = Runtime({"target": "cpu"})
    model = runtime.load(path)

    def picture(size: int) -> Buffer:
        image = runtime.allocate("float32", (1, 3, size, size))
        runtime.write(image, np.zeros(image.shape, np.float32).tobytes())
        return image

    def encode(image: Buffer) -> np.ndarray:
        latent = runtime.allocate("float32", ())
        runtime.launch(model, "vae_encoder", [("image", image)], [("latent", latent)])
        return latent.array
    small, large = picture(64), picture(1024)
    encode(small)
    # the first layer's 32 channels of the large one are 128 MB; all that MindSpore's own threads need is there
    usual = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (int(memory("VmSize")) + (64 << 20), usual[1]))
    try:
        encode(large)
        says = ""
    except RuntimeError as error:
        says = str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, usual)       # MindSpore's way out of the process starts threads
    return {"says": np.array(says), "then": np.array(np.isfinite(encode(small)).all())}


if __name__ == "__main__":
    function, where, settings = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    with np.load(where / "in.npz") as file:
        given = dict(file)
    np.savez(where / "out.npz", **globals()[function](given, **settings))
