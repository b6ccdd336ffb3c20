"""Normalisation. Activations are [tokens, width]; tokens stay symbolic: one kernel for prefill and decode."""

from __future__ import annotations

import numpy as np
from tvm import tirx
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.script.tirx import builder

from . import tir
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
        total = T.sblock_alloc_buffer((n,), "float32")
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


@op(symbolic={"x": "n"}, ranges=(1, 2, 17))
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, eps: float) -> Tensor:
    """(x - mean(x)) / sqrt(var(x) + eps) * weight + bias over the last axis, in float32; var is the population's.

    x: [n, width]; weight and bias: [width], float32 or x's dtype. Returns x's shape and dtype.
    Ba, Kiros and Hinton 2016; HF nn.LayerNorm.
    """
    if x.dtype not in FLOATS:
        raise DTypeError(f"x is {x}, expected one of {', '.join(FLOATS)}")
    if x.ndim != 2:
        raise ShapeError(f"x is {x}, expected [n, width]")
    for name, row in (("weight", weight), ("bias", bias)):
        if row is not None and row.dtype not in ("float32", x.dtype):
            raise DTypeError(f"{name} is {row}, expected float32 or {x.dtype}, the dtype of x")
        if row is not None and row.shape != x.shape[-1:]:
            raise ShapeError(f"{name} is {row}, expected [{x.shape[-1]}] for x {x}")
    return like(x)


@layer_norm.reference
def _(x, weight, bias=None, *, eps):
    centred = x.astype("float64") - x.astype("float64").mean(axis=-1, keepdims=True)
    scaled = centred / np.sqrt(np.mean(centred**2, axis=-1, keepdims=True) + eps) * weight.astype("float64")
    return scaled if bias is None else scaled + bias.astype("float64")


@layer_norm.kernel
def _(x, weight, bias, out, *, eps):
    with IRBuilder() as ir, builder.prim_func(s_tir=True):
        builder.func_name("layer_norm")
        shape = (tirx.Var("n", "int64"), x.shape[-1])
        source = builder.arg("x", builder.buffer(shape, x.dtype, align=x.itemsize))
        w = builder.arg("weight", builder.buffer(weight.shape, weight.dtype, align=weight.itemsize))
        b = bias and builder.arg("bias", builder.buffer(bias.shape, bias.dtype, align=bias.itemsize))
        target = builder.arg("out", builder.buffer(shape, out.dtype, align=out.itemsize))
        count = tir.f32(float(shape[-1]))
        total = tir.folded("total", shape, tir.f32(0.0), lambda so_far, at: so_far + tir.f32(source[at]))

        def centred(at: tuple) -> tirx.Expr:
            return tir.f32(source[at]) - total[at[0]] / count

        # The variance from centred values: a mean far from 0 does not cancel it away.
        squares = tir.folded("squares", shape, tir.f32(0.0), lambda so_far, at: so_far + centred(at) * centred(at))
        with tir.block("layer_norm", shape) as at:
            value = centred(at) / tirx.sqrt(squares[at[0]] / count + tir.f32(eps)) * tir.f32(w[at[1]])
            value = value if b is None else value + tir.f32(b[at[1]])
            builder.buffer_store(target, value.astype(out.dtype), at)
    return ir.get()
