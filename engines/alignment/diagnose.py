"""Why two networks or two runs differ: the classic causes, each recognised by what would undo it.

Two runs show what goes wrong around the networks: each cause leaves its mark in what a network was given. What goes
wrong inside a network that can be called is found by trying: it is given what would undo a fault, and if its error then
falls to less than half, that fault it is. Rounding alone never passes this test, as undoing nothing adds an error.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, permutations

import numpy as np

from ..errors import EngineError
from ..roles import ROLES
from ..stages import SD1_LATENT_SCALE
from .compare import Networks, Pair, Row, difference
from .recording import Call, Recording

FINE = 3e-4          # relative error that needs no explanation: single precision in another order of summing
EXPLAINS = 0.5       # of the error may be left when a fault is undone
ALIKE = 0.999        # cosine of arrays that differ by a factor and no more
PROBES = 2           # calls of a stage to try each cause on
START, END = 49406, 49407


@dataclass(frozen=True)
class Finding:
    """A recognised cause. `sentence` says what is wrong and what to do; `cause` is its key in CAUSES."""

    cause: str
    stage: str
    sentence: str
    step: int | None = None


CAUSES = {
    "timestep_fraction": "a timestep that is no whole number",
    "timestep_shift": "timesteps off by one",
    "timestep_ignored": "a timestep without effect",
    "cast": "values forced into a type that cannot hold them",
    "latent_scale": "the latent scale applied twice or not at all",
    "conditions": "condition and uncondition exchanged",
    "residual_order": "ControlNet residuals in another order",
    "residual_ignored": "ControlNet residuals without effect",
    "padding": "tokens padded with another id",
    "overflow": "NaN or infinite values",
    "other_run": "runs that do not belong together",
}


def bfloat16(array: np.ndarray) -> np.ndarray:
    """Values as bfloat16 holds them (8 bits, nearest even), as float32."""
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)


def float16(array: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.asarray(array).astype(np.float16).astype(np.float32)


CASTS = {"bfloat16": bfloat16, "float16": float16, "a whole number": np.trunc, "the nearest whole number": np.rint}


# Two runs ------------------------------------------------------------------------------------------------------------


def diagnose_runs(pairs: Sequence[Pair]) -> list[Finding]:
    """What two runs show, in the order of the stages; the first of a kind for each stage."""
    found: dict[tuple[str, str], Finding] = {}
    for finding in _in_runs(pairs):
        found.setdefault((finding.cause, finding.stage), finding)
    # Runs that never belonged together explain every other difference, except that of values that are not finite.
    others = [f for f in found.values() if f.cause == "other_run"]
    return [f for f in found.values() if not others or f.cause in ("other_run", "overflow")]


def _in_runs(pairs: Sequence[Pair]) -> Iterator[Finding]:
    of = {stage: [pair for pair in pairs if pair.reference.stage == stage] for stage in ROLES}
    for pair in of["text_encoder"]:
        yield from _ids(pair)
    if of["unet"]:
        yield from _timesteps(of["unet"])
        yield from _first_unet_call(of["unet"][0], of["vae_encoder"])
    for pair in of["vae_decoder"]:
        yield from _scaled("vae_decoder", pair.reference.inputs["latent"], pair.candidate.inputs["latent"])
    for pair in of["vae_encoder"]:
        yield from _cast("vae_encoder", "picture", pair.reference.inputs["image"], pair.candidate.inputs["image"])
        yield from _scaled("vae_encoder", pair.reference.outputs["latent"], pair.candidate.outputs["latent"])
    yield from _overflow([pair.candidate for pair in pairs])


def _ids(pair: Pair) -> Iterator[Finding]:
    wanted, got = pair.reference.inputs["ids"], pair.candidate.inputs["ids"]
    if wanted.shape != got.shape:
        yield _other("text_encoder", f"the text encoder gets {got.shape[0]} sections of {got.shape[1]} tokens instead of "
                                     f"{wanted.shape[0]} of {wanted.shape[1]}")
        return
    wrong = wanted != got
    if not wrong.any():
        return
    for name, cast in CASTS.items():
        if (got == cast(wanted)).all():
            yield Finding("cast", "text_encoder", f"The token ids go through {name}, which makes {int(got[wrong][0])} of "
                          f"{int(wanted[wrong][0])}: pass them as integers.")
            return
    ended = np.cumsum(wanted == END, axis=1) - (wanted == END) > 0       # everything after the first END
    pads = set(got[wrong].tolist())
    if (ended | ~wrong).all() and len(pads) == 1:
        yield Finding("padding", "text_encoder", f"The prompt is padded with token {pads.pop()} where the reference pads "
                      f"with {int(wanted[wrong][0])}: SD 1.x was trained with its end token {END} as padding (0 is that of "
                      "SD 2.x), use the tokenizer of the model's family.")
        return
    yield _other("text_encoder", f"their prompts differ (token {int(got[wrong][0])} where the reference has "
                                 f"{int(wanted[wrong][0])})")


def _timesteps(pairs: Sequence[Pair]) -> Iterator[Finding]:
    known = [(pair, *(np.ravel(call.inputs["timestep"]).astype(np.float64) for call in (pair.reference, pair.candidate)))
             for pair in pairs if "timestep" in pair.reference.inputs and "timestep" in pair.candidate.inputs]
    known = [(pair, wanted[:1], got[:1]) for pair, wanted, got in known]       # one a call: rows of a step share it
    wrong = [(pair, wanted, got) for pair, wanted, got in known if wanted != got]
    if not wrong:
        return
    pair, wanted, got = wrong[0]
    step, shown = pair.reference.facts.get("step"), f"{got[0]:g} where the reference has {wanted[0]:g}"
    wanted_all, got_all = (np.concatenate([item[i] for item in known]) for i in (1, 2))
    if (got_all == np.rint(wanted_all)).all():
        yield Finding("timestep_fraction", "unet", f"The reference's schedule asks for fractional timesteps ({wanted[0]:g}) "
                      f"and the other run rounds them ({got[0]:g}): a network with an integer timestep cannot do else; "
                      "compare with a schedule of whole timesteps.", step)
    elif (got_all - wanted_all == got[0] - wanted[0]).all() and abs(got[0] - wanted[0]) == 1:
        yield Finding("timestep_shift", "unet", f"The timesteps are off by one: {shown}; they count from 0 to 999.", step)
    elif (got_all == bfloat16(wanted_all)).all() or (got_all == float16(wanted_all)).all():
        yield Finding("cast", "unet", f"The timesteps go through a 16-bit float, which makes {got[0]:g} of {wanted[0]:g}: "
                      "pass them as integers.", step)
    elif (got_all != np.rint(got_all)).any():
        place = next(item for item in wrong if item[2] != np.rint(item[2]))
        yield Finding("timestep_fraction", "unet", f"A timestep is no whole number: {place[2][0]:.9g} where the reference "
                      f"has {place[1][0]:g}; the network was trained on whole ones, round before the call and compile it "
                      "with an integer timestep.", place[0].reference.facts.get("step"))
    else:
        yield _other("unet", f"their schedules differ (timestep {shown})", step)


def _first_unet_call(pair: Pair, encoded: Sequence[Pair]) -> Iterator[Finding]:
    """Before the networks could have changed anything but the context."""
    theirs, ours = pair.reference, pair.candidate
    yield from _latent(theirs, ours, encoded)
    if "context" in theirs.inputs and "context" in ours.inputs:
        wanted, got = theirs.inputs["context"], ours.inputs["context"]
        if wanted.shape == got.shape and len(wanted) % 2 == 0:
            straight, crossed = difference(got, wanted), difference(got, np.roll(wanted, len(wanted) // 2, 0))
            if straight.relative > FINE and crossed.relative < EXPLAINS * straight.relative:
                yield Finding("conditions", "unet", "Condition and uncondition are exchanged: the U-Net gets the positive "
                              "prompt's context where the reference gets the negative one's; ComfyUI's order in a batch is "
                              "uncondition first.", theirs.facts.get("step"))
    yield from _residuals_of_runs(theirs, ours)


def _latent(theirs: Call, ours: Call, encoded: Sequence[Pair]) -> Iterator[Finding]:
    wanted, got = theirs.inputs["latent"], ours.inputs["latent"]
    if wanted.shape != got.shape:
        yield _other("unet", f"the first latent is {list(got.shape)} and the reference's {list(wanted.shape)}")
        return
    found = difference(got, wanted)
    if not found.finite or found.relative < FINE:
        return
    if casts := list(_cast("unet", "latent", wanted, got)):
        yield from casts
        return
    if scaled := list(_scaled("unet", wanted, got)):
        yield from scaled
        return
    if encoded and "sigma" in theirs.facts:      # image to image: only the picture's part of the latent is out of scale
        picture = encoded[0].reference.outputs["latent"].astype(np.float64)
        change = (got.astype(np.float64) - wanted)[:len(picture), :4]
        if change.shape == picture.shape and difference(change, picture).cosine ** 2 > ALIKE ** 2:
            right = SD1_LATENT_SCALE / np.sqrt(1 + float(theirs.facts["sigma"]) ** 2)      # as ComfyUI scales its input
            factor = 1 + float(np.vdot(change, picture) / np.vdot(picture, picture)) / right
            if said := _scale_sentence("unet", factor):
                yield Finding("latent_scale", "unet", said, theirs.facts.get("step"))
                return
    if found.cosine < 0.99:
        yield _other("unet", "they do not start from the same latent: give both the same seed, size and picture", 1)


def _scaled(stage: str, wanted: np.ndarray, got: np.ndarray) -> Iterator[Finding]:
    if wanted.shape != got.shape or not difference(got, wanted).cosine > 0.9:      # not: NaN, too, ends here
        return
    factor = float(np.vdot(got.astype(np.float64), wanted) / np.vdot(wanted.astype(np.float64), wanted))
    if said := _scale_sentence(stage, factor):
        yield Finding("latent_scale", stage, said)


def _scale_sentence(stage: str, factor: float) -> str:
    """The sentence for latents that are `factor` times what they should be; empty if that is not SD's scale."""
    if abs(factor / SD1_LATENT_SCALE - 1) > 0.1 and abs(factor * SD1_LATENT_SCALE - 1) > 0.1:
        return ""
    # What scales: into the U-Net latents are multiplied by 0.18215, before the decoder they are divided by it.
    twice = (factor < 1) == (stage in ("unet", "vae_encoder"))
    where = {"unet": "the U-Net's latent", "vae_decoder": "the VAE decoder's latent",
             "vae_encoder": "the VAE encoder's result"}[stage]
    told = ("is applied twice: leave it to one place" if twice else "is not applied at all: apply it once")
    return (f"SD's latent scale {SD1_LATENT_SCALE} {told}; {where} is {factor:.4g} times the reference's (with Load VAE "
            "(Sophgo) choose the other latent_scale).")


def _cast(stage: str, what: str, wanted: np.ndarray, got: np.ndarray) -> Iterator[Finding]:
    if wanted.shape != got.shape or not (wanted != got).any():
        return
    for name, cast in CASTS.items():
        if (got == cast(wanted)).all():
            yield Finding("cast", stage, f"The {ROLES[stage]}'s {what} was cast to {name} before the network got it: pass "
                          "float32.")
            return


def _residuals_of_runs(theirs: Call, ours: Call) -> Iterator[Finding]:
    names = [name for name in theirs.inputs if name.startswith("residual.") and name in ours.inputs]
    wanted, moved = {name: theirs.inputs[name] for name in names}, {}
    for name in names:
        got = ours.inputs[name]
        sources = [other for other in names if wanted[other].shape == got.shape and got.any()]
        nearest = min(sources, key=lambda other: (difference(got, wanted[other]).relative, other != name), default=name)
        if nearest != name:
            moved[name] = nearest
    if moved:
        yield Finding("residual_order", "unet", _moved_sentence(moved), theirs.facts.get("step"))


def _moved_sentence(moved: Mapping[str, str]) -> str:
    told = ", ".join(f"{source} as {name}" for name, source in sorted(moved.items()))
    return (f"ControlNet residuals are in another order: the U-Net gets {told}; the order is the 12 of the way down, first "
            "to last, and the middle one, which Sophgo's files take first and ControlNets give last.")


def _overflow(calls: Sequence[Call]) -> Iterator[Finding]:
    """The first call that answers with NaN or infinite values."""
    for call in calls:
        if all(np.isfinite(array).all() for array in call.outputs.values()):
            continue
        given = [name for name, array in call.inputs.items() if not np.isfinite(array).all()]
        step = call.facts.get("step")
        if given:
            yield Finding("overflow", call.stage, f"The {ROLES[call.stage]} was given NaN or infinite values{call.where} "
                          f"({', '.join(given)}): look at what comes before it.", step)
        else:
            yield Finding("overflow", call.stage, _overflow_sentence(call, None), step)
        return


def _overflow_sentence(call: Call, layer: str | None) -> str:
    layer = f", first in its layer '{layer}'" if layer else ""
    return (f"The {ROLES[call.stage]} answers finite inputs with NaN or infinite values{call.where}{layer}: half precision "
            "overflows beyond 65504, compile it as BF16 or F32.")


def _other(stage: str, how: str, step: int | None = None) -> Finding:
    return Finding("other_run", stage, f"The runs do not belong together: {how}.", step)


# A network that can be called ----------------------------------------------------------------------------------------


def diagnose_networks(reference: Recording, networks: Networks, rows: Sequence[Row]) -> list[Finding]:
    """Why the networks differ from the recording, given the teacher-forced rows; one finding a stage at most.

    Costs some ten calls of a stage that differs, none of one that does not. A network may have `locate(call)`, which
    names the first layer whose output is not finite. Raises EngineError.
    """
    found = []
    for stage, network in networks.items():
        calls, worst = reference.of(stage), _worst(rows, stage)
        broken = [number for number, error in worst.items() if not np.isfinite(error)]
        if broken:
            call = calls[min(broken)]
            layer = getattr(network, "locate", lambda call: None)(call)
            found.append(Finding("overflow", stage, _overflow_sentence(call, layer), call.facts.get("step")))
        elif worst and max(worst.values()) > FINE:
            # The call that differs most, and one from the middle: a cause must explain both.
            chosen = dict.fromkeys([max(worst, key=worst.get), sorted(worst)[len(worst) // 2], *sorted(worst)])
            found += list(_Probe(network, stage, [calls[number] for number in chosen]).findings())[:1]
    return found


def _worst(rows: Sequence[Row], stage: str) -> dict[int, float]:
    """Call number -> the largest relative error of its answers; infinite where they are not finite."""
    worst: dict[int, float] = {}
    for row in rows:
        if row.mode == "forced" and row.stage == stage:
            error = row.difference.relative if row.difference.finite else np.inf
            worst[row.number] = max(worst.get(row.number, 0.0), error)
    return worst


Change = Callable[[Call], Mapping[str, np.ndarray]]


class _Probe:
    """Tries causes on a network that differs. `calls`: those of the stage, the first PROBES to be tried first."""

    def __init__(self, network, stage: str, calls: Sequence[Call]):
        self.network, self.stage, self.calls = network, stage, list(calls)
        self._plain: dict[int, Mapping[str, np.ndarray]] = {}

    def findings(self) -> Iterator[Finding]:
        tries = {"text_encoder": [self._ids], "vae_decoder": [self._scale, self._integers],
                 "vae_encoder": [self._scaled_answer, self._integers],
                 "unet": [self._conditions, self._timestep_shift, self._timestep_rounding, self._integers, self._residuals]}
        for attempt in tries.get(self.stage, []):
            yield from attempt()

    # -- tools
    def plain(self, call: Call) -> Mapping[str, np.ndarray]:
        if id(call) not in self._plain:
            self._plain[id(call)] = self.network(call)
        return self._plain[id(call)]

    def run(self, call: Call, **changed: np.ndarray) -> Mapping[str, np.ndarray]:
        return self.network(replace(call, inputs={**call.inputs, **changed}))

    def error(self, answers: Mapping[str, np.ndarray], call: Call) -> float:
        found = [difference(answers[array], call.outputs[array]) for array in call.outputs if array in answers]
        return max((d.relative if d.finite else np.inf for d in found), default=np.inf)

    def left(self, calls: Sequence[Call], change: Change) -> float:
        """The part of the error that is left when the calls' inputs are changed: below EXPLAINS says that this is it."""
        before = sum(self.error(self.plain(call), call) for call in calls)
        try:
            return sum(self.error(self.run(call, **change(call)), call) for call in calls) / before
        except EngineError:
            return np.inf               # a network may refuse what it is never given

    def blind(self, call: Call, **changed: np.ndarray) -> bool:
        """Whether a change makes no difference at all to the answer."""
        plain, other = self.plain(call), self.run(call, **changed)
        return all(np.array_equal(plain[array], other[array]) for array in plain)

    def finding(self, cause: str, sentence: str, call: Call | None = None) -> Finding:
        return Finding(cause, self.stage, sentence, (call or self.calls[0]).facts.get("step"))

    # -- causes
    def _ids(self) -> Iterator[Finding]:
        call = self.calls[0]
        ids = np.array(call.inputs["ids"])
        if (ids[:, -1] == END).any():
            ids[:, -1] = START
            if self.blind(call, ids=ids):
                yield self.finding("cast", f"The text encoder cannot tell token {START} from {END}: inside it the ids go "
                                   "through a 16-bit float; look the tokens up by integers.", call)

    def _conditions(self) -> Iterator[Finding]:
        calls = [call for call in self.calls if len(call.inputs["latent"]) % 2 == 0
                 and len(call.inputs["latent"]) == len(call.inputs.get("context", ()))][:PROBES]
        # Exchanged contexts, rather than answers, so that halves with different latents count too.
        if calls and self.left(calls, lambda call: {
                "context": np.roll(call.inputs["context"], len(call.inputs["context"]) // 2, 0)}) < EXPLAINS:
            yield self.finding("conditions", "Condition and uncondition are exchanged: with the two halves of the context "
                               "exchanged this U-Net answers as the reference does; ComfyUI's order is uncondition first.")

    def _timestep_shift(self) -> Iterator[Finding]:
        calls = [call for call in self.calls if "timestep" in call.inputs
                 and ((call.inputs["timestep"] >= 1) & (call.inputs["timestep"] <= 998)).all()][:PROBES]
        if not calls:
            return
        left = {shift: self.left(calls, lambda call: {"timestep": call.inputs["timestep"] + np.float32(shift)})
                for shift in (1, -1)}
        shift = min(left, key=left.get)
        if left[shift] < EXPLAINS:
            yield self.finding("timestep_shift", f"This U-Net's timesteps are off by one: given timestep t{shift:+d} it "
                               "answers as the reference does at t; count them from 0 to 999.")

    def _timestep_rounding(self) -> Iterator[Finding]:
        """16-bit floats hold whole numbers up to 256 (bfloat16) or 2048 (float16)."""
        timed = [call for call in self.calls if "timestep" in call.inputs]
        odd = [call for call in timed if (bfloat16(call.inputs["timestep"]) != call.inputs["timestep"]).any()]
        for call in (odd or timed)[:1]:
            time = call.inputs["timestep"]
            near, far = bfloat16(time), np.where(time > 500, time - 400, time + 400).astype(np.float32)
            if odd and not self.blind(call, timestep=near):
                return
            if self.blind(call, timestep=far):
                yield self.finding("timestep_ignored", "The timestep has no effect on this U-Net's answer: it is fed stale "
                                   "data, or the input is not connected inside.", call)
            elif odd:
                yield self.finding("cast", f"This U-Net cannot tell timestep {time.flat[0]:g} from {near.flat[0]:g}: inside "
                                   "it the timestep goes through a 16-bit float; compile it with an integer timestep whose "
                                   "embedding is looked up.", call)

    def _integers(self) -> Iterator[Finding]:
        call, name = self.calls[0], "image" if self.stage == "vae_encoder" else "latent"
        for told, cast in (("truncates", np.trunc), ("rounds", np.rint)):
            if (cast(call.inputs[name]) != call.inputs[name]).any() and self.blind(call, **{name: cast(call.inputs[name])}):
                yield self.finding("cast", f"The {ROLES[self.stage]} {told} its {name} to whole numbers: it was given the "
                                   "dtype of another input; pass float32.", call)
                return

    def _scale(self) -> Iterator[Finding]:
        calls = self.calls[:PROBES]
        left = {factor: self.left(calls, lambda call: {"latent": call.inputs["latent"] * np.float32(factor)})
                for factor in (SD1_LATENT_SCALE, 1 / SD1_LATENT_SCALE)}
        factor = min(left, key=left.get)
        if left[factor] < EXPLAINS:
            # It needs the reference's latent times `factor`, so it is given 1 / factor times too much.
            yield self.finding("latent_scale", _scale_sentence(self.stage, 1 / factor))

    def _scaled_answer(self) -> Iterator[Finding]:
        call = self.calls[0]
        yield from _scaled(self.stage, call.outputs["latent"], self.plain(call)["latent"])

    def _residuals(self) -> Iterator[Finding]:
        call = next((call for call in self.calls if any(name.startswith("residual.") for name in call.inputs)), None)
        if call is None:
            return
        names = [name for name in call.inputs if name.startswith("residual.")]
        nothing = {name: np.zeros_like(call.inputs[name]) for name in names}
        if self.blind(call, **nothing):
            yield self.finding("residual_ignored", "The ControlNet's residuals have no effect on this U-Net's answer: the "
                               "network was compiled without them, or gets zeros.", call)
            return
        def reordered(moved: dict[str, str]) -> float:
            return self.left([call], lambda call: {name: call.inputs[source] for name, source in moved.items()})
        left = [(reordered(moved), number, moved) for number, moved in enumerate(_orders(call, names))]
        if left and min(left)[0] < EXPLAINS:
            # It answers rightly when given `source` as `name`: so it takes what is given as `name` for `source`.
            yield self.finding("residual_order", _moved_sentence({source: name for name, source in min(left)[2].items()}),
                               call)


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
