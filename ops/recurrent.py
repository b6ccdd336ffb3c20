"""What recurrent models are made of: a token mixed with the one before it, and RWKV's sums that decay."""

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
def token_mix(x: Tensor, before: Tensor, mix: Tensor) -> Tensor:
    """x[i] * mix + x[i - 1] * (1 - mix), in float32; `before` stands before the first token.

    x: [n, width]; before: [1, width]; mix: [width]; floats of one dtype, which the result has too.
    Peng et al. 2023 (RWKV), HF RwkvSelfAttention.extract_key_value.
    """
    for name, each, shape in (("before", before, (1, x.shape[-1])), ("mix", mix, (x.shape[-1],))):
        if x.dtype not in FLOATS or each.dtype != x.dtype:
            raise DTypeError(f"x is {x} and {name} {each}, expected floats of one dtype")
        if x.ndim != 2 or each.shape != shape:
            raise ShapeError(f"{name} is {each}, expected {list(shape)} for x {x}: [n, width]")
    return like(x)


@op(symbolic={"key": "n", "value": "n"}, ranges=(1, 2, 17))
def wkv(key: Tensor, value: Tensor, decay: Tensor, first: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """RWKV's weighted mean of the values so far: what is older counts less by e**-exp(decay) a token.

    For each column: y[i] = (sum_j<i exp(key[j] - (i - 1 - j) exp(decay)) value[j] + exp(first + key[i]) value[i]) / the
    same sum without values. key and value: [n, width]; decay and first: [width], float32; state: float32 [3, width],
    the sum of values, the sum of weights, and the largest exponent, by which both are scaled down; before the first
    token it is 0, 0 and -1e38. Returns y like `key`, and the state after the last token.
    Peng et al. 2023 (RWKV 4); HF rwkv_linear_attention_cpu.
    """
    if key.dtype not in FLOATS or value.dtype != key.dtype:
        raise DTypeError(f"key is {key} and value {value}, expected floats of one dtype")
    if key.ndim != 2 or value.shape != key.shape:
        raise ShapeError(f"key is {key} and value {value}, expected [n, width] both")
    for name, each, shape in (("decay", decay, ()), ("first", first, ()), ("state", state, (3,))):
        if each.dtype != "float32" or each.shape != (*shape, key.shape[1]):
            raise ShapeError(f"{name} is {each}, expected float32 {[*shape, key.shape[1]]} for key {key}")
    return like(key), like(state)


@token_mix.reference
def _(x, before, mix):
    shifted, mix = np.concatenate([before, x])[:-1].astype("float64"), mix.astype("float64")
    return x.astype("float64") * mix + shifted * (1 - mix)


@wkv.reference
def _(key, value, decay, first, state):
    """By the state's recurrence, in float64; a test holds it against the sums of the definition."""
    key, value, first = (each.astype("float64") for each in (key, value, first))
    fade, (values, weights, top) = np.exp(decay.astype("float64")), state.astype("float64")
    y = np.empty_like(key)
    for i in range(len(key)):
        most = np.maximum(top, first + key[i])
        old, new = np.exp(top - most), np.exp(first + key[i] - most)
        y[i] = (old * values + new * value[i]) / (old * weights + new)
        most = np.maximum(top - fade, key[i])
        old, new = np.exp(top - fade - most), np.exp(key[i] - most)
        values, weights, top = old * values + new * value[i], old * weights + new, most
    return y, np.stack([values, weights, top])


@token_mix.kernel
def _(x, before, mix, out):
    with IRBuilder() as ir, builder.prim_func(s_tir=True):
        builder.func_name("token_mix")
        n, width = tirx.Var("n", "int64"), x.shape[1]
        source = builder.arg("x", builder.buffer((n, width), x.dtype, align=x.itemsize))
        last = builder.arg("before", builder.buffer((1, width), x.dtype, align=x.itemsize))
        share = builder.arg("mix", builder.buffer((width,), x.dtype, align=x.itemsize))
        target = builder.arg("out", builder.buffer((n, width), out.dtype, align=out.itemsize))
        with tir.block("token_mix", (n, width)) as (token, column):
            old = tirx.if_then_else(token > 0, source[tirx.max(token - 1, 0), column], last[0, column])
            part = tir.f32(share[column])
            value = tir.f32(source[token, column]) * part + tir.f32(old) * (tir.f32(1.0) - part)
            builder.buffer_store(target, value.astype(out.dtype), (token, column))
    return ir.get()


@wkv.kernel
def _(key, value, decay, first, state, out, after):
    width, dtype = key.shape[1], key.dtype

    @T.prim_func(s_tir=True)
    def wkv(
        key_: T.handle, value_: T.handle, decay_: T.handle, first_: T.handle, state_: T.handle, out_: T.handle,
        after_: T.handle,
    ):  # fmt: skip
        n = T.int64()
        K = T.match_buffer(key_, (n, width), dtype, align=key.itemsize)
        V = T.match_buffer(value_, (n, width), dtype, align=key.itemsize)
        D = T.match_buffer(decay_, (width,), "float32", align=4)
        F = T.match_buffer(first_, (width,), "float32", align=4)
        S = T.match_buffer(state_, (3, width), "float32", align=4)
        Y = T.match_buffer(out_, (n, width), out.dtype, align=out.itemsize)
        A = T.match_buffer(after_, (3, width), "float32", align=4)
        most = T.alloc_buffer((width,), "float32")
        old = T.alloc_buffer((width,), "float32")
        fresh = T.alloc_buffer((width,), "float32")
        for c in range(width):
            with T.sblock("column"):
                vc = T.axis.spatial(width, c)
                for p in range(3):
                    A[p, vc] = S[p, vc]
                for i in range(n):
                    most[vc] = T.max(A[2, vc], F[vc] + T.Cast("float32", K[i, vc]))
                    old[vc] = tir.exp(A[2, vc] - most[vc])
                    fresh[vc] = tir.exp(F[vc] + T.Cast("float32", K[i, vc]) - most[vc])
                    Y[i, vc] = T.Cast(
                        out.dtype,
                        (old[vc] * A[0, vc] + fresh[vc] * T.Cast("float32", V[i, vc]))
                        / (old[vc] * A[1, vc] + fresh[vc]),
                    )
                    most[vc] = T.max(A[2, vc] - tir.exp(D[vc]), T.Cast("float32", K[i, vc]))
                    old[vc] = tir.exp(A[2, vc] - tir.exp(D[vc]) - most[vc])
                    fresh[vc] = tir.exp(T.Cast("float32", K[i, vc]) - most[vc])
                    A[0, vc] = old[vc] * A[0, vc] + fresh[vc] * T.Cast("float32", V[i, vc])
                    A[1, vc] = old[vc] * A[1, vc] + fresh[vc]
                    A[2, vc] = most[vc]

    return wkv
