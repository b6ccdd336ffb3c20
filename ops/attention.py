"""Attention over a cache: row p of the key and value buffers belongs to position p, rows not yet written are ignored.

`attention` is one fused kernel; its steps `scores`, `softmax` (or `softmax_with_sinks`) and `mix` are ops of their own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import tirx
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as B

from . import target
from .errors import DTypeError, KernelError, ShapeError
from .op import like, op
from .reduce import softmax
from .schedule import flash, flash_decode, flash_prefill
from .schedule.flash import LOWEST, capped, seen
from .spec import FLOATS, Dim
from .tensor import Tensor
from .tir import exp, f32

_OPEN = {"q": "n", "positions": "n", "k": "t", "v": "t"}


def _check_heads(**tensors: Any) -> None:
    """All are [rows, heads, dim] floats."""
    for name, each in tensors.items():
        if each.dtype not in FLOATS:
            raise DTypeError(f"{name} is {each}, expected one of {', '.join(FLOATS)}")
        if each.ndim != 3:
            raise ShapeError(f"{name} is {each}, expected [rows, heads, dim]")


def _check_keys(q: Any, k: Any, positions: Any, window: int | None, softcap: float | None) -> None:
    _check_heads(q=q, k=k)
    if positions.dtype != "int32":
        raise DTypeError(f"positions is {positions}, expected int32")
    if positions.shape != q.shape[:1]:
        raise ShapeError(f"positions is {positions}, expected [{q.shape[0]}] for q {q}")
    if k.shape[2] != q.shape[2] or 0 in k.shape[1:] or q.shape[1] % k.shape[1]:
        raise ShapeError(
            f"k is {k}, expected [t, kv_heads, {q.shape[2]}] for q {q}, kv_heads a divisor of {q.shape[1]}"
        )
    if window is not None and window < 1:
        raise ShapeError(f"window is {window}, expected at least 1")
    if softcap is not None and softcap <= 0:
        raise ShapeError(f"softcap is {softcap}, expected more than 0")


def _check_sinks(sinks: Any, heads: int) -> None:
    if sinks.dtype not in FLOATS:
        raise DTypeError(f"sinks is {sinks}, expected one of {', '.join(FLOATS)}")
    if sinks.shape != (heads,):
        raise ShapeError(f"sinks is {sinks}, expected [{heads}], one for a head")


@op(symbolic=_OPEN, ranges=(1, 2, 17))
def attention(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, sinks: Tensor | None = None,
    *, scale: float, window: int | None = None, softcap: float | None = None,
) -> Tensor:  # fmt: skip
    """Softmax(scale * q @ k.T) @ v over the keys that each query sees, accumulated in float32.

    q: [n, heads, dim]; k: [t, kv_heads, dim] and v: [t, kv_heads, v_dim], buffers in which row p holds position p;
    positions: int32 [n]. Query i sees max(0, positions[i] - window + 1) to positions[i]; what other rows hold does not
    matter. Head h reads kv head h // (heads / kv_heads). `softcap` bounds scores: cap * tanh(score / cap).
    sinks: [heads], a logit that takes part in the softmax and has no value. Returns [n, heads, v_dim] in q's dtype.
    A position outside [0, t) raises KernelError. Vaswani et al. 2017; Dao et al. 2022 (one pass, no score matrix);
    HF eager_attention_forward, of Gemma2 for softcap and GptOss for sinks.
    """
    _check_keys(q, k, positions, window, softcap)
    _check_heads(v=v)
    if v.shape[:2] != k.shape[:2]:
        raise ShapeError(f"v is {v}, expected [{k.shape[0]}, {k.shape[1]}, v_dim] for k {k}")
    if sinks is not None:
        _check_sinks(sinks, q.shape[1])
    return like(q, (*q.shape[:2], v.shape[2]))


@attention.reference
def _(q, k, v, positions, sinks=None, *, scale, window=None, softcap=None):
    s = _scores(q, k, positions, scale, window, softcap)
    return _mix(_softmax(s, sinks), v)


def _scores(q, k, positions, scale, window, softcap):
    """[n, heads, t] in float64, -inf for what a query does not see."""
    position, key = positions[:, None, None].astype("int64"), np.arange(k.shape[0])
    visible = (key <= position) & (window is None or key > position - window)
    k = np.where(visible.any(axis=(0, 1))[:, None, None], k, 0)  # what no query sees may be anything
    k = np.repeat(k.astype("float64"), q.shape[1] // k.shape[1], axis=1)
    s = scale * np.einsum("nhd,thd->nht", q.astype("float64"), k)
    s = s if softcap is None else softcap * np.tanh(s / softcap)
    return np.where(visible, s, -np.inf)


def _softmax(s, sinks):
    top = s.max(axis=-1, keepdims=True, initial=-np.inf)
    sink = -np.inf if sinks is None else sinks.astype("float64")[:, None]
    top = np.maximum(top, sink)
    e = np.exp(s - top)
    return e / (e.sum(axis=-1, keepdims=True) + np.exp(sink - top))


def _mix(probabilities, v):
    """Rows of v without weight do not matter, whatever they hold."""
    v = np.where((probabilities != 0).any(axis=(0, 1))[:, None, None], v, 0)
    v = np.repeat(v.astype("float64"), probabilities.shape[1] // v.shape[1], axis=1)
    return np.einsum("nht,thd->nhd", probabilities.astype("float64"), v)


@attention.kernel
def _(q, k, v, positions, sinks, out, *, scale, window, softcap):
    heads, dim, v_dim, group = q.shape[1], q.shape[2], v.shape[2], q.shape[1] // k.shape[1]
    sinks_dtype = sinks.dtype if sinks else "float32"

    def sink(buffer, h):
        return buffer[h].astype("float32") if sinks else f32(LOWEST)

    @T.prim_func(s_tir=True)
    def attention(
        q_: T.handle, k_: T.handle, v_: T.handle, positions_: T.handle, sinks_: T.handle, out_: T.handle
    ):  # fmt: skip
        n = T.int64()
        t = T.int64()
        Q = T.match_buffer(q_, (n, heads, dim), q.dtype, align=q.itemsize)
        K = T.match_buffer(k_, (t, heads // group, dim), k.dtype, align=k.itemsize)
        V = T.match_buffer(v_, (t, heads // group, v_dim), v.dtype, align=v.itemsize)
        P = T.match_buffer(positions_, (n,), "int32", align=4)
        S = T.match_buffer(sinks_, (heads,), sinks_dtype, align=1)
        Y = T.match_buffer(out_, (n, heads, v_dim), out.dtype, align=out.itemsize)
        product = T.alloc_buffer((n, heads, t), "float32")
        score = T.alloc_buffer((n, heads, t), "float32")
        top = T.alloc_buffer((n, heads), "float32")
        weight = T.alloc_buffer((n, heads, t), "float32")
        total = T.alloc_buffer((n, heads), "float32")
        mixed = T.alloc_buffer((n, heads, v_dim), "float32")
        for i, h, p, d in T.grid(n, heads, t, dim):
            with T.sblock("product"):
                vi, vh, vp, vd = T.axis.remap("SSSR", [i, h, p, d])
                with T.init():
                    product[vi, vh, vp] = T.float32(0)
                product[vi, vh, vp] = product[vi, vh, vp] + T.Cast("float32", Q[vi, vh, vd]) * T.Cast(
                    "float32", K[vp, vh // group, vd]
                )
        for i, h, p in T.grid(n, heads, t):
            with T.sblock("score"):
                vi, vh, vp = T.axis.remap("SSS", [i, h, p])
                score[vi, vh, vp] = T.if_then_else(
                    seen(vp, T.Cast("int64", P[vi]), window),
                    capped(product[vi, vh, vp] * T.float32(scale), softcap),
                    T.float32(LOWEST),
                )
        for i, h, p in T.grid(n, heads, t):
            with T.sblock("top"):
                vi, vh, vp = T.axis.remap("SSR", [i, h, p])
                with T.init():
                    top[vi, vh] = T.float32(LOWEST)
                top[vi, vh] = T.max(top[vi, vh], score[vi, vh, vp])
        for i, h, p in T.grid(n, heads, t):
            with T.sblock("weight"):
                vi, vh, vp = T.axis.remap("SSS", [i, h, p])
                weight[vi, vh, vp] = T.if_then_else(
                    seen(vp, T.Cast("int64", P[vi]), window),
                    exp(score[vi, vh, vp] - T.max(top[vi, vh], sink(S, vh))),
                    T.float32(0),
                )
        for i, h, p in T.grid(n, heads, t):
            with T.sblock("total"):
                vi, vh, vp = T.axis.remap("SSR", [i, h, p])
                with T.init():
                    total[vi, vh] = T.float32(0)
                total[vi, vh] = total[vi, vh] + weight[vi, vh, vp]
        for i, h, d, p in T.grid(n, heads, v_dim, t):
            with T.sblock("mix"):
                vi, vh, vd, vp = T.axis.remap("SSSR", [i, h, d, p])
                with T.init():
                    mixed[vi, vh, vd] = T.float32(0)
                mixed[vi, vh, vd] = mixed[vi, vh, vd] + T.if_then_else(
                    weight[vi, vh, vp] == T.float32(0),
                    T.float32(0),
                    weight[vi, vh, vp] * T.Cast("float32", V[vp, vh // group, vd]),
                )
        for i, h, d in T.grid(n, heads, v_dim):
            with T.sblock("divide"):
                vi, vh, vd = T.axis.remap("SSS", [i, h, d])
                Y[vi, vh, vd] = T.Cast(
                    out.dtype,
                    mixed[vi, vh, vd] / (total[vi, vh] + exp(sink(S, vh) - T.max(top[vi, vh], sink(S, vh)))),
                )

    return attention if sinks else _without(attention, 4)


def _without(function: Any, index: int) -> Any:
    """A PrimFunc without a parameter that its body does not use."""
    parameters = [each for i, each in enumerate(function.params) if i != index]
    return tirx.PrimFunc(parameters, function.body, function.ret_type, function.attrs)


@attention.template("cpu")
def _(q, k, v, positions, sinks, out, *, scale, window, softcap):
    n, t = (s if isinstance(s, int) else tirx.Var(s.name, "int64") for s in (q.shape[0], k.shape[0]))

    def buffer(name: str, spec: Any, size: Any) -> Any:
        return B.arg(name, B.buffer((size, *spec.shape[1:]), spec.dtype, align=spec.itemsize))

    with IRBuilder() as builder, B.prim_func(s_tir=True):
        B.func_name("attention")
        problem = flash.Problem(
            q=buffer("q", q, n),
            k=buffer("k", k, t),
            v=buffer("v", v, t),
            positions=buffer("positions", positions, n),
            sinks=sinks and buffer("sinks", sinks, sinks.shape[0]),
            out=buffer("out", out, n),
            scale=scale,
            window=window,
            softcap=softcap,
            lanes=target.lanes(),
        )
        problem.check_positions()
        if q.shape[0] == 1 and flash_decode.applies(problem):
            flash_decode.emit(problem)
        else:
            flash_prefill.emit(problem, q.shape[0].high if isinstance(q.shape[0], Dim) else q.shape[0])
    return builder.get()


@op(symbolic={"q": "n", "positions": "n", "k": "t"}, ranges=(1, 2, 17))
def scores(
    q: Tensor, k: Tensor, positions: Tensor, *, scale: float, window: int | None = None, softcap: float | None = None
) -> Tensor:
    """The first step of `attention`: its logits, float32 [n, heads, t], -inf where a query does not see a key."""
    _check_keys(q, k, positions, window, softcap)
    return like(q, (*q.shape[:2], k.shape[0]), "float32")


@scores.reference
def _(q, k, positions, *, scale, window=None, softcap=None):
    return _scores(q, k, positions, scale, window, softcap)


@scores.kernel
def _(q, k, positions, out, *, scale, window, softcap):
    heads, dim, group = q.shape[1], q.shape[2], q.shape[1] // k.shape[1]

    @T.prim_func(s_tir=True)
    def scores(q_: T.handle, k_: T.handle, positions_: T.handle, out_: T.handle):
        n = T.int64()
        t = T.int64()
        Q = T.match_buffer(q_, (n, heads, dim), q.dtype, align=q.itemsize)
        K = T.match_buffer(k_, (t, heads // group, dim), k.dtype, align=k.itemsize)
        P = T.match_buffer(positions_, (n,), "int32", align=4)
        Y = T.match_buffer(out_, (n, heads, t), "float32", align=4)
        product = T.alloc_buffer((n, heads, t), "float32")
        for i, h, p, d in T.grid(n, heads, t, dim):
            with T.sblock("product"):
                vi, vh, vp, vd = T.axis.remap("SSSR", [i, h, p, d])
                with T.init():
                    product[vi, vh, vp] = T.float32(0)
                product[vi, vh, vp] = product[vi, vh, vp] + T.Cast("float32", Q[vi, vh, vd]) * T.Cast(
                    "float32", K[vp, vh // group, vd]
                )
        for i, h, p in T.grid(n, heads, t):
            with T.sblock("score"):
                vi, vh, vp = T.axis.remap("SSS", [i, h, p])
                Y[vi, vh, vp] = T.if_then_else(
                    seen(vp, T.Cast("int64", P[vi]), window),
                    capped(product[vi, vh, vp] * T.float32(scale), softcap),
                    -T.infinity("float32"),
                )

    return scores


@op(symbolic={"x": ("n", None, "t")}, ranges=(1, 2, 17))
def softmax_with_sinks(x: Tensor, sinks: Tensor) -> Tensor:
    """Softmax over the last axis with one more logit a head, which takes its part of the whole and is then dropped.

    x: float32 [n, heads, t]; sinks: [heads]. Returns x's shape: rows that sum to less than 1. HF GptOss.
    """
    if x.dtype != "float32" or x.ndim != 3:
        raise ShapeError(f"x is {x}, expected float32[n, heads, t]")
    _check_sinks(sinks, x.shape[1])
    return like(x)


@softmax_with_sinks.reference
def _(x, sinks):
    return _softmax(x.astype("float64"), sinks)


@softmax_with_sinks.kernel
def _(x, sinks, out):
    heads = x.shape[1]

    @T.prim_func(s_tir=True)
    def softmax_with_sinks(x_: T.handle, sinks_: T.handle, out_: T.handle):
        n = T.int64()
        t = T.int64()
        X = T.match_buffer(x_, (n, heads, t), "float32", align=4)
        S = T.match_buffer(sinks_, (heads,), sinks.dtype, align=sinks.itemsize)
        Y = T.match_buffer(out_, (n, heads, t), "float32", align=4)
        top = T.alloc_buffer((n, heads), "float32")
        weight = T.alloc_buffer((n, heads, t), "float32")
        total = T.alloc_buffer((n, heads), "float32")
        for i, h, p in T.grid(n, heads, t):
            with T.sblock("top"):
                vi, vh, vp = T.axis.remap("SSR", [i, h, p])
                with T.init():
                    top[vi, vh] = T.float32(LOWEST)
                top[vi, vh] = T.max(top[vi, vh], X[vi, vh, vp])
        for i, h, p in T.grid(n, heads, t):
            with T.sblock("weight"):
                vi, vh, vp = T.axis.remap("SSS", [i, h, p])
                weight[vi, vh, vp] = exp(X[vi, vh, vp] - T.max(top[vi, vh], T.Cast("float32", S[vh])))
        for i, h, p in T.grid(n, heads, t):
            with T.sblock("total"):
                vi, vh, vp = T.axis.remap("SSR", [i, h, p])
                with T.init():
                    total[vi, vh] = T.float32(0)
                total[vi, vh] = total[vi, vh] + weight[vi, vh, vp]
        for i, h, p in T.grid(n, heads, t):
            with T.sblock("divide"):
                vi, vh, vp = T.axis.remap("SSS", [i, h, p])
                Y[vi, vh, vp] = weight[vi, vh, vp] / (
                    total[vi, vh] + exp(T.Cast("float32", S[vh]) - T.max(top[vi, vh], T.Cast("float32", S[vh])))
                )

    return softmax_with_sinks


@op(symbolic={"probabilities": ("n", None, "t"), "v": "t"}, ranges=(1, 2, 17))
def mix(probabilities: Tensor, v: Tensor, *, dtype: str = "float32") -> Tensor:
    """The last step of `attention`: the rows of v, weighed by the probabilities and added up in float32.

    probabilities: float32 [n, heads, t]; v: [t, kv_heads, v_dim], of which rows of probability 0 are not looked at.
    Returns [n, heads, v_dim] in `dtype`.
    """
    if probabilities.dtype != "float32" or probabilities.ndim != 3:
        raise ShapeError(f"probabilities is {probabilities}, expected float32[n, heads, t]")
    _check_heads(v=v)
    _, heads, t = probabilities.shape
    if v.shape[0] != t or not v.shape[1] or heads % v.shape[1]:
        raise ShapeError(f"v is {v}, expected [{t}, kv_heads, v_dim], kv_heads a divisor of {heads}")
    if dtype not in FLOATS:
        raise DTypeError(f"dtype is {dtype!r}, expected one of {', '.join(FLOATS)}")
    return like(probabilities, (*probabilities.shape[:2], v.shape[2]), dtype)


@mix.reference
def _(probabilities, v, *, dtype="float32"):
    return _mix(probabilities, v)


@mix.kernel
def _(probabilities, v, out, *, dtype):
    heads, v_dim, group = probabilities.shape[1], v.shape[2], probabilities.shape[1] // v.shape[1]

    @T.prim_func(s_tir=True)
    def mix(probabilities_: T.handle, v_: T.handle, out_: T.handle):
        n = T.int64()
        t = T.int64()
        P = T.match_buffer(probabilities_, (n, heads, t), "float32", align=4)
        V = T.match_buffer(v_, (t, heads // group, v_dim), v.dtype, align=v.itemsize)
        Y = T.match_buffer(out_, (n, heads, v_dim), dtype, align=out.itemsize)
        mixed = T.alloc_buffer((n, heads, v_dim), "float32")
        for i, h, p, d in T.grid(n, heads, t, v_dim):
            with T.sblock("mix"):
                vi, vh, vp, vd = T.axis.remap("SSRS", [i, h, p, d])
                with T.init():
                    mixed[vi, vh, vd] = T.float32(0)
                mixed[vi, vh, vd] = mixed[vi, vh, vd] + T.if_then_else(
                    P[vi, vh, vp] == T.float32(0),
                    T.float32(0),
                    P[vi, vh, vp] * T.Cast("float32", V[vp, vh // group, vd]),
                )
        for i, h, d in T.grid(n, heads, v_dim):
            with T.sblock("cast"):
                vi, vh, vd = T.axis.remap("SSS", [i, h, d])
                Y[vi, vh, vd] = T.Cast(dtype, mixed[vi, vh, vd])

    return mix


@attention.composed
def _(q, k, v, positions, sinks=None, *, scale, window=None, softcap=None):
    first, last = int(positions.numpy().min()), int(positions.numpy().max())
    if first < 0 or last >= len(k):
        raise KernelError(f"attention: {flash.OUT_OF_RANGE}; positions go from {first} to {last} and k is {k.spec}")
    s = scores(q, k[: last + 1], positions, scale=scale, window=window, softcap=softcap)
    p = softmax(s) if sinks is None else softmax_with_sinks(s, sinks)
    return mix(p, v[: last + 1], dtype=q.dtype)
