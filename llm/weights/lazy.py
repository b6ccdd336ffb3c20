"""Arrays of a checkpoint that are made when they are read, so that a model is never in memory twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import numpy as np


class Lazy:
    """An array whose shape and dtype are known before it is made: `np.asarray` makes it, each time anew."""

    form: str | None = None  # the weight format that holds exactly these values, made by `pack`

    def __init__(self, shape: Sequence[int], make: Callable[[], np.ndarray], dtype: Any = "float32"):
        self.shape, self.dtype, self._make = tuple(shape), np.dtype(dtype), make

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return prod(self.shape)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        made = self._make()
        assert made.shape == self.shape and made.dtype == self.dtype
        return made if dtype is None else made.astype(dtype, copy=False)

    def pack(self, form: str, out: np.ndarray) -> np.ndarray:
        """The bytes of the packed weight in `form`, which is `self.form`, into `out`: no float is rounded."""
        raise NotImplementedError


def changed(array: Any, shape: Sequence[int], change: Callable[[np.ndarray], np.ndarray]) -> Lazy:
    """`change(array)`, of `shape` and the same dtype, made when it is read."""
    return Lazy(shape, lambda: change(np.asarray(array)), array.dtype)
