"""The steps of attention, ops of their own: scores, softmax with sinks, mix. `attention` is all of them at once."""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm.script import tirx as T

from .errors import DTypeError, ShapeError
from .op import like, op
from .schedule.flash import capped, seen
from .spec import FLOATS
from .tensor import Tensor
from .tir import exp


def check_heads(**tensors: Any) -> None:
    """All are [rows, heads, dim] floats."""
    for name, each in tensors.items():
        if each.dtype not in FLOATS:
            raise DTypeError(f"{name} is {each}, expected one of {', '.join(FLOATS)}")
        if each.ndim != 3:
            raise ShapeError(f"{name} is {each}, expected [rows, heads, dim]")


def check_keys(q: Any, k: Any, positions: Any, window: int | None, softcap: float | None) -> None:
    check_heads(q=q, k=k)
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


def check_sinks(sinks: Any, heads: int) -> None:
    if sinks.dtype not in FLOATS:
        raise DTypeError(f"sinks is {sinks}, expected one of {', '.join(FLOATS)}")
    if sinks.shape != (heads,):
        raise ShapeError(f"sinks is {sinks}, expected [{heads}], one for a head")


def scores_of(q, k, positions, scale, window, softcap):
    """[n, heads, t] in float64, -inf for what a query does not see."""
    position, key = positions[:, None, None].astype("int64"), np.arange(k.shape[0])
    visible = (key <= position) & (window is None or key > position - window)
    k = np.where(visible.any(axis=(0, 1))[:, None, None], k, 0)  # what no query sees may be anything
    k = np.repeat(k.astype("float64"), q.shape[1] // k.shape[1], axis=1)
    s = scale * np.einsum("nhd,thd->nht", q.astype("float64"), k)
    s = s if softcap is None else softcap * np.tanh(s / softcap)
    return np.where(visible, s, -np.inf)


def softmax_of(s, sinks):
    top = s.max(axis=-1, keepdims=True, initial=-np.inf)
    sink = -np.inf if sinks is None else sinks.astype("float64")[:, None]
    top = np.maximum(top, sink)
    e = np.exp(s - top)
    return e / (e.sum(axis=-1, keepdims=True) + np.exp(sink - top))


def mix_of(probabilities, v):
    """A row of v to which a query gives no weight does not matter to it, whatever the row holds."""
    p = probabilities.astype("float64")
    v = np.where((p != 0).any(axis=(0, 1))[:, None, None], v, 0).astype("float64")  # nobody sees it: memory as it was
    v = np.repeat(v, p.shape[1] // v.shape[1], axis=1)
    odd = ~np.isfinite(v).all(axis=(1, 2))
    mixed = np.einsum("nht,thd->nhd", p[..., ~odd], v[~odd])
    for row in np.flatnonzero(odd):
        weight = p[:, :, row, None]
        mixed += np.multiply(weight, v[row], out=np.zeros_like(mixed), where=weight != 0)
    return mixed


@op(symbolic={"q": "n", "positions": "n", "k": "t"}, ranges=(1, 2, 17))
def scores(
    q: Tensor, k: Tensor, positions: Tensor, *, scale: float, window: int | None = None, softcap: float | None = None
) -> Tensor:
    """The first step of `attention`: its logits, float32 [n, heads, t], -inf where a query does not see a key."""
    check_keys(q, k, positions, window, softcap)
    return like(q, (*q.shape[:2], k.shape[0]), "float32")


@scores.reference
def _(q, k, positions, *, scale, window=None, softcap=None):
    return scores_of(q, k, positions, scale, window, softcap)


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
    check_sinks(sinks, x.shape[1])
    return like(x)


@softmax_with_sinks.reference
def _(x, sinks):
    return softmax_of(x.astype("float64"), sinks)


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
                    top[vi, vh] = T.min_value("float32")
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
    check_heads(v=v)
    _, heads, t = probabilities.shape
    if v.shape[0] != t or not v.shape[1] or heads % v.shape[1]:
        raise ShapeError(f"v is {v}, expected [{t}, kv_heads, v_dim], kv_heads a divisor of {heads}")
    if dtype not in FLOATS:
        raise DTypeError(f"dtype is {dtype!r}, expected one of {', '.join(FLOATS)}")
    return like(probabilities, (*probabilities.shape[:2], v.shape[2]), dtype)


@mix.reference
def _(probabilities, v, *, dtype="float32"):
    return mix_of(probabilities, v)


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
