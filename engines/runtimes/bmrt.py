"""bmodels through libbmrt by ctypes: the same calls on libsophon hardware and on Sophgo's simulator.

Runs in the worker (Python 3.8, see the package docstring). Structures follow libsophon's bmlib_runtime.h and
bmruntime_interface.h, 64-bit. In the simulator, leaving without destroying everything crashes and running out of
device memory ends the process: both are the supervisor's business (engines.workers).
"""
import ctypes as C
import os
import re

CHIPS = {0x1684: "BM1684", 0x1686: "BM1684X", 0x1688: "BM1688"}
DTYPES = ["float32", "float16", "int8", "uint8", "int16", "uint16", "int32", "uint32", "bfloat16", "int4", "uint4"]
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1, "uint8": 1, "int16": 2, "uint16": 2, "int32": 4,
              "uint32": 4}


class Shape(C.Structure):        # bm_shape_t
    _fields_ = [("num_dims", C.c_int), ("dims", C.c_int * 8)]


class DeviceMemory(C.Structure):  # bm_device_mem_t
    _fields_ = [("address", C.c_ulong), ("reserved", C.c_uint), ("dmabuf_fd", C.c_int), ("flags", C.c_uint),
                ("size", C.c_uint)]


class Tensor(C.Structure):       # bm_tensor_t
    _fields_ = [("dtype", C.c_int), ("shape", Shape), ("memory", DeviceMemory), ("store_mode", C.c_int)]


class Stage(C.Structure):        # bm_stage_info_t
    _fields_ = [("input_shapes", C.POINTER(Shape)), ("output_shapes", C.POINTER(Shape)),
                ("input_mems", C.c_void_p), ("output_mems", C.c_void_p)]


class NetInfo(C.Structure):      # bm_net_info_t, the leading fields; only ever read through the library's pointer
    _fields_ = [("name", C.c_char_p), ("is_dynamic", C.c_bool),
                ("input_num", C.c_int), ("input_names", C.POINTER(C.c_char_p)), ("input_dtypes", C.POINTER(C.c_int)),
                ("input_scales", C.c_void_p),
                ("output_num", C.c_int), ("output_names", C.POINTER(C.c_char_p)),
                ("output_dtypes", C.POINTER(C.c_int)), ("output_scales", C.c_void_p),
                ("stage_num", C.c_int), ("stages", C.POINTER(Stage)),
                ("max_input_bytes", C.POINTER(C.c_size_t)), ("max_output_bytes", C.POINTER(C.c_size_t))]


assert C.sizeof(Shape) == 36 and C.sizeof(DeviceMemory) == 24 and C.sizeof(Tensor) == 72


class Buffer(object):
    def __init__(self, dtype, shape, memory, nbytes):
        self.dtype, self.shape, self.memory, self.nbytes = dtype, tuple(shape), memory, nbytes


class Runtime(object):
    """options: {"libraries": folder, "device_id": int, "simulated": bool}"""

    def __init__(self, options):
        self.options = options
        self.handle, self.models = C.c_void_p(), {}
        folder = options["libraries"]
        self.lib = self._open(folder, "libbmlib.so.0", "libbmlib.so")
        self.rt = self._open(folder, "libbmrt.so.1.0", "libbmrt.so")
        self._declare()
        device = int(options.get("device_id", 0))
        if self.lib.bm_dev_request(C.byref(self.handle), device):
            raise RuntimeError("Sophgo device %d could not be opened: %s" % (device, self._present()))
        chip = C.c_uint()
        self.lib.bm_get_chipid(self.handle, C.byref(chip))
        self.chip = CHIPS.get(chip.value, hex(chip.value))

    @staticmethod
    def _open(folder, *names):
        for name in names:
            path = os.path.join(folder, name)
            if os.path.exists(path):
                try:
                    return C.CDLL(path, mode=C.RTLD_GLOBAL)
                except OSError as error:
                    raise RuntimeError("%s could not be loaded: %s" % (path, error))
        raise RuntimeError("no %s in %s: point 'libraries' at the lib folder of libsophon" % (names[-1], folder))

    def _declare(self):
        void, tensors = C.c_void_p, C.POINTER(Tensor)
        memory = C.POINTER(DeviceMemory)

        def sign(function, result, *arguments):
            function.restype, function.argtypes = result, list(arguments)
        lib, rt = self.lib, self.rt
        sign(lib.bm_dev_request, C.c_int, C.POINTER(void), C.c_int)
        sign(lib.bm_dev_getcount, C.c_int, C.POINTER(C.c_int))
        sign(lib.bm_dev_free, None, void)
        sign(lib.bm_get_chipid, C.c_int, void, C.POINTER(C.c_uint))
        sign(lib.libbmlib_version, C.c_char_p)
        sign(lib.bm_malloc_device_byte, C.c_int, void, memory, C.c_uint)
        sign(lib.bm_free_device, None, void, DeviceMemory)
        sign(lib.bm_memcpy_s2d_partial, C.c_int, void, DeviceMemory, void, C.c_uint)
        sign(lib.bm_memcpy_d2s_partial, C.c_int, void, void, DeviceMemory, C.c_uint)
        sign(lib.bm_thread_sync, C.c_int, void)
        sign(rt.bmrt_create, void, void)
        sign(rt.bmrt_destroy, None, void)
        sign(rt.bmrt_load_bmodel, C.c_bool, void, C.c_char_p)
        sign(rt.bmrt_get_network_number, C.c_int, void)
        sign(rt.bmrt_get_network_names, None, void, C.POINTER(C.POINTER(C.c_char_p)))
        sign(rt.bmrt_get_network_info, C.POINTER(NetInfo), void, C.c_char_p)
        sign(rt.bmrt_launch_tensor_ex, C.c_bool, void, C.c_char_p, tensors, C.c_int, tensors, C.c_int, C.c_bool,
             C.c_bool)

    def _present(self):
        count = C.c_int()
        if self.lib.bm_dev_getcount(C.byref(count)) or count.value == 0:
            return "there is none (is the driver loaded?)"
        return "there are %d, numbered from 0" % count.value

    def describe(self):
        said = (self.lib.libbmlib_version() or b"").decode("ascii", "replace")
        version = re.search(r"\d+(\.\d+)+", said)
        where = "simulator" if self.options.get("simulated") else "tpu %d" % int(self.options.get("device_id", 0))
        return {"runtime": "libbmrt", "version": version.group() if version else "of unknown version",
                "chip": self.chip, "device": where}

    # -- models ------------------------------------------------------------------------------------------------
    def load(self, path):
        runtime = self.rt.bmrt_create(self.handle)
        if not runtime:
            raise RuntimeError("bmrt_create failed on %s" % self.chip)
        if not self.rt.bmrt_load_bmodel(runtime, os.fsencode(path)):
            self.rt.bmrt_destroy(runtime)
            raise RuntimeError("%s refused by libbmrt on %s: a broken file, another chip's file, or too little device "
                               "memory" % (os.path.basename(path), self.chip))
        self.models[runtime] = self._network_names(runtime)
        return runtime

    def _network_names(self, runtime):
        array = C.POINTER(C.c_char_p)()
        self.rt.bmrt_get_network_names(runtime, C.byref(array))
        names = [array[i].decode() for i in range(self.rt.bmrt_get_network_number(runtime))]
        free = C.CDLL(None).free
        free.argtypes = [C.c_void_p]
        free(array)              # the library mallocs it and leaves it to the caller
        return names

    def networks(self, model):
        return self.models[model]

    def unload(self, model):
        del self.models[model]
        self.rt.bmrt_destroy(model)

    # -- memory ------------------------------------------------------------------------------------------------
    def allocate(self, dtype, shape):
        nbytes = ITEM_BYTES[dtype]
        for size in shape:
            nbytes *= size
        memory = DeviceMemory()
        if self.lib.bm_malloc_device_byte(self.handle, C.byref(memory), nbytes):
            raise RuntimeError("no device memory for %d bytes on %s" % (nbytes, self.chip))
        return Buffer(dtype, shape, memory, nbytes)

    def write(self, buffer, data):
        if len(data) != buffer.nbytes:
            raise RuntimeError("%d bytes for a buffer of %d" % (len(data), buffer.nbytes))
        if self.lib.bm_memcpy_s2d_partial(self.handle, buffer.memory, data, len(data)):
            raise RuntimeError("copying %d bytes to the device failed" % len(data))

    def read(self, buffer):
        data = C.create_string_buffer(buffer.nbytes)
        if self.lib.bm_memcpy_d2s_partial(self.handle, data, buffer.memory, buffer.nbytes):
            raise RuntimeError("copying %d bytes from the device failed" % buffer.nbytes)
        return data.raw

    def free(self, buffer):
        self.lib.bm_free_device(self.handle, buffer.memory)

    # -- running -----------------------------------------------------------------------------------------------
    def launch(self, model, network, inputs, outputs):
        if network not in self.models[model]:
            raise RuntimeError("no network '%s' in this file, it has: %s" % (network, ", ".join(self.models[model])))
        info = self.rt.bmrt_get_network_info(model, network.encode()).contents
        feeds = self._tensors(network, "input", dict(inputs), info.input_num, info.input_names, info.input_dtypes)
        results = self._tensors(network, "output", dict(outputs), info.output_num, info.output_names,
                                info.output_dtypes)
        # user memory in and out, shapes and store modes as compiled
        if not self.rt.bmrt_launch_tensor_ex(model, network.encode(), feeds, len(feeds), results, len(results), True,
                                             False):
            shapes = ", ".join("%s %s" % (name, list(buffer.shape)) for name, buffer in inputs)
            raise RuntimeError("libbmrt refused to run '%s' with %s" % (network, shapes))
        if self.lib.bm_thread_sync(self.handle):
            raise RuntimeError("the device failed while running '%s'" % network)

    @staticmethod
    def _tensors(network, kind, buffers, count, names, dtypes):
        tensors = (Tensor * count)()
        for index in range(count):
            name = names[index].decode()
            if name not in buffers:
                raise RuntimeError("'%s' needs %s '%s', which was not given" % (network, kind, name))
            buffer = buffers[name]
            if buffer.dtype != DTYPES[dtypes[index]]:
                raise RuntimeError("'%s' takes %s '%s' as %s, not %s"
                                   % (network, kind, name, DTYPES[dtypes[index]], buffer.dtype))
            shape = Shape(len(buffer.shape), (C.c_int * 8)(*buffer.shape))
            tensors[index] = Tensor(dtypes[index], shape, buffer.memory, 0)
        return tensors

    def close(self):
        for model in list(self.models):
            self.unload(model)
        if self.handle:
            self.lib.bm_dev_free(self.handle)
            self.handle = C.c_void_p()
