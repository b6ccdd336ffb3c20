"""Clean: a run beside the real one, of the ops' references on clean inputs, in float64 but where a reference rounds."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np

from ops import Tensor
from ops.difference import differs
from ops.spec import FLOATS


class _Twin:
    """The clean values of one memory, float64 [elements], while the tensor that it was made for lives.

    `known` says which elements calls have made, None for all: the others, such as rows of a cache that nothing was
    written to, are copies of the real ones. `held` keeps a written tensor alive to the end of the pass: what grows
    copies it to a larger one.
    """

    __slots__ = ("held", "itemsize", "known", "root", "values")

    def __init__(self, root: weakref.ref, values: np.ndarray, itemsize: int, known: np.ndarray | None):
        self.root, self.values, self.itemsize, self.known = root, values, itemsize, known
        self.held: Tensor | None = None


class Clean:
    """Clean values of what calls made, found by memory, so that views share them.

    A tensor without one is as clean as it is: a weight, an input. So are integers: the clean run takes the real one's
    choices.
    """

    def __init__(self) -> None:
        self._twins: dict[int, _Twin] = {}  # by the address that the memory begins at

    def value(self, tensor: Tensor) -> tuple[np.ndarray, np.ndarray | None] | None:
        """The clean values, in tensor's shape, and which of them calls made; None where the real ones are clean."""
        if tensor.dtype not in FLOATS or not tensor.size:
            return None
        found = self._find(tensor)
        if found is None:
            return None
        twin, part = found
        known = None if twin.known is None else twin.known[part].reshape(tensor.shape)
        return twin.values[part].reshape(tensor.shape), known

    def put(self, tensor: Tensor, values: np.ndarray) -> None:
        """A call has given or written `tensor`; its clean values are these, in its shape."""
        if tensor.dtype not in FLOATS or not tensor.size:
            return
        found, flat = self._find(tensor), np.asarray(values, "float64").reshape(-1)
        if found is None:
            root = _root(tensor)
            if root.nbytes == tensor.nbytes:
                self._add(root, flat.copy() if np.may_share_memory(flat, values) else flat, None)
                return
            found = self._start(root), _part(tensor, _begin(root))
        twin, part = found
        if twin.known is not None:
            twin.known[part] |= differs(twin.values[part], flat)
        twin.values[part] = flat

    def before_writing(self, tensor: Tensor) -> None:
        """A call is about to write to `tensor`."""
        if tensor.dtype not in FLOATS or not tensor.size:
            return
        found = self._find(tensor)
        twin = found[0] if found else self._start(_root(tensor))
        twin.held = twin.root()

    def new_pass(self) -> None:
        """What only we kept alive may go."""
        for twin in [*self._twins.values()]:
            if twin.held is not None:
                twin.held = None
                twin.held = twin.root()

    def _find(self, tensor: Tensor) -> tuple[_Twin, slice] | None:
        begin, end = _begin(tensor), _begin(tensor) + tensor.nbytes
        for at in (_begin(_root(tensor)), *self._twins):  # another tensor over the same memory has another root
            twin = self._twins.get(at)
            if twin is not None and at <= begin and end <= at + twin.values.size * twin.itemsize:
                return twin, _part(tensor, at)
        return None

    def _add(self, root: Tensor, values: np.ndarray, known: np.ndarray | None) -> _Twin:
        at = _begin(root)

        def gone(_: Any) -> None:
            if self._twins.get(at) is twin:
                del self._twins[at]

        twin = self._twins[at] = _Twin(weakref.ref(root, gone), values, root.spec.itemsize, known)
        return twin

    def _start(self, root: Tensor) -> _Twin:
        """Memory that is written for the first time: the real values, and clean ones of rows copied from elsewhere."""
        with np.errstate(invalid="ignore"):  # whatever was in it
            twin = self._add(root, root.numpy().astype("float64").reshape(-1), np.zeros(root.size, "bool"))
        for other in [*self._twins.values()]:
            source = other.held
            if source is not None and other is not twin and source.ndim and source.spec.like(root.shape) is root.spec:
                _copy_rows(source, other, root, twin)
        return twin


def _copy_rows(source: Tensor, clean: _Twin, target: Tensor, into: _Twin) -> None:
    """Give the rows of `target` that are those of `source`, to the bit, the clean values of these."""
    if source.shape[1:] != target.shape[1:]:
        return
    rows = min(len(source), len(target))
    old, new = (np.ascontiguousarray(each.numpy()[:rows]).reshape(rows, -1).view("uint8") for each in (source, target))
    same = (old == new).all(axis=1)
    into.values.reshape(len(target), -1)[:rows][same] = clean.values.reshape(len(source), -1)[:rows][same]
    known = np.ones(source.size, "bool") if clean.known is None else clean.known
    assert into.known is not None
    into.known.reshape(len(target), -1)[:rows][same] = known.reshape(len(source), -1)[:rows][same]


def _root(tensor: Tensor) -> Tensor:
    """The tensor that a view, of a view, is of."""
    while isinstance(tensor.owner, Tensor):
        tensor = tensor.owner
    return tensor


def _begin(tensor: Tensor) -> int:
    return tensor.buffer.data.data_ptr()


def _part(tensor: Tensor, at: int) -> slice:
    """Where the elements of a tensor are in memory that begins at `at`."""
    first = (_begin(tensor) - at) // tensor.spec.itemsize
    return slice(first, first + tensor.size)
