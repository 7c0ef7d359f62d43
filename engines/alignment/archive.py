"""An .npz read member by member; nothing that a stranger's file says of itself is believed.

Members must lie there as they are, not compressed, so none can be larger than the file; and no pickle is ever loaded.
"""
from __future__ import annotations

import json
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from ..errors import EngineError

MAX_JSON = 1 << 16                            # bytes; a call's own takes about 500
# An .npy member as numpy writes it (numpy.lib.format, version 1.0); numpy's own reader evaluates more than is needed here.
HEADER = re.compile(rb"\x93NUMPY\x01\x00(..)\{'descr': '(<f4|<i4|\|u1)', 'fortran_order': False, 'shape': "
                    rb"\(((?:\d{1,18}, ?)*(?:\d{1,18})?)\), \} *\n", re.DOTALL)
LOCAL = struct.Struct("<4s22xHH")             # a zip member's own header: signature, lengths of name and extra field


class RecordingError(EngineError):
    """A recording cannot be written or read."""


class Archive:
    """The members of an .npz by name, without ".npy". Raises RecordingError for what is none, and for every damage."""

    def __init__(self, path: Path):
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive:
                self.members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            self.size = path.stat().st_size
        except FileNotFoundError:
            raise RecordingError(f"There is no recording {path.name}.") from None
        except (OSError, zipfile.BadZipFile, ValueError, RuntimeError) as error:
            raise RecordingError(f"{path.name} is no recording ({error}).") from error
        if any(info.compress_type != zipfile.ZIP_STORED for info in self.members.values()):
            raise RecordingError(f"{path.name} is no recording: its arrays are compressed.")

    def numbered(self) -> Iterator[str]:
        """Names that are numbers, in their order."""
        return iter(sorted((name for name in self.members if name.isdecimal()), key=int))

    def json(self, name: str) -> dict:
        """A member that holds JSON, as uint8."""
        try:
            if name not in self.members or self.members[name].file_size > MAX_JSON:
                raise ValueError(name)
            value = json.loads(self.array(name).tobytes())
            if not isinstance(value, dict):
                raise ValueError(name)
        except (ValueError, RecursionError) as error:
            raise self.damaged() from error
        return value

    def array(self, name: str) -> np.ndarray:
        """float32, int32 or uint8; read-only. It is of some size: nothing that is recorded is empty."""
        try:
            data = self._bytes(self.members[name])
            header = HEADER.match(data)
            if header is None:
                raise ValueError("no array of ours")
            shape = [int(size) for size in header[3].split(b",") if size.strip()]
            if 0 in shape:
                raise ValueError("an empty array")
            return np.frombuffer(data, header[2].decode(), offset=header.end()).reshape(shape)
        except (OSError, KeyError, ValueError, OverflowError, struct.error) as error:
            raise RecordingError(f"{self.path.name} is damaged at '{name[:80]}': record again.") from error

    def _bytes(self, info: zipfile.ZipInfo) -> bytes:
        """From where it lies: zipfile would read the whole directory once more for each member."""
        if info.file_size > self.size:
            raise ValueError("longer than its file")
        with self.path.open("rb") as file:
            file.seek(info.header_offset)
            signature, name, extra = LOCAL.unpack(file.read(LOCAL.size))
            if signature != zipfile.stringFileHeader or file.read(name) != info.orig_filename.encode():
                raise ValueError("another member")
            file.seek(extra, 1)
            data = file.read(info.file_size)
        if len(data) != info.file_size or zlib.crc32(data) != info.CRC:
            raise ValueError("other bytes than were written")
        return data

    def damaged(self) -> RecordingError:
        return RecordingError(f"{self.path.name} is no recording, or a damaged one: record again.")


class Arrays(Mapping):
    """Arrays of an archive by argument, read when asked for. members: {argument: member}; ranks: the least of each."""

    def __init__(self, archive: Archive, members: dict[str, str], ranks: Mapping[str, int]):
        self.archive, self.members, self.ranks = archive, members, ranks

    def __getitem__(self, argument: str) -> np.ndarray:
        array = self.archive.array(self.members[argument])
        if array.ndim < self.ranks.get(argument, 0) or array.dtype == np.uint8:
            raise RecordingError(f"{self.archive.path.name} is damaged: its '{argument[:80]}' has the shape "
                                 f"{list(array.shape)}; record again.")
        return array

    def __iter__(self):
        return iter(self.members)

    def __len__(self) -> int:
        return len(self.members)
