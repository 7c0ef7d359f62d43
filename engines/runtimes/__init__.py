"""What runs inside a worker process: `serve` is the loop, the others each drive one vendor library.

These files are sent to the worker as source text and run in whatever interpreter it has, a Sophgo box's system
Python 3.8 included: numpy, the vendor library and the standard library only, and no import from this project. A
runtime may also be a folder that imports other modules of the project, relatively; `SHIPPED` in engines.workers names
what is sent for it, and there it is imported under the names it has here.

A runtime defines one class, `Runtime`, with the same few calls, so that residency, counters and error
handling live once, in `serve`:

    Runtime(options)                                   opens the device; options come from engines.devices
    describe() -> {"runtime", "version", "chip", "device"}
    load(path, **options) -> model     networks(model) -> [name]     unload(model)
                                                       options are those of the FileVersion; most take none
    allocate(dtype, shape) -> buffer    write(buffer, data)    read(buffer) -> bytes    free(buffer)
    launch(model, network, [(name, buffer)], [(name, buffer)])
    perform(model, program, {name: buffer}, settings, report) -> [(dtype, shape, bytes)]
                                                       optional: something long, as a whole sampling loop.
                                                       report({...}) tells the host how far it is, and raises when the
                                                       host has cancelled: call it at each step and let that pass
    close()                                            safe to call twice

Buffers are device memory with `.dtype` (numpy's names and "bfloat16") and `.shape`; data crosses as raw bytes.
Everything that goes wrong is a RuntimeError of one sentence.
"""
