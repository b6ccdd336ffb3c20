"""A file mapped into memory that is a zip archive while a call is in it, and none otherwise.

Filling it takes a few copies and checksums, no system call: what is written stays when the process dies. Members lie
one after the other: those that are kept from call to call, then those of the call at hand; the directory, which makes
an archive of it, ends the file, and its last record is written last.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
import zlib
from pathlib import Path

import numpy as np

_LOCAL = struct.Struct("<4sHHHHHIIIHH")
_CENTRAL = struct.Struct("<4sHHHHHHIIIHHHHHII")
_END = struct.Struct("<4sHHHHIIH")
_1980 = 0x21  # the first date that an archive knows
_FIRST = 2**20
_LARGEST = 2**32 - 2**20  # offsets in an archive have 32 bits


class Slot:
    """`begin`, then `add` or `refer` for each member, then `close`; `clear` when the call is over."""

    def __init__(self, path: Path):
        self.path = path
        self.kept = 0  # bytes at the start that stay
        self._position = 0
        self._directory: list[bytes] = []
        self._file = open(path, "x+b")  # noqa: SIM115 - as long as the slot lives
        self._map(_FIRST)

    def begin(self) -> None:
        self._position = self.kept
        self._directory.clear()

    def add(self, name: bytes, head: bytes, address: int, nbytes: int) -> bytes:
        """Put a member: `head`, then the memory at an address. Gives its entry, for `refer`.

        Raises OverflowError when there is no room for it in an archive.
        """
        size = len(head) + nbytes
        start = self._position + _LOCAL.size + len(name)
        self._room(start + size)
        if nbytes:
            ctypes.memmove(self._address + start + len(head), address, nbytes)
        crc = (
            zlib.crc32(self._bytes[start + len(head) : start + size], zlib.crc32(head)) if nbytes else zlib.crc32(head)
        )
        _LOCAL.pack_into(self._bytes, self._position, b"PK\3\4", 20, 0, 0, 0, _1980, crc, size, size, len(name), 0)
        self._bytes[self._position + _LOCAL.size : start + len(head)] = name + head
        entry = _CENTRAL.pack(
            b"PK\1\2", 20, 20, 0, 0, 0, _1980, crc, size, size, len(name), 0, 0, 0, 0, 0, self._position
        )
        self._position = start + size
        entry += name
        self._directory.append(entry)
        return entry

    def refer(self, entry: bytes) -> None:
        """Put a member that was added before, and kept."""
        self._directory.append(entry)

    def keep(self) -> None:
        """What was added since `begin` stays."""
        self.kept = self._position

    def close(self) -> None:
        """The directory: from here on the file is an archive."""
        directory = b"".join(self._directory)
        self._room(self._position + len(directory))
        end = self._size - _END.size
        self._bytes[end - len(directory) : end] = directory
        count = len(self._directory)
        self._bytes[end:] = _END.pack(b"PK\5\6", 0, 0, count, count, len(directory), end - len(directory), 0)

    def clear(self) -> None:
        """No call is in it any more."""
        self._bytes[self._size - _END.size :] = bytes(_END.size)

    def remove(self) -> None:
        """Delete the file. Another thread may still be in a call: the memory goes with the slot."""
        self._file.close()
        self.path.unlink(missing_ok=True)

    def _room(self, nbytes: int) -> None:
        if nbytes + _END.size > self._size:
            if nbytes > _LARGEST:
                raise OverflowError(nbytes)
            self._map(nbytes + max(nbytes // 4, _FIRST))

    def _map(self, size: int) -> None:
        os.posix_fallocate(self._file.fileno(), 0, size)  # on a full disk an error here, and no crash later
        self._memory = mmap.mmap(self._file.fileno(), size)
        self._bytes, self._size = memoryview(self._memory), size
        self._address = np.frombuffer(self._memory, "uint8").ctypes.data
