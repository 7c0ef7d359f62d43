"""What a user drags: one file a family, thin nodes without arithmetic."""
from .inspect import SophgoInspect
from .loaders import SophgoLoadCheckpoint, SophgoLoadCLIP, SophgoLoadUNet, SophgoLoadVAE
from .stages import SophgoTextEncode, SophgoUNetStep, SophgoVAEDecode, SophgoVAEEncode

ALL_NODES = [
    SophgoLoadCheckpoint, SophgoLoadUNet, SophgoLoadCLIP, SophgoLoadVAE,
    SophgoTextEncode, SophgoUNetStep, SophgoVAEDecode, SophgoVAEEncode,
    SophgoInspect,
]
