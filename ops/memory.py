"""Buffers: memory on a device, taken from a pool and given back when nothing refers to it any more.

A decode step asks for the same shapes again and again, so the pool keeps free buffers by spec. A buffer that a NumPy
array or another library still holds through DLPack is never reused: its runtime reference count tells.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import sys
import threading

import numpy as np
import tvm
import tvm_ffi
from tvm.runtime import _ffi_api

from . import device
from .errors import KernelError
from .spec import Spec

IDLE_LIMIT = 512 * 2**20  # bytes that may wait for reuse before the pool is emptied

_lock = threading.Lock()
_allocations = 0
_allocated_bytes = 0
_checked_bytes = 0  # `_allocated_bytes` when the idle buffers were last added up


class Buffer:
    """One allocation: `data` is the runtime tensor, `references` its count of owners outside Python.

    `views` are other shapes of the same memory, made once: a decode step asks for them again and again.
    """

    __slots__ = ("data", "references", "views")

    def __init__(self, data):
        self.data = data
        self.views: dict[Spec, Buffer] = {}
        # The strong count is the low half of the first word of every runtime object.
        self.references = ctypes.c_uint32.from_address(data.__chandle__())

    def exclusive(self) -> bool:
        """True when only this buffer and its views, and its caller's reference to it, know the memory."""
        views = self.views  # each of which is one more owner
        if self.references.value != 1 + len(views) or sys.getrefcount(self.data) != 2:
            return False
        return not views or all(each.exclusive() for each in views.values())


def allocate(spec: Spec) -> Buffer:
    """A buffer of `spec`, reused when one is free. Its contents are whatever was there."""
    try:
        return spec.free.pop()
    except IndexError:
        return _allocate(spec)


def _allocate(spec: Spec) -> Buffer:
    global _allocations, _allocated_bytes, _checked_bytes
    with _lock:
        _allocations += 1
        _allocated_bytes += spec.nbytes
        due = _allocated_bytes - _checked_bytes > IDLE_LIMIT // 16  # adding up takes a while when there are many specs
        _checked_bytes = _allocated_bytes if due else _checked_bytes
    if due and idle_bytes() > IDLE_LIMIT:
        clear()
    try:
        return _fresh(spec)
    except KernelError:  # of a device that does not work any more
        raise
    except (RuntimeError, MemoryError):
        clear()  # what is idle may be what is missing
    try:
        return _fresh(spec)
    except (RuntimeError, MemoryError) as error:
        raise MemoryError(f"no memory for {spec}, {spec.nbytes} bytes") from error


def _fresh(spec: Spec) -> Buffer:
    own = None if spec.device == "cpu" else device.find(spec.device).memory(spec.nbytes)
    if own is not None:
        return view(spec, Buffer(tvm_ffi.from_dlpack(own)))
    return Buffer(_ffi_api.TVMTensorAllocWithScope(*_runtime_type(spec), tvm.cpu(), None))


def view(spec: Spec, buffer: Buffer) -> Buffer:
    """The same memory seen as `spec`, which must hold no more bytes. The view keeps the memory alive."""
    return Buffer(_ffi_api.TVMTensorCreateView(buffer.data, *_runtime_type(spec), 0))


def reshaped(spec: Spec, buffer: Buffer) -> Buffer:
    """The same memory as `spec`, which holds as many bytes: the view that the buffer remembers."""
    return buffer.views.get(spec) or buffer.views.setdefault(spec, view(spec, buffer))


def view_as(buffer: Buffer, shape: tuple[int, ...], dtype: str):
    """The runtime tensor of `buffer` with another shape or dtype name, such as the bits of a bfloat16."""
    return _ffi_api.TVMTensorCreateView(buffer.data, tvm_ffi.Shape(shape), tvm_ffi.dtype(dtype), 0)


def view_at(spec: Spec, buffer: Buffer, offset: int) -> Buffer:
    """`spec` at `offset` bytes into the memory of `buffer`."""
    if offset == 0 or spec.size == 0:
        return view(spec, buffer)
    # Kernels take no byte offset, so the data pointer itself must move; DLPack from a NumPy slice does that.
    whole = np.from_dlpack(_ffi_api.TVMTensorCreateView(buffer.data, *_bytes_of(buffer), 0))
    part = whole[offset : offset + spec.nbytes]
    return view(spec, Buffer(tvm_ffi.from_dlpack(part)))


def _bytes_of(buffer: Buffer) -> tuple:
    data = buffer.data
    return tvm_ffi.Shape((data.numel() * data.dtype.itemsize,)), tvm_ffi.dtype("uint8")


@functools.lru_cache(65536)
def _runtime_type(spec: Spec) -> tuple:
    if spec.format is not None:
        return tvm_ffi.Shape((spec.nbytes,)), tvm_ffi.dtype("uint8")
    return tvm_ffi.Shape(spec.shape), tvm_ffi.dtype(spec.dtype)


def huge(nbytes: int) -> np.ndarray:
    """Zeros, uint8 [nbytes], outside the pool, in pages of 2 MiB where the system gives them."""
    memory = mmap.mmap(-1, max(nbytes, 1), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared memory gets no such pages
    if hasattr(mmap, "MADV_HUGEPAGE") and nbytes >= 2**21:
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, "uint8", nbytes)


def idle_bytes() -> int:
    """Bytes that wait in the pool for reuse."""
    return sum(len(spec.free) * spec.nbytes for spec in tuple(Spec._interned.values()) if spec.free)


def clear() -> None:
    """Return all idle buffers to the system."""
    for spec in tuple(Spec._interned.values()):
        spec.free.clear()


def statistics() -> dict[str, int]:
    """`allocations` and `allocated_bytes` since the process started, `idle_bytes` now."""
    return {"allocations": _allocations, "allocated_bytes": _allocated_bytes, "idle_bytes": idle_bytes()}
