"""Definitions: a run in which every call is computed by its op's NumPy definition, on float64 arrays.

Kernels do not run. Each tensor of the model has a shadow, a float64 array that belongs to its memory; the model sees
the shadow rounded to the tensor's dtype, the next call takes the shadow itself.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

import ops
from ops import Call, Tensor
from ops.call import as_tuple
from ops.spec import FLOATS


def begin(tensor: Tensor) -> int:
    """The address that a tensor's memory begins at."""
    return tensor.buffer.data.data_ptr()


class Shadows:
    """float64 arrays by the memory of the tensors they stand for; a view of a tensor has a view of its array."""

    def __init__(self) -> None:
        self._begins: list[int] = []
        self._held: dict[int, tuple[Tensor, np.ndarray]] = {}  # the tensor too: its memory is not given away

    def put(self, tensor: Tensor, array: np.ndarray) -> None:
        at = begin(tensor)
        if at not in self._held:
            bisect.insort(self._begins, at)
        self._held[at] = tensor, array.reshape(tensor.shape)

    def get(self, tensor: Tensor) -> np.ndarray | None:
        at = begin(tensor)
        found = bisect.bisect_right(self._begins, at) - 1
        if found < 0:
            return None
        base, array = self._held[self._begins[found]]
        offset = (at - begin(base)) // base.spec.itemsize
        if offset + tensor.size > base.size or tensor.dtype != base.dtype:
            return None
        return array.reshape(-1)[offset : offset + tensor.size].reshape(tensor.shape)

    def keep_only(self, begins: Collection[int]) -> None:
        """Forget all but the memory that begins at these, such as a cache's buffers between two forwards."""
        self._held = {at: held for at, held in self._held.items() if at in begins}
        self._begins = sorted(self._held)


class Definitions(ops.Interceptor):
    """Computes every call by its definition instead of its kernel. `weights` stand in for tensors, by their address.

    A packed weight is taken by its values: activations are not rounded for it.
    """

    def __init__(self, weights: Mapping[int, np.ndarray] | None = None):
        self.weights = weights or {}
        self.shadows = Shadows()
        self.written: dict[int, Tensor] = {}

    def array(self, tensor: Tensor) -> np.ndarray:
        """A tensor's values: its shadow, the weight in its place, or what it holds; floats as float64."""
        found = self.shadows.get(tensor) if tensor.spec.format is None else None
        if found is not None:
            return found
        found = self.weights.get(begin(tensor))
        if found is None or found.shape != tensor.shape:
            found = tensor.numpy().view(np.ndarray)
        with np.errstate(invalid="ignore"):  # what nobody wrote yet may be anything
            return found.astype("float64") if tensor.dtype in FLOATS or tensor.spec.format else found

    def put(self, tensor: Tensor, array: np.ndarray) -> None:
        """Give a tensor other values, in its shadow and in its memory."""
        self.shadows.put(tensor, array)
        with np.errstate(all="ignore"):
            np.copyto(tensor.numpy(), array.reshape(tensor.shape), casting="unsafe")

    def compute(self, call: Call) -> tuple[np.ndarray, ...]:
        """What a call gives by its definition: outputs, then written arguments."""
        given = [self.array(each) if isinstance(each, Tensor) else each for each in call.args]
        with np.errstate(all="ignore"):  # infinities and NaN are results here
            return tuple(map(np.asarray, as_tuple(call.op.reference(*given, **call.constants))))

    def call(self, call: Call, launch: Callable[[Call], Any]) -> Any:
        results = self.compute(call)
        outputs = [ops.empty(spec) for spec in call.outputs]
        for tensor, result in zip((*outputs, *call.written.values()), results, strict=True):
            self.put(tensor, result.astype("float64") if tensor.dtype in FLOATS else result)
        self.written |= {begin(each): each for each in call.written.values()}
        return outputs[0] if len(outputs) == 1 else tuple(outputs) or None

    def next_forward(self) -> None:
        """Forget everything but what was written, which is the cache."""
        self.shadows.keep_only(self.written)
