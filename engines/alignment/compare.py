"""Two networks over the same inputs, and two runs call by call.

Teacher-forced: a recording's inputs go through another network, so that each number is that network's own error.
Free-running: two runs are set side by side, each on its own trajectory, so that errors add up as they do in pictures.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..errors import EngineError, NotFinite
from ..roles import ROLES
from .recording import Call, Recording, RecordingError

FORCED, FREE = "forced", "free"
PLAIN = {FORCED: "teacher-forced", FREE: "free-running"}

# A network to compare: answers a recorded call by its stage, inputs and facts. {stage: network}
Networks = Mapping[str, Callable[[Call], Mapping[str, np.ndarray]]]


@dataclass(frozen=True)
class Difference:
    """Of an array from its reference, in float64: mean and largest absolute difference, root mean square of the
    difference over that of the reference, and cosine of the two as vectors; NaN where the array is not finite."""

    l1: float
    largest: float
    relative: float
    cosine: float

    @property
    def finite(self) -> bool:
        return not math.isnan(self.relative)


NOT_FINITE = Difference(math.nan, math.nan, math.nan, math.nan)


def difference(got: np.ndarray, wanted: np.ndarray, what: str = "an answer") -> Difference:
    """Raises EngineError, with `what` they are, where the shapes differ."""
    if got.shape != wanted.shape:
        raise EngineError(f"These cannot be compared: {what} is {list(got.shape)} and the reference's "
                          f"{list(wanted.shape)}; take the same model, size, batch and prompts.")
    a, b = got.astype(np.float64).ravel(), wanted.astype(np.float64).ravel()
    if not np.isfinite(a).all() or not np.isfinite(b).all():
        return NOT_FINITE
    error, norms = np.abs(a - b), np.linalg.norm(a) * np.linalg.norm(b)
    size = np.linalg.norm(b)
    relative = np.linalg.norm(error) / size if size else (math.inf if error.any() else 0.0)
    cosine = a @ b / norms if norms else float(not error.any())
    return Difference(float(error.mean()), float(error.max()), float(relative), float(min(cosine, 1.0)))


def psnr(picture: np.ndarray, reference: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of pictures in [0,1]; infinite for equal ones. Raises EngineError."""
    if picture.shape != reference.shape:
        raise EngineError(f"The pictures cannot be compared: one is {_size(picture)} and its reference {_size(reference)}.")
    error = float(np.mean((picture.astype(np.float64) - reference) ** 2))
    return math.inf if error == 0 else -10 * math.log10(error)


def _size(picture: np.ndarray) -> str:
    return "x".join(map(str, picture.shape))


@dataclass(frozen=True)
class Row:
    """How one array of one call differs. `number` counts the calls of the stage from 0; step (from 1) may be None."""

    mode: str
    stage: str
    number: int
    array: str                 # "prediction", "hidden", "image", ...; a free-running U-Net also has its input "latent"
    difference: Difference
    step: int | None = None
    steps: int | None = None

    @property
    def where(self) -> str:
        """"U-Net, step 3 of 20, prediction, free-running"."""
        step = f"step {self.step} of {self.steps}" if self.step else f"call {self.number + 1}"
        return f"{ROLES[self.stage]}, {step}, {self.array}, {PLAIN[self.mode]}"


@dataclass
class Parity:
    """A whole comparison: what a table shows and a gate judges. `psnr` is of the final pictures, in dB."""

    reference: str
    candidate: str
    rows: list[Row] = field(default_factory=list)
    findings: list = field(default_factory=list)          # of causes.Finding
    notes: list[str] = field(default_factory=list)
    psnr: float | None = None

    def of(self, mode: str, stage: str, array: str) -> list[Row]:
        return [row for row in self.rows if (row.mode, row.stage, row.array) == (mode, stage, array)]


def forced(reference: Recording, networks: Networks, progress: Callable[[int, int], None] = lambda done, total: None
           ) -> Iterator[Row]:
    """Each recorded call through the network of its stage. progress(done, total) counts calls. Raises EngineError."""
    calls = [call for call in reference.calls if call.stage in networks]
    numbers = dict.fromkeys(ROLES, 0)
    for done, call in enumerate(calls):
        progress(done, len(calls))
        try:
            answers = networks[call.stage](call)
        except NotFinite:
            answers = None
        for array in call.outputs:
            if answers is None or array in answers:       # a compiled text encoder may lack the pooled text
                yield _row(FORCED, call, numbers[call.stage], array, None if answers is None else answers[array],
                           call.outputs[array])
        numbers[call.stage] += 1
    progress(len(calls), len(calls))


@dataclass(frozen=True, eq=False)
class Pair:
    """The same call in two runs."""

    number: int
    reference: Call
    candidate: Call


def free(pairs: Sequence[Pair]) -> Iterator[Row]:
    """What every call of two runs answered, and of the U-Net also the latent it was given."""
    for pair in pairs:
        ours, theirs = pair.candidate, pair.reference
        for mine, other in ((ours.inputs, theirs.inputs), (ours.outputs, theirs.outputs)):
            for array in other:
                if array in mine and (other is theirs.outputs or (ours.stage, array) == ("unet", "latent")):
                    yield _row(FREE, theirs, pair.number, array, mine[array], other[array])


def _row(mode: str, call: Call, number: int, array: str, got: np.ndarray | None, wanted: np.ndarray) -> Row:
    """`got` is None where the network's answer was refused as not finite."""
    what = f"the {ROLES[call.stage]}'s {array}{call.where}"
    found = NOT_FINITE if got is None else difference(got, wanted, what)
    return Row(mode, call.stage, number, array, found, call.facts.get("step"), call.facts.get("steps"))


def pairs(reference: Recording, candidate: Recording) -> list[Pair]:
    """The calls of two runs that belong together; stages that only one has are left out.

    Where one run sends condition and uncondition together and the other each alone, the parts are joined. Raises
    RecordingError for runs that are not of one kind.
    """
    found = []
    for stage in ROLES:
        ours, theirs = candidate.of(stage), reference.of(stage)
        if not ours or not theirs:
            continue
        if stage == "text_encoder":
            ours = _in_order(ours, theirs)
        matched = list(_matched(theirs, ours))
        if sum(len(a) for a, _ in matched) < len(theirs) and not candidate.full or (
                sum(len(b) for _, b in matched) < len(ours) and not reference.full):
            early = next((run for run in (reference, candidate) if run.stopped_at), None)
            advice = (f"'{early.name}' ends at {early.stopped_at}, so if its run was interrupted record it again"
                      if early else "record both with the same workflow, steps and batch size")
            wanted, got = f"{len(theirs)} times", f"{len(ours)} times"
            if wanted == got:
                wanted, got = (f"with {_rows(calls)} rows in all" for calls in (theirs, ours))
            raise RecordingError(f"The runs cannot be set side by side: '{reference.name}' calls the {ROLES[stage]} "
                                 f"{wanted} and '{candidate.name}' {got}; {advice}.")
        found += [Pair(number, _joined(a), _joined(b)) for number, (a, b) in enumerate(matched)]
    return found


def _in_order(ours: list[Call], theirs: list[Call]) -> list[Call]:
    """Calls with equal token ids at equal places: ComfyUI encodes the prompts of a graph in either order."""
    left, placed = list(ours), []
    for call in theirs:
        same = next((other for other in left if other.facts.get("part") == call.facts.get("part")
                     and np.array_equal(other.inputs["ids"], call.inputs["ids"])), None)
        placed.append(same)
        if same is not None:
            left.remove(same)
    return [call or left.pop(0) for call in placed if call or left] + left


def _matched(theirs: list[Call], ours: list[Call]) -> Iterator[tuple[list[Call], list[Call]]]:
    """As many calls of each run as make the same number of rows; ends where one run ends."""
    theirs, ours = iter(theirs), iter(ours)
    for a, b in zip(theirs, ours):
        left, right = [a], [b]
        while _rows(left) != _rows(right):
            short, rest = (left, theirs) if _rows(left) < _rows(right) else (right, ours)
            following = next(rest, None)
            if following is None or following.stage != "unet":
                return
            short.append(following)
        yield left, right


def _rows(calls: list[Call]) -> int:
    return sum(len(next(iter(call.inputs.values()))) for call in calls)


def _joined(calls: list[Call]) -> Call:
    """Calls of parts of a batch as one call, with the parts in ComfyUI's order, uncondition first."""
    first = calls[0]
    flags = [flag for call in calls for flag in call.facts.get("cond_or_uncond", ())]
    if len(calls) == 1 and flags == sorted(flags, reverse=True):
        return first
    order = np.argsort([-flag for flag in flags], kind="stable")

    def joined(side: str) -> dict[str, np.ndarray]:
        arrays = {name: np.concatenate([getattr(call, side)[name] for call in calls]) for name in getattr(first, side)}
        if not flags or any(len(array) % len(flags) for array in arrays.values()):
            return arrays
        return {name: np.concatenate([np.split(array, len(flags))[part] for part in order])
                for name, array in arrays.items()}
    return Call(first.stage, joined("inputs"), joined("outputs"),
                {**first.facts, "cond_or_uncond": [flags[part] for part in order]})


def judge(parity: Parity, min_cosine: float = 0.0, min_cosine_free: float = 0.0, min_psnr: float = 0.0) -> None:
    """Raises EngineError naming the first stage and step below a threshold, or not finite; 0 switches one off."""
    if not parity.rows and parity.psnr is None:
        raise EngineError("There is nothing to judge: the comparison has no call that both sides made.")
    causes = " ".join(finding.sentence for finding in parity.findings)
    for row in parity.rows:
        least = min_cosine if row.mode == FORCED else min_cosine_free
        if not row.difference.finite:
            raise EngineError(f"{_capital(row.where)}: NaN or infinite values. {causes}".strip())
        if least and row.difference.cosine < least:
            raise EngineError(f"{_capital(row.where)}: the cosine to the reference is {row.difference.cosine:.6f}, less "
                              f"than {least:g}. {causes}".strip())
    if min_psnr and parity.psnr is not None and parity.psnr < min_psnr:
        raise EngineError(f"The final picture has a PSNR of {parity.psnr:.1f} dB to the reference's, less than {min_psnr:g} "
                          f"dB. {causes}".strip())


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
