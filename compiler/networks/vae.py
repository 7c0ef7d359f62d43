"""The two halves of SD 1.x's VAE, at any depth and width that a checkpoint shows."""

from ..checkpoint import Part
from .graph import Graph, Value, Weights

GROUPS = 32
EPS = 1e-6


def vae_decoder(part: Part, weights: Weights, width: int, height: int, batch: int = 1) -> Graph:
    """latent (B,4,h,w), unscaled -> picture (B,3,8h,8w) in [-1,1]. width, height: of the picture."""
    graph = Graph(f"vae_decoder_{width}x{height}", part, weights)
    vae = _VAE(graph)
    channels = part.shape("post_quant_conv.weight")[1]
    x = graph.input("latent", (batch, channels, height // 8, width // 8))
    x = graph.conv(graph.conv(x, "post_quant_conv"), "decoder.conv_in")
    x = vae.middle(x, "decoder.mid")
    for level in reversed(range(part.count("decoder.up.{}"))):
        name = f"decoder.up.{level}"
        x = vae.resnets(x, name)
        if f"{name}.upsample.conv.weight" in part:
            with graph.scope(f"{name}.upsample"):
                x = graph.mark(f"{name}.upsample", graph.conv(graph.twice(x), f"{name}.upsample.conv"))
    x = vae.end(x, "decoder")
    graph.output("picture", x)
    return graph


def vae_encoder(part: Part, weights: Weights, width: int, height: int, batch: int = 1) -> Graph:
    """picture (B,3,8h,8w) in [-1,1] -> moments (B,8,h,w): mean and log variance of the unscaled latent."""
    graph = Graph(f"vae_encoder_{width}x{height}", part, weights)
    vae = _VAE(graph)
    x = graph.conv(graph.input("picture", (batch, 3, height, width)), "encoder.conv_in")
    for level in range(part.count("encoder.down.{}")):
        name = f"encoder.down.{level}"
        x = vae.resnets(x, name)
        if f"{name}.downsample.conv.weight" in part:
            with graph.scope(f"{name}.downsample"):
                # a row and a column of zeros at the far edges only
                x = graph.conv(x, f"{name}.downsample.conv", stride=2, pads=(0, 0, 1, 1))
                graph.mark(f"{name}.downsample", x)
    x = vae.middle(x, "encoder.mid")
    x = vae.end(x, "encoder")
    graph.output("moments", graph.conv(x, "quant_conv"))
    return graph


class _VAE:
    def __init__(self, graph: Graph):
        self.graph, self.groups = graph, graph.part.conventions.get("groups", GROUPS)

    def resnets(self, x: Value, name: str) -> Value:
        for number in range(self.graph.part.count(name + ".block.{}")):
            x = self.resnet(x, f"{name}.block.{number}")
        return x

    def resnet(self, x: Value, name: str) -> Value:
        graph = self.graph
        with graph.scope(name):
            h = graph.conv(graph.silu(graph.group_norm(x, f"{name}.norm1", self.groups, EPS)), f"{name}.conv1")
            h = graph.conv(graph.silu(graph.group_norm(h, f"{name}.norm2", self.groups, EPS)), f"{name}.conv2")
            if f"{name}.nin_shortcut.weight" in graph.part:
                x = graph.conv(x, f"{name}.nin_shortcut")
            return graph.mark(name, graph.add(x, h))

    def middle(self, x: Value, name: str) -> Value:
        x = self.resnet(x, f"{name}.block_1")
        x = self.attention(x, f"{name}.attn_1")
        return self.resnet(x, f"{name}.block_2")

    def attention(self, image: Value, name: str) -> Value:
        """One head over all places of the picture."""
        graph = self.graph
        batch, channels, height, width = image.shape
        with graph.scope(name):
            x = graph.reshape(graph.group_norm(image, f"{name}.norm", self.groups, EPS), (batch, channels, height * width))
            x = graph.transpose(x, (0, 2, 1))
            q, k, v = (graph.linear(x, f"{name}.{kind}") for kind in "qkv")
            scores = graph.scale(graph.matmul(q, graph.transpose(k, (0, 2, 1))), channels**-0.5)
            x = graph.linear(graph.matmul(graph.softmax(scores), v), f"{name}.proj_out")
            x = graph.reshape(graph.transpose(x, (0, 2, 1)), image.shape)
            return graph.mark(name, graph.add(image, x))

    def end(self, x: Value, half: str) -> Value:
        graph = self.graph
        with graph.scope(f"{half}.out"):
            x = graph.silu(graph.group_norm(x, f"{half}.norm_out", self.groups, EPS))
            return graph.conv(x, f"{half}.conv_out")
