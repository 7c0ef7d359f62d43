"""The demo: boot a real ComfyUI headless, queue a shipped workflow over HTTP, and save the picture it makes.

    python -m demo.run [--prompt "a small blue star, top left, yellow background"] [--seed 7] [--model NAME] [--out PNG]
"""
from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from tools.comfyui import Server, ServerError
from tools.install import LOCAL, PACK

WORKFLOW = PACK / "workflows" / "api" / "Sophgo text to image.json"
BASE = LOCAL / "demo-server"


def text_to_image(prompt: str | None = None, seed: int | None = None, model: str | None = None) -> dict:
    """The shipped workflow, with wishes put where a person would: the sampler's prompt and seed, the loader's model."""
    workflow = json.loads(WORKFLOW.read_text(encoding="utf-8"))
    sampler = only(workflow, "KSampler")
    if prompt is not None:
        workflow[sampler["inputs"]["positive"][0]]["inputs"]["text"] = prompt
    if seed is not None:
        sampler["inputs"]["seed"] = seed
    if model is not None:
        only(workflow, "SophgoLoadCheckpoint")["inputs"]["model_name"] = model
    return workflow


def only(workflow: dict, kind: str) -> dict:
    """The one node of a kind."""
    node, = (node for node in workflow.values() if node["class_type"] == kind)
    return node


class Progress:
    """Prints what a person would see in the graph: the node that runs, its steps, what loaders report."""

    def __init__(self, workflow: dict):
        self.workflow, self.started = workflow, time.monotonic()

    def __call__(self, kind: str, data: dict) -> None:
        if kind == "executing" and data.get("node"):
            self.say(self.workflow[data["node"]]["class_type"])
        elif kind == "progress":
            self.say(f"  step {data['value']} of {data['max']}")
        elif kind == "binary" and data["data"][:4] == b"\0\0\0\3":        # text for a node: id length, id, text
            length = int.from_bytes(data["data"][4:8], "big")
            for line in data["data"][8 + length:].decode().splitlines():
                self.say(f"  {line}")

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.started:5.1f} s] {text}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", help="what the picture shows; default: the workflow's own")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--model", help="a name under demo/models or the demo server's models/sophgo")
    parser.add_argument("--out", type=Path, default=LOCAL / "output" / "demo.png")
    args = parser.parse_args()
    workflow = text_to_image(args.prompt, args.seed, args.model)
    print("Booting ComfyUI ...", flush=True)
    try:
        with Server(BASE) as server:
            progress = Progress(workflow)
            outputs = server.run(workflow, progress)
            image = next(image for output in outputs.values() for image in output.get("images", []))
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_bytes(server.picture(image))
    except ServerError as error:
        sys.exit(f"The demo failed: {error}")
    prompt = workflow[only(workflow, "KSampler")["inputs"]["positive"][0]]
    print(f"\n\"{prompt['inputs']['text']}\" is in {args.out}")


if __name__ == "__main__":
    main()
