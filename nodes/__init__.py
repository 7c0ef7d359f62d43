"""What a user drags: one file a family, thin nodes without arithmetic."""
from .ascend import AscendLoadSDXL, AscendSDXLConditioner, AscendSDXLSampler, AscendVAEDecode, AscendVAEEncode
from .inspect import SophgoInspect
from .loaders import SophgoLoadCheckpoint, SophgoLoadCLIP, SophgoLoadUNet, SophgoLoadVAE
from .stages import SophgoTextEncode, SophgoUNetStep, SophgoVAEDecode, SophgoVAEEncode

ALL_NODES = [
    SophgoLoadCheckpoint, SophgoLoadUNet, SophgoLoadCLIP, SophgoLoadVAE,
    SophgoTextEncode, SophgoUNetStep, SophgoVAEDecode, SophgoVAEEncode,
    SophgoInspect,
    AscendLoadSDXL, AscendSDXLConditioner, AscendSDXLSampler, AscendVAEDecode, AscendVAEEncode,
]
