"""What runs inside a worker process: `serve` is the loop, the others each drive one vendor library.

These files are shipped to the worker as source text and run in whatever interpreter it has, a Sophgo box's system
Python 3.8 included: numpy, the vendor library and the standard library only, and no import from this project.

A runtime file defines one class, `Runtime`, with the same few calls, so that residency, counters and error
handling live once, in `serve`:

    Runtime(options)                                   opens the device; options come from engines.devices
    describe() -> {"runtime", "version", "chip", "device"}
    load(path) -> model        networks(model) -> [name]        unload(model)
    allocate(dtype, shape) -> buffer    write(buffer, data)    read(buffer) -> bytes    free(buffer)
    launch(model, network, [(name, buffer)], [(name, buffer)])
    close()                                            safe to call twice

Buffers are device memory with `.dtype` (numpy's names and "bfloat16") and `.shape`; data crosses as raw bytes.
Everything that goes wrong is a RuntimeError of one sentence.
"""
