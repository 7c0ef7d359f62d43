"""Lets a CUDA-linked torchvision import beside a CPU build of torch, in the pack's own test environment only.

Package indexes serve torchvision linked against CUDA; without the CUDA torch its compiled operators are missing and
`import torchvision` fails while it registers shapes for two of them. Declaring those two is enough for ComfyUI, which
never calls them. tools/install.py puts this file into its venv with a .pth line that imports it.
"""
import sys
from importlib.abc import MetaPathFinder

SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


class _BeforeRegistration(MetaPathFinder):
    library = None

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision._meta_registrations":
            sys.meta_path.remove(self)
            import torch
            if not hasattr(torch.ops.torchvision, "nms"):
                library = torch.library.Library("torchvision", "FRAGMENT")
                for operator in ("nms", "qnms"):
                    library.define(operator + SIGNATURE)
                _BeforeRegistration.library = library      # collected, it would take its declarations along
        return None


sys.meta_path.insert(0, _BeforeRegistration())
