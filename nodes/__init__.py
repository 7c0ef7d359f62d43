"""What a user drags: one file a family, thin nodes without arithmetic."""
from .align import SophgoLoadRecording, SophgoParity, SophgoParityGate, SophgoRecord
from .inspect import SophgoInspect
from .loaders import SophgoLoadCheckpoint, SophgoLoadCLIP, SophgoLoadUNet, SophgoLoadVAE
from .reference import SophgoLoadReference
from .stages import SophgoTextEncode, SophgoUNetStep, SophgoVAEDecode, SophgoVAEEncode

ALL_NODES = [
    SophgoLoadCheckpoint, SophgoLoadUNet, SophgoLoadCLIP, SophgoLoadVAE,
    SophgoTextEncode, SophgoUNetStep, SophgoVAEDecode, SophgoVAEEncode,
    SophgoInspect,
    SophgoLoadReference, SophgoRecord, SophgoLoadRecording, SophgoParity, SophgoParityGate,
]
