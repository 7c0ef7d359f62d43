"""What a compile takes: the networks it makes, and the time, memory and disk of each, before anything is done."""

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .checkpoint import Checkpoint, Part
from .errors import CompilerError
from .networks import Graph, Weights, text_encoder, unet, unet_levels, vae_decoder, vae_encoder
from .recipes import Recipe, recipes
from .request import LATENT, STAGES, Request
from .summary import gigabytes

GB = 1e9
SPARE = 0.5 * GB  # of memory and disk, for whatever else goes on


@dataclass(frozen=True)
class Network:
    """One file to make. `build` gives its graph from tensors, with weights in the given file."""

    stage: str  # of STAGES
    kind: str  # of request.KINDS
    size: tuple[int, int] | None
    precision: str
    build: Callable[[Part, Weights], Graph]

    @property
    def title(self) -> str:
        return STAGES[self.stage] + (f" {self.size[0]}x{self.size[1]}" if self.size else "")


@dataclass(frozen=True)
class Cost:
    """Of one network on an idle machine of two cores, in seconds and bytes; what one try takes."""

    name: str
    build: float
    transform: float
    deploy: float
    simulate: float
    verified: bool  # whether the simulation is within the budget
    memory: float
    work: float  # disk while it is made
    result: float  # disk that stays

    @property
    def seconds(self) -> float:
        return self.build + self.transform + self.deploy + (self.simulate if self.verified else 0)


def networks(request: Request) -> list[Network]:
    """In the order in which they are made: a network may be tried with what one before it gives."""
    skip, batch, tokens, control = request.skip, request.batch, request.tokens, request.control
    found = []
    if "text_encoder" in request.kinds:
        build = lambda part, weights: text_encoder(part, weights, skip=skip)
        found.append(Network("text_encoder", "text_encoder", None, request.precision("text_encoder"), build))
    if "unet" in request.kinds:
        for w, h in request.sizes:
            build = lambda part, weights, w=w, h=h: unet(part, weights, w, h, batch, tokens, control)
            found.append(Network("unet", "unet", (w, h), request.precision("unet"), build))
    if "vae" in request.kinds:
        for w, h in request.sizes:
            for stage, make in (("vae_encoder", vae_encoder), ("vae_decoder", vae_decoder)):
                build = lambda part, weights, w=w, h=h, make=make: make(part, weights, w, h)
                found.append(Network(stage, "vae", (w, h), request.precision("vae"), build))
    return found


def check(request: Request, checkpoint: Checkpoint):
    """Raises CompilerError if the checkpoint cannot give what is asked for, naming sizes its U-Net could take."""
    levels = unet_levels(checkpoint.part("unet", dry=True)) if "unet" in request.kinds else 1
    request.check(LATENT * 2 ** (levels - 1))


def costs(request: Request, checkpoint: Checkpoint) -> Iterator[Cost]:
    """What each network takes. The budget for simulating is spent in order."""
    left = request.budget
    for network in networks(request):
        graph = network.build(checkpoint.part(network.kind, dry=True), Weights(None))
        cost = estimate(graph, next(recipes(network.stage, request.chip, network.precision)), request.chip, left)
        left -= cost.simulate if cost.verified else 0
        yield cost


def estimate(graph: Graph, recipe: Recipe, chip: str, budget: float) -> Cost:
    weights = 4.0 * graph.parameters
    kept = weights * (1.0 if recipe.precision == "F32" else 0.5)
    sizes = [size(value.shape) for value in graph.infos.values()]
    product, number = SIMULATE[chip][recipe.precision]
    simulate = SIMULATOR_START + product * graph.macs + number * sum(sizes)
    verified = simulate <= budget
    # while the code is made the compiler has what it keeps three times; the reference has weights, and a few activations
    reference = weights + 3 * 4.0 * max(sizes)
    return Cost(
        name=graph.name,
        build=0.1 + 3e-9 * weights,
        transform=2.0 + 12e-9 * weights,
        deploy=4.0 + 30e-9 * weights,
        simulate=simulate,
        verified=verified,
        memory=0.3 * GB + max(3 * kept, reference if verified else 0),
        # in the compiler's form, with what is being read or what it makes of it for the chip, twice
        work=weights + max(weights, 2 * kept),
        result=weights + kept + 10e6,
    )


# Measured, as are the numbers above: docs/compile.md. Seconds for each multiplication, and for each number between layers,
# which tells in networks as small as the demo's.
SIMULATE = {
    "bm1684x": {"F32": (30e-9, 0.35e-6), "F16": (33e-9, 0.8e-6), "BF16": (44e-9, 0.3e-6)},
    "bm1684": {"F32": (12e-9, 2.8e-6)},
}
SIMULATOR_START = 1.0


def size(shape: tuple[int, ...]) -> int:
    count = 1
    for side in shape:
        count *= side
    return count


def free_memory() -> int:
    """Bytes that can be had without harm: Linux's own estimate, and swap."""
    fields = {}
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            name, _, value = line.partition(":")
            fields[name] = int(value.split()[0]) * 1024
        return fields["MemAvailable"] + fields["SwapFree"]
    except (OSError, KeyError, ValueError, IndexError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def disk(costs: list[Cost]) -> float:
    """Bytes at the worst moment: all results, and one network's work."""
    return sum(cost.result for cost in costs) + max(cost.work for cost in costs)


def refuse_if_too_large(request: Request, costs: list[Cost]):
    """Raises CompilerError if memory or disk will not do."""
    worst = max(costs, key=lambda cost: cost.memory)
    free = free_memory()
    if worst.memory + SPARE > free:
        raise CompilerError(
            f"Compiling {worst.name} needs about {gigabytes(worst.memory)} of memory and {gigabytes(free)} are free: close "
            "other programs, use a smaller size, or compile on a larger machine and copy the folder."
        )
    needed, free = disk(costs), shutil.disk_usage(request.folder).free
    if needed + SPARE > free:
        raise CompilerError(
            f"Compiling '{request.name}' needs about {gigabytes(needed)} of disk in {request.folder} and "
            f"{gigabytes(free)} are free: make room there, or compile fewer sizes."
        )
