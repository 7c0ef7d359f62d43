"""What a user drags: one file a family, thin nodes without arithmetic.

At its top a file imports what its schemas need, and in `execute` what runs: ComfyUI starts as fast as without the pack.
"""
from .align import SophgoLoadRecording, SophgoParity, SophgoParityGate, SophgoRecord
from .ascend import AscendLoadSDXL, AscendSDXLConditioner, AscendSDXLSampler, AscendVAEDecode, AscendVAEEncode
from .compile import SophgoCompile
from .inspect import SophgoInspect
from .loaders import SophgoLoadCheckpoint, SophgoLoadCLIP, SophgoLoadUNet, SophgoLoadVAE
from .reference import SophgoLoadReference
from .stages import SophgoTextEncode, SophgoUNetStep, SophgoVAEDecode, SophgoVAEEncode

ALL_NODES = [
    SophgoLoadCheckpoint, SophgoLoadUNet, SophgoLoadCLIP, SophgoLoadVAE,
    SophgoTextEncode, SophgoUNetStep, SophgoVAEDecode, SophgoVAEEncode,
    SophgoInspect, SophgoCompile,
    SophgoLoadReference, SophgoRecord, SophgoLoadRecording, SophgoParity, SophgoParityGate,
    AscendLoadSDXL, AscendSDXLConditioner, AscendSDXLSampler, AscendVAEDecode, AscendVAEEncode,
]
