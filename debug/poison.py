"""Poison: memory that a right kernel writes before anybody reads it."""

from __future__ import annotations

import numpy as np

import ops
from ops import Spec
from ops.spec import DTYPES, FLOATS


def poison(*specs: Spec) -> None:
    """Leave memory in the pool that holds NaN, or the least integer: the next tensors of these specs start from it."""
    stale = [ops.empty(spec) for spec in specs]
    for each in stale:
        worst = np.nan if each.dtype in FLOATS else np.iinfo(DTYPES[each.dtype]).min
        each.numpy()[...] = (
            worst  # no name for the array: it would outlive the tensor, and keep its memory from the pool
        )
