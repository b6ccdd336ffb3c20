"""Kernels in Python: a function with the signature of the op's reference, NumPy arrays in and arrays out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..call import Kernel
from ..errors import SwapRefused
from ..op import Op
from .base import Options


def kernel(op: Op, function: Any, shape: Any, dims: Mapping[str, Any], options: Options) -> Kernel:
    """A kernel of a Python function. Raises SwapRefused for what cannot be called with the op's arguments."""
    if not callable(function):
        raise SwapRefused(f"a Python kernel of {op.name} is a function, not {type(function).__name__}")
    if shape.grid is not None or shape.block is not None or dims:
        raise SwapRefused(f"{function.__name__}: a Python kernel has no grid, block or dims")
    return Kernel.from_python(function)
