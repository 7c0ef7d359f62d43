"""Line plots with Pillow alone: the parity node's picture, and those of the documents."""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

from PIL import Image, ImageDraw, ImageFont

from .compare import FORCED, FREE, Parity

WIDTH, HEIGHT = 560, 400          # of a panel, pixels
LEFT, RIGHT, TOP, BOTTOM = 70, 16, 40, 80
SHARPER = 3                       # drawn larger and reduced: Pillow's lines have hard edges
INK, FAINT, PAPER = "#222222", "#dddddd", "#ffffff"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")      # Okabe and Ito, for all eyes
ROUNDING = 1e-9                   # 1 - cosine of float32 answers means nothing below
DASHES = (None, (9, 5), (2, 4))


@dataclass(frozen=True)
class Line:
    """Points of a line; those that are not finite or, on a logarithmic axis, not above zero are left out."""

    label: str
    points: Sequence[tuple[float, float]]
    dash: int = 0                                  # index into DASHES
    colour: int | None = None                      # index into COLOURS; by position if None


@dataclass(frozen=True)
class Panel:
    title: str
    lines: Sequence[Line]
    across: str = "step"
    logarithmic: bool = True
    notes: Sequence[str] = field(default_factory=tuple)    # small, below the legend


def of_parity(parity: Parity) -> Image.Image:
    """L1 and 1 - cosine of the U-Net, call by call, forced and free; where there is no U-Net, of the other stages."""
    arrays = [("unet", "prediction")]
    if not any(row.stage == "unet" for row in parity.rows):
        arrays = list(dict.fromkeys((row.stage, row.array) for row in parity.rows))
    panels = []
    for title, measure in (("L1", lambda d: d.l1), ("1 - cosine", lambda d: d.cosine < 1 and max(1 - d.cosine, ROUNDING))):
        lines = []
        for colour, (mode, plain) in enumerate(((FORCED, "teacher-forced"), (FREE, "free-running"))):
            for dash, (stage, array) in enumerate(arrays):
                points = [(row.number + 1, measure(row.difference)) for row in parity.of(mode, stage, array)]
                if points:
                    named = plain if len(arrays) == 1 else f"{stage} {array}, {plain}"
                    lines.append(Line(named, points, dash % len(DASHES), colour))
        told = "U-Net prediction" if arrays[:1] == [("unet", "prediction")] else "answers"
        panels.append(Panel(f"{title} of the {told}", lines, "call"))
    return draw(panels, columns=1)


def draw(panels: Sequence[Panel], columns: int = 2) -> Image.Image:
    """The panels side by side, as RGB."""
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    sheet = Image.new("RGB", (columns * WIDTH, rows * HEIGHT), PAPER)
    for place, panel in enumerate(panels):
        sheet.paste(_panel(panel), (place % columns * WIDTH, place // columns * HEIGHT))
    return sheet


def _panel(panel: Panel) -> Image.Image:
    picture = Image.new("RGB", (WIDTH * SHARPER, HEIGHT * SHARPER), PAPER)
    pen = _Pen(ImageDraw.Draw(picture))
    lines = [[(x, y) for x, y in line.points if math.isfinite(y) and (y > 0 or not panel.logarithmic)]
             for line in panel.lines]
    points = [point for line in lines for point in line] or [(0, 1), (1, 1)]
    xs, ys = _Axis([x for x, _ in points], LEFT, WIDTH - RIGHT), _Axis([y for _, y in points], HEIGHT - BOTTOM, TOP,
                                                                      panel.logarithmic)
    for value, label in ys.ticks():
        pen.line([(LEFT, ys.at(value)), (WIDTH - RIGHT, ys.at(value))], FAINT)
        pen.text((LEFT - 8, ys.at(value)), label, "rm")
    for value, label in xs.ticks(whole=True):
        pen.line([(xs.at(value), HEIGHT - BOTTOM), (xs.at(value), HEIGHT - BOTTOM + 4)], INK)
        pen.text((xs.at(value), HEIGHT - BOTTOM + 8), label, "mt")
    pen.line([(LEFT, TOP), (LEFT, HEIGHT - BOTTOM), (WIDTH - RIGHT, HEIGHT - BOTTOM)], INK)
    pen.text((LEFT, TOP - 14), panel.title, "lm", 15)
    pen.text((WIDTH - RIGHT, HEIGHT - BOTTOM + 24), panel.across, "rt")
    for number, (line, kept) in enumerate(zip(panel.lines, lines)):
        colour = COLOURS[(number if line.colour is None else line.colour) % len(COLOURS)]
        path = [(xs.at(x), ys.at(y)) for x, y in kept]
        pen.line(path, colour, 2, DASHES[line.dash])
        for point in path:
            pen.dot(point, colour)
    _legend(pen, panel)
    if not any(lines):
        told = "no difference" if any(line.points for line in panel.lines) else "nothing to show"
        pen.text(((LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2), told, "mm", 15)
    return picture.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)


def _legend(pen: _Pen, panel: Panel) -> None:
    x, y = LEFT, HEIGHT - BOTTOM + 42
    for number, line in enumerate(panel.lines):
        wide = 34 + pen.width(line.label)
        if x + wide > WIDTH and x > LEFT:
            x, y = LEFT, y + 17
        colour = COLOURS[(number if line.colour is None else line.colour) % len(COLOURS)]
        pen.line([(x, y), (x + 22, y)], colour, 2, DASHES[line.dash])
        pen.text((x + 27, y), line.label, "lm")
        x += wide + 12


class _Axis:
    """Values to pixels from `start` to `end`."""

    def __init__(self, values: Sequence[float], start: float, end: float, logarithmic: bool = False):
        self.start, self.end, self.logarithmic = start, end, logarithmic
        low, high = min(map(self._scaled, values)), max(map(self._scaled, values))
        if logarithmic:
            low, high = math.floor(low + 1e-9), math.ceil(high - 1e-9)
        self.low, self.high = (low, high) if high > low else (low - 1, high + 1)

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self.logarithmic else value

    def at(self, value: float) -> float:
        return self.start + (self._scaled(value) - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, whole: bool = False) -> list[tuple[float, str]]:
        if self.logarithmic:
            step = max(1, math.ceil((self.high - self.low) / 8))
            between = (1, 2, 5) if self.high - self.low <= 2 else (1,)
            return [(factor * 10.0 ** power, f"{factor}e{power}") for power in range(int(self.low), int(self.high) + 1, step)
                    for factor in between if power < self.high or factor == 1]
        step = 10.0 ** math.floor(math.log10((self.high - self.low) / 2))
        step = next(step * factor for factor in (1, 2, 5, 10) if (self.high - self.low) / (step * factor) <= 8)
        if whole:
            step = max(1.0, step)
        first = math.ceil(self.low / step)
        return [(n * step, f"{n * step:g}") for n in range(first, math.floor(self.high / step) + 1)]


class _Pen:
    """Draws in the panel's own pixels on a larger canvas."""

    def __init__(self, canvas: ImageDraw.ImageDraw):
        self.canvas = canvas

    def line(self, points, colour: str, width: float = 1, dash: tuple[float, float] | None = None) -> None:
        pieces = zip(points, points[1:]) if dash is None else _dashed(points, *dash)
        for a, b in pieces:
            self.canvas.line([tuple(side * SHARPER for side in point) for point in (a, b)], colour, round(width * SHARPER))

    def dot(self, point, colour: str, radius: float = 2.5) -> None:
        x, y = point
        self.canvas.ellipse([(side - radius) * SHARPER for side in (x, y)] + [(side + radius) * SHARPER for side in (x, y)],
                            colour)

    def text(self, point, text: str, anchor: str, size: int = 12) -> None:
        font = _font(size * SHARPER)
        if not isinstance(font, ImageFont.FreeTypeFont):       # Pillow without FreeType: a small font, no anchors
            anchor = None
        self.canvas.text(tuple(side * SHARPER for side in point), text, INK, font, anchor)

    def width(self, text: str, size: int = 12) -> float:
        return self.canvas.textlength(text, _font(size * SHARPER)) / SHARPER


@cache
def _font(size: int):
    try:
        return ImageFont.load_default(size)
    except TypeError:                                          # Pillow before 10.1
        return ImageFont.load_default()


def _dashed(points, drawn: float, left: float):
    """Pieces of a path: `drawn` long, with gaps of `left`."""
    position, pen_down, rest = 0.0, True, drawn
    for (ax, ay), (bx, by) in zip(points, points[1:]):
        length, position = math.hypot(bx - ax, by - ay), 0.0
        while position < length:
            step = min(rest, length - position)
            if pen_down:
                yield tuple((ax + (bx - ax) * t / length, ay + (by - ay) * t / length) for t in (position, position + step))
            position, rest = position + step, rest - step
            if rest <= 0:
                pen_down = not pen_down
                rest = drawn if pen_down else left
