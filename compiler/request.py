"""What is to be compiled, as it travels to the compiler's Python, and everything about it that can be wrong."""

import json
import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from .errors import CompilerError

# The precisions each chip can be compiled for without calibration. The BM1684 has no 16-bit floats.
CHIPS = {"bm1684x": ("F32", "F16", "BF16"), "bm1684": ("F32",)}
AUTO = "auto"
KINDS = {"text_encoder": "text encoder", "unet": "U-Net", "vae": "VAE"}
STAGES = {"text_encoder": "text encoder", "unet": "U-Net", "vae_decoder": "VAE decoder", "vae_encoder": "VAE encoder"}
# What `auto` is: text survives 16 bits; the U-Net and the VAE overflow F16 in some models, never BF16.
BEST = {
    "bm1684x": {"text_encoder": "F16", "unet": "BF16", "vae": "BF16"},
    "bm1684": dict.fromkeys(KINDS, "F32"),
}
TOKENS = 77
LATENT = 8  # picture pixels for one element of a latent
MAX_SIDE, MAX_SIZES, MAX_BATCH, MAX_TOKENS = 4096, 8, 16, 10 * TOKENS
MAX_NAME, MAX_NAME_BYTES = 80, 240
NAMES = r"[^\W_][\w. ()+-]*"
RESERVED = r"CON|PRN|AUX|NUL|(COM|LPT)[0-9]"
MINUTE = 60.0
MODEL_JSON = "model.json"


@dataclass(frozen=True)
class Request:
    """One compile. `kinds` are of KINDS, sizes (width, height) in pixels; `source` goes into model.json as it is.

    budget: seconds that comparing in the simulator may take in all; what would take longer is not verified.
    """

    checkpoint: str
    name: str
    folder: str  # where the folder `name` appears
    kinds: tuple[str, ...] = tuple(KINDS)
    chip: str = "bm1684x"
    precisions: dict[str, str] = field(default_factory=dict)  # by kind; AUTO where missing
    sizes: tuple[tuple[int, int], ...] = ((512, 512),)
    batch: int = 2
    control: bool = False
    tokens: int = TOKENS
    skip: int = 0  # last layers of the text encoder to leave out
    budget: float = 10 * MINUTE
    dry: bool = False
    source: dict = field(default_factory=dict)

    @classmethod
    def from_json(cls, text: str) -> "Request":
        said = json.loads(text)
        return cls(**said | {"kinds": tuple(said["kinds"]), "sizes": tuple(map(tuple, said["sizes"]))})

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @property
    def out(self) -> Path:
        return Path(self.folder) / self.name

    @property
    def options(self) -> dict:
        """What was asked for, as model.json keeps it."""
        said = json.loads(self.to_json())
        return {key: said[key] for key in ("kinds", "precisions", "sizes", "batch", "control", "tokens", "skip", "budget")}

    def precision(self, kind: str) -> str:
        asked = self.precisions.get(kind, AUTO)
        return BEST[self.chip][kind] if asked == AUTO else asked

    def of(self, checkpoint: Path, source: dict) -> "Request":
        return replace(self, checkpoint=str(checkpoint), source=source)

    def check(self, multiple: int | None = None):
        """Raises CompilerError for the first thing that cannot be.

        multiple: of what the sizes must be, where it is known: a U-Net of n levels halves a latent n - 1 times.
        """
        self.check_name()
        if not self.kinds:
            raise CompilerError("Nothing to compile was given: connect a MODEL, a CLIP, a VAE, or all of them.")
        if self.chip not in CHIPS:
            chips = " and ".join(map(str.upper, CHIPS))
            raise CompilerError(f"'{self.chip}' is no chip that can be compiled for: choose {chips}.")
        for kind in self.kinds:
            if self.precision(kind) not in CHIPS[self.chip]:
                offered = " or ".join(CHIPS[self.chip])
                raise CompilerError(
                    f"The {KINDS[kind]} was asked for in {self.precision(kind)} and the {self.chip.upper()} computes in "
                    f"{offered}: choose that, or auto."
                )
        if not 1 <= self.batch <= MAX_BATCH:
            raise CompilerError(f"A batch of {self.batch} was asked for: choose 1 to {MAX_BATCH}.")
        if self.tokens % TOKENS or not TOKENS <= self.tokens <= MAX_TOKENS:
            raise CompilerError(
                f"A context of {self.tokens} tokens was asked for: prompts come in sections of {TOKENS}, so choose "
                f"{TOKENS}, {2 * TOKENS}, {3 * TOKENS}, up to {MAX_TOKENS}."
            )
        self.check_sizes(multiple or LATENT)

    def check_name(self):
        """Raises CompilerError unless a new folder can have this name, here and where it may be copied to."""
        fits = len(self.name) <= MAX_NAME and len(self.name.encode()) <= MAX_NAME_BYTES
        reserved = re.fullmatch(RESERVED, self.name.partition(".")[0].strip(), re.IGNORECASE)
        if reserved or not fits or not re.fullmatch(NAMES, self.name) or self.name.endswith((" ", ".")):
            raise CompilerError(
                f"{self.name[:MAX_NAME]!r} is no name for a folder of models: use letters, digits, spaces and . _ - + (), "
                f"{MAX_NAME} at most" + (", and nothing that Windows keeps for itself." if reserved else ".")
            )
        if self.out.exists():
            raise self.taken()

    def taken(self) -> CompilerError:
        return CompilerError(f"There is a '{self.name}' already: choose another name, or remove that folder first.")

    def check_sizes(self, multiple: int):
        if not self.sizes and self.kinds != ("text_encoder",):
            raise CompilerError("No picture size was given: name one, such as 512x512.")
        if len(self.sizes) > MAX_SIZES:
            raise CompilerError(f"{len(self.sizes)} sizes were asked for: compile {MAX_SIZES} at a time at most.")
        for width, height in self.sizes:
            if width % multiple or height % multiple or not all(multiple <= s <= MAX_SIDE for s in (width, height)):
                near = "x".join(str(min(max(round(s / multiple), 1) * multiple, MAX_SIDE)) for s in (width, height))
                raise CompilerError(
                    f"A size of {width}x{height} was asked for, and sizes must be multiples of {multiple} up to "
                    f"{MAX_SIDE}: use {near}, the nearest."
                )


def parse_sizes(text: str) -> tuple[tuple[int, int], ...]:
    """"512x512, 768x512" -> ((512, 512), (768, 512)): width first, separated by commas or spaces, without repeats."""
    sizes = []
    for word in text.replace(",", " ").lower().split():
        if not (match := re.fullmatch(r"(\d{1,5})[x×*](\d{1,5})", word)):
            raise CompilerError(f"'{word[:40]}' is no picture size: write width x height without spaces, such as 768x512.")
        sizes.append((int(match[1]), int(match[2])))
    return tuple(dict.fromkeys(sizes))
