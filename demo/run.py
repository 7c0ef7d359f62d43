"""The demo: boot a real ComfyUI headless, queue a shipped workflow over HTTP, and save the picture it makes.

    python -m demo.run [--workflow "Ascend SDXL text to image"] [--prompt "a small blue star, top left, yellow background"]
                       [--seed 7] [--model NAME] [--out PNG]
"""
from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from tools.comfyui import Server, ServerError
from tools.install import LOCAL, PACK

WORKFLOWS = PACK / "workflows" / "api"
TEXT_TO_IMAGE = "Sophgo text to image"
BASE = LOCAL / "demo-server"


def text_to_image(prompt: str | None = None, seed: int | None = None, model: str | None = None,
                  name: str = TEXT_TO_IMAGE) -> dict:
    """A shipped workflow, with wishes put where a person would: the prompt, the sampler's seed, the loader's model."""
    workflow = json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))
    if prompt is not None:
        inputs, key = told(workflow)
        inputs[key] = prompt
    if seed is not None:
        having(workflow, "seed")["seed"] = seed
    if model is not None:
        having(workflow, "model_name")["model_name"] = model
    return workflow


def told(workflow: dict) -> tuple[dict, str]:
    """Where the prompt is: the inputs of the node that feeds the sampler's `positive`, and the name of one of them."""
    inputs = workflow[having(workflow, "positive")["positive"][0]]["inputs"]
    return inputs, next(key for key in ("prompt", "text") if key in inputs)


def having(workflow: dict, input: str) -> dict:
    """The inputs of the one node that has an input of this name."""
    inputs, = (node["inputs"] for node in workflow.values() if input in node["inputs"])
    return inputs


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
    parser.add_argument("--workflow", default=TEXT_TO_IMAGE,
                        choices=sorted(path.stem for path in WORKFLOWS.glob("* text to image.json")))
    parser.add_argument("--prompt", help="what the picture shows; default: the workflow's own")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--model", help="a name under demo/models or the demo server's models/sophgo")
    parser.add_argument("--out", type=Path, default=LOCAL / "output" / "demo.png")
    args = parser.parse_args()
    workflow = text_to_image(args.prompt, args.seed, args.model, args.workflow)
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
    inputs, key = told(workflow)
    print(f"\n\"{inputs[key]}\" is in {args.out}")


if __name__ == "__main__":
    main()
