"""What importing the pack, its nodes included, adds to a host that has loaded everything of its own."""
from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Iterator

from tools.install import PACK

VENDORS = ("sophon", "onnxruntime", "mindspore", "mindone", "execnet")
SCRIPT = """
import asyncio, json, sys, time
from tools.inprocess import PACKAGE, load_comfyui
load_comfyui()
import nodes, comfy.sd, comfy.samplers, latent_preview, folder_paths, comfy_api.latest
before = set(sys.modules)
started = time.perf_counter()
from tools.inprocess import load_pack
pack = load_pack()
asyncio.run(asyncio.run(pack.comfy_entrypoint()).get_node_list())
spent = (time.perf_counter() - started) * 1000
print(json.dumps([spent, sorted(set(m.split(".")[0] for m in set(sys.modules) - before))]))
"""


def run() -> Iterator[tuple[str, str]]:
    results = [json.loads(subprocess.run([sys.executable, "-c", SCRIPT], cwd=PACK, capture_output=True, text=True,
                                         check=True).stdout.splitlines()[-1]) for _ in range(5)]
    times, modules = [spent for spent, _ in results], results[0][1]
    yield "import of the pack over the host's own", f"median {statistics.median(times):.0f} ms of 5 starts"
    yield "  vendor modules it imports", ", ".join(m for m in modules if m in VENDORS) or "none"
