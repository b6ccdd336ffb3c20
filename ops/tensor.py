"""Tensor: a dense array on a device, shared with NumPy and other libraries without copying."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import tvm_ffi

from . import memory
from .errors import DTypeError, OpError, ShapeError
from .spec import DTYPES, Spec

Number = float | np.integer | np.floating
_STORAGE = {"bfloat16": "uint16"}  # NumPy's bfloat16 has no DLPack: it travels as its bits


class Tensor:
    """A contiguous array. Make one with `ops.tensor(array)`; ops return them.

    `x.shape`, `x.dtype`, `x.device`; `x.numpy()` and `np.asarray(x)` share the memory; `x[2:5]` and `x.reshape(...)`
    are views. Arithmetic (`x + y`, `x * 2.0`) calls ops, so tools see it.
    """

    __slots__ = ("__weakref__", "buffer", "owner", "spec")

    spec: Spec
    buffer: Any  # memory.Buffer
    owner: Any  # what keeps the memory alive; None when it is a buffer of the pool

    def __new__(cls, *_: Any, **__: Any) -> Tensor:
        raise OpError("Tensor(...) is not called directly; use ops.tensor(array), ops.empty(shape) or ops.zeros(shape)")

    def __del__(self):
        if self.owner is None:
            memory.release(self.spec, self.buffer)
            self.buffer = None  # a finalizer that still reaches this tensor must not reach memory given away
        else:
            # The view goes before its owner does: else the owner's buffer would look shared and leave the pool.
            self.buffer = None
            self.owner = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.spec.shape

    @property
    def dtype(self) -> str:
        return self.spec.dtype

    @property
    def device(self) -> str:
        return self.spec.device

    @property
    def ndim(self) -> int:
        return self.spec.ndim

    @property
    def size(self) -> int:
        return self.spec.size

    @property
    def nbytes(self) -> int:
        return self.spec.nbytes

    def __len__(self) -> int:
        if not self.shape:
            raise ShapeError("a tensor without dimensions has no length")
        return self.shape[0]

    def numpy(self) -> np.ndarray:
        """The values as a NumPy array over the same memory, on the CPU; a change in one is seen in the other."""
        if self.device != "cpu":
            raise OpError(f"{self.spec} is not on the CPU, and NumPy sees only CPU memory")
        if self.dtype not in _STORAGE:
            return np.from_dlpack(self.buffer.data)
        bits = memory.view_as(self.buffer, self.shape, _STORAGE[self.dtype])
        return np.from_dlpack(bits).view(DTYPES[self.dtype])

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        array = self.numpy()
        if dtype is not None and np.dtype(dtype) != array.dtype:
            if copy is False:
                raise ValueError(f"{self.spec} as {np.dtype(dtype)} needs a copy, and copy=False forbids it")
            return array.astype(dtype)
        return array.copy() if copy else array

    def __copy__(self) -> Tensor:
        return self.reshape(self.shape)

    def __deepcopy__(self, _: Any) -> Tensor:
        return tensor(self.numpy().copy())

    def __reduce__(self):
        return tensor, (self.numpy(),)

    def __dlpack__(self, **options):
        return self.buffer.data.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.buffer.data.__dlpack_device__()

    def item(self) -> int | float:
        """The value of a tensor with one element."""
        if self.size != 1:
            raise ShapeError(f"item() needs one element; this is {self.spec}")
        return self.numpy().reshape(()).item()

    def reshape(self, *shape: Any) -> Tensor:
        """A view with another shape of the same size; one size may be -1."""
        sizes = tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape
        if -1 in sizes:
            rest = int(np.prod([size for size in sizes if size != -1]))
            if sizes.count(-1) > 1 or rest == 0 or self.size % rest:
                raise ShapeError(f"cannot reshape {self.spec} to {sizes}")
            sizes = tuple(self.size // rest if size == -1 else size for size in sizes)
        spec = self.spec.like(sizes)
        if spec.size != self.size:
            raise ShapeError(f"cannot reshape {self.spec} ({self.size} elements) to {sizes} ({spec.size} elements)")
        return _wrap(spec, memory.view(spec, self.buffer), owner=self)

    def __getitem__(self, index) -> Tensor:
        """A view along leading dimensions: `x[3]`, `x[2:5]`, `x[0, 1:]`. It is contiguous, so steps are 1."""
        spec, offset = _leading_view(self.spec, index if isinstance(index, tuple) else (index,))
        return _wrap(spec, memory.view_at(spec, self.buffer, offset), owner=self)

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def __bool__(self) -> bool:
        if self.size != 1:
            raise ShapeError(f"the truth of {self.spec} is ambiguous; look at x.numpy()")
        return bool(self.item())

    __array_priority__ = 1.0  # NumPy's numbers on the left leave arithmetic to the tensor

    # Arithmetic calls ops, and those are made of tensors: `ops/pointwise.py` sets these methods when it is imported.
    if TYPE_CHECKING:

        def __add__(self, other: Tensor | Number, /) -> Tensor: ...
        def __radd__(self, other: Tensor | Number, /) -> Tensor: ...
        def __sub__(self, other: Tensor | Number, /) -> Tensor: ...
        def __rsub__(self, other: Number, /) -> Tensor: ...
        def __mul__(self, other: Tensor | Number, /) -> Tensor: ...
        def __rmul__(self, other: Tensor | Number, /) -> Tensor: ...
        def __truediv__(self, other: Tensor | Number, /) -> Tensor: ...
        def __neg__(self, /) -> Tensor: ...

    def __repr__(self) -> str:
        from .display import text

        return text(self)

    def _repr_html_(self) -> str:
        from .display import html

        return html(self)


def _leading_view(spec: Spec, index: tuple) -> tuple[Spec, int]:
    """The spec of a view along leading dimensions, and its offset in bytes."""
    if len(index) > spec.ndim:
        raise ShapeError(f"{len(index)} indices for {spec}")
    kept, offset, stride = [], 0, spec.nbytes
    for axis, (part, size) in enumerate(zip(index, spec.shape, strict=False)):
        stride = stride // size if size else 0
        if isinstance(part, slice):
            start, stop, step = part.indices(size)
            if step != 1 or axis != len(index) - 1:
                raise ShapeError(f"{part} of {spec} is not contiguous: a view takes ints, then one slice with step 1")
            kept.append(max(stop - start, 0))
        elif isinstance(part, (int, np.integer)):
            start = int(part) + size if part < 0 else int(part)
            if not 0 <= start < size:
                raise IndexError(f"index {part} is out of range for axis {axis} of {spec}")
        else:
            raise ShapeError(f"a view takes ints and slices, not {part!r}; for more use x.numpy()[...]")
        offset += start * stride
    return spec.like((*kept, *spec.shape[len(index) :])), offset


def _wrap(spec: Spec, buffer, owner=None) -> Tensor:
    self = object.__new__(Tensor)
    self.spec, self.buffer, self.owner = spec, buffer, owner
    return self


def empty(shape, dtype: str = "float32", device: str = "cpu") -> Tensor:
    """A tensor with whatever was in its memory."""
    spec = Spec((shape,) if isinstance(shape, int) else tuple(shape), dtype, device)
    if spec.symbolic:
        raise ShapeError(f"{spec} has symbolic sizes; memory needs numbers")
    return _wrap(spec, memory.allocate(spec))


def zeros(shape, dtype: str = "float32", device: str = "cpu") -> Tensor:
    """A tensor of zeros."""
    result = empty(shape, dtype, device)
    result.numpy()[...] = 0
    return result


def tensor(array: Any, dtype: str | None = None, device: str = "cpu") -> Tensor:
    """A tensor over `array`: NumPy or anything with DLPack (no copy), a tensor, a number or nested lists.

    Copied only where sharing is impossible: a read-only or unaligned array, or another `dtype` asked for. Raises
    ShapeError for an array that is not contiguous and DTypeError for a dtype that no op takes.
    """
    if device != "cpu":
        raise OpError(f"device {device!r} is not supported; this build runs on 'cpu'")
    if isinstance(array, Tensor):
        return array if dtype in (None, array.dtype) else tensor(array.numpy(), dtype)
    if not isinstance(array, np.ndarray) and hasattr(array, "__dlpack__"):
        return _from_dlpack(array, dtype)
    if not isinstance(array, (np.ndarray, np.generic)):
        listed = np.asarray(array)
        array = listed.astype("float32") if listed.dtype == np.float64 else listed
    array = np.asarray(array)
    if dtype is not None:
        array = array.astype(_known(dtype), copy=False)
    name = array.dtype.name
    if name not in DTYPES or array.dtype != DTYPES[name]:
        raise DTypeError(f"no op takes {array.dtype}; convert with array.astype(...) to one of {', '.join(DTYPES)}")
    if not array.flags.c_contiguous:
        raise ShapeError(f"the array of shape {array.shape} is not contiguous; pass np.ascontiguousarray(array)")
    if not (array.flags.writeable and array.flags.aligned):
        array = array.copy()
    spec = Spec(array.shape, name)
    if array.size == 0:
        return empty(array.shape, name)
    bits = array.view(_STORAGE.get(name, array.dtype))
    buffer = memory.Buffer(tvm_ffi.from_dlpack(bits))
    return _wrap(spec, memory.view(spec, buffer) if name in _STORAGE else buffer, owner=array)


def _known(dtype: str) -> np.dtype:
    if dtype not in DTYPES:
        raise DTypeError(f"unknown dtype {dtype!r}; known are {', '.join(DTYPES)}")
    return DTYPES[dtype]


def _from_dlpack(array: Any, dtype: str | None) -> Tensor:
    data = tvm_ffi.from_dlpack(array)
    name, shape = str(data.dtype), tuple(data.shape)
    if name not in DTYPES:
        raise DTypeError(f"no op takes {name}; convert it to one of {', '.join(DTYPES)}")
    if not data.is_contiguous():
        raise ShapeError(f"the array of shape {shape} is not contiguous; make it contiguous first")
    if data.__dlpack_device__()[0] != 1:
        raise OpError("the array is not in CPU memory; copy it there first")
    shared = _wrap(Spec(shape, name), memory.Buffer(data), owner=array)
    return shared if dtype in (None, name) else tensor(shared.numpy(), dtype)
