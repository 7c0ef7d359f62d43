"""What the pack asks of the running ComfyUI server, and what it does in its place: interrupts, combos, texts on a node."""
from __future__ import annotations

import logging
from collections.abc import Sequence

import comfy.model_management

from ...engines.errors import EngineError

log = logging.getLogger("sophgo_ascend")

# Raised inside a stage while a device works; clears the flag, as ComfyUI's own samplers do.
poll = comfy.model_management.throw_exception_if_processing_interrupted


def one_of(name: str, value: str, options: Sequence[str]) -> None:
    """Raise EngineError unless a combo's value is on offer: ComfyUI does not check those of a workflow from the API."""
    if value not in options:
        listed = ", ".join(f"'{option}'" for option in options[:-1])
        raise EngineError(f"{name} cannot be '{value}': choose {listed} or '{options[-1]}'.")


def tell(text: str, node_id: str | None = None, level: int = logging.INFO) -> None:
    """Write `text` to the log and onto a node: the one given, else the one that runs now."""
    log.log(level, text)
    server, running = _server(), _running()
    node_id = node_id or (running.node_id if running else None)
    if server is not None and node_id is not None:
        server.send_progress_text(text, node_id, server.client_id)


def running_node() -> str:
    """The node that runs now, as a person knows it: 'LoraLoader (pixel.safetensors)'. Empty outside a graph."""
    server, running = _server(), _running()
    if server is None or running is None:
        return ""
    for item in server.prompt_queue.get_current_queue()[0]:
        node = item[2].get(running.node_id) if item[1] == running.prompt_id else None
        if node:
            files = [str(v) for v in node.get("inputs", {}).values() if isinstance(v, str) and "." in v]
            return node["class_type"] + (f" ({', '.join(files)})" if files else "")
    return ""


def maker(thing: object) -> str:
    """The node that put a function or object into a model, told by the class its code is in, to begin a sentence with."""
    from nodes import NODE_CLASS_MAPPINGS
    thing = getattr(thing, "func", thing)      # of functools.partial
    name = getattr(thing, "__qualname__", type(thing).__qualname__).split(".")[0]
    ids = (id for id, node in NODE_CLASS_MAPPINGS.items() if node.__name__ == name)
    return next(ids, f"A node before this one ({name})")


def feeds(prompt: dict | None, node_id: str, slot: int) -> bool:
    """Whether an output of a node is connected to something in an API-format workflow."""
    return any(value == [node_id, slot] for node in (prompt or {}).values() for value in node.get("inputs", {}).values())


def _server():
    from server import PromptServer
    return getattr(PromptServer, "instance", None)


def _running():
    from comfy_execution.utils import get_executing_context
    return get_executing_context()
