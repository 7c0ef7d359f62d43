"""The U-Net of SD 1.x, at any depth and width that a checkpoint shows."""

import math

import numpy as np

from ..checkpoint import Part
from .graph import INT64, Graph, Value, Weights

HEADS, GROUPS = 8, 32
TIMESTEPS = 1000
LONGEST_PERIOD = 10000


def unet_levels(part: Part) -> int:
    """Sizes it works in: each is half the one before, so that latents must be divisible by 2 ** (levels - 1)."""
    return 1 + sum(f"input_blocks.{number}.0.op.weight" in part for number in range(part.count("input_blocks.{}")))


def residual_shapes(part: Part, batch: int, height: int, width: int) -> dict[str, tuple[int, ...]]:
    """What a ControlNet adds, in the order of Sophgo's own files: of the middle block, then of each input block.

    height, width: of the latent.
    """
    shapes, channels, shrunk = {}, 0, 1
    for number in range(part.count("input_blocks.{}")):
        name = f"input_blocks.{number}.0"
        if f"{name}.op.weight" in part:
            shrunk *= 2
        last = next(n for n in (f"{name}.op", f"{name}.out_layers.3", name) if f"{n}.weight" in part)
        channels = part.shape(f"{last}.weight")[0]
        shapes[f"residual_{number}"] = (batch, channels, height // shrunk, width // shrunk)
    return {"residual_mid": (batch, channels, height // shrunk, width // shrunk)} | shapes


def unet(
    part: Part, weights: Weights, width: int, height: int, batch: int = 2, tokens: int = 77, control: bool = False
) -> Graph:
    """latent (B,4,h,w), timestep (B,) int64, context (B,tokens,D) and, with `control`, residuals -> prediction (B,4,h,w).

    width, height: of the picture, eight times the latent's. Residuals are added to what the input blocks hand over to
    the output blocks, and to the middle block's result.
    """
    graph = Graph(f"unet_{width}x{height}", part, weights)
    heads, groups = part.conventions.get("heads", HEADS), part.conventions.get("groups", GROUPS)
    net = _UNet(graph, heads, groups)
    h, w = height // 8, width // 8
    x = graph.input("latent", (batch, part.shape("input_blocks.0.0.weight")[1], h, w))
    timestep = graph.input("timestep", (batch,), INT64)
    depth = next(t.shape[1] for name, t in part.tensors.items() if name.endswith("attn2.to_k.weight"))
    net.context = graph.input("context", (batch, tokens, depth))
    shapes = residual_shapes(part, batch, h, w) if control else {}
    residuals = {name: graph.input(name, shape) for name, shape in shapes.items()}

    net.embed(timestep)
    skips = []
    for number in range(part.count("input_blocks.{}")):
        x = net.block(x, f"input_blocks.{number}")
        skips.append(x)
    x = net.block(x, "middle_block")
    if control:
        x = graph.add(x, residuals["residual_mid"])
        skips = [graph.add(skip, residuals[f"residual_{number}"]) for number, skip in enumerate(skips)]
    for number in range(part.count("output_blocks.{}")):
        x = net.block(graph.concat([x, skips.pop()], 1), f"output_blocks.{number}")
    with graph.scope("out"):
        x = graph.silu(graph.group_norm(x, "out.0", groups, 1e-5))
        graph.output("prediction", graph.conv(x, "out.2"))
    return graph


class _UNet:
    """The blocks; `context` and the embedded timestep are the same for all."""

    context: Value
    embedding: Value

    def __init__(self, graph: Graph, heads: int, groups: int):
        self.graph, self.heads, self.groups = graph, heads, groups

    def embed(self, timestep: Value):
        """Sines are looked up: bfloat16 rounds 601 to 600 before it computes them."""
        graph = self.graph
        width = graph.part.shape("time_embed.0.weight")[1]
        with graph.scope("time_embed"):
            x = graph.lookup(graph.constant("sines", sines(width)), timestep)
            x = graph.linear(graph.silu(graph.linear(x, "time_embed.0")), "time_embed.2")
            self.embedding = graph.silu(x)  # which every block would begin with

    def block(self, x: Value, name: str) -> Value:
        """A list of layers, each recognised by the tensors it has."""
        part = self.graph.part
        with self.graph.scope(name):
            for number in range(part.count(name + ".{}")):
                layer = f"{name}.{number}"
                if f"{layer}.in_layers.0.weight" in part:
                    x = self.resnet(x, layer)
                elif f"{layer}.proj_in.weight" in part:
                    x = self.transformer(x, layer)
                elif f"{layer}.op.weight" in part:
                    x = self.graph.conv(x, f"{layer}.op", stride=2)
                elif f"{layer}.conv.weight" in part:
                    x = self.graph.conv(self.graph.twice(x), f"{layer}.conv")
                else:
                    x = self.graph.conv(x, layer)
        return self.graph.mark(name, x)

    def resnet(self, x: Value, name: str) -> Value:
        graph = self.graph
        h = graph.conv(graph.silu(graph.group_norm(x, f"{name}.in_layers.0", self.groups, 1e-5)), f"{name}.in_layers.2")
        shift = graph.linear(self.embedding, f"{name}.emb_layers.1")
        h = graph.add(h, graph.reshape(shift, (*shift.shape, 1, 1)))
        h = graph.conv(graph.silu(graph.group_norm(h, f"{name}.out_layers.0", self.groups, 1e-5)), f"{name}.out_layers.3")
        if f"{name}.skip_connection.weight" in graph.part:
            x = graph.conv(x, f"{name}.skip_connection")
        return graph.add(x, h)

    def transformer(self, image: Value, name: str) -> Value:
        graph = self.graph
        batch, channels, height, width = image.shape
        x = graph.conv(graph.group_norm(image, f"{name}.norm", self.groups, 1e-6), f"{name}.proj_in")
        x = graph.transpose(graph.reshape(x, (batch, channels, height * width)), (0, 2, 1))
        for number in range(graph.part.count(name + ".transformer_blocks.{}")):
            block = f"{name}.transformer_blocks.{number}"
            normal = graph.layer_norm(x, f"{block}.norm1")
            x = graph.add(x, self.attention(normal, normal, f"{block}.attn1"))
            x = graph.add(x, self.attention(graph.layer_norm(x, f"{block}.norm2"), self.context, f"{block}.attn2"))
            x = graph.add(x, self.feed_forward(graph.layer_norm(x, f"{block}.norm3"), f"{block}.ff.net"))
        x = graph.reshape(graph.transpose(x, (0, 2, 1)), image.shape)
        return graph.add(image, graph.conv(x, f"{name}.proj_out"))

    def attention(self, x: Value, context: Value, name: str) -> Value:
        q = self.graph.linear(x, f"{name}.to_q")
        k, v = (self.graph.linear(context, f"{name}.to_{kind}") for kind in "kv")
        return self.graph.linear(self.graph.attention(q, k, v, self.heads), f"{name}.to_out.0")

    def feed_forward(self, x: Value, name: str) -> Value:
        """The first layer gives a value and its gate: two products with half of its rows each."""
        graph, rows = self.graph, self.graph.part.shape(f"{name}.0.proj.weight")[0]
        value = graph.linear(x, f"{name}.0.proj", slice(0, rows // 2))
        gate = graph.linear(x, f"{name}.0.proj", slice(rows // 2, rows))
        return graph.linear(graph.multiply(value, graph.gelu(gate)), f"{name}.2")


def sines(width: int) -> np.ndarray:
    """(1000, width): cosines and sines of each timestep, in periods from 1 to 10000 (times 2 pi).

    In float32 step by step, as the network saw them in training.
    """
    half = width // 2
    speeds = np.exp(np.float32(-math.log(LONGEST_PERIOD)) * np.arange(half, dtype=np.float32) / np.float32(half))
    angles = np.arange(TIMESTEPS, dtype=np.float32)[:, None] * speeds
    return np.concatenate([np.cos(angles), np.sin(angles)], 1)
