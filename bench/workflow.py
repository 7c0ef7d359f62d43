"""The shipped text-to-image workflow, with other models and seeds."""
from __future__ import annotations

import json

from tools.install import PACK

WORKFLOW = PACK / "workflows" / "api" / "Sophgo text to image.json"


def text_to_image(model: str, seed: int | None = None, steps: int | None = None) -> dict:
    graph = json.loads(WORKFLOW.read_text(encoding="utf-8"))
    for node in graph.values():
        inputs = node["inputs"]
        if node["class_type"] == "SophgoLoadCheckpoint":
            inputs["model_name"] = model
        if node["class_type"] == "KSampler":
            inputs.update({key: value for key, value in (("seed", seed), ("steps", steps)) if value is not None})
    return graph
