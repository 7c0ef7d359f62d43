"""What the networks of a run were given and what they answered, call by call, in one npz file.

A file is an ordinary .npz (float32 and int32 arrays, not compressed, no pickle). A run appends to it call by call, so that
a run that fails leaves everything up to its failure. Its members:

    about            JSON as uint8: {"version": 1, "name": ..., "networks": {stage: what ran}}
    NNNN             JSON as uint8, of call NNNN: stage, facts, and for inputs and outputs {argument: member}
    NNNN.argument    an array; one that equals an earlier one is that member, so a context is kept once
    full             empty; there if calls were left out because the file had reached its limit
"""
from __future__ import annotations

import hashlib
import json
import re
import threading
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..roles import ROLES
from . import LIMIT_BYTES, SUFFIX
from .archive import Archive, Arrays, RecordingError

VERSION = 1
NAME = re.compile(r"\w[\w .()+-]{0,99}")      # a file name on every system, with nothing of a path in it
UNKNOWN_TOKEN = -1                            # among ids: a token that is an embedding (textual inversion)
# What a call of each stage has at least, given and answered.
NEEDED = {"text_encoder": ({"ids"}, {"hidden"}), "unet": ({"latent", "timestep"}, {"prediction"}),
          "vae_decoder": ({"latent"}, {"image"}), "vae_encoder": ({"image"}, {"latent"})}
RANKS = {"ids": 2, "hidden": 2, "pooled": 2, "latent": 3, "context": 3, "prediction": 3, "image": 3}      # at least
MOST_PARTS = 1000                             # of a batch, and of ComfyUI's lists of residuals


@dataclass(frozen=True, eq=False)
class Call:
    """One call of one network.

    stage: a key of engines.roles.ROLES. inputs, outputs: float32, or int32 for token ids, by argument:
    text_encoder ids -> hidden, pooled; unet latent, timestep, context, residual.N, residual.mid -> prediction;
    vae_decoder latent -> image; vae_encoder image -> latent (its mean). Others keep the name the model gives them.
    facts: of a U-Net call step (from 1), steps, sigma, cond_or_uncond (for each part of the batch 0 condition, 1
    uncondition) and control (how long ComfyUI's lists of residuals are); of a text encoder part ("clip_l"); dtype, if a
    network is not given float32. Each may be missing.
    """

    stage: str
    inputs: Mapping[str, np.ndarray]
    outputs: Mapping[str, np.ndarray]
    facts: Mapping[str, object] = field(default_factory=dict)

    @property
    def where(self) -> str:
        """" at step 3 of 20", as errors and tables say it; empty for a stage without steps."""
        return f" at step {self.facts['step']} of {self.facts['steps']}" if "step" in self.facts else ""


@dataclass(frozen=True, eq=False)
class Recording:
    """The calls of one run, in their order. Arrays of a file are read when they are asked for."""

    name: str
    calls: tuple[Call, ...]
    networks: Mapping[str, str] = field(default_factory=dict)     # stage -> what ran
    full: bool = False                                            # calls after these were left out

    def of(self, stage: str) -> list[Call]:
        return [call for call in self.calls if call.stage == stage]

    @property
    def stopped_at(self) -> str:
        """"step 3 of 20" where the U-Net was not called for the last step; else empty."""
        for call in self.of("unet")[-1:]:
            if call.facts.get("step", 0) < call.facts.get("steps", 0):
                return call.where.removeprefix(" at ")
        return ""

    @classmethod
    def open(cls, path: Path | str) -> Recording:
        """Raises RecordingError for a file that is no recording."""
        archive = Archive(Path(path))
        about = archive.json("about")
        if about.get("version") != VERSION:
            raise RecordingError(f"{archive.path.name} is a recording of version {str(about.get('version'))[:20]} and this "
                                 f"pack reads version {VERSION}: record again.")
        try:
            calls = tuple(_call(archive, archive.json(member)) for member in archive.numbered())
            networks = {stage: str(about["networks"][stage])[:200] for stage in ROLES if stage in about["networks"]}
            return cls(str(about["name"])[:100], calls, networks, "full" in archive.members)
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
            raise archive.damaged() from error


def _call(archive: Archive, entry: dict) -> Call:
    """Raises KeyError, TypeError, AttributeError, ValueError for an entry that is none."""
    sides = [Arrays(archive, {str(k): str(v) for k, v in entry[side].items()}, RANKS) for side in ("inputs", "outputs")]
    for side, needed in zip(sides, NEEDED[entry["stage"]]):
        if not needed <= side.members.keys() or not set(side.members.values()) <= archive.members.keys():
            raise KeyError(entry["stage"])
    return Call(entry["stage"], *sides, _facts(entry["facts"]))


def _facts(said: Mapping[str, object]) -> dict:
    """The facts that Call speaks of, as the types they must have."""
    facts = {name: kind(said[name]) for name, kind in (("step", int), ("steps", int), ("sigma", float)) if name in said}
    facts |= {name: str(said[name])[:40] for name in ("part", "dtype") if name in said}
    if "cond_or_uncond" in said:
        facts["cond_or_uncond"] = [int(flag) for flag in said["cond_or_uncond"][:MOST_PARTS]]
    if "control" in said:
        facts["control"] = {str(place): min(int(length), MOST_PARTS) for place, length in said["control"].items()}
    return facts


def recording_path(name: str, folder: Path) -> Path:
    """The file of a recording called `name`. Raises RecordingError for a name that is more than a file name."""
    if not NAME.fullmatch(name) or name != name.rstrip(" ."):
        raise RecordingError(f"'{name[:80]}' cannot be the name of a recording: use letters, digits, spaces and "
                             "- _ . ( ) + in it, 100 at most.")
    return folder / f"{name}{SUFFIX}"


def known_ids(call: Call) -> np.ndarray:
    """A text encoder's ids. Raises RecordingError where one stands for an embedding, which is not kept."""
    if (call.inputs["ids"] == UNKNOWN_TOKEN).any():
        raise RecordingError("The recorded prompt names a textual inversion embedding, which is not kept: record one of "
                             "words only.")
    return call.inputs["ids"]


class Recorder:
    """Writes a run into `path`, call by call. The first call replaces a file that is there."""

    def __init__(self, path: Path, name: str, limit_bytes: int = LIMIT_BYTES):
        self.path, self.name, self.limit = path, name, limit_bytes
        self.networks: dict[str, str] = {}
        self.count = self.bytes = 0
        self.left_out = 0                     # calls that did not fit
        self.stages: set[str] = set()         # of which there is a call
        self._members: dict[str, str] = {}    # content hash -> member
        self._lock = threading.Lock()

    def add(self, stage: str, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray], **facts) -> None:
        """Keep one call. Raises RecordingError if the file cannot be written; a full one is no error (`left_out`)."""
        with self._lock:
            self.stages.add(stage)
            number = f"{self.count:04d}"
            entry = {"stage": stage, "facts": facts, "inputs": {}, "outputs": {}}
            fresh: dict[str, np.ndarray] = {}
            hashes: dict[str, str] = {}
            for side, arrays in (("inputs", inputs), ("outputs", outputs)):
                for argument, array in arrays.items():
                    array = storable(array)
                    digest = _digest(array)
                    member = self._members.get(digest) or hashes.get(digest)
                    if member is None:
                        member = f"{number}.{side[:-3]}.{argument}"
                        fresh[member], hashes[digest] = array, member
                    entry[side][argument] = member
            size = sum(array.nbytes for array in fresh.values())
            if self.left_out or self.bytes + size > self.limit:
                self.left_out += 1
                if self.left_out == 1:
                    self._write({"full": np.zeros(0, np.uint8)})
                return
            self._write({**fresh, number: _as_bytes(entry)})
            self._members.update(hashes)
            self.count, self.bytes = self.count + 1, self.bytes + size

    def silent(self) -> list[str]:
        """The networks that are recorded and have not been called yet, in words; of a VAE either half will do."""
        tapped = {ROLES[stage]: {stage} for stage in self.networks if not stage.startswith("vae")}
        if halves := {stage for stage in self.networks if stage.startswith("vae")}:
            tapped["VAE"] = halves
        return [title for title, stages in tapped.items() if not stages & self.stages]

    def recording(self) -> Recording:
        """What was recorded up to now. Raises RecordingError where that is nothing."""
        if not self.count:
            raise RecordingError(f"Nothing was recorded as '{self.name}' yet: connect the pictures of its run, so that the "
                                 "run comes first.")
        return Recording.open(self.path)

    def _write(self, members: dict[str, np.ndarray]) -> None:
        try:
            begin = not self.count
            if begin:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                about = {"version": VERSION, "name": self.name, "networks": self.networks}
                members = {"about": _as_bytes(about), **members}
            with zipfile.ZipFile(self.path, "w" if begin else "a", zipfile.ZIP_STORED) as archive:
                for name, array in members.items():
                    with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                        np.lib.format.write_array(file, array, version=(1, 0), allow_pickle=False)
        except OSError as error:
            raise RecordingError(f"The recording {self.path.name} could not be written ({error.strerror or error}): free "
                                 "some space, or lower its limit.") from error


def storable(array: np.ndarray) -> np.ndarray:
    """Floats as float32, whole numbers as int32: what a recording holds."""
    array = np.asarray(array)
    return np.ascontiguousarray(array, np.int32 if array.dtype.kind in "iub" else np.float32).reshape(array.shape)


def _digest(array: np.ndarray) -> str:
    digest = hashlib.sha256(f"{array.dtype}{array.shape}".encode())
    digest.update(array.data if array.size else b"")
    return digest.hexdigest()


def _as_bytes(value: dict) -> np.ndarray:
    return np.frombuffer(json.dumps(value).encode(), np.uint8)
