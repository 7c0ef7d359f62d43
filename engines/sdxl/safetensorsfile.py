"""The header of a .safetensors file: names, dtypes, shapes and positions, in the time of one short read.

The format is huggingface/safetensors': eight bytes with the header's length, the header as JSON, the data.
"""
from __future__ import annotations

from pathlib import Path

from .tensors import MAX_TENSORS, NUMPY, CheckpointError, Tensor, check, elements, named, parse_json, refuse_strangers

DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
          "I16": "int16", "I8": "int8", "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool"}
MAX_HEADER = 16 << 20       # bytes; SDXL's has 0.3 MB


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of the file by name. Raises CheckpointError, one sentence, if it is damaged or cut short."""
    with named(path), open(path, "rb") as file:
        start = file.read(24)
        length = int.from_bytes(start[:8], "little")
        if start[8:9] != b"{":      # in this format the length's high bytes are zero and the header is an object
            refuse_strangers(start)
            raise CheckpointError("it is no safetensors file")
        if length > MAX_HEADER:
            raise CheckpointError(f"it is damaged: its header is said to have {length:,} bytes")
        total = file.seek(0, 2)
        if 8 + length > total:
            raise CheckpointError(_cut_short(8 + length, total))
        file.seek(8)
        header = parse_json(file.read(length), MAX_HEADER)
        header.pop("__metadata__", None)
        if len(header) > MAX_TENSORS:
            raise CheckpointError(f"it has more than {MAX_TENSORS:,} tensors")
        tensors = {name: _tensor(path, name, entry, 8 + length) for name, entry in header.items()}
        end = max((tensor.pieces[0][0] + tensor.bytes for tensor in tensors.values()), default=0)
        if end > total:
            raise CheckpointError(_cut_short(end, total))
        return tensors


def _tensor(path: Path, name: str, entry: object, data: int) -> Tensor:
    if not isinstance(entry, dict):
        raise CheckpointError("it is damaged: its header does not describe its tensors")
    shape = check(name, entry.get("shape"))
    dtype, span = entry.get("dtype"), entry.get("data_offsets")
    if (not isinstance(dtype, str) or not dtype.isprintable() or len(dtype) > 16 or not isinstance(span, list)
            or len(span) != 2 or not all(type(at) is int for at in span) or not 0 <= span[0] <= span[1] < 2**60):
        raise CheckpointError(f"it is damaged: its header does not say where {name!r} lies")
    dtype = DTYPES.get(dtype, dtype)
    size = span[1] - span[0]
    if dtype in NUMPY and size != elements(shape) * int(NUMPY[dtype][2:]):
        raise CheckpointError(f"it is damaged: {name!r} has {size:,} bytes, which is not its shape's size")
    return Tensor(name, dtype, shape, path, ((data + span[0], size),))


def _cut_short(expected: int, found: int) -> str:
    return f"it is cut short, with {found:,} bytes of at least {expected:,}: download or copy it again"
