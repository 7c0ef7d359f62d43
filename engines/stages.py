"""What the networks of Stable Diffusion mean: text encoder, U-Net, VAE decoder and encoder.

A stage takes whatever the graph brings (any batch, any size a file has, a fractional timestep, an odd picture size)
and feeds the compiled networks exactly what they take: numpy in, numpy out, errors in the words of the graph.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from .engine import Constant, Engine
from .errors import EngineError, NotFinite
from .roles import VAE_SCALE, family
from .tiling import run_tiled
from .workers import NO_POLL

Poll = Callable[[], None]
SD1_LATENT_SCALE = 0.18215   # standard deviation factor of the SD 1.x latent space (CompVis/stable-diffusion config)
VOCABULARY = 49408           # CLIP's byte pair encoding, start (49406) and end (49407) included


class Stage:
    """Networks of one role. `poll` is called while a device works and may raise to abandon the call."""

    title = ""
    # What a node is told that wants to change the networks: "... is compiled: its weights are fixed; or apply it ...".
    nature = "is compiled"
    instead = "apply it before compiling"
    # Why it may give NaN, and what to do.
    overflow = "half precision overflows in some networks, compile it as BF16 or F32"

    def __init__(self, engines: Sequence[Engine], poll: Poll = NO_POLL):
        self.engines, self.poll = list(engines), poll

    @property
    def memory(self) -> dict[Path, int]:
        """What each file of this stage takes on the device, in bytes."""
        return {engine.path: engine.device_bytes for engine in self.engines}

    @property
    def names(self) -> str:
        return ", ".join(sorted({engine.path.name for engine in self.engines}))

    def release(self) -> None:
        for engine in self.engines:
            engine.release()

    def describe(self) -> str:
        """What really runs where: "U-Net: unet.bmodel (BM1684X) on simulator, libbmrt 1.0". Starts the worker."""
        return f"{self.title}: {self.runs_on()}"

    def runs_on(self) -> str:
        about = self.engines[0].worker.describe()
        chip = f" ({about['chip']})" if about["chip"] else ""
        return f"{self.names}{chip} on {self.engines[0].spec.name}, {about['runtime']} {about['version']}"

    def _finite(self, array: np.ndarray, engine: Engine, context: str = "") -> np.ndarray:
        if np.isfinite(array).all():
            return array
        what = "NaN" if np.isnan(array).any() else "infinite values"
        raise NotFinite(f"The {self.title} in {engine.path.name} returned {what}{context}: {self.overflow}.")


def chunks(total: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` rows; a free size (-1) takes all at once."""
    size = total if size < 0 else size
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


def pad_rows(array: np.ndarray, size: int) -> np.ndarray:
    """Repeat the last row up to `size` rows, so that a fixed-batch network has all its rows finite and alike."""
    missing = size - len(array)
    return array if missing <= 0 else np.concatenate([array, np.repeat(array[-1:], missing, 0)])


def check_ids(ids: np.ndarray) -> np.ndarray:
    """The ids as they are. Raises EngineError for one outside CLIP's vocabulary: a device would read past its table."""
    ids = np.asarray(ids)
    if ids.min() < 0 or ids.max() >= VOCABULARY:
        raise EngineError(f"A token id of {int(ids.max())} is outside CLIP's vocabulary of {VOCABULARY} ids.")
    return ids


def check_sampled(latent: np.ndarray, title: str, where: str) -> None:
    """Raise EngineError if what a sampler gives a U-Net is not finite, so that the network is not blamed for it."""
    if not np.isfinite(latent).all():
        raise EngineError(f"The sampler gave the {title} NaN or infinite values{where}, before the network ran: look at the "
                          "latent, the scheduler (kl_optimal needs 2 steps) and the nodes before it.")


class TextEncoder(Stage):
    title = "text encoder"

    def __init__(self, engine: Engine, poll: Poll = NO_POLL):
        super().__init__([engine], poll)
        self.engine = engine
        self.length = engine.shape("ids")[1]
        self.width = engine.shape("hidden")[-1]

    def __call__(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """ids (B, length) integers -> hidden (B, length, width) float32, pooled (B, P) float32 or None.

        Raises EngineError for ids outside CLIP's vocabulary.
        """
        ids = check_ids(ids)
        batch = self.engine.shape("ids")[0]
        hidden, pooled = [], []
        for rows in chunks(len(ids), batch):
            count = rows.stop - rows.start
            out = self.engine.run({"ids": pad_rows(ids[rows], batch)}, poll=self.poll)
            hidden.append(self._finite(out["hidden"][:count], self.engine))
            if "pooled" in out:
                pooled.append(out["pooled"][:count])
        return np.concatenate(hidden), np.concatenate(pooled) if pooled else None


class UNet(Stage):
    title = "U-Net"

    def __init__(self, engines: Sequence[Engine], poll: Poll = NO_POLL):
        super().__init__(engines, poll)
        # Every compiled (network, variant) with the latent size it takes; -1 where free.
        self.variants = [(engine, variant) for engine in engines for variant in range(engine.network.variants)]
        self.channels = self.engines[0].shape("latent")[1]
        self.width = self.engines[0].shape("context")[-1]
        self.family = family(self.engines[0].binding, self.engines[0].network)
        self._zeros: dict[tuple[int, ...], Constant] = {}

    @property
    def tokens(self) -> int:
        """How long a context it takes; -1 where free."""
        return self.engines[0].shape("context")[1]

    @property
    def residuals(self) -> int:
        """How many residuals of a ControlNet it adds to its skip connections; 0 for one that takes none."""
        return sum(role.startswith("residual.") and role != "residual.mid" for role in self.engines[0].binding.inputs)

    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) in pixels of every compiled size; empty if one of them is free."""
        found = {engine.shape("latent", variant)[-2:] for engine, variant in self.variants}
        return [] if any(-1 in size for size in found) else sorted((h * VAE_SCALE, w * VAE_SCALE) for h, w in found)

    def __call__(self, latent: np.ndarray, timestep: np.ndarray, context: np.ndarray,
                 residuals: dict[str, np.ndarray] | None = None, where: str = "") -> np.ndarray:
        """latent (B,C,h,w), timestep (B,), context (B,77n,D) float32 -> prediction (B,4,h,w) float32.

        A timestep goes to an integer network as the nearest integer, to a float network as it is. residuals: role
        ("residual.0" ... "residual.mid") -> (B,c,h',w') float32, zeros for those that are not given.
        `where` is added to errors about the numbers ("at step 3 of 20"). Raises EngineError.
        """
        if latent.shape[1] != self.channels:
            raise EngineError(f"The {self.title} in {self.names} takes {self.channels} latent channels and was given "
                              f"{latent.shape[1]}.")
        engine, variant = self._pick(latent.shape[-2:])
        check_sampled(latent, self.title, where)
        context = self._context(context, engine, variant)
        batch = engine.shape("latent", variant)[0]
        prediction = np.empty((len(latent), 4, *latent.shape[-2:]), np.float32)
        for rows in self._rows(timestep, batch, engine.shape("timestep", variant)):
            feeds = {"latent": pad_rows(latent[rows], batch), "context": pad_rows(context[rows], batch),
                     "timestep": self._timestep(timestep[rows], engine, variant)}
            for role in engine.binding.inputs:
                if role.startswith("residual."):
                    feeds[role] = (pad_rows(residuals[role][rows], batch) if role in (residuals or {})
                                   else self._zero(engine, role, variant, batch if batch > 0 else len(latent[rows])))
            out = engine.run(feeds, variant, resident={"context"}, poll=self.poll)["prediction"]
            prediction[rows] = self._finite(out[:rows.stop - rows.start], engine, where)
        return prediction

    def _pick(self, size: tuple[int, int]) -> tuple[Engine, int]:
        for engine, variant in self.variants:
            if all(have in (-1, want) for have, want in zip(engine.shape("latent", variant)[-2:], size)):
                return engine, variant
        height, width = size[0] * VAE_SCALE, size[1] * VAE_SCALE
        sizes = self.sizes()
        nearest = min(sizes, key=lambda s: abs(np.log(s[0] * s[1] / (height * width)))
                      + abs(np.log(s[0] * width / (s[1] * height))))
        raise SizeError((width, height), [(w, h) for h, w in sizes], (nearest[1], nearest[0]), self.names)

    def _context(self, context: np.ndarray, engine: Engine, variant: int) -> np.ndarray:
        _, length, width = engine.shape("context", variant)
        if context.shape[-1] != width:
            raise EngineError(f"The conditioning is {context.shape[-1]} wide and the U-Net in {self.names} takes "
                              f"{width}: use the text encoder that belongs to it.")
        if length in (-1, context.shape[1]):
            return context
        # Copies of all tokens carry nothing new, as attention weighs them alike: ComfyUI repeats conditions of different
        # length to a common multiple, and a short prompt is repeated for a network that takes longer ones.
        times, rest = divmod(length, context.shape[1])
        if not rest:
            return np.tile(context, (1, times, 1))
        times, rest = divmod(context.shape[1], length)
        if not rest and (context.reshape(len(context), times, length, width) == context[:, None, :length]).all():
            return context[:, :length]
        raise EngineError(f"The prompt's conditioning is {context.shape[1]} tokens long and the U-Net in {self.names} "
                          f"takes {length}: shorten the prompt, or set long_prompts to 'truncate' in the loader.")

    @staticmethod
    def _rows(timestep: np.ndarray, batch: int, shape: tuple[int, ...]) -> Iterator[slice]:
        """Chunks for one call each; a network with one timestep for the whole batch gets rows that share it."""
        if shape not in ((), (1,)):
            yield from chunks(len(timestep), batch)
            return
        edges = [0, *(np.flatnonzero(np.diff(timestep)) + 1).tolist(), len(timestep)]
        for start, stop in zip(edges, edges[1:]):
            for rows in chunks(stop - start, batch):
                yield slice(start + rows.start, start + rows.stop)

    @staticmethod
    def _timestep(timestep: np.ndarray, engine: Engine, variant: int) -> np.ndarray:
        if "int" in engine.dtype("timestep"):
            timestep = np.rint(timestep)     # the embedding was trained on exact integers (the first article's fix)
        shape = engine.shape("timestep", variant)
        if shape in ((), (1,)):
            return timestep[:1].reshape(shape)
        return pad_rows(timestep, shape[0])

    def _zero(self, engine: Engine, role: str, variant: int, batch: int) -> Constant:
        shape = (batch, *engine.shape(role, variant)[1:])
        if shape not in self._zeros:
            self._zeros[shape] = Constant(np.zeros(shape, np.float32))
        return self._zeros[shape]


class SizeError(EngineError):
    """The U-Net has no network of this size. Sizes are (width, height) in pixels, as the graph says them."""

    def __init__(self, asked: tuple[int, int], sizes: list[tuple[int, int]], nearest: tuple[int, int], names: str):
        listed = ", ".join(f"{w}x{h}" for w, h in sizes)
        super().__init__(f"The U-Net in {names} was compiled for pictures of {listed} and was asked for "
                         f"{asked[0]}x{asked[1]}: use {nearest[0]}x{nearest[1]}, the nearest, or add a file of that "
                         "size to its folder.")
        self.asked, self.sizes, self.nearest = asked, sizes, nearest


class ImageStage(Stage):
    """A VAE half: picks the compiled size that matches, else covers the picture with tiles of the best one."""

    argument = result = ""
    scale = (1, 1)

    def __init__(self, engines: Sequence[Engine], latent_scale_inside: bool = False, poll: Poll = NO_POLL):
        super().__init__(engines, poll)
        self.latent_factor = SD1_LATENT_SCALE if latent_scale_inside else 1.0
        self.variants = [(engine, variant) for engine in engines for variant in range(engine.network.variants)]

    def _pick(self, size: tuple[int, int]) -> tuple[Engine, int, tuple[int, int]]:
        """The engine and variant to use and its tile: an exact match, else the largest that fits, else the smallest."""
        found = []
        for engine, variant in self.variants:
            compiled = engine.shape(self.argument, variant)[-2:]
            tile = tuple(want if have == -1 else have for have, want in zip(compiled, size))
            if tile == tuple(size):
                return engine, variant, tile
            found.append((engine, variant, tile))
        fitting = [item for item in found if item[2][0] <= size[0] and item[2][1] <= size[1]]
        area = lambda item: item[2][0] * item[2][1]  # noqa: E731
        return max(fitting, key=area) if fitting else min(found, key=area)

    def _run(self, images: np.ndarray, overlap: int) -> np.ndarray:
        engine, variant, tile = self._pick(images.shape[-2:])
        batch = engine.shape(self.argument, variant)[0]
        results = []
        for rows in chunks(len(images), batch):
            def run(part: np.ndarray) -> np.ndarray:
                out = engine.run({self.argument: part}, variant, poll=self.poll)[self.result]
                return self._finite(out, engine)
            out = run_tiled(run, pad_rows(images[rows], batch), tile, overlap, self.scale)
            results.append(out[:rows.stop - rows.start])
        return np.concatenate(results)


class VAEDecoder(ImageStage):
    title, argument, result, scale = "VAE decoder", "latent", "image", (VAE_SCALE, 1)

    def __call__(self, latent: np.ndarray, overlap: int = 64) -> np.ndarray:
        """latent (B,4,h,w) float32, unscaled -> picture (B,3,8h,8w) float32, about [-1,1]. overlap: picture pixels."""
        return self._run(latent * np.float32(self.latent_factor), overlap // VAE_SCALE)


class VAEEncoder(ImageStage):
    title, argument, result, scale = "VAE encoder", "image", "moments", (1, VAE_SCALE)

    def __call__(self, picture: np.ndarray, overlap: int = 64) -> np.ndarray:
        """picture (B,3,8h,8w) float32 in [-1,1] -> latent (B,4,h,w) float32, unscaled. overlap: picture pixels.

        A network that returns moments (8 channels: mean, log variance) gives its mean, so that encoding repeats.
        """
        return self._run(picture, overlap)[:, :4] / np.float32(self.latent_factor)
