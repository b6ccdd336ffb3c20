"""How far values are from what they should be, and where most; what a call should give, by its NumPy reference."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from .call import Call, as_tuple, tensors
from .spec import FLOATS
from .tensor import Tensor
from .tolerance import KERNEL, relative_error


@dataclass(frozen=True)
class Difference:
    """`error` is max|actual - expected| / max|expected|, as in `ops.tolerance`; the worst element is at `index`."""

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


def inputs_of(call: Call) -> dict[str, Any]:
    """Inputs by name as the reference takes them; what the call writes as a copy, of what it is before."""
    return {
        name: (value.numpy().copy() if name in call.op.writes else value.numpy())
        if isinstance(value, Tensor)
        else value
        for name, value in call.inputs.items()
    }


def referred(call: Call, inputs: dict[str, Any], wide: bool = False) -> tuple[np.ndarray, ...]:
    """What the call's reference gives for inputs by name: outputs, then what it writes. `wide` makes floats float64.

    A reference that rounds by itself still does.
    """
    with np.errstate(all="ignore"):  # inf and NaN are results here, as in the kernel; in a cache there may be anything
        if wide:
            inputs = {name: value.astype("float64") if _is_float(value) else value for name, value in inputs.items()}
        return tuple(np.asarray(each) for each in as_tuple(call.op.reference(*inputs.values(), **call.constants)))


def _is_float(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.name in FLOATS


class Expected:
    """What a call should give: its reference on its real inputs. Made before the launch, which may overwrite them."""

    def __init__(self, call: Call, given: dict[str, Any] | None = None, wide: bool = False):
        self.call, self.given = call, inputs_of(call) if given is None else given
        self.values = referred(call, self.given, wide)

    def pairs(self, output: Any) -> Iterator[tuple[str, Tensor, np.ndarray]]:
        """Each thing that the call gave, by name, and what it should be."""
        for (name, tensor), wanted in zip(results(self.call, output).items(), self.values, strict=True):
            yield name, tensor, wanted

    def differences(self, output: Any) -> Iterator[tuple[str, Tensor, Difference]]:
        """Each thing that the call gave, by name, and its difference from what it should be."""
        for name, tensor, wanted in self.pairs(output):
            yield name, tensor, introduced(tensor, wanted, self.given[name] if name in self.call.op.writes else None)


def results(call: Call, output: Any) -> dict[str, Tensor]:
    """What a call gave, by name and in the order of `referred`: `output`, `output 1`, ..., then written arguments."""
    return {f"output {i}" if i else "output": each for i, each in enumerate(tensors(output))} | call.written


@np.errstate(all="ignore")  # memory that nothing was written to may hold anything
def introduced(tensor: Tensor, wanted: np.ndarray, before: np.ndarray | None = None) -> Difference:
    """How far a result is from what it should be. Of what was written, with its values `before`, only what has changed
    or should have counts: what lies beside it in the memory, which may be anything, is no measure."""
    actual, wanted = tensor.numpy().astype("float64"), np.asarray(wanted, "float64")
    if before is not None:
        old = before.astype("float64")
        touched = differs(actual, old) | differs(wanted, old)
        actual, wanted = np.where(touched, actual, 0), np.where(touched, wanted, 0)
    if tensor.dtype in FLOATS:
        largest = float(ml_dtypes.finfo(tensor.dtype).max) * (1 - bound(tensor))
        beyond = np.isinf(actual) & (np.abs(wanted) > largest) & (np.sign(actual) == np.sign(wanted))
        wanted = np.where(beyond, actual, wanted)  # the dtype has nothing nearer
    return difference(actual, wanted, tensor.dtype)


def differs(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Where the values of two arrays are not the same; NaN and NaN are."""
    return (a != b) & ~(np.isnan(a) & np.isnan(b))


def bound(tensor: Tensor) -> float:
    """The error that a kernel's result in this dtype may have."""
    return KERNEL.get(tensor.dtype, 0.0)
