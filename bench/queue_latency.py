"""How fast the server answers while a step runs in the simulator, next to how fast it answers when idle."""
from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Iterator

from demo.run import text_to_image
from tools.comfyui import Server

MODEL = "shapes-bm1684x-f32"


def p99(times: list[float]) -> float:
    return statistics.quantiles(times, n=100)[98]


def run(server: Server) -> Iterator[tuple[str, str]]:
    stepping, done = threading.Event(), threading.Event()

    def watch(kind: str, data: dict) -> None:
        if kind == "progress":
            stepping.set()

    def sample() -> list[float]:
        times = []
        while len(times) < 200 and not done.is_set():
            started = time.perf_counter()
            server.get("/queue")
            times.append((time.perf_counter() - started) * 1000)
            time.sleep(0.02)
        return times
    idle = sample()
    sampling = threading.Thread(target=lambda: (server.run(text_to_image(model=MODEL), watch), done.set()))
    sampling.start()
    stepping.wait(120)
    busy = sample()
    sampling.join()
    yield ("GET /queue while the simulator runs steps",
           f"p99 {p99(busy):.1f} ms ({len(busy)} requests), {p99(busy) / p99(idle):.1f} times the idle server's")
