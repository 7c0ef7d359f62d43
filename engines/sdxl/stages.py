"""SDXL's stages on the host: text encoders, U-Net, VAE halves of one checkpoint on one worker. numpy in, numpy out.

What a worker holds is the whole checkpoint in one precision; each stage is one of its networks. The U-Net is called step
by step by ComfyUI's samplers, or `sample` runs the whole loop (`loop`) beside it in the worker.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from ..engine import digest_of, from_wire, to_wire
from ..errors import EngineError
from ..network import ITEM_BYTES
from ..roles import VAE_SCALE
from ..stages import Poll, Stage, check_ids, check_sampled
from ..workers import NO_POLL, Feed, FileVersion, Worker, WorkerSpec
from . import AUTO
from .checkpoint import PARTS, Checkpoint

VAE_PRECISION = "float32"       # in half precision SDXL's VAE overflows
PENULTIMATE = -2                # the layer whose output SDXL was trained with, of both text encoders
NORMED = 0                      # in place of a layer: the last one's output after the final norm
SIZES = 6                       # original height and width, crop top and left, target height and width


@dataclass(eq=False)
class Network:
    """One network of a checkpoint on the worker of `spec`, in `precision`.

    Nothing is loaded until the first call; the checkpoint stays loaded while any Network of it lives, or until `release`.
    """

    checkpoint: Checkpoint
    name: str                   # the worker's: "text_encoder", "text_encoder_2", "unet", "vae_decoder", "vae_encoder"
    spec: WorkerSpec
    precision: str

    def __post_init__(self):
        self.worker = Worker.of(self.spec)
        self.file = FileVersion.of(self.path, precision=self.precision)
        self.worker.hold(self, self.file)

    @property
    def path(self) -> Path:
        return self.checkpoint.path

    @property
    def part(self) -> str:
        """The part of the checkpoint that it is, or is in."""
        return "vae" if self.name.startswith("vae") else self.name

    @property
    def config(self) -> dict:
        return self.checkpoint.configs[self.part]

    @property
    def device_bytes(self) -> int:
        """What the next call will take of this machine's memory: the checkpoint's, unless it is loaded or goes elsewhere."""
        if self.spec.ssh or dict(self.spec.options).get("target") != "cpu" or self.worker.has(self.file):
            return 0
        return self._bytes

    @cached_property
    def _bytes(self) -> int:
        return sum(ITEM_BYTES[VAE_PRECISION if part == "vae" else self.precision] * math.prod(one.shape)
                   for part in PARTS for one in self.checkpoint.parameters(part))

    def run(self, feeds: Mapping[str, np.ndarray], outputs: Mapping[str, tuple[int, ...]],
            resident: Set[str] = frozenset(), poll: Poll = NO_POLL) -> list[np.ndarray]:
        """One call: float32 (or int32) arrays by name -> float32 arrays of the shapes given by name, in that order."""
        wanted = [(name, "float32", shape) for name, shape in outputs.items()]
        answers = self.worker.run(self.file, self.name, _feeds(feeds, resident), wanted, poll)
        return [from_wire(*answer) for answer in answers]

    def perform(self, program: str, feeds: Mapping[str, np.ndarray], settings: dict, resident: Set[str], poll: Poll,
                progress: Callable[[dict], None]) -> list[np.ndarray]:
        """A program of the worker: arrays -> arrays, with reports on the way; see Worker.perform."""
        answers = self.worker.perform(self.file, program, _feeds(feeds, resident), settings, poll, progress)
        return [from_wire(*answer) for answer in answers]

    def release(self) -> None:
        """Free the device now, of the whole checkpoint; the next call loads it again."""
        self.worker.unload(self.file)


def _feeds(arrays: Mapping[str, np.ndarray], resident: Set[str]) -> list[Feed]:
    feeds = []
    for name, array in arrays.items():
        dtype = "int32" if array.dtype.kind == "i" else "float32"
        data = to_wire(array, dtype)
        digest = digest_of(dtype, array.shape, data) if name in resident else ""
        feeds.append(Feed(name, dtype, tuple(array.shape), data, digest))
    return feeds


class SDXLStage(Stage):
    nature = "runs on MindSpore, out of ComfyUI's reach"
    instead = "apply it to a stock checkpoint and load the file that CheckpointSave makes of it"
    overflow = ("half precision overflows in some networks, load it with precision float32 or bfloat16, and if it has that, "
                "its file is damaged")

    def __init__(self, network: Network, poll: Poll = NO_POLL):
        super().__init__([network], poll)
        self.network = network

    def runs_on(self) -> str:
        return f"{super().runs_on()}, {VAE_PRECISION if self.network.part == 'vae' else self.network.precision}"


class TextEncoder(SDXLStage):
    def __init__(self, network: Network, poll: Poll = NO_POLL):
        super().__init__(network, poll)
        self.title = "text encoder 2" if network.name == "text_encoder_2" else "text encoder 1"
        self.width = network.config["hidden_size"]
        self.layers = network.config["num_hidden_layers"]
        # Only the second one projects its pooled text.
        self.pooled_width = network.config["projection_dim"] if network.name == "text_encoder_2" else self.width

    def __call__(self, ids: np.ndarray, layer: int = PENULTIMATE) -> tuple[np.ndarray, np.ndarray]:
        """ids (B, 77) integers -> hidden (B, 77, width), pooled (B, pooled_width), float32.

        layer: -1 the output of the last layer, -2 of the one before, ..., each without the final norm; NORMED the last
        one's with it. The pooled text is that of the last layer, whatever `layer` is. Raises EngineError.
        """
        ids = check_ids(ids).astype(np.int32)
        shapes = {"hidden": (*ids.shape, self.width), "pooled": (len(ids), self.pooled_width)}
        hidden, pooled = self.network.run({"ids": ids, "layer": np.array([layer], np.int32)}, shapes, poll=self.poll)
        return self._finite(hidden, self.network), self._finite(pooled, self.network)


class UNet(SDXLStage):
    title = "U-Net"

    def __init__(self, network: Network, poll: Poll = NO_POLL):
        super().__init__(network, poll)
        self.channels = network.config["in_channels"]
        self.width = network.config["cross_attention_dim"]
        self.first_channels = network.config["block_out_channels"][0]
        self.vector_width = network.config["projection_class_embeddings_input_dim"]
        self.size_width = network.config["addition_time_embed_dim"]       # of each embedded size in the vector

    def check(self, latent: np.ndarray, context: np.ndarray, y: np.ndarray) -> None:
        """Raise EngineError unless this latent and this conditioning are what the U-Net takes."""
        if latent.ndim != 4 or latent.shape[1] != self.channels:
            raise EngineError(f"The U-Net in {self.names} takes latents of {self.channels} channels and was given an array "
                              f"of {'x'.join(map(str, latent.shape))}: use Empty Latent Image, or encode with the VAE that "
                              "belongs to it.")
        for width, wanted, what in ((context.shape[-1], self.width, "context"), (y.shape[-1], self.vector_width, "vector")):
            if width != wanted:
                raise EngineError(f"The conditioning's {what} is {width} wide and the U-Net in {self.names} takes {wanted}: "
                                  "use the CLIP that belongs to it.")

    def __call__(self, latent: np.ndarray, timestep: np.ndarray, context: np.ndarray, y: np.ndarray,
                 where: str = "") -> np.ndarray:
        """latent (B,C,h,w), timestep (B,), context (B,L,D), y (B,V) float32 -> prediction (B,C,h,w) float32.

        y is the pooled text and the six embedded sizes in one. `where` is added to errors about the numbers ("at step 3
        of 20"). Raises EngineError.
        """
        self.check(latent, context, y)
        check_sampled(latent, self.title, where)
        prediction, = self.network.run({"latent": latent, "timestep": timestep, "context": context, "y": y},
                                       {"prediction": latent.shape}, {"context", "y"}, self.poll)
        return self._finite(prediction, self.network, where)

    def sample(self, arrays: Mapping[str, np.ndarray], settings: dict, progress: Callable[[dict], None]) -> np.ndarray:
        """The whole loop of `loop.sample` in the worker: its arrays and settings -> latent (B,C,h,w) float32.

        `progress` gets its reports, one a step, in this thread; what it raises ends the run. Raises EngineError.
        """
        conditions = range(len(settings["conditions"]))
        for i in conditions:
            self.check(arrays["latent"], arrays[f"context.{i}"], arrays[f"y.{i}"])
        resident = {f"{what}.{i}" for i in conditions for what in ("context", "y")}
        latent, *_ = self.network.perform("sample", arrays, settings, resident, self.poll, progress)
        return self._finite(latent, self.network)


class VAEHalf(SDXLStage):
    given = wanted = ""             # the worker's names of what goes in and what comes out
    overflow = f"it computes in {VAE_PRECISION}, so its file is damaged, or what it was given is far from what it knows"

    def __init__(self, network: Network, poll: Poll = NO_POLL):
        super().__init__(network, poll)
        self.channels = network.checkpoint.latent_channels

    def _one_by_one(self, arrays: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """`shape` of each result, batch left out. A call a picture: the activations of a large one are gigabytes."""
        if not np.isfinite(arrays).all():
            raise EngineError(f"The {self.title} in {self.names} was given NaN or infinite values in its {self.given}: look "
                              "at the nodes before it.")
        rows = [self.network.run({self.given: row[None]}, {self.wanted: (1, *shape)}, poll=self.poll)[0] for row in arrays]
        return self._finite(np.concatenate(rows), self.network)

    def _refuse(self, what: str, array: np.ndarray, advice: str) -> EngineError:
        return EngineError(f"The {self.title} in {self.names} takes {what} and was given an array of "
                           f"{'x'.join(map(str, array.shape))}: {advice}.")


class VAEDecoder(VAEHalf):
    title, given, wanted = "VAE decoder", "latent", "image"

    def __call__(self, latent: np.ndarray) -> np.ndarray:
        """latent (B,C,h,w) float32, unscaled -> picture (B,3,8h,8w) float32, about [-1,1]."""
        if latent.ndim != 4 or latent.shape[1] != self.channels:
            raise self._refuse(f"latents of {self.channels} channels", latent, "use the VAE of the model that made it")
        height, width = latent.shape[-2:]
        return self._one_by_one(latent, (3, height * VAE_SCALE, width * VAE_SCALE))


class VAEEncoder(VAEHalf):
    title, given, wanted = "VAE encoder", "image", "latent"

    def __call__(self, picture: np.ndarray) -> np.ndarray:
        """picture (B,3,H,W) float32 in [-1,1], sizes multiples of 8 -> latent (B,C,H/8,W/8) float32, unscaled.

        The mean of what the encoder gives, without its variance, so that encoding repeats.
        """
        if picture.ndim != 4 or picture.shape[1] != 3:
            raise self._refuse("pictures of 3 channels", picture, "give it an ordinary IMAGE")
        height, width = picture.shape[-2:]
        return self._one_by_one(picture, (self.channels, height // VAE_SCALE, width // VAE_SCALE))


@dataclass(frozen=True, eq=False)
class SDXL:
    """A checkpoint on a device, stage by stage."""

    text_encoder_1: TextEncoder
    text_encoder_2: TextEncoder
    unet: UNet
    decoder: VAEDecoder
    encoder: VAEEncoder

    @property
    def stages(self) -> Sequence[SDXLStage]:
        return self.text_encoder_1, self.text_encoder_2, self.unet, self.decoder, self.encoder

    def describe(self) -> str:
        """Where it really runs: "SDXL: base.safetensors (CPU) on cpu, MindSpore 2.10.0, float32". Starts the worker."""
        return f"SDXL: {self.unet.runs_on()}"


def open_sdxl(checkpoint: Checkpoint, spec: WorkerSpec, precision: str = AUTO, poll: Poll = NO_POLL) -> SDXL:
    """The stages of a checkpoint on a worker; precision "auto" is float16 on Ascend and float32 on a CPU.

    Nothing is loaded yet. Raises CheckpointError if a part is missing.
    """
    checkpoint.require(*PARTS)
    if precision == AUTO:
        precision = "float16" if dict(spec.options).get("target") == "ascend" else "float32"

    def network(name: str) -> Network:
        return Network(checkpoint, name, spec, precision)
    return SDXL(TextEncoder(network("text_encoder"), poll), TextEncoder(network("text_encoder_2"), poll),
                UNet(network("unet"), poll), VAEDecoder(network("vae_decoder"), poll),
                VAEEncoder(network("vae_encoder"), poll))
