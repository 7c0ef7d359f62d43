"""Which recipes are tried for a network until one computes what it should, and where the last one went wrong."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np

from .convert import Recipe

# The least cosine between a compiled network's output and the reference's. 16-bit floats keep 8 or 11 bits of each
# number, and a network adds up many.
TOLERANCE = {"F32": 0.99999, "F16": 0.999, "BF16": 0.999}


@dataclass(frozen=True)
class Parity:
    """How one output differs from the reference's; `mean` and `largest` of the absolute difference."""

    cosine: float
    mean: float
    largest: float

    @classmethod
    def of(cls, got: np.ndarray, wanted: np.ndarray) -> "Parity":
        """In float64. An output that is not finite, or all zeros, has cosine 0."""
        a, b = got.astype(np.float64).ravel(), wanted.astype(np.float64).ravel()
        if not np.isfinite(a).all():
            return cls(0.0, float("inf"), float("inf"))
        error, norms = np.abs(a - b), np.linalg.norm(a) * np.linalg.norm(b)
        return cls(float(a @ b / norms) if norms else 0.0, float(error.mean()), float(error.max()))

    def __str__(self) -> str:
        return f"cosine {self.cosine:.7f}, mean difference {self.mean:.1e}, largest {self.largest:.1e}"


@dataclass(frozen=True)
class Attempt:
    """A recipe that was compiled and, with `parity` by output, compared; or one that did not compile, and why."""

    recipe: Recipe
    parity: dict[str, Parity] = field(default_factory=dict)
    seconds: float = 0.0  # of the simulated call
    failure: str = ""

    @property
    def cosine(self) -> float:
        return min((parity.cosine for parity in self.parity.values()), default=0.0)

    @property
    def good(self) -> bool:
        return self.cosine >= TOLERANCE[self.recipe.precision]

    def to_dict(self) -> dict:
        parity = {output: asdict(parity) for output, parity in self.parity.items()}
        found = {"recipe": str(self.recipe), "seconds": round(self.seconds, 1), "parity": parity}
        return found | ({"failure": self.failure} if self.failure else {})


def recipes(stage: str, chip: str, precision: str) -> Iterator[Recipe]:
    """What is tried in turn: as asked for, then one remedy after the other.

    The layer-group pass is known to miscompile the U-Net for the BM1684, so there it is not even tried.
    """
    first = Recipe(precision, layer_groups=(chip, stage) != ("bm1684", "unet"))
    yield first
    if first.layer_groups:
        yield Recipe(precision, layer_groups=False)
    if precision == "F16":
        yield Recipe("BF16")
    if precision != "F32":
        yield Recipe(precision, high_precision=True)
        yield Recipe("F32")
        yield Recipe("F32", layer_groups=False)


def first_bad_block(blocks: Sequence[str], good: Callable[[str], bool]) -> str:
    """The first block after which the network is wrong, by halving; it is wrong after the last.

    `good` compiles the network up to the end of a block and compares what comes out there.
    """
    low, high = 0, len(blocks) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if good(blocks[middle]) else (low, middle)
    return blocks[high]
