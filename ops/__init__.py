"""Ops: tensors, and the one seam through which every op call goes. Knows TVM and NumPy, nothing above it."""

import os as _os


def _set_threads() -> None:
    """TVM reads its thread count once, at import, and takes one thread on a small machine: say it before."""
    cores = len(_os.sched_getaffinity(0)) if hasattr(_os, "sched_getaffinity") else _os.cpu_count() or 1
    _os.environ.setdefault("TVM_NUM_THREADS", _os.environ.get("LIMPID_THREADS") or str(cores))


_set_threads()

from . import scope  # noqa: E402
from .attention import attention  # noqa: E402
from .call import Call, Kernel  # noqa: E402
from .embedding import cache_write, concat, embedding  # noqa: E402
from .errors import DTypeError, KernelError, OpError, SelectorError, ShapeError  # noqa: E402
from .intercept import Interceptor, install, intercepted  # noqa: E402
from .linear import linear  # noqa: E402
from .norm import layer_norm, rms_norm  # noqa: E402
from .op import Op, like, op  # noqa: E402
from .pointwise import (  # noqa: E402
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
from .prepare import prepare  # noqa: E402
from .reduce import argmax, log_softmax, softmax, top_k  # noqa: E402
from .rotary import rope  # noqa: E402
from .select import Selector  # noqa: E402
from .spec import Dim, Spec  # noqa: E402
from .tensor import Tensor, empty, tensor, zeros  # noqa: E402

__all__ = [
]
