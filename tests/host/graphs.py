"""API-format graphs that read like a workflow: `graph.KSampler(model=model, ...)` adds a node and answers it."""
from __future__ import annotations

import io
import re
import uuid
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tools.comfyui import Server, ServerError

ARITHMETIC = "arithmetic"
TINY_SDXL = "tiny-sdxl.safetensors"        # random weights: tests.helpers.sdxl_models
CATS, DOGS = "cat " * 30, "dog " * 10      # prompts: each word moves the mean of the arithmetic encoder's answer by 0.012


class Node:
    """A node of a graph; node[1] is its second output, and a bare node stands for its first."""

    def __init__(self, graph: Graph, id: str):
        self.graph, self.id = graph, id

    def __getitem__(self, slot: int) -> Output:
        return Output(self.graph, self.id, slot)


class Output:
    def __init__(self, graph: Graph, id: str, slot: int):
        self.graph, self.id, self.slot = graph, id, slot


class Graph(dict):
    """What POST /prompt takes."""

    def node(self, class_type: str, **inputs) -> Node:
        id = str(len(self) + 1)
        self[id] = {"class_type": class_type, "inputs": {name: _wire(value) for name, value in inputs.items()}}
        return Node(self, id)

    def __getattr__(self, class_type: str):
        return partial(self.node, class_type)

    # -- the parts that most graphs share --------------------------------------------------------------------
    def checkpoint(self, name: str = ARITHMETIC, device: str = "auto", unet_device: str = "same",
                   long_prompts: str = "truncate") -> tuple[Output, Output, Output]:
        loader = self.SophgoLoadCheckpoint(model_name=name, device=device, unet_device=unet_device,
                                           long_prompts=long_prompts)
        return loader[0], loader[1], loader[2]

    def prompt(self, clip, text: str) -> Node:
        return self.CLIPTextEncode(clip=clip, text=text)

    def empty(self, width: int = 64, height: int = 64, batch: int = 1) -> Node:
        return self.EmptyLatentImage(width=width, height=height, batch_size=batch)

    def sample(self, model, positive, negative, latent, **changes) -> Node:
        """KSampler: four Euler steps."""
        settings = {"seed": 1, "steps": 4, "cfg": 5.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
        return self.KSampler(model=model, positive=positive, negative=negative, latent_image=latent,
                             **{**settings, **changes})

    def sample_part(self, model, positive, negative, latent, **changes) -> Node:
        """KSamplerAdvanced: four Euler steps; leftover noise stays, so that parts can follow each other."""
        settings = {"add_noise": "enable", "noise_seed": 1, "steps": 4, "cfg": 5.0, "sampler_name": "euler",
                    "scheduler": "simple", "start_at_step": 0, "end_at_step": 10000,
                    "return_with_leftover_noise": "enable"}
        return self.KSamplerAdvanced(model=model, positive=positive, negative=negative, latent_image=latent,
                                     **{**settings, **changes})

    def sdxl(self, name: str = TINY_SDXL, device: str = "auto", precision: str = "auto") -> tuple[Output, Output, Output]:
        loader = self.AscendLoadSDXL(model_name=name, device=device, precision=precision)
        return loader[0], loader[1], loader[2]

    def condition(self, clip, prompt: str, negative_prompt: str = "", **changes) -> tuple[Output, Output]:
        """AscendSDXLConditioner: (positive, negative)."""
        settings = {"negative_prompt": negative_prompt, "original_width": 64, "original_height": 64, "crop_top": 0,
                    "crop_left": 0, "target_width": 64, "target_height": 64, "unconditional": "encode"}
        node = self.AscendSDXLConditioner(clip=clip, prompt=prompt, **{**settings, **changes})
        return node[0], node[1]

    def sample_sdxl(self, model, positive, negative, latent, **changes) -> Node:
        """AscendSDXLSampler: what `sample` does, four Euler steps."""
        settings = {"seed": 1, "steps": 4, "cfg": 5.0, "denoise": 1.0, "sampler_name": "EulerEDM",
                    "discretization": "LegacyDDPM", "guider": "VanillaCFG", "s_churn": 0.0, "s_tmin": 0.0, "s_tmax": 999.0,
                    "s_noise": 1.0, "snap_sigmas": True, "noise": "comfy"}
        return self.AscendSDXLSampler(model=model, positive=positive, negative=negative, latent_image=latent,
                                      **{**settings, **changes})

    def picture(self, model_name: str = ARITHMETIC, positive: str = CATS, negative: str = DOGS,
                device: str = "auto", size: tuple[int, int] = (64, 64), **sampling) -> Node:
        """The whole of a text-to-image graph up to its latent; size is (width, height)."""
        model, clip, _ = self.checkpoint(model_name, device)
        return self.sample(model, self.prompt(clip, positive), self.prompt(clip, negative), self.empty(*size), **sampling)


def _wire(value):
    if isinstance(value, Node):
        return [value.id, 0]
    return [value.id, value.slot] if isinstance(value, Output) else value


def latents(server: Server, *nodes: Node | Output, **run) -> list[np.ndarray]:
    """Run the nodes' graph: the LATENT of each, (B,4,h,w) float32, exactly as ComfyUI holds it."""
    graph = nodes[0].graph
    saves = [graph.SaveLatent(samples=node, filename_prefix=f"latents/{uuid.uuid4().hex}").id for node in nodes]
    outputs = server.run(graph, **run)
    files = [outputs[save]["latents"][0] for save in saves]
    return [load_file(server.base / "output" / file["subfolder"] / file["filename"])["latent_tensor"].numpy()
            for file in files]


def latent(server: Server, node: Node | Output, **run) -> np.ndarray:
    return latents(server, node, **run)[0]


def pictures(server: Server, node: Node | Output) -> np.ndarray:
    """Run the node's graph: its IMAGE as 8-bit levels (B,H,W,3)."""
    save = node.graph.SaveImage(images=node, filename_prefix=uuid.uuid4().hex).id
    images = server.run(node.graph)[save]["images"]
    return np.stack([np.asarray(Image.open(io.BytesIO(server.picture(image)))) for image in images]).astype(int)


def load_latent(graph: Graph, base: Path, values: np.ndarray) -> Node:
    """A LATENT with these values."""
    name = f"{uuid.uuid4().hex}.latent"
    save_file({"latent_tensor": torch.from_numpy(np.ascontiguousarray(values, np.float32)),
               "latent_format_version_0": torch.tensor([])}, base / "input" / name)
    return graph.LoadLatent(latent=name)


def load_picture(graph: Graph, base: Path, levels: np.ndarray) -> Node:
    """An IMAGE with these 8-bit levels (H,W,3), and the MASK of its alpha channel (H,W,4) as second output."""
    name = f"{uuid.uuid4().hex}.png"
    Image.fromarray(levels.astype(np.uint8)).save(base / "input" / name)
    return graph.LoadImage(image=name)


def refusal(server: Server, node: Node | Output, *words: str) -> str:
    """Run the node's graph, which must fail with one plain sentence that has all of `words`; the sentence."""
    with pytest.raises(ServerError) as refused:
        latent(server, node)
    return plain_sentence(str(refused.value), *words)


def plain_sentence(said: str, *words: str) -> str:
    assert not [word for word in words if word not in said], said
    assert "\n" not in said and "Traceback" not in said and not re.search(r"\btensor", said.lower()), said
    assert said.endswith(".") and 20 < len(said) < 700, said
    return said
