"""Attention over a cache: row p of the key and value buffers belongs to position p, rows not yet written are ignored.

`attention` is one fused kernel; its steps `scores`, `softmax` (or `softmax_with_sinks`) and `mix` are ops of their own.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as B

from . import target
from .attention_steps import (
    check_heads,
    check_keys,
    check_sinks,
    mix,
    mix_of,
    scores,
    scores_of,
    softmax_of,
    softmax_with_sinks,
)
from .errors import KernelError, ShapeError
from .op import like, op
from .reduce import softmax
from .schedule import flash, flash_decode, flash_prefill, gpu_attention
from .schedule.flash import LOWEST, capped, seen
from .spec import Dim
from .tensor import Tensor
from .tir import exp, f32, without

_OPEN = {"q": "n", "positions": "n", "k": "t", "v": "t"}


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
    check_keys(q, k, positions, window, softcap)
    check_heads(v=v)
    if v.shape[:2] != k.shape[:2]:
        raise ShapeError(f"v is {v}, expected [{k.shape[0]}, {k.shape[1]}, v_dim] for k {k}")
    if sinks is not None:
        check_sinks(sinks, q.shape[1])
    return like(q, (*q.shape[:2], v.shape[2]))


@attention.reference
def _(q, k, v, positions, sinks=None, *, scale, window=None, softcap=None):
    s = scores_of(q, k, positions, scale, window, softcap)
    return mix_of(softmax_of(s, sinks), v)


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
                    top[vi, vh] = T.min_value("float32")
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

    return attention if sinks else without(attention, 4)


def _problem(q, k, v, positions, sinks, out, constants: dict[str, Any]) -> flash.Problem:
    """In an IRBuilder: the parameters of a prim_func, tokens and keys left open where they are."""
    n, t = (s if isinstance(s, int) else tirx.Var(s.name, "int64") for s in (q.shape[0], k.shape[0]))

    def buffer(name: str, spec: Any, size: Any) -> Any:
        return B.arg(name, B.buffer((size, *spec.shape[1:]), spec.dtype, align=spec.itemsize))

    B.func_name("attention")
    return flash.Problem(
        q=buffer("q", q, n),
        k=buffer("k", k, t),
        v=buffer("v", v, t),
        positions=buffer("positions", positions, n),
        sinks=sinks and buffer("sinks", sinks, sinks.shape[0]),
        out=buffer("out", out, n),
        lanes=target.lanes(),
        **constants,
    )


@attention.template("cpu")
def _(q, k, v, positions, sinks, out, **constants):
    with IRBuilder() as builder, B.prim_func(s_tir=True):
        problem = _problem(q, k, v, positions, sinks, out, constants)
        problem.check_positions()
        if q.shape[0] == 1 and flash_decode.applies(problem):
            flash_decode.emit(problem)
        else:
            flash_prefill.emit(problem, q.shape[0].high if isinstance(q.shape[0], Dim) else q.shape[0])
    return builder.get()


@attention.template("check")
def _(q, k, v, positions, sinks, out, **constants):
    """For the CPU, in front of a GPU's kernel."""
    with IRBuilder() as builder, B.prim_func(s_tir=True):
        _problem(q, k, v, positions, sinks, out, constants).check_positions()
    return builder.get()


@attention.template("gpu")
def _(q, k, v, positions, sinks, out, **constants):
    with IRBuilder() as builder, B.prim_func(s_tir=True):
        gpu_attention.emit(_problem(q, k, v, positions, sinks, out, constants))
    return builder.get()


@attention.composed
def _(q, k, v, positions, sinks=None, *, scale, window=None, softcap=None):
    first, last = int(positions.numpy().min()), int(positions.numpy().max())
    if first < 0 or last >= len(k):
        raise KernelError(f"attention: {flash.OUT_OF_RANGE}; positions go from {first} to {last} and k is {k.spec}")
    s = scores(q, k[: last + 1], positions, scale=scale, window=window, softcap=softcap)
    p = softmax(s) if sinks is None else softmax_with_sinks(s, sinks)
    return mix(p, v[: last + 1], dtype=q.dtype)
