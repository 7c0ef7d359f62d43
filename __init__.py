"""Sophgo & Ascend: Stable Diffusion on Sophgo TPUs and Huawei Ascend NPUs as ordinary ComfyUI nodes."""
from comfy_api.latest import ComfyExtension, io

WEB_DIRECTORY = "./web"


class SophgoAscend(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        from .nodes import ALL_NODES, library
        library.register_folders()
        return ALL_NODES


async def comfy_entrypoint() -> ComfyExtension:
    return SophgoAscend()


__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
