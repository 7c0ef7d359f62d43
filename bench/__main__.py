"""Run all benches and print one line a number. Times are of this machine; read the ratios and the counts."""
import tempfile
from pathlib import Path

from bench import import_cost, parity, queue_latency, sdxl, unet_call
from tools.comfyui import Server


def show(rows) -> None:
    for what, value in rows:
        print(f"{what}: {value}", flush=True)


show(import_cost.run())
show(unet_call.run())
show(sdxl.run())
with tempfile.TemporaryDirectory() as base, Server(Path(base)) as server:
    show(queue_latency.run(server))
    show(parity.run(server))
