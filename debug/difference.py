"""How far values are from what they should be, and where most; what a call should give, by its NumPy reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ops import Call, Tensor

from .record import tensors
from .tolerance import KERNEL, relative_error


@dataclass(frozen=True)
class Difference:
    """`error` is max|actual - expected| / max|expected|, as in `debug.tolerance`; the worst element is at `index`."""

    error: float
    index: tuple[int, ...]
    actual: float
    expected: float

    def __str__(self) -> str:
        return f"error {self.error:.3g}: {self.actual:.6g} instead of {self.expected:.6g} at {list(self.index)}"


def difference(actual: Any, expected: Any, dtype: str | None = None) -> Difference:
    """Of arrays of one shape; `dtype` is that of what made `actual`. A NaN on one side only is an infinite error."""
    with np.errstate(invalid="ignore"):  # rows that nobody wrote may hold signalling NaNs
        actual, expected = np.asarray(actual, "float64"), np.asarray(expected, "float64")
    error = relative_error(actual, expected, dtype)
    if not actual.size:
        return Difference(error, (), 0.0, 0.0)
    with np.errstate(invalid="ignore"):
        off = np.abs(actual - expected)
    off[(actual == expected) | (np.isnan(actual) & np.isnan(expected))] = 0
    off[np.isnan(off)] = np.inf
    worst = np.unravel_index(int(off.argmax()), off.shape)
    return Difference(error, tuple(int(i) for i in worst), float(actual[worst]), float(expected[worst]))


def expected(call: Call) -> tuple[np.ndarray, ...]:
    """What a call's outputs, then its written arguments, should be: its reference on its real inputs.

    To be asked before the launch, which may overwrite inputs; they are copied for a reference that does so too.
    """
    given = [
        value.numpy().copy() if isinstance(value, Tensor) and name in call.op.writes else value
        for name, value in call.inputs.items()
    ]
    result = call.op.reference(*given, **call.constants)
    return tuple(np.asarray(each) for each in (result if isinstance(result, tuple) else (result,)))


def results(call: Call, output: Any) -> dict[str, Tensor]:
    """What a call gave, by name and in the order of `expected`: `output`, `output 1`, ..., then written arguments."""
    return {f"output {i}" if i else "output": each for i, each in enumerate(tensors(output))} | call.written


def introduced(call: Call, output: Any, wanted: tuple[np.ndarray, ...]) -> tuple[str, Difference]:
    """The largest difference of what a call gave from what `expected` said, and in which of its results."""
    found = {
        name: difference(each.numpy(), reference, each.dtype)
        for (name, each), reference in zip(results(call, output).items(), wanted, strict=True)
    }
    return max(found.items(), key=lambda item: item[1].error)


def bound(tensor: Tensor) -> float:
    """The error that a kernel's result in this dtype may have."""
    return KERNEL.get(tensor.dtype, 0.0)
