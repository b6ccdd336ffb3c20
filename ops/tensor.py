"""Tensor: a dense array on a device, shared with NumPy and other libraries without copying."""

from __future__ import annotations

import ctypes
import functools
import math
from sys import getrefcount
from typing import TYPE_CHECKING, Any

import numpy as np
import tvm_ffi

from . import device as devices
from . import memory, quantize, target
from .errors import DTypeError, OpError, ShapeError
from .quantize import KNOWN
from .spec import DTYPES, Spec

Number = float | np.integer | np.floating
_STORAGE = {"bfloat16": "uint16"}  # NumPy's bfloat16 has no DLPack: it travels as its bits


class Tensor:
    """A contiguous array. Make one with `ops.tensor(array)`; ops return them.

    `x.shape`, `x.dtype`, `x.device`; `x.numpy()` and `np.asarray(x)` share the memory; `x[2:5]` and `x.reshape(...)`
    are views. Arithmetic (`x + y`, `x * 2.0`) calls ops, so tools see it. `x.to(device)` is a copy on another device,
    whose memory NumPy sees as well: `x.numpy()` waits for what the device is still computing. An array from there is
    what it was until the next op; take another one then.

    A packed weight has a weight format as its dtype, such as "q4". `numpy()` gives a copy of its values as float32;
    it has no views.
    """

    __slots__ = ("__weakref__", "buffer", "owner", "spec")

    spec: Spec
    buffer: Any  # memory.Buffer
    owner: Any  # what keeps the memory alive; None when it is a buffer of the pool

    def __new__(cls, *_: Any, **__: Any) -> Tensor:
        raise OpError("Tensor(...) is not called directly; use ops.tensor(array), ops.empty(shape) or ops.zeros(shape)")

    def __del__(self):
        if self.owner is None:
            buffer = self.buffer
            self.buffer = None  # a finalizer that still reaches this tensor must not reach memory given away
            # First the usual case of `exclusive`. Where somebody still refers to the memory, it is dropped, not kept.
            if (buffer.references.value == 1 and getrefcount(buffer.data) == 2) or buffer.exclusive():
                self.spec.free.append(buffer)
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
        """The values as a NumPy array over the same memory; a change in one is seen in the other.

        Of a packed weight a copy, float32, which remembers its format. Raises LaunchError where a kernel of the
        tensor's device has failed.
        """
        if self.spec.device != "cpu":
            devices.wait(self.spec.device)
        if self.spec.format is not None:
            return quantize.unpack(np.from_dlpack(self.buffer.data), self.shape, self.spec.format)
        array = np.from_dlpack(self._bits())
        return array if self.dtype not in _STORAGE else array.view(DTYPES[self.dtype])

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        array = self.numpy()
        if dtype is not None and np.dtype(dtype) != array.dtype:
            if copy is False:
                raise ValueError(f"{self.spec} as {np.dtype(dtype)} needs a copy, and copy=False forbids it")
            return array.astype(dtype)
        if copy is False and self.spec.format is not None:
            raise ValueError(f"the values of {self.spec} are a copy, and copy=False forbids it")
        return array.copy() if copy else array

    def to(self, device: str) -> Tensor:
        """A copy on a device: "cpu", "cuda" or "emulate"; the tensor itself where it is there. Raises OpError."""
        if device == self.spec.device:
            return self
        devices.check(device)
        result = _wrap(spec := self.spec.on(device), memory.allocate(spec))
        devices.wait(self.spec.device)
        _fill(result, np.from_dlpack(self._bits()))
        return result

    def on_cpu(self) -> Tensor:
        """The same memory as a tensor of the CPU, once the device has computed it."""
        if self.spec.device == "cpu":
            return self
        devices.wait(self.spec.device)
        return _wrap(self.spec.on("cpu"), self.buffer, owner=self)

    def _bits(self) -> Any:
        """The runtime tensor with elements that NumPy reads: the bits where it does not know the dtype."""
        if self.spec.format is not None or self.dtype not in _STORAGE:
            return self.buffer.data
        return memory.view_as(self.buffer, self.shape, _STORAGE[self.dtype])

    def __copy__(self) -> Tensor:
        return self.reshape(self.shape)

    def __deepcopy__(self, _: Any) -> Tensor:
        if self.spec.format is not None:
            return tensor_from_packed(np.from_dlpack(self.buffer.data).copy(), self.spec)
        return tensor(self.numpy().copy(), device=self.device)

    def __reduce__(self):
        if self.spec.format is not None:
            return _unpickled, (np.from_dlpack(self.buffer.data), self.spec, target.lanes())
        return tensor, (self.numpy(), None, self.device)

    def __dlpack__(self, *, copy: bool | None = None, **options):
        if self.spec.format is not None:
            raise OpError(f"{self.spec} is packed, which no other library reads; share its values: x.numpy()")
        shared = self.__deepcopy__({}) if copy else self
        devices.wait(self.spec.device)
        return shared.buffer.data.__dlpack__(**options)

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
        spec = _reshaped(self.spec, sizes)
        return _wrap(spec, memory.reshaped(spec, self.buffer), owner=self)

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
        def __rtruediv__(self, other: Number, /) -> Tensor: ...
        def __neg__(self, /) -> Tensor: ...

    def __repr__(self) -> str:
        from .display import text

        return text(self)

    def _repr_html_(self) -> str:
        from .display import html

        return html(self)


@functools.lru_cache(4096)
def _reshaped(spec: Spec, sizes: tuple) -> Spec:
    """`spec` with another shape of the same size; one of the `sizes` may be -1."""
    if -1 in sizes:
        rest = math.prod(size for size in sizes if size != -1)
        if sizes.count(-1) > 1 or rest == 0 or spec.size % rest:
            raise ShapeError(f"cannot reshape {spec} to {sizes}")
        sizes = tuple(spec.size // rest if size == -1 else size for size in sizes)
    if spec.format is not None and sizes != spec.shape:
        raise ShapeError(f"{spec} is packed and has no other shape; reshape its values: x.numpy()")
    found = spec.like(sizes)
    if found.size != spec.size:
        raise ShapeError(f"cannot reshape {spec} ({spec.size} elements) to {sizes} ({found.size} elements)")
    return found


def _leading_view(spec: Spec, index: tuple) -> tuple[Spec, int]:
    """The spec of a view along leading dimensions, and its offset in bytes."""
    if spec.format is not None:
        raise ShapeError(f"{spec} is packed and has no views; look at its values: x.numpy()[...]")
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
    """A tensor with whatever was in its memory. `shape` may be a whole `Spec`. Raises OpError for a missing device."""
    spec = shape if type(shape) is Spec else Spec((shape,) if isinstance(shape, int) else tuple(shape), dtype, device)
    devices.check(spec.device)
    if spec.symbolic:
        raise ShapeError(f"{spec} has symbolic sizes; memory needs numbers")
    return _wrap(spec, memory.allocate(spec))


def zeros(shape, dtype: str = "float32", device: str = "cpu") -> Tensor:
    """A tensor of zeros; arguments as of `empty`."""
    result = empty(shape, dtype, device)
    devices.wait(result.device)
    np.from_dlpack(result._bits())[...] = 0
    return result


def integer(value: int, device: str = "cpu") -> Tensor:
    """int32 [1] with `value`, such as a token or its position: not by NumPy, which weights drive out of the caches."""
    if device != "cpu":
        return tensor(np.array([value], "int32"), device=device)
    spec = Spec((1,), "int32")
    buffer = memory.allocate(spec)
    ctypes.c_int32.from_address(buffer.data.data_ptr()).value = value
    return _wrap(spec, buffer)


def tensor(array: Any, dtype: str | None = None, device: str = "cpu") -> Tensor:
    """A tensor over `array`: NumPy or anything with DLPack (no copy), a tensor, a number or nested lists.

    Copied only where sharing is impossible: a read-only or unaligned array, or another `dtype` asked for. Raises
    ShapeError for an array that is not contiguous and DTypeError for a dtype that no op takes. A weight format as
    `dtype`, such as "q4", quantises a matrix [rows, inputs] and packs it. On another `device` it is a copy; OpError
    where there is no such device.
    """
    if device != "cpu":
        devices.check(device)
        return tensor(array, dtype).to(device)
    if isinstance(array, Tensor):
        return array.to("cpu") if dtype in (None, array.dtype) else tensor(array.numpy(), dtype)
    if not isinstance(array, np.ndarray) and hasattr(array, "__dlpack__"):
        return _from_dlpack(array, dtype)
    if not isinstance(array, (np.ndarray, np.generic)):
        listed = np.asarray(array)
        array = listed.astype("float32") if listed.dtype == np.float64 else listed
    array = np.asarray(array)
    if dtype in KNOWN:
        return tensor_from_packed(quantize.pack(array, dtype), Spec(array.shape, dtype))
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


def tensor_from_packed(data: np.ndarray, spec: Spec) -> Tensor:
    """A packed weight over its bytes, uint8 [spec.nbytes], as `ops.quantize.pack` lays them out for this machine.

    On another device than the CPU it is a copy.
    """
    if data.dtype != np.uint8 or data.shape != (spec.nbytes,) or not data.flags.c_contiguous:
        raise ShapeError(f"{spec} takes {spec.nbytes} bytes; given {data.dtype} {list(data.shape)}")
    if spec.device != "cpu":
        return tensor_from_packed(data, spec.on("cpu")).to(spec.device)
    return _wrap(spec, memory.Buffer(tvm_ffi.from_dlpack(data)), owner=data)


def _unpickled(data: np.ndarray, spec: Spec, lanes: int) -> Tensor:
    if lanes != target.lanes():
        raise OpError(f"{spec} was packed for vectors of {lanes} lanes; this machine's have {target.lanes()}")
    return tensor_from_packed(data.copy(), spec)


def _fill(result: Tensor, bits: np.ndarray) -> None:
    """Fill a fresh tensor, once nothing that was started still reads what its memory held before."""
    device = devices.find(result.device) if result.device != "cpu" else None
    if device is not None:
        device.wait()
    array = np.from_dlpack(result._bits())
    np.copyto(array, bits)
    if device is not None:
        device.filled(array)


def _known(dtype: str) -> np.dtype:
    if dtype not in DTYPES:
        raise DTypeError(f"unknown dtype {dtype!r}; known are {', '.join((*DTYPES, *KNOWN))}")
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
