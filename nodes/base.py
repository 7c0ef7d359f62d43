"""What all nodes of the pack share."""
from __future__ import annotations

from comfy_api.latest import io

CATEGORY = "Sophgo & Ascend"


class PackNode(io.ComfyNode):
    """A node with search aliases on every host: older ones have no field for them in the schema."""

    ALIASES: tuple[str, ...] = ()

    @classmethod
    def GET_NODE_INFO_V1(cls) -> dict:
        return {**super().GET_NODE_INFO_V1(), "search_aliases": list(cls.ALIASES)}
