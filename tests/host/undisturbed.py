"""What SDXL on MindSpore's CPU gives when nothing goes wrong, to compare with what it gives afterwards: bit for bit."""
from __future__ import annotations

import contextlib
import itertools

import numpy as np
import psutil

from tests.host.graphs import Graph, Node, latent, latents
from tools.comfyui import Server
from tools.install import MINDSPORE

CAT, DOG = "a cat on a mat", "a dog"


def picture(seed: int = 1, graph: Graph | None = None, **changes) -> Node:
    """The LATENT of a small run of AscendSDXLSampler with the tiny model."""
    graph = Graph() if graph is None else graph
    model, clip, _ = graph.sdxl()
    return graph.sample_sdxl(model, *graph.condition(clip, CAT, DOG), graph.empty(), **{"seed": seed, "steps": 2, **changes})


class Undisturbed:
    """The same few prompts again and again. Their seeds take turns, so that no answer is that of the prompt before."""

    def __init__(self, server: Server, seeds: tuple[int, ...] = (71, 72, 73)):
        self.server, self.seeds, graph = server, itertools.cycle(seeds), Graph()
        self.wanted = dict(zip(seeds, latents(server, *(picture(seed, graph) for seed in seeds))))
        for one, other in itertools.combinations(self.wanted.values(), 2):
            assert np.isfinite(one).all() and np.abs(one - other).max() > 1

    def check(self) -> None:
        seed = next(self.seeds)
        np.testing.assert_array_equal(latent(self.server, picture(seed)), self.wanted[seed])


def workers(server: Server) -> list[psutil.Process]:
    """The server's processes in MindSpore's interpreter."""
    found = []
    for process in psutil.Process(server.process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            if str(MINDSPORE) in process.cmdline()[0]:
                found.append(process)
    return found


def worker(server: Server) -> psutil.Process:
    [found] = workers(server)
    return found
