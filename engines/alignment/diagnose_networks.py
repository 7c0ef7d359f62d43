"""Why a network that can be called differs from a recording: it is given what would undo a fault.

If its error then falls to less than half, that fault it is. Rounding alone never passes this test, as undoing what was
never done adds an error. Or it is given inputs that differ only in what a fault would lose: if it answers both alike,
it has lost that.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations, islice, permutations

import numpy as np

from ..errors import EngineError
from ..roles import ROLES
from ..stages import SD1_LATENT_SCALE
from . import causes
from .causes import END, EXPLAINS, FINE, START, Finding, bfloat16
from .compare import FORCED, Networks, Row, difference
from .recording import Call, Recording

PROBES = 2           # calls of a stage to try each cause on


def diagnose_networks(reference: Recording, networks: Networks, rows: Sequence[Row]) -> list[Finding]:
    """Why the networks differ from the recording, given the teacher-forced rows; one finding a stage at most.

    Costs some ten calls of a stage that differs, thirty of a U-Net with ControlNet residuals, none of one that does not
    differ. A network may have `locate(call)`, which
    names the first layer whose output is not finite. Raises EngineError.
    """
    found = []
    for stage, network in networks.items():
        calls, worst = reference.of(stage), _worst(rows, stage)
        broken = [number for number, error in worst.items() if not np.isfinite(error)]
        if broken:
            call = calls[min(broken)]
            layer = getattr(network, "locate", lambda call: None)(call)
            found.append(Finding("overflow", stage, causes.overflow(call, layer), call.facts.get("step")))
        elif worst and max(worst.values()) > FINE:
            # The call that differs most, and one from the middle: a cause must explain both.
            chosen = dict.fromkeys([max(worst, key=worst.get), sorted(worst)[len(worst) // 2], *sorted(worst)])
            probe = Probe(network, stage, [calls[number] for number in chosen])
            found += islice((finding for attempt in ATTEMPTS[stage] for finding in attempt(probe)), 1)
    return found


def _worst(rows: Sequence[Row], stage: str) -> dict[int, float]:
    """Call number -> the largest relative error of its answers; infinite where they are not finite."""
    worst: dict[int, float] = {}
    for row in rows:
        if row.mode == FORCED and row.stage == stage:
            error = row.difference.relative if row.difference.finite else np.inf
            worst[row.number] = max(worst.get(row.number, 0.0), error)
    return worst


class Probe:
    """A network that differs, to try causes on. `calls`: those of the stage, the first PROBES to be tried first."""

    def __init__(self, network: Callable[[Call], Mapping[str, np.ndarray]], stage: str, calls: Sequence[Call]):
        self.network, self.stage, self.calls = network, stage, list(calls)
        self._plain: dict[int, Mapping[str, np.ndarray]] = {}

    def plain(self, call: Call) -> Mapping[str, np.ndarray]:
        """What it answers to a call as it was recorded."""
        if id(call) not in self._plain:
            self._plain[id(call)] = self.network(call)
        return self._plain[id(call)]

    def left(self, calls: Sequence[Call], change: Callable[[Call], Mapping[str, np.ndarray]]) -> float:
        """The part of the error that is left when the calls' inputs are changed: below EXPLAINS says that this is it."""
        before = sum(_error(self.plain(call), call) for call in calls)
        try:
            return sum(_error(self._changed(call, change(call)), call) for call in calls) / before
        except EngineError:
            return np.inf               # a network may refuse what it is never given

    def blind(self, call: Call, **changed: np.ndarray) -> bool:
        """Whether a change makes no difference at all to the answer."""
        plain = self.plain(call)
        try:
            other = self._changed(call, changed)
        except EngineError:
            return False
        return all(np.array_equal(plain[array], other[array]) for array in plain)

    def finding(self, cause: str, sentence: str, call: Call | None = None) -> Finding:
        return Finding(cause, self.stage, sentence, (call or self.calls[0]).facts.get("step"))

    def _changed(self, call: Call, inputs: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        return self.network(replace(call, inputs={**call.inputs, **inputs}))


def _error(answers: Mapping[str, np.ndarray], call: Call) -> float:
    found = [difference(answers[array], call.outputs[array]) for array in call.outputs if array in answers]
    return max((d.relative if d.finite else np.inf for d in found), default=np.inf)


# Text encoder --------------------------------------------------------------------------------------------------------


def _ids(probe: Probe) -> Iterator[Finding]:
    call = probe.calls[0]
    ids = np.array(call.inputs["ids"])
    if (ids[:, -1] == END).any():
        ids[:, -1] = START
        if probe.blind(call, ids=ids):
            yield probe.finding("cast", f"The text encoder cannot tell token {START} from {END}: inside it the ids go "
                                "through a 16-bit float; look the tokens up by integers.", call)


# U-Net ---------------------------------------------------------------------------------------------------------------


def _conditions(probe: Probe) -> Iterator[Finding]:
    calls = [call for call in probe.calls if len(call.inputs["latent"]) % 2 == 0
             and len(call.inputs["latent"]) == len(call.inputs.get("context", ()))][:PROBES]
    # Exchanged contexts, rather than answers, so that halves with different latents count too.
    if calls and probe.left(calls, lambda call: {
            "context": np.roll(call.inputs["context"], len(call.inputs["context"]) // 2, 0)}) < EXPLAINS:
        yield probe.finding("conditions", "Condition and uncondition are exchanged: with the two halves of the context "
                            "exchanged this U-Net answers as the reference does; ComfyUI's order is uncondition first.")


def _timestep_shift(probe: Probe) -> Iterator[Finding]:
    calls = [call for call in _timed(probe) if ((call.inputs["timestep"] >= 1) & (call.inputs["timestep"] <= 998)).all()]
    if not calls:
        return
    left = {shift: probe.left(calls[:PROBES], lambda call: {"timestep": call.inputs["timestep"] + np.float32(shift)})
            for shift in (1, -1)}
    shift = min(left, key=left.get)
    if left[shift] < EXPLAINS:
        yield probe.finding("timestep_shift", f"This U-Net's timesteps are off by one: given timestep t{shift:+d} it "
                            "answers as the reference does at t; count them from 0 to 999.")


def _timestep_rounding(probe: Probe) -> Iterator[Finding]:
    """16-bit floats hold whole numbers up to 256 (bfloat16) or 2048 (float16)."""
    timed = _timed(probe)
    odd = [call for call in timed if (bfloat16(call.inputs["timestep"]) != call.inputs["timestep"]).any()]
    for call in (odd or timed)[:1]:
        time = call.inputs["timestep"]
        near, far = bfloat16(time), np.where(time > 500, time - 400, time + 400).astype(np.float32)
        if odd and not probe.blind(call, timestep=near):
            return
        if probe.blind(call, timestep=far):
            yield probe.finding("timestep_ignored", "The timestep has no effect on this U-Net's answer: it is fed stale "
                                "data, or the input is not connected inside.", call)
        elif odd:
            yield probe.finding("cast", f"This U-Net cannot tell timestep {time.flat[0]:g} from {near.flat[0]:g}: inside "
                                "it the timestep goes through a 16-bit float; compile it with an integer timestep whose "
                                "embedding is looked up.", call)


def _timed(probe: Probe) -> list[Call]:
    return [call for call in probe.calls if "timestep" in call.inputs]


def _residuals(probe: Probe) -> Iterator[Finding]:
    call = next((call for call in probe.calls if any(name.startswith("residual.") for name in call.inputs)), None)
    if call is None:
        return
    names = [name for name in call.inputs if name.startswith("residual.")]
    if probe.blind(call, **{name: np.zeros_like(call.inputs[name]) for name in names}):
        yield probe.finding("residual_ignored", "The ControlNet's residuals have no effect on this U-Net's answer: the "
                            "network was compiled without them, or gets zeros.", call)
        return

    def reordered(moved: dict[str, str]) -> float:
        return probe.left([call], lambda call: {name: call.inputs[source] for name, source in moved.items()})
    left = [(reordered(moved), number, moved) for number, moved in enumerate(_orders(call, names))]
    if left and min(left)[0] < EXPLAINS:
        # It answers rightly when given `source` as `name`: so it takes what is given as `name` for `source`.
        yield probe.finding("residual_order", causes.residual_order({
            source: name for name, source in min(left)[2].items()}), call)


def _orders(call: Call, names: Sequence[str]) -> Iterator[dict[str, str]]:
    """Orders that mistakes make, among residuals of one shape: {residual: the one given in its place}."""
    groups: dict[tuple, list[str]] = {}
    for name in names:
        groups.setdefault(call.inputs[name].shape, []).append(name)
    groups = {shape: group for shape, group in groups.items() if len(group) > 1}
    backwards = {name: other for group in groups.values() for name, other in zip(group, reversed(group)) if name != other}
    if len(groups) > 1:
        yield backwards
    for group in groups.values():
        if len(group) <= 4:
            yield from ({name: other for name, other in zip(group, order) if name != other}
                        for order in permutations(group) if list(order) != group)
        else:
            yield from ({a: b, b: a} for a, b in combinations(group, 2))


# VAE -----------------------------------------------------------------------------------------------------------------


def _scale(probe: Probe) -> Iterator[Finding]:
    left = {factor: probe.left(probe.calls[:PROBES], lambda call: {"latent": call.inputs["latent"] * np.float32(factor)})
            for factor in (SD1_LATENT_SCALE, 1 / SD1_LATENT_SCALE)}
    factor = min(left, key=left.get)
    if left[factor] < EXPLAINS:
        # It needs the reference's latent times `factor`, so it is given 1 / factor times too much.
        yield probe.finding("latent_scale", causes.latent_scale(probe.stage, 1 / factor))


def _scaled_answer(probe: Probe) -> Iterator[Finding]:
    call = probe.calls[0]
    wanted, got = call.outputs["latent"].astype(np.float64), probe.plain(call)["latent"]
    if not difference(got, wanted).cosine > 0.9:
        return
    if said := causes.latent_scale(probe.stage, float(np.vdot(got, wanted) / np.vdot(wanted, wanted))):
        yield probe.finding("latent_scale", said)


# U-Net and VAE -------------------------------------------------------------------------------------------------------


def _integers(probe: Probe) -> Iterator[Finding]:
    call, name = probe.calls[0], "image" if probe.stage == "vae_encoder" else "latent"
    for told, cast in (("truncates", np.trunc), ("rounds", np.rint)):
        if (cast(call.inputs[name]) != call.inputs[name]).any() and probe.blind(call, **{name: cast(call.inputs[name])}):
            yield probe.finding("cast", f"The {ROLES[probe.stage]} {told} its {name} to whole numbers: it was given the "
                                "dtype of another input; pass float32.", call)
            return


ATTEMPTS = {"text_encoder": [_ids], "vae_decoder": [_scale, _integers], "vae_encoder": [_scaled_answer, _integers],
            "unet": [_conditions, _timestep_shift, _timestep_rounding, _integers, _residuals]}
