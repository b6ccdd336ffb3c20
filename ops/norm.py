"""Normalisation. Activations are [tokens, width]; tokens stay symbolic: one kernel for prefill and decode."""

from __future__ import annotations

import numpy as np
from tvm.script import tirx as T

from .errors import DTypeError, ShapeError
from .op import like, op
from .spec import FLOATS
from .tensor import Tensor


@op(symbolic={"x": "n"}, ranges=(1, 2, 17))
def rms_norm(x: Tensor, weight: Tensor, *, eps: float, plus_one: bool = False) -> Tensor:
    """Root-mean-square normalisation over the last axis: x / sqrt(mean(x**2) + eps) * weight, in float32.

    x: [n, width]; weight: [width], float32 or x's dtype. `plus_one` multiplies by 1 + weight instead, as Gemma does.
    Returns x's shape and dtype. Zhang and Sennrich 2019; HF LlamaRMSNorm, GemmaRMSNorm.
    """
    if x.dtype not in FLOATS or weight.dtype not in ("float32", x.dtype):
        raise DTypeError(f"x is {x.dtype} and weight is {weight.dtype}; expected floats, weight as x or float32")
    if x.ndim != 2 or weight.shape != x.shape[-1:]:
        raise ShapeError(f"weight is {weight}, expected [{x.shape[-1]}] for x {x}")
    return like(x)


@rms_norm.reference
def _(x, weight, *, eps, plus_one=False):
    x32, w32 = x.astype("float32"), weight.astype("float32")
    scale = 1 + w32 if plus_one else w32
    return x32 / np.sqrt(np.mean(x32**2, axis=-1, keepdims=True) + eps) * scale


@rms_norm.kernel
def _(x, weight, out, *, eps, plus_one):
    width, dtype = x.shape[-1], x.dtype
    offset = 1.0 if plus_one else 0.0

    @T.prim_func(s_tir=True)
    def rms_norm(x_: T.handle, weight_: T.handle, out_: T.handle):
        n = T.int64()
        X = T.match_buffer(x_, (n, width), dtype, align=x.itemsize)
        W = T.match_buffer(weight_, (width,), weight.dtype, align=weight.itemsize)
        Y = T.match_buffer(out_, (n, width), dtype, align=out.itemsize)
        total = T.alloc_buffer((n,), "float32")
        for i, k in T.grid(n, width):
            with T.sblock("sum_of_squares"):
                vi, vk = T.axis.remap("SR", [i, k])
                with T.init():
                    total[vi] = T.float32(0)
                total[vi] = total[vi] + T.Cast("float32", X[vi, vk]) * T.Cast("float32", X[vi, vk])
        for i, k in T.grid(n, width):
            with T.sblock("normalise"):
                vi, vk = T.axis.remap("SS", [i, k])
                Y[vi, vk] = T.Cast(
                    dtype,
                    T.Cast("float32", X[vi, vk])
                    / T.sqrt(total[vi] / T.float32(width) + T.float32(eps))
                    * (T.Cast("float32", W[vk]) + T.float32(offset)),
                )

    return rms_norm
