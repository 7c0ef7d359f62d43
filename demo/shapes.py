"""The demo's data: pictures of one flat shape on a flat background, and sentences that describe them.

Five attributes describe a picture completely (shape, colour, background, size, position); the rest (the exact place,
radius and angle) is chance, and is what a seed changes. Everything here is numpy and Pillow.
"""

from dataclasses import astuple, dataclass

import numpy as np
from PIL import Image, ImageDraw

PIXELS = 64
SUPERSAMPLE = 4  # drawn this many times larger and averaged down, for clean edges

COLOURS = {
    "red": (220, 30, 35),
    "orange": (255, 140, 0),
    "yellow": (250, 225, 40),
    "green": (35, 160, 60),
    "blue": (35, 80, 220),
    "purple": (140, 45, 170),
    "black": (15, 15, 15),
    "white": (250, 250, 250),
}
RADII = {"small": (10, 2), "large": (17, 3)}  # pixels: middle, and how far from it
CORNER = 14  # pixels from the middle of the picture to a corner position's middle, along each axis
POSITIONS = {
    "center": (0, 0),
    "top left": (-1, -1),
    "top right": (1, -1),
    "bottom left": (-1, 1),
    "bottom right": (1, 1),
}
JITTER_PIXELS = 5
JITTER_DEGREES = 12


def _ring(angles, radii) -> np.ndarray:
    """Points (n, 2), x to the right and y down, at `angles` (degrees clockwise from the top) and `radii`."""
    angles = np.radians(np.asarray(angles, float))
    return np.stack([np.sin(angles), -np.cos(angles)], 1) * np.broadcast_to(radii, angles.shape)[:, None]


def _heart() -> np.ndarray:
    """The heart curve of https://mathworld.wolfram.com/HeartCurve.html, about as wide as the unit circle."""
    t = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([x, -y - 2.5], 1) / 15.5


OUTLINES = {
    "circle": _ring(np.arange(0, 360, 5), 1.0),
    "square": _ring([45, 135, 225, 315], 1.25),
    "triangle": _ring([0, 120, 240], 1.25),
    "star": _ring(np.arange(0, 360, 36), np.tile([1.25, 0.5], 5)),
    "heart": _heart(),
}

# Every attribute with its values, in the order of the fields of Attributes. An index into a value list is a label.
VALUES = {
    "shape": tuple(OUTLINES),
    "colour": tuple(COLOURS),
    "background": tuple(COLOURS),
    "size": tuple(RADII),
    "position": tuple(POSITIONS),
}

SYNONYMS = {
    "circle": ("circle", "circle", "disc"),
    "triangle": ("triangle",),
    "small": ("small", "small", "little", "tiny"),
    "large": ("large", "big", "huge"),
    "purple": ("purple", "purple", "violet"),
    "center": ("center", "centre", "middle"),
    "top left": ("top left", "top left", "upper left", "top - left"),
    "top right": ("top right", "top right", "upper right", "top - right"),
    "bottom left": ("bottom left", "bottom left", "lower left", "bottom - left"),
    "bottom right": ("bottom right", "bottom right", "lower right", "bottom - right"),
}
OPENINGS = ("a photo of", "a picture of", "a drawing of", "an image of", "a photo of the", "there is")
ON_BACKGROUND = (
    "on a {} background",
    "on a {} background",
    "{} background",
    "on {}",
    "with a {} background",
    "against a {} background",
    "and a {} background",
)
AT_POSITION = ("{}", "in the {}", "at the {}", "in the {} of the picture", "in the {} of the image")
AT_CORNER = ("in the {} corner", "{} corner")
FILLERS = (
    "a",
    "an",
    "the",
    "of",
    "in",
    "on",
    "with",
    "and",
    "at",
    ",",
    ",",
    ",",
    ".",
    "is",
    "picture",
    "image",
    "photo",
)


@dataclass(frozen=True)
class Attributes:
    """What a picture shows, in words. None (in a caption only) leaves the attribute open."""

    shape: str | None
    colour: str | None
    background: str | None
    size: str | None
    position: str | None

    def labels(self) -> tuple[int, ...]:
        """One index per attribute; an open attribute is the index after the last value."""
        return tuple(
            len(values) if value is None else values.index(value)
            for value, values in zip(astuple(self), VALUES.values(), strict=True)
        )


OPEN = Attributes(None, None, None, None, None)


def default_background(colour: str | None) -> str:
    """What a caption that names no background means: white, or black behind a white shape."""
    return "black" if colour == "white" else "white"


def choose(rng: np.random.Generator) -> Attributes:
    """One random picture's attributes: half are centred, and the shape never has its background's colour."""
    colour = str(rng.choice(VALUES["colour"]))
    others = [c for c in COLOURS if c != colour]
    return Attributes(
        shape=str(rng.choice(VALUES["shape"])),
        colour=colour,
        background=default_background(colour) if rng.random() < 0.3 else str(rng.choice(others)),
        size=str(rng.choice(VALUES["size"])),
        position="center" if rng.random() < 0.5 else str(rng.choice(VALUES["position"][1:])),
    )


def draw(a: Attributes, rng: np.random.Generator) -> np.ndarray:
    """A picture of `a`, uint8 (64, 64, 3) RGB; `rng` moves, scales and turns the shape, whose points may be cut off."""
    middle, spread = RADII[a.size]
    radius = middle + spread * rng.uniform(-1, 1)
    reach, direction = JITTER_PIXELS * np.sqrt(rng.random()), rng.uniform(0, 2 * np.pi)  # uniform in a disc
    jitter = reach * np.array([np.cos(direction), np.sin(direction)])
    centre = PIXELS / 2 + CORNER * np.array(POSITIONS[a.position]) + jitter
    centre = np.clip(centre, radius + 1, PIXELS - radius - 1)
    turn = np.radians(JITTER_DEGREES * rng.uniform(-1, 1))
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    points = (OUTLINES[a.shape] @ rotation.T * radius + centre) * SUPERSAMPLE
    picture = Image.new("RGB", (PIXELS * SUPERSAMPLE,) * 2, COLOURS[a.background])
    ImageDraw.Draw(picture).polygon([tuple(p) for p in points], fill=COLOURS[a.colour])
    return np.asarray(picture.reduce(SUPERSAMPLE))


def caption(a: Attributes, rng: np.random.Generator) -> str:
    """One of many ways to say `a`. The usual (large, centred, on white) may go unsaid; what is open always does."""

    def say(value: str) -> str:
        return str(rng.choice(SYNONYMS.get(value, (value,))))

    def phrase(forms, value: str) -> str:
        return str(rng.choice(forms)).format(say(value))

    size = say(a.size) if a.size and (a.size != "large" or rng.random() < 0.5) else ""
    colour = say(a.colour) if a.colour else ""
    adjectives = [size, colour] if rng.random() < 0.75 else [colour, size]
    article = "a" if rng.random() < 0.6 else "the" if rng.random() < 0.1 else ""
    thing = say(a.shape) if a.shape else "shape"
    parts = [" ".join(filter(None, [article, *adjectives, thing]))]
    if rng.random() < 0.06:  # one word a tag: "circle, red, large"
        parts = [*filter(None, [thing, *adjectives])]

    background = position = ""
    if a.background and (a.background != default_background(a.colour) or rng.random() < 0.5):
        background = a.background
        parts.append(phrase(ON_BACKGROUND, background))
    if a.position and (a.position != "center" or rng.random() < 0.4):
        position = a.position
        parts.append(phrase(AT_POSITION if position == "center" or rng.random() < 0.6 else AT_CORNER, position))

    form = rng.random()
    if form < 0.25:  # "a small red circle on a blue background in the top left"
        text = " ".join(parts)
    elif form < 0.55:  # "small red circle, top left, blue background"
        text = ", ".join([parts[0], *rng.permutation(parts[1:])])
    elif form < 0.85 or not background:  # the same in any order
        text = ", ".join(rng.permutation(parts))
    else:  # "a blue background with a small red circle in the top left"
        where = phrase(AT_POSITION, position) if position else ""
        subject = " ".join(filter(None, ["a", *adjectives, thing]))
        text = " ".join(filter(None, [f"a {say(background)} background with", subject, where]))
    if rng.random() < 0.15:
        text = f"{rng.choice(OPENINGS)} {text}"
    return text.replace("a orange", "an orange") + ("." if rng.random() < 0.05 else "")


def vocabulary() -> list[str]:
    """Every word a caption can hold; the text encoder gives all other words one shared meaning."""
    texts = [*FILLERS, *OPENINGS, *ON_BACKGROUND, *AT_POSITION, *AT_CORNER, "shape"]
    for values in VALUES.values():
        texts += values
    for values in SYNONYMS.values():
        texts += values
    return sorted({word for text in texts for word in text.replace("{}", " ").split()})
