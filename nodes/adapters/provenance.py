"""Where a MODEL, CLIP or VAE comes from, as the workflow says it: nodes, their settings, and the files those name."""
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import folder_paths

from ...engines.files import content_hash

# Which model folder an input of a stock loader names a file of.
FOLDERS = {"ckpt_name": "checkpoints", "unet_name": "diffusion_models", "clip_name": "text_encoders", "vae_name": "vae",
           "lora_name": "loras"}


def provenance(prompt: dict | None, node_id: str, inputs: tuple[str, ...], own: Mapping[str, Path]) -> dict:
    """{"nodes": [{"node", "settings"}], "files": [{"file", "folder", "sha256"}]} of all that leads to some inputs of a node.

    prompt: the workflow in the API format. Nodes come in the order in which they run. own: the pack's own checkpoints by
    name, which ComfyUI does not know.
    """
    nodes, seen = [], set()

    def visit(link):
        if not isinstance(link, list) or not link or link[0] in seen or link[0] not in prompt:
            return
        seen.add(link[0])
        node = prompt[link[0]]
        for value in node.get("inputs", {}).values():
            visit(value)
        settings = {name: value for name, value in node.get("inputs", {}).items() if not isinstance(value, list)}
        nodes.append({"node": node["class_type"], "settings": settings})

    prompt = prompt or {}
    for name in inputs:
        visit(prompt.get(node_id, {}).get("inputs", {}).get(name))
    return {"nodes": nodes, "files": _files(nodes, own)}


def _files(nodes: list[dict], own: Mapping[str, Path]) -> list[dict]:
    found = {}
    for node in nodes:
        for name, value in node["settings"].items():
            path = _path(name, value, own)
            if path is not None:
                found[path] = {"file": str(value), "folder": FOLDERS[name], "sha256": content_hash(path)}
    return list(found.values())


def _path(name: str, value, own: Mapping[str, Path]) -> Path | None:
    """The file that a loader's setting names; None for what is no file, or one that is gone."""
    if name not in FOLDERS or not isinstance(value, str):
        return None
    path = folder_paths.get_full_path(FOLDERS[name], value)
    return Path(path) if path else own.get(value) if FOLDERS[name] == "checkpoints" else None
