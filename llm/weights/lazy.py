"""Arrays of a checkpoint that are made when they are read, so that a model is never in memory twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import numpy as np

from ops import target
from ops.quantize import KNOWN


class Lazy:
    """An array whose shape and dtype are known before it is made: `np.asarray` makes it, each time anew.

    What models do to rearrange a checkpoint's arrays it does too, and gives another such array.
    """

    form: str | None = None  # the weight format that holds exactly these values, made by `pack`

    def __init__(self, shape: Sequence[int], make: Callable[[], np.ndarray], dtype: Any = "float32"):
        self.shape, self.dtype, self._make = tuple(shape), np.dtype(dtype), make

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def T(self) -> Lazy:
        return changed(self, self.shape[::-1], np.transpose)

    def __getitem__(self, index: Any) -> Lazy:
        shape = np.broadcast_to(np.False_, self.shape)[index].shape
        return changed(self, shape, lambda array: array[index])

    def reshape(self, *shape: int) -> Lazy:
        known = prod(each for each in shape if each != -1)
        full = tuple(self.size // max(known, 1) if each == -1 else each for each in shape)
        if prod(full) != self.size:
            raise ValueError(f"cannot reshape an array of shape {self.shape} into {shape}")
        return changed(self, full, lambda array: array.reshape(full))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        made = self._make()
        assert made.shape == self.shape and made.dtype == self.dtype
        return made if dtype is None else made.astype(dtype, copy=False)

    def pack(self, form: str, out: np.ndarray) -> np.ndarray:
        """The bytes of the packed weight in `form`, which is `self.form`, into `out`: no float is rounded."""
        raise NotImplementedError


class Pile(Lazy):
    """Arrays one below the other, alike but for their rows. They are made, or packed, one at a time.

    Raises ValueError where the rows are not alike.
    """

    def __init__(self, parts: Sequence[Any]):
        rows, *others = {tuple(each.shape[1:]) for each in parts}
        if others:
            raise ValueError(f"rows of shapes {rows} and {others[0]} are not put one below the other")
        dtype = np.result_type(*(each.dtype for each in parts))
        super().__init__((sum(each.shape[0] for each in parts), *rows), self._made, dtype)
        self.parts = [*parts]

    @property
    def form(self) -> str | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The form that all of them have; None where one's last rows would share a record with the next one's."""
        forms = {getattr(each, "form", None) for each in self.parts}
        aligned = all(each.shape[0] % target.lanes() == 0 for each in self.parts)
        return forms.pop() if aligned and len(forms) == 1 else None

    def _made(self) -> np.ndarray:
        out, at = np.empty(self.shape, self.dtype), 0
        for each in self.parts:
            out[at : at + each.shape[0]] = np.asarray(each)
            at += each.shape[0]
        return out

    def pack(self, form: str, out: np.ndarray) -> np.ndarray:
        at = 0
        for each in self.parts:
            size = KNOWN[form].nbytes(each.shape)
            each.pack(form, out[at : at + size])
            at += size
        return out


def concatenated(arrays: Sequence[Any]) -> Any:
    """The arrays one below the other, made when they are read where any of them is."""
    return Pile(arrays) if any(isinstance(each, Lazy) for each in arrays) else np.concatenate(arrays)


def changed(array: Any, shape: Sequence[int], change: Callable[[np.ndarray], np.ndarray]) -> Lazy:
    """`change(array)`, of `shape` and the same dtype, made when it is read."""
    return Lazy(shape, lambda: change(np.asarray(array)), array.dtype)
