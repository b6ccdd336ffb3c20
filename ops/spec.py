"""Shape, dtype and device of a tensor, known without the tensor. Sizes may be symbolic."""

from __future__ import annotations

import math
import operator
from typing import Any

import ml_dtypes
import numpy as np

from .errors import DTypeError, ShapeError
from .quantize import KNOWN, Format

DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype("float32"),
    "float16": np.dtype("float16"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "int64": np.dtype("int64"),
    "int32": np.dtype("int32"),
    "int8": np.dtype("int8"),
    "uint8": np.dtype("uint8"),
}
FLOATS = ("float32", "float16", "bfloat16")
INTEGERS = ("int64", "int32", "int8", "uint8")


class Dim:
    """A size that is known only when a kernel runs: a name and the range that a kernel is built for.

    Equal names mean equal sizes. `low` and `high` are inclusive; `high` is None when there is no limit.
    """

    __slots__ = ("high", "low", "name")

    def __init__(self, name: str, low: int = 1, high: int | None = None):
        self.name, self.low, self.high = name, low, high

    def _made(self, sign: str, other: object) -> Dim:
        return Dim(f"({self.name}{sign}{other})")

    def __add__(self, other: int | Dim) -> Dim:
        return self if other == 0 else self._made("+", other)

    def __mul__(self, other: int | Dim) -> Dim:
        return self if other == 1 else self._made("*", other)

    __radd__, __rmul__ = __add__, __mul__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Dim) and (self.name, self.low, self.high) == (other.name, other.low, other.high)

    def __hash__(self) -> int:
        return hash((self.name, self.low, self.high))

    def __repr__(self) -> str:
        if (self.low, self.high) == (1, None):
            return self.name
        return f"{self.name}:{self.low}-{'' if self.high is None else self.high}"


class Spec:
    """Shape, dtype and device; interned, so that equal specs are one object and compare by identity.

    A size is an int, or a `Dim` where it is symbolic. `free` holds the buffers of this spec that wait for reuse.
    """

    __slots__ = ("device", "dtype", "free", "ndim", "shape")
    _interned: dict[tuple, Spec] = {}  # noqa: RUF012 - one table for the process

    shape: tuple[Any, ...]
    dtype: str
    device: str
    ndim: int
    free: list

    def __new__(cls, shape: tuple[Any, ...], dtype: str, device: str = "cpu") -> Spec:
        key = (shape, dtype, device)
        found = cls._interned.get(key)
        if found is not None:
            return found
        if dtype not in DTYPES and dtype not in KNOWN:
            raise DTypeError(f"unknown dtype {dtype!r}; known are {', '.join((*DTYPES, *KNOWN))}")
        shape = tuple(_size(size, shape) for size in shape)
        if dtype in KNOWN and (len(shape) != 2 or any(isinstance(size, Dim) for size in shape)):
            raise ShapeError(f"shape {shape} of dtype {dtype}: a packed weight is [rows, inputs]")
        self = object.__new__(cls)
        self.shape, self.dtype, self.device, self.ndim, self.free = shape, dtype, device, len(shape), []
        return cls._interned.setdefault((shape, dtype, device), self)

    @property
    def symbolic(self) -> bool:
        return any(isinstance(size, Dim) for size in self.shape)

    @property
    def size(self) -> int:
        """Number of elements; raises for a symbolic spec."""
        if self.symbolic:
            raise ShapeError(f"{self} has no fixed size")
        return math.prod(self.shape)

    @property
    def format(self) -> Format | None:
        """How a packed weight is held; None where elements stand in memory one by one."""
        return KNOWN.get(self.dtype)

    @property
    def itemsize(self) -> int:
        """Bytes of what an address is a multiple of: an element, or a byte of a packed weight."""
        return DTYPES[self.dtype].itemsize if self.dtype in DTYPES else 1

    @property
    def nbytes(self) -> int:
        return self.size * self.itemsize if self.format is None else self.format.nbytes(self.shape)

    def like(self, shape: tuple[Any, ...] | None = None, dtype: str | None = None) -> Spec:
        """The same spec with another shape or dtype."""
        return Spec(self.shape if shape is None else tuple(shape), dtype or self.dtype, self.device)

    def on(self, device: str) -> Spec:
        """The same spec on another device."""
        return self if device == self.device else Spec(self.shape, self.dtype, device)

    def __reduce__(self):
        return Spec, (self.shape, self.dtype, self.device)

    def __repr__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]" + ("" if self.device == "cpu" else f" {self.device}")


def _size(size: Any, shape: tuple[Any, ...]) -> int | Dim:
    """A size as a plain int, whatever integer it was given as."""
    if isinstance(size, Dim):
        return size
    try:
        number = operator.index(size)
    except TypeError:
        number = -1
    if number < 0:
        raise ShapeError(f"shape {shape} has the size {size!r}; sizes are ints >= 0")
    return number
