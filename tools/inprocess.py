"""Import the pack into this process the way ComfyUI does, without a server: for benches and in-process tests."""
from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType

from tools.install import PACK, comfyui

PACKAGE = "sophgo_ascend_pack"


def load_comfyui() -> None:
    """Put ComfyUI on the path, on the CPU. Its flags must be set before anything of it looks at devices."""
    if str(comfyui()) not in sys.path:
        sys.path.insert(0, str(comfyui()))
    from comfy.cli_args import args
    args.cpu = True


def load_pack(module: str = "") -> ModuleType:
    """The pack under a name of its own, as custom_nodes are imported; or one of its modules ("nodes.loaders")."""
    load_comfyui()
    if PACKAGE not in sys.modules:
        spec = importlib.util.spec_from_file_location(PACKAGE, PACK / "__init__.py", submodule_search_locations=[str(PACK)])
        sys.modules[PACKAGE] = package = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(package)
    return importlib.import_module(f"{PACKAGE}.{module}") if module else sys.modules[PACKAGE]
