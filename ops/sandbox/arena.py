"""The memory that a sandbox's child shares: where the arrays lie in it, and what lies before and after each of them."""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from ..languages.base import LaunchError, Parameter, Value
from ..languages.native import number

SIZE = 32 << 20  # bytes, at first; only what is touched takes memory
_GAP = 1 << 20  # bytes that nobody may touch, before and after each array
_CANARY = 256  # bytes beside an array whose change gives away a write that nothing else saw
_POISON = 0xFF  # a NaN in every float, -1 or 255 in integers
_KEPT = 256 << 20  # bytes that stay allocated from one run to the next
_NUMBER = 16  # bytes of a number


@dataclass(frozen=True)
class Slot:
    """Where an argument lies: bytes from the arena's beginning. `kept`: why it may not be written, "" if it may."""

    name: str
    start: int
    nbytes: int
    itemsize: int
    kept: str

    @property
    def end(self) -> int:
        return self.start + self.nbytes

    def told(self, offset: int, did: str) -> str:
        """What an access at `offset` did wrong. `did` is "read" or "wrote"."""
        element = f"{did} {self.name}[{(offset - self.start) // self.itemsize}]"
        count = self.nbytes // self.itemsize
        if offset < self.start:
            return f"{element}, before its beginning"
        if offset >= self.end:
            return f"{element}, past its end ({count} element{'s' * (count != 1)})"
        return f"{element}, which is {self.kept}" if self.kept else element


class Arena:
    """Shared memory without a name: it is gone when both processes are."""

    def __init__(self) -> None:
        if hasattr(os, "memfd_create"):
            self.file = os.memfd_create("limpid-sandbox")
        else:
            with tempfile.TemporaryFile() as file:
                self.file = os.dup(file.fileno())
        self.size = 0
        self.grow(SIZE)

    def grow(self, size: int) -> None:
        """At least `size` bytes, in whole powers of two."""
        self.size = 1 << (size - 1).bit_length()
        os.ftruncate(self.file, self.size)
        self._map = mmap.mmap(self.file, self.size)
        self._bytes = np.frombuffer(self._map, np.uint8)

    def close(self) -> None:
        del self._bytes
        with contextlib.suppress(BufferError):  # somebody looks at it; it goes with the last who does
            self._map.close()
        os.close(self.file)

    def fill(self, layout: Layout, parameters: Sequence[Parameter], values: Sequence[Value]) -> None:
        """Copy the arguments in; outputs get values that nobody takes for a result."""
        for index, (parameter, value) in enumerate(zip(parameters, values, strict=True)):
            slot = layout.slots.get(parameter.name)
            if slot is None:
                raw = number(parameter, value).view(np.uint8)
                self._at(layout.offsets[index], raw.size)[:] = raw
                continue
            if parameter.name in layout.outputs:
                self._at(slot.start, slot.nbytes)[:] = _POISON
            elif slot.nbytes:
                self._at(slot.start, slot.nbytes)[:] = np.asarray(value).reshape(-1).view(np.uint8)
            for start in (slot.start - _CANARY, slot.end):
                self._at(start, _CANARY)[:] = _pattern

    def collect(self, layout: Layout, parameters: Sequence[Parameter], values: Sequence[Value]) -> None:
        """Copy back what the run may have written. Raises LaunchError for a write beside an array."""
        for slot in layout.slots.values():
            for start in (slot.start - _CANARY, slot.end):
                changed = np.flatnonzero(self._at(start, _CANARY) != _pattern)
                if changed.size:
                    at = start + int(changed[0 if start == slot.end else -1])
                    raise LaunchError(f"the kernel {slot.told(at, 'wrote')}")
        for parameter, value in zip(parameters, values, strict=True):
            slot = layout.slots.get(parameter.name)
            if slot is not None and not slot.kept and slot.nbytes:
                np.asarray(value).reshape(-1).view(np.uint8)[:] = self._at(slot.start, slot.nbytes)
        if layout.used > _KEPT and hasattr(mmap, "MADV_REMOVE"):
            self._map.madvise(mmap.MADV_REMOVE)

    def _at(self, start: int, nbytes: int) -> np.ndarray:
        return self._bytes[start : start + nbytes]


_pattern = np.random.default_rng(0).integers(1, 255, _CANARY, np.uint8)  # neither zeros nor poison


@dataclass(frozen=True)
class Layout:
    """Where everything lies. `regions`: (start, bytes, read only), of what a kernel may touch."""

    slots: dict[str, Slot]
    outputs: Collection[str]
    offsets: tuple[int, ...]  # of each value
    sizes: tuple[int, ...]  # of each value: of a number 0
    regions: tuple[tuple[int, int, bool], ...]
    used: int

    def nearest(self, offset: int) -> Slot | None:
        """The argument that an access at `offset` was meant for: the nearest; None where none is near."""

        def distance(slot: Slot) -> int:
            return max(slot.start - offset, offset - slot.end + 1, 0)

        slot = min(self.slots.values(), key=distance, default=None)
        return slot if slot is not None and distance(slot) < _GAP else None


def laid_out(
    parameters: Sequence[Parameter], values: Sequence[Value], inputs: Collection[str], outputs: Collection[str]
) -> Layout:
    """A place for each value: arrays on pages of their own, at the parent's addresses modulo 64."""
    regions = [(_GAP, _NUMBER * len(parameters), True)]  # the numbers
    at = _GAP + _NUMBER * len(parameters)
    slots, offsets, sizes = {}, [], []
    for index, (parameter, value) in enumerate(zip(parameters, values, strict=True)):
        if not parameter.pointer:
            offsets.append(_GAP + _NUMBER * index)
            sizes.append(0)
            continue
        array = np.asarray(value)
        # Not where a page begins: what lies right before the array can be looked at, and tells who wrote there.
        start = -(-(at + _GAP) // mmap.PAGESIZE) * mmap.PAGESIZE + _CANARY + array.ctypes.data % 64
        kept = "const" if parameter.const else "an input" if parameter.name in inputs else ""
        slots[parameter.name] = Slot(parameter.name, start, array.nbytes, array.itemsize, kept)
        regions.append((start, array.nbytes, bool(kept)))
        offsets.append(start)
        sizes.append(array.nbytes)
        at = start + array.nbytes
    written = frozenset(name for name, slot in slots.items() if name in outputs and not slot.kept)
    return Layout(slots, written, tuple(offsets), tuple(sizes), tuple(regions), at + _GAP)
