"""Runs the network of a bmodel once in Sophgo's simulator. Its own process: the simulator serves one chip in each.

    python simulate.py LIBRARIES FILE.bmodel INPUTS.npz OUTPUTS.npz

INPUTS has an array an input, by name; OUTPUTS gets output_0, output_1, ... as float32, in the file's order.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from engines.bmodel import read_bmodel  # noqa: E402
from engines.engine import from_wire, to_wire  # noqa: E402
from engines.runtimes.bmrt import Runtime  # noqa: E402


def main(libraries: str, bmodel: str, inputs: str, outputs: str):
    (network,) = read_bmodel(bmodel).networks
    arrays = np.load(inputs)
    runtime, buffers = Runtime({"libraries": libraries, "simulated": True}), []

    def allocate(port):
        buffers.append(runtime.allocate(port.dtype, port.shapes[0]))
        return port.name, buffers[-1]

    try:
        model = runtime.load(bmodel)
        feeds, results = [list(map(allocate, ports)) for ports in (network.inputs, network.outputs)]
        for name, buffer in feeds:
            runtime.write(buffer, to_wire(arrays[name], buffer.dtype))
        runtime.launch(model, network.name, feeds, results)
        answers = [from_wire(buffer.dtype, buffer.shape, runtime.read(buffer)) for _, buffer in results]
    finally:
        for buffer in buffers:  # the simulator ends with an assertion over what is left
            runtime.free(buffer)
        runtime.close()
    np.savez(outputs, **{f"output_{number}": answer for number, answer in enumerate(answers)})


main(*sys.argv[1:])
