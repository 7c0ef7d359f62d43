"""The whole comparison of a recording with networks or with another recording, as node and command line make it."""
from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from ..errors import EngineError
from ..roles import ROLES
from . import NO_CAUSES, WHEN_DIFFERENT
from .compare import Networks, Pair, Parity, forced, free, pairs, psnr
from .diagnose_networks import diagnose_networks
from .diagnose_runs import diagnose_runs
from .recording import Recording


def align(reference: Recording, networks: Networks | None = None, candidate: Recording | None = None, *,
          names: Mapping[str, str] | None = None, pictures: tuple[np.ndarray, np.ndarray] | None = None,
          causes: str = WHEN_DIFFERENT, progress: Callable[[int, int], None] = lambda done, total: None) -> Parity:
    """networks: compared teacher-forced; names: what they are, by stage. candidate: compared free-running.

    pictures: the candidate's and the reference's (B,H,W,3) in [0,1], for the PSNR; without them it is taken from the
    decoders' answers, if both runs have some. progress(done, total) counts calls. Raises EngineError.
    """
    if not networks and candidate is None:
        raise EngineError("There is nothing to compare the recording with: connect a MODEL, CLIP or VAE, or the recording "
                          "of another run.")
    said = {**(candidate.networks if candidate else {}), **(names or {})}
    parity = Parity(_words(reference.name, reference.networks), _words(candidate.name if candidate else "", said))
    if networks:
        parity.rows += forced(reference, networks, progress)
        parity.notes += [f"The recording '{reference.name}' has no call of the {ROLES[stage]}, so that one is not compared."
                         for stage in networks if not reference.of(stage) and stage != "vae_encoder"]
        if causes != NO_CAUSES:
            parity.findings += diagnose_networks(reference, networks, parity.rows)
    if candidate is not None:
        matched = pairs(reference, candidate)
        if not matched:
            raise EngineError(f"The recordings '{reference.name}' and '{candidate.name}' have no stage in common.")
        found = diagnose_runs(matched) if causes != NO_CAUSES else []
        try:
            parity.rows += free(matched)
        except EngineError as error:      # shapes that differ have a reason
            raise EngineError(next((f.sentence for f in found if f.cause == "other_run"), str(error))) from error
        known = {(finding.cause, finding.stage) for finding in parity.findings}
        parity.findings += [finding for finding in found if (finding.cause, finding.stage) not in known]
        pictures = pictures or _pictures(matched)
    if pictures is not None:
        parity.psnr = psnr(*pictures)
    for recording in (reference, candidate):
        if recording is not None and recording.full:
            parity.notes.append(f"The recording '{recording.name}' had reached its limit: later calls are left out.")
    return parity


def _words(name: str, networks: Mapping[str, str]) -> str:
    """The name and, in lines below it, what ran; equal ones are said once."""
    same: dict[str, list[str]] = {}
    for stage, what in networks.items():
        same.setdefault(what, []).append(ROLES.get(stage, stage))
    return "\n".join(filter(None, [name, *(f"{', '.join(stages)}: {what}" for what, stages in same.items())]))


def _pictures(matched: list[Pair]) -> tuple[np.ndarray, np.ndarray] | None:
    """The last pictures decoded in each run, if they are of one size, as a VAE node gives them."""
    last = [pair for pair in matched if pair.reference.stage == "vae_decoder"][-1:]
    for pair in last:
        found = [np.clip((call.outputs["image"] + 1) / 2, 0, 1) for call in (pair.candidate, pair.reference)]
        if found[0].shape == found[1].shape and all(np.isfinite(picture).all() for picture in found):
            return found[0], found[1]
    return None
