"""Write bmodels for tests: valid header and flatbuffer, made-up weights; and the networks that are in the wild.

Field ids are the schema's: sophgo/libsophon tpu-bmodel/model/model.fbs.
"""
from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import flatbuffers

from engines.bmodel import DTYPES, HEADER_BYTES, MAGIC
from engines.network import Network, Port


def write_bmodel(path: Path, networks: Sequence[Network], **how) -> Path:
    """A file of `bmodel_bytes`."""
    path.write_bytes(bmodel_bytes(networks, **how))
    return path


def bmodel_bytes(networks: Sequence[Network], chip: str = "BM1684X", weights: int = 1000,
                 scratch: int | Sequence[int] = 5000, version: str = "2.2+v1.30",
                 created: str = "Sat Nov 22 04:00:00 2025\n", shared_weights: bool = False, commands: int = 0,
                 kernel: int = 0) -> bytes:
    """Each stage has `weights` bytes of its own (or one block for all, told by its check code) and `scratch` bytes (those
    of its variant, if they are several); `commands` are for each engine, `kernel` for the file. Neither of these is there.
    """
    writer = Writer()
    binary = b""
    nets = []
    for network in networks:
        stages = []
        for variant in range(network.variants):
            if not shared_weights or not binary:
                binary += bytes([len(stages) + 1]) * weights
            code = bytes(32) if shared_weights else bytes([len(nets), len(stages)]) * 16
            stages.append(writer.stage(network, variant, (len(binary) - weights, weights), code,
                                       scratch if isinstance(scratch, int) else scratch[variant], commands))
        nets.append(writer.table({0: writer.text(network.name), 3: writer.references(stages)}))
    return writer.file(nets, binary, chip, version, created, scratch if isinstance(scratch, int) else max(scratch), kernel)


class Writer:
    """A flatbuffers Builder with tables written from {field id: offset, or (scalar type, value), or struct bytes}."""

    def __init__(self):
        self.builder = flatbuffers.Builder(1024)

    def file(self, nets: list[int], binary: bytes = b"", chip: str = "BM1684X", version: str = "2.2", created: str = "",
             scratch: int = 0, kernel: int = 0) -> bytes:
        """The whole file: header, the description that ends with these nets, binary part."""
        fields = {0: self.text("B"), 1: self.text(version), 2: self.text(created), 3: self.text(chip),
                  4: self.references(nets), 5: ("Uint64", scratch)}
        if kernel:
            fields[6] = self.table({0: self.text("kernel.so"), 1: ("Binary", 0, kernel)})
        self.builder.Finish(self.table(fields))
        description = bytes(self.builder.Output())
        header = struct.pack("<IIIQ", MAGIC, HEADER_BYTES, len(description), len(binary))
        return header.ljust(HEADER_BYTES, b"\0") + description + binary

    def text(self, text: str) -> int:
        return self.builder.CreateString(text)

    def references(self, offsets: list[int]) -> int:
        self.builder.StartVector(4, len(offsets), 4)
        for offset in reversed(offsets):
            self.builder.PrependUOffsetTRelative(offset)
        return self.builder.EndVector()

    def longs(self, values: Sequence[int]) -> int:
        self.builder.StartVector(8, len(values), 8)
        for value in reversed(values):
            self.builder.PrependUint64(value)
        return self.builder.EndVector()

    def table(self, fields: dict[int, object]) -> int:
        builder = self.builder
        builder.StartObject(max(fields) + 1)
        for field, value in fields.items():
            match value:
                case int():
                    builder.PrependUOffsetTRelativeSlot(field, value, 0)
                case ("Binary", start, size):
                    builder.Prep(8, 16)
                    builder.PrependUint64(size)
                    builder.PrependUint64(start)
                    builder.PrependStructSlot(field, builder.Offset(), 0)
                case (kind, number):
                    getattr(builder, f"Prepend{kind}Slot")(field, number, 0)
        return builder.EndObject()

    def stage(self, network: Network, variant: int, weights: tuple[int, int], code: bytes, scratch: int,
              commands: int = 0) -> int:
        inputs, outputs = (self.references([self.tensor(port, variant) for port in ports])
                           for ports in (network.inputs, network.outputs))
        coeff = self.table({1: self.builder.CreateByteVector(code), 2: ("Binary", *weights)})
        subnets = self.references([self.table({0: ("Int32", 0)})])
        group = self.table({2: ("Binary", 0, commands), 3: ("Binary", commands, commands)})
        return self.table({0: inputs, 1: outputs, 3: ("Uint64", scratch), 4: coeff, 12: subnets,
                           5: ("Int32", int(network.dynamic)), 8: self.references([group])})

    def tensor(self, port: Port, variant: int) -> int:
        shape = self.table({0: self.longs(port.shapes[variant])})
        return self.table({0: self.text(port.name), 1: ("Uint32", DTYPES.index(port.dtype)),
                           5: self.references([shape])})


def network(name: str, inputs: dict[str, tuple], outputs: dict[str, tuple], dtypes: dict[str, str] | None = None,
            dynamic: bool = False) -> Network:
    """A one-variant network from {port name: shape}; float32 unless `dtypes` says otherwise."""
    inputs, outputs = (tuple(Port(port, (dtypes or {}).get(port, "float32"), (shape,)) for port, shape in side.items())
                       for side in (inputs, outputs))
    return Network(name, inputs, outputs, dynamic)


def variants(*networks: Network) -> Network:
    """One network whose variants are the given ones."""
    def merge(sides: list[tuple[Port, ...]]) -> tuple[Port, ...]:
        return tuple(Port(same[0].name, same[0].dtype, sum((port.shapes for port in same), ())) for same in zip(*sides))
    return Network(networks[0].name, merge([net.inputs for net in networks]), merge([net.outputs for net in networks]),
                   networks[0].dynamic)


def residual_shapes(batch: int, h: int, w: int) -> list[tuple]:
    """The twelve of an SD 1.x U-Net on the way down."""
    steps = [(320, 1)] * 3 + [(320, 2)] + [(640, 2)] * 2 + [(640, 4)] + [(1280, 4)] * 2 + [(1280, 8)] * 3
    return [(batch, channels, h // by, w // by) for channels, by in steps]


def unet_article(h: int = 64, w: int = 64, d: int = 768, channels: int = 4) -> Network:
    return network("unet_a", {"input.1": (2, channels, h, w), "timesteps.1": (2,), "input0.1": (2, 77, d)},
                   {"noise_pred_Conv_f32": (2, 4, h, w)}, {"timesteps.1": "int32"})


def unet_demo(h: int = 64, w: int = 64, d: int = 768) -> Network:
    return network("unet_b", {"latent.1": (2, 4, h, w), "t.1": (1,), "prompt_embeds.1": (2, 77, d)},
                   {"out": (2, 4, h, w)})


def unet_controlled(h: int = 64, w: int = 64, d: int = 768, batch: int = 2) -> Network:
    """Sixteen inputs, the mid residual before the others."""
    residuals = [(batch, 1280, h // 8, w // 8), *residual_shapes(batch, h, w)]
    return network("unet_c", {"latent": (batch, 4, h, w), "t": (1,), "prompt": (batch, 77, d)}
                   | {f"x.{index}": shape for index, shape in enumerate(residuals)}, {"out": (batch, 4, h, w)})


def unet_sdxl(h: int = 128, w: int = 128) -> Network:
    return network("unet_base", {"sample": (2, 4, h, w), "t": (1,), "context": (2, 77, 2048),
                                 "text_embeds": (2, 1280), "time_ids": (2, 6)}, {"out": (2, 4, h, w)})


def controlnet(h: int = 64, w: int = 64, d: int = 768, image_last: bool = True) -> Network:
    inputs = {"latent": (2, 4, h, w), "t": (1,), "prompt": (2, 77, d), "image": (2, 3, 8 * h, 8 * w)}
    if not image_last:
        inputs = {name: inputs[name] for name in ("latent", "prompt", "image", "t")}
    shapes = [*residual_shapes(2, h, w), (2, 1280, h // 8, w // 8)]
    return network("canny", inputs, {f"y.{index}": shape for index, shape in enumerate(shapes)})


def text_encoder(d: int = 768, pooled: str = "") -> Network:
    """`pooled`: "" without it, "last" or "first" for where it stands among the outputs."""
    outputs = {"": {"hidden": (1, 77, d)}, "last": {"hidden": (1, 77, d), "pooled": (1, d)},
               "first": {"pooled": (1, d), "hidden": (1, 77, d)}}[pooled]
    return network("text_encoder", {"input_ids.1": (1, 77)}, outputs, {"input_ids.1": "int32"})


def vae_decoder(h: int = 64, w: int = 64) -> Network:
    return network("vae_decoder", {"z": (1, 4, h, w)}, {"image_Conv": (1, 3, 8 * h, 8 * w)})


def vae_encoder(h: int = 64, w: int = 64, channels: int = 8) -> Network:
    return network("vae_encoder", {"x": (1, 3, 8 * h, 8 * w)}, {"m": (1, channels, h, w)})


WILD = {
    "article": unet_article(), "demo": unet_demo(), "controlled": unet_controlled(), "sdxl": unet_sdxl(),
    "inpaint": unet_article(channels=9), "controlnet": controlnet(), "text": text_encoder(),
    "text and pooled": text_encoder(pooled="last"), "pooled and text": text_encoder(1024, pooled="first"),
    "decoder": vae_decoder(), "encoder": vae_encoder(), "tiny unet": unet_demo(8, 8, 64),
    "tiny controlled": unet_controlled(8, 8, 64), "tiny decoder": vae_decoder(8, 8), "tiny encoder": vae_encoder(8, 8),
    "many sizes": variants(unet_controlled(64, 64), unet_controlled(96, 64), unet_controlled(64, 96)),
}
