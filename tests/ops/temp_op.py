"""An op in a file of its own: the tests of building copy it, change it, and load the copy."""

from __future__ import annotations

import os
import threading

from tvm.script import tirx as T

import ops
from ops import Tensor

built: list[int] = []  # the threads that built its kernel


@ops.op(symbolic={"x": "n"}, ranges=(1, 2))
def temp_scale(x: Tensor, *, by: float) -> Tensor:
    """x * by, for tests."""
    return ops.like(x)


@temp_scale.reference
def _(x, *, by):
    return x * by


@temp_scale.kernel
def _(x, out, *, by):
    if os.environ.get("NEVER_BUILD"):
        raise AssertionError("a kernel was built")
    built.append(threading.get_ident())
    width = x.shape[1]

    @T.prim_func(s_tir=True)
    def temp_scale(x_: T.handle, out_: T.handle):
        n = T.int64()
        X = T.match_buffer(x_, (n, width), "float32", align=4)
        Y = T.match_buffer(out_, (n, width), "float32", align=4)
        for i, k in T.grid(n, width):
            with T.sblock("scale"):
                vi, vk = T.axis.remap("SS", [i, k])
                Y[vi, vk] = X[vi, vk] * T.float32(by)

    return temp_scale
