"""Ops: tensors, and the one seam through which every op call goes. Knows TVM and NumPy, nothing above it."""

import os as _os


def _set_threads() -> None:
    """TVM reads its thread count once, at import, and takes one thread on a small machine: say it before."""
    cores = len(_os.sched_getaffinity(0)) if hasattr(_os, "sched_getaffinity") else _os.cpu_count() or 1
    given = _os.environ.get("LIMPID_THREADS") or _os.environ.get("TVM_NUM_THREADS")
    _os.environ["TVM_NUM_THREADS"] = given or str(cores)


_set_threads()

from . import build, ceilings, memory, scope, select, spec, target
from .attention import attention, mix, scores, softmax_with_sinks
from .call import Call, Kernel
from .embedding import cache_write, concat, embedding
from .errors import DTypeError, KernelError, OpError, SelectorError, ShapeError
from .intercept import Interceptor, install, intercepted
from .linear import linear
from .norm import layer_norm, rms_norm
from .op import Op, like, op
from .pointwise import (
    add,
    add_row,
    cast,
    copy,
    div,
    gelu,
    gelu_mul,
    mul,
    mul_row,
    neg,
    offset,
    scale,
    silu,
    silu_mul,
    softcap,
    sub,
    tanh,
)
from .prepare import prepare
from .reduce import argmax, log_softmax, softmax, top_k
from .rotary import rope
from .select import Selector
from .spec import Dim, Spec
from .tensor import Tensor, empty, tensor, zeros

__all__ = [
    "Call",
    "DTypeError",
    "Dim",
    "Interceptor",
    "Kernel",
    "KernelError",
    "Op",
    "OpError",
    "Selector",
    "SelectorError",
    "ShapeError",
    "Spec",
    "Tensor",
    "add",
    "add_row",
    "argmax",
    "attention",
    "build",
    "cache_write",
    "cast",
    "ceilings",
    "concat",
    "copy",
    "div",
    "embedding",
    "empty",
    "gelu",
    "gelu_mul",
    "install",
    "intercepted",
    "layer_norm",
    "like",
    "linear",
    "log_softmax",
    "memory",
    "mix",
    "mul",
    "mul_row",
    "neg",
    "offset",
    "op",
    "prepare",
    "rms_norm",
    "rope",
    "scale",
    "scope",
    "scores",
    "select",
    "silu",
    "silu_mul",
    "softcap",
    "softmax",
    "softmax_with_sinks",
    "spec",
    "sub",
    "tanh",
    "target",
    "tensor",
    "top_k",
    "zeros",
]
