"""Kernels from hand-written source: a language a file, all of one shape (`base.py`).

`make` turns what stands below a swap's decorator into a `Kernel`: of source text, or of a function that is the kernel.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from ..call import Kernel
from ..errors import OpError
from .base import Options
from .source import Origin

TEXTS = {
    "c": ("c", "C"), "c++": ("c", "CPlusPlus"), "cuda": ("cuda", "Cuda"), "metal": ("metal", "Metal"),
    "wgsl": ("wgsl", "Wgsl"), "opencl": ("opencl", "OpenCL"),
}  # fmt: skip
_FUNCTIONS = ("python", "tvmscript", "triton")
NAMES = (*TEXTS, *_FUNCTIONS)


def check_name(name: str) -> None:
    if name not in NAMES:
        raise OpError(f"the language is {name!r}, expected one of {', '.join(map(repr, NAMES))}")


def make(name: str, op: Any, origin: Origin, decorated: Any, shape: Any, dims: Mapping[str, Any], options: Options):
    """The kernel that `origin` describes. `decorated` is what a function language takes: the function, a PrimFunc."""
    check_name(name)
    if name in TEXTS:
        from .kernel import SourceKernel

        module, kind = TEXTS[name]
        language = getattr(importlib.import_module(f".{module}", __name__), kind)(options)
        return SourceKernel(op, language, origin.read(), shape, dims)
    maker: Callable[..., Kernel] = importlib.import_module(f".{name}", __name__).kernel
    return maker(op, decorated, shape, dims, options)
