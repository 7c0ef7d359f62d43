"""Why two runs differ, by what their networks were given: each cause leaves its mark there.

What the first call of a stage gets shows what is wrong around the networks; later ones follow from answers that differ.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ..roles import ROLES
from ..stages import SD1_LATENT_SCALE
from . import causes
from .causes import CASTS, END, EXPLAINS, FINE, Finding, bfloat16, float16
from .compare import Pair, difference
from .recording import Call

ALIKE = 0.999        # cosine of arrays that differ by a factor and no more


def diagnose_runs(pairs: Sequence[Pair]) -> list[Finding]:
    """What two runs show, in the order of the stages; the first of a kind for each stage."""
    found: dict[tuple[str, str], Finding] = {}
    for finding in _all(pairs):
        found.setdefault((finding.cause, finding.stage), finding)
    # Runs that never belonged together explain every other difference, except that of values that are not finite.
    others = [f for f in found.values() if f.cause == "other_run"]
    return [f for f in found.values() if not others or f.cause in ("other_run", "overflow")]


def _all(pairs: Sequence[Pair]) -> Iterator[Finding]:
    of = {stage: [pair for pair in pairs if pair.reference.stage == stage] for stage in ROLES}
    for pair in of["text_encoder"]:
        yield from _ids(pair)
    if of["unet"]:
        yield from _timesteps(of["unet"])
        first = of["unet"][0]
        yield from _first_latent(first, of["vae_encoder"])
        yield from _conditions(first)
        yield from _residuals(first)
    for pair in of["vae_decoder"]:
        yield from _scaled("vae_decoder", pair.reference.inputs["latent"], pair.candidate.inputs["latent"])
    for pair in of["vae_encoder"]:
        yield from _cast(pair, "image", "picture")
        yield from _scaled("vae_encoder", pair.reference.outputs["latent"], pair.candidate.outputs["latent"])
    yield from _overflow([pair.candidate for pair in pairs])


# Text encoder --------------------------------------------------------------------------------------------------------


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


# U-Net ---------------------------------------------------------------------------------------------------------------


def _timesteps(pairs: Sequence[Pair]) -> Iterator[Finding]:
    known = []
    for pair in pairs:
        if "timestep" in pair.reference.inputs and "timestep" in pair.candidate.inputs:
            # one a call: the rows of a step share it
            known.append((pair, *(float(call.inputs["timestep"].flat[0]) for call in (pair.reference, pair.candidate))))
    wrong = [(pair, wanted, got) for pair, wanted, got in known if wanted != got]
    if not wrong:
        return
    pair, wanted, got = wrong[0]
    step, shown = pair.reference.facts.get("step"), f"{got:g} where the reference has {wanted:g}"
    wanted_all, got_all = (np.array([item[i] for item in known]) for i in (1, 2))
    if (got_all == np.rint(wanted_all)).all():
        yield Finding("timestep_fraction", "unet", f"The reference's schedule asks for fractional timesteps ({wanted:g}) "
                      f"and the other run rounds them ({got:g}): a network with an integer timestep cannot do else; "
                      "compare with a schedule of whole timesteps.", step)
    elif abs(got - wanted) == 1 and (got_all - wanted_all == got - wanted).all():
        yield Finding("timestep_shift", "unet", f"The timesteps are off by one: {shown}; they count from 0 to 999.", step)
    elif (got_all == bfloat16(wanted_all)).all() or (got_all == float16(wanted_all)).all():
        yield Finding("cast", "unet", f"The timesteps go through a 16-bit float, which makes {got:g} of {wanted:g}: "
                      "pass them as integers.", step)
    elif (got_all != np.rint(got_all)).any():
        pair, wanted, got = next(item for item in wrong if item[2] != np.rint(item[2]))
        yield Finding("timestep_fraction", "unet", f"A timestep is no whole number: {got:.9g} where the reference has "
                      f"{wanted:g}; the network was trained on whole ones, round before the call and compile it with an "
                      "integer timestep.", pair.reference.facts.get("step"))
    else:
        yield _other("unet", f"their schedules differ (timestep {shown})", step)


def _first_latent(pair: Pair, encoded: Sequence[Pair]) -> Iterator[Finding]:
    theirs, ours = pair.reference, pair.candidate
    wanted, got = theirs.inputs["latent"], ours.inputs["latent"]
    if wanted.shape != got.shape:
        yield _other("unet", f"the first latent is {list(got.shape)} and the reference's {list(wanted.shape)}")
        return
    found = difference(got, wanted)
    if not found.finite or found.relative < FINE:
        return
    if known := [*_cast(pair, "latent", "latent"), *_scaled("unet", wanted, got)]:
        yield known[0]
        return
    if encoded and "sigma" in theirs.facts:      # image to image: only the picture's part of the latent is out of scale
        picture = encoded[0].reference.outputs["latent"].astype(np.float64)
        change = (got.astype(np.float64) - wanted)[:len(picture), :4]
        if change.shape == picture.shape and difference(change, picture).cosine ** 2 > ALIKE ** 2:
            right = SD1_LATENT_SCALE / np.sqrt(1 + float(theirs.facts["sigma"]) ** 2)      # as ComfyUI scales its input
            factor = 1 + float(np.vdot(change, picture) / np.vdot(picture, picture)) / right
            if said := causes.latent_scale("unet", factor):
                yield Finding("latent_scale", "unet", said, theirs.facts.get("step"))
                return
    if found.cosine < 0.99:
        yield _other("unet", "they do not start from the same latent: give both the same seed, size and picture", 1)


def _conditions(pair: Pair) -> Iterator[Finding]:
    theirs, ours = pair.reference, pair.candidate
    if "context" not in theirs.inputs or "context" not in ours.inputs:
        return
    wanted, got = theirs.inputs["context"], ours.inputs["context"]
    if wanted.shape != got.shape or len(wanted) % 2:
        return
    straight, crossed = difference(got, wanted), difference(got, np.roll(wanted, len(wanted) // 2, 0))
    if straight.relative > FINE and crossed.relative < EXPLAINS * straight.relative:
        yield Finding("conditions", "unet", "Condition and uncondition are exchanged: the U-Net gets the positive prompt's "
                      "context where the reference gets the negative one's; ComfyUI's order in a batch is uncondition "
                      "first.", theirs.facts.get("step"))


def _residuals(pair: Pair) -> Iterator[Finding]:
    theirs, ours = pair.reference.inputs, pair.candidate.inputs
    names, moved = [name for name in theirs if name.startswith("residual.") and name in ours], {}
    wanted = {name: theirs[name] for name in names}
    for name in names:
        got = ours[name]
        comparable = got.any() and np.isfinite(got).all()
        sources = [other for other in names if comparable and wanted[other].shape == got.shape]
        nearest = min(sources, key=lambda other: (difference(got, wanted[other]).relative, other != name), default=name)
        if nearest != name:
            moved[name] = nearest
    if moved:
        yield Finding("residual_order", "unet", causes.residual_order(moved), pair.reference.facts.get("step"))


# Several stages ------------------------------------------------------------------------------------------------------


def _scaled(stage: str, wanted: np.ndarray, got: np.ndarray) -> Iterator[Finding]:
    if wanted.shape != got.shape or not difference(got, wanted).cosine > 0.9:      # not: NaN, too, ends here
        return
    factor = float(np.vdot(got.astype(np.float64), wanted) / np.vdot(wanted.astype(np.float64), wanted))
    if said := causes.latent_scale(stage, factor):
        yield Finding("latent_scale", stage, said)


def _cast(pair: Pair, argument: str, what: str) -> Iterator[Finding]:
    stage, wanted, got = pair.reference.stage, pair.reference.inputs[argument], pair.candidate.inputs[argument]
    if wanted.shape != got.shape or not (wanted != got).any():
        return
    for name, cast in CASTS.items():
        # A torch network that computes in 16 bits is given them, which is no fault.
        if name != pair.candidate.facts.get("dtype") and (got == cast(wanted)).all():
            yield Finding("cast", stage, f"The {ROLES[stage]}'s {what} was cast to {name} before the network got it: pass "
                          "float32.")
            return


def _overflow(calls: Sequence[Call]) -> Iterator[Finding]:
    """The first call that answers with NaN or infinite values."""
    for call in calls:
        if all(np.isfinite(array).all() for array in call.outputs.values()):
            continue
        yield Finding("overflow", call.stage, causes.overflow(call), call.facts.get("step"))
        return


def _other(stage: str, how: str, step: int | None = None) -> Finding:
    return Finding("other_run", stage, f"The runs do not belong together: {how}.", step)
