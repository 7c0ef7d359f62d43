"""Nodes that only tests need: a ControlNet small enough for the demo's U-Net, which ComfyUI's own loader has no file for."""
import comfy.controlnet
import torch
from comfy_api.latest import ComfyExtension, io

# (channels, shrunk) of what each input block of the demo's U-Net hands over, and the middle block's result.
OUTPUTS = ((32, 1), (32, 1), (32, 2), (64, 2))
MIDDLE = (64, 2)


class TinyNetwork(torch.nn.Module):
    """Says something else at each place: a pattern of its own, times the hint's mean."""

    dtype = torch.float32

    def __init__(self, order: list[int], middle: bool):
        super().__init__()
        self.order, self.middle = order, middle

    def forward(self, x, hint, timesteps, context, **_):
        height, width = x.shape[2:]

        def residual(number: int, channels: int, shrunk: int) -> torch.Tensor:
            pattern = torch.randn(channels, height // shrunk, width // shrunk, generator=torch.manual_seed(number))
            return hint.mean((1, 2, 3)).reshape(-1, 1, 1, 1) * pattern[None]
        output = [residual(self.order[number], *place) for number, place in enumerate(OUTPUTS)]
        return {"output": output, "middle": [residual(99, *MIDDLE)] if self.middle else []}


class TestControlNet(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(node_id="TestControlNet", category="testing",
                         inputs=[io.String.Input("order", default="0123"), io.String.Input("kind", default="controlnet")],
                         outputs=[io.ControlNet.Output()])

    @classmethod
    def execute(cls, order, kind) -> io.NodeOutput:
        network = TinyNetwork(list(map(int, order)), middle=kind != "no middle")
        if kind == "adapter":
            plain = network.forward
            network.forward = lambda **inputs: {"input": plain(**inputs)["output"]}
        return io.NodeOutput(comfy.controlnet.ControlNet(network, load_device=torch.device("cpu")))


class Testing(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [TestControlNet]


async def comfy_entrypoint() -> ComfyExtension:
    return Testing()
