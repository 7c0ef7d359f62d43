"""A comparison as text: tables, what they amount to, and the causes found."""
from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from ..roles import ROLES
from .compare import FORCED, FREE, PLAIN, Parity, Row
from .recording import Recording

SINGLE = 3e-4          # relative errors up to here are those of single precision,
HALF = 3e-2            # and up to here those that 16-bit floats explain
MOST_ROWS = 64         # of a table; a longer run shows its first and last steps


def text(parity: Parity) -> str:
    """What the parity node shows and the command line prints."""
    blocks = ["\n".join(f"{side}  " + said.replace("\n", "\n" + " " * 11)
                        for side, said in (("reference", parity.reference), ("candidate", parity.candidate)))]
    for mode in (FORCED, FREE):
        rows = [row for row in parity.rows if row.mode == mode]
        if rows:
            blocks.append("\n".join([_TITLES[mode], *_table(rows)]))
    blocks.append("\n".join(f"- {line}" for line in summary(parity)))
    return "\n\n".join(block for block in blocks if block)


_TITLES = {FORCED: "Teacher-forced: the reference's inputs through the candidate",
           FREE: "Free-running: each run on its own trajectory"}


def summary(parity: Parity) -> Iterator[str]:
    """The comparison in sentences: growth, precision, pictures, causes, remarks."""
    forced = [row.difference for row in parity.of(FORCED, "unet", "prediction") if row.difference.finite]
    free = [row.difference for row in parity.of(FREE, "unet", "prediction") if row.difference.finite]
    if forced:
        mean = sum(d.relative for d in forced) / len(forced)
        yield (f"The U-Net's own relative error is {percent(mean)} a call: {_precision(mean)}." if mean else
               "The U-Net answers exactly as the reference does.")
    if len(free) > 1 and free[-1].relative:
        own = forced[-1].relative if len(forced) == len(free) else 0.0
        grown = f", {free[-1].relative / own:.1f} times its own error there" if own else ""
        yield (f"Over {len(free)} calls the two trajectories part: {percent(free[0].relative)} at the first call, "
               f"{percent(free[-1].relative)} at the last{grown}.")
    if parity.psnr is not None:
        yield ("The pictures are equal." if math.isinf(parity.psnr)
               else f"The pictures have a PSNR of {parity.psnr:.1f} dB.")
    yield from (finding.sentence for finding in parity.findings)
    if not parity.findings:
        yield "No classic cause of a difference was found."
    yield from parity.notes


def _precision(relative: float) -> str:
    if relative <= SINGLE:
        return "that of single precision"
    return "as 16-bit floats make it" if relative <= HALF else "more than 16-bit floats explain"


def percent(relative: float) -> str:
    """0.0031 -> "0.31 %", 0.000031 -> "0.0031 %"; two digits, however small."""
    if not relative:
        return "0 %"
    return f"{relative:.2%}".replace("%", " %") if relative >= 1e-3 else f"{100 * relative:.2g} %"


def _table(rows: Sequence[Row]) -> list[str]:
    cells = [("stage", "step", "array", "L1", "max", "relative", "cosine")]
    left_out = max(0, len(rows) - MOST_ROWS)
    for row in (rows if not left_out else [*rows[:MOST_ROWS // 2], *rows[-MOST_ROWS // 2:]]):
        d = row.difference
        numbers = ("not finite",)
        if d.finite:
            numbers = (f"{d.l1:.2e}", f"{d.largest:.2e}", f"{d.relative:.2e}", f"{d.cosine:.7f}")
        step = f"{row.step}/{row.steps}" if row.step else str(row.number + 1)
        cells.append((ROLES[row.stage], step, row.array, *numbers, *[""] * (4 - len(numbers))))
    widths = [max(len(cell) for cell in column) for column in zip(*cells)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in cells]
    if left_out:
        lines.insert(1 + MOST_ROWS // 2, f"... {left_out} more")
    return lines


def describe(recording: Recording) -> str:
    """What a recording holds, as text."""
    lines = [recording.name, *(f"  {ROLES.get(stage, stage):<13} {what}" for stage, what in recording.networks.items())]
    for stage, title in ROLES.items():
        calls = recording.of(stage)
        if calls:
            arrays = [f"{name} {list(array.shape)}" for side in (calls[0].inputs, calls[0].outputs)
                      for name, array in side.items()]
            shown = ", ".join(arrays[:6]) + (f" and {len(arrays) - 6} more" if len(arrays) > 6 else "")
            lines.append(f"  {len(calls)} call{'s' * (len(calls) > 1)} of the {title}: {shown}")
    if recording.stopped_at:
        lines.append(f"  It ends at {recording.stopped_at}.")
    if recording.full:
        lines.append("  Calls after these were left out: the recording had reached its limit.")
    return "\n".join(lines)


def as_json(parity: Parity) -> dict:
    """Everything in numbers, for scripts; not finite ones are null."""
    def number(value: float) -> float | None:
        return value if math.isfinite(value) else None
    return {
        "reference": parity.reference, "candidate": parity.candidate,
        "psnr": None if parity.psnr is None else number(parity.psnr), "notes": parity.notes,
        "findings": [vars(finding) for finding in parity.findings],
        "rows": [{"mode": PLAIN[row.mode], "stage": row.stage, "call": row.number, "step": row.step, "steps": row.steps,
                  "array": row.array, **{name: number(value) for name, value in vars(row.difference).items()}}
                 for row in parity.rows]}
