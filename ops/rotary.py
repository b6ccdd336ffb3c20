"""Rotary position embedding: queries and keys are turned by angles that grow with their position."""

from __future__ import annotations

import numpy as np
from tvm.script import tirx as T

from .errors import DTypeError, ShapeError
from .op import like, op
from .spec import FLOATS
from .tensor import Tensor

PARALLEL_WORK = 16384  # elements below which waking the threads costs more than it saves; an angle counts as 16


@op(symbolic={"x": "n", "positions": "n"}, ranges=(1, 2, 17))
def rope(x: Tensor, positions: Tensor, frequencies: Tensor, *, interleaved: bool = False, scale: float = 1.0) -> Tensor:
    """Turn pairs of elements of every head by position * frequency, in float32.

    x: [n, heads, dim]; positions: int32 [n]; frequencies: float32 [rotary/2], with rotary <= dim: elements from rotary
    on pass through unchanged. A pair is (j, j + rotary/2), or (2j, 2j + 1) when `interleaved`. cos and sin are
    multiplied by `scale`, the attention factor of YaRN and LongRoPE. Returns x's shape and dtype.
    Su et al. 2021; HF apply_rotary_pos_emb (rotate_half); interleaved: GPT-J, llama2.c.
    """
    if x.dtype not in FLOATS or positions.dtype != "int32" or frequencies.dtype != "float32":
        raise DTypeError(
            f"x is {x.dtype}, positions {positions.dtype} and frequencies {frequencies.dtype}; "
            "expected a float, int32 and float32"
        )
    if x.ndim != 3:
        raise ShapeError(f"x is {x}, expected [n, heads, dim]")
    if positions.shape != x.shape[:1]:
        raise ShapeError(f"positions is {positions}, expected [{x.shape[0]}] for x {x}")
    if frequencies.ndim != 1 or not 1 <= frequencies.shape[0] <= x.shape[2] // 2:
        raise ShapeError(f"frequencies is {frequencies}, expected [1] to [{x.shape[2] // 2}], one for a pair of x {x}")
    return like(x)


@rope.reference
def _(x, positions, frequencies, *, interleaved=False, scale=1.0):
    half = frequencies.shape[0]
    angle = positions.astype("float32")[:, None] * frequencies.astype("float32")  # a float32 product, as HF has it
    cos, sin = (scale * f(angle.astype("float64"))[:, None] for f in (np.cos, np.sin))
    first, second = (
        (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if interleaved else (slice(half), slice(half, 2 * half))
    )
    out = x.astype("float64")
    a, b = out[..., first].copy(), out[..., second].copy()
    out[..., first], out[..., second] = a * cos - b * sin, b * cos + a * sin
    return out


@rope.kernel
def _(x, positions, frequencies, out, *, interleaved, scale):
    heads, dim, dtype = x.shape[1], x.shape[2], x.dtype
    half = frequencies.shape[0]

    def pair(d):
        """Which angle turns element d."""
        return d // 2 % half if interleaved else d % half

    def partner(d):
        """The other element of d's pair."""
        return (d + 1 - d % 2 * 2 if interleaved else d + half) % (2 * half)

    def is_first(d):
        return d % 2 == 0 if interleaved else d < half

    @T.prim_func(s_tir=True)
    def rope(x_: T.handle, positions_: T.handle, frequencies_: T.handle, out_: T.handle):
        n = T.int64()
        X = T.match_buffer(x_, (n, heads, dim), dtype, align=x.itemsize)
        P = T.match_buffer(positions_, (n,), "int32", align=4)
        F = T.match_buffer(frequencies_, (half,), "float32", align=4)
        Y = T.match_buffer(out_, (n, heads, dim), dtype, align=out.itemsize)
        cos = T.alloc_buffer((n, half), "float32")
        sin = T.alloc_buffer((n, half), "float32")
        for i, j in T.grid(n, half):
            with T.sblock("cos"):
                vi, vj = T.axis.remap("SS", [i, j])
                cos[vi, vj] = T.cos(T.Cast("float32", P[vi]) * F[vj]) * T.float32(scale)
        for i, j in T.grid(n, half):
            with T.sblock("sin"):
                vi, vj = T.axis.remap("SS", [i, j])
                sin[vi, vj] = T.sin(T.Cast("float32", P[vi]) * F[vj]) * T.float32(scale)
        for i, h, d in T.grid(n, heads, dim):
            with T.sblock("rotate"):
                vi, vh, vd = T.axis.remap("SSS", [i, h, d])
                Y[vi, vh, vd] = T.if_then_else(
                    vd < 2 * half,
                    T.Cast(
                        dtype,
                        T.Cast("float32", X[vi, vh, vd]) * cos[vi, pair(vd)]
                        + T.Cast("float32", X[vi, vh, partner(vd)])
                        * T.if_then_else(is_first(vd), -sin[vi, pair(vd)], sin[vi, pair(vd)]),
                    ),
                    X[vi, vh, vd],
                )

    return rope


@rope.template("cpu")
def _(x, positions, frequencies, out, *, interleaved, scale):
    heads, dim, dtype = x.shape[1], x.shape[2], x.dtype
    half = frequencies.shape[0]
    rest = dim - 2 * half
    first, second, step = (0, 1, 2) if interleaved else (0, half, 1)
    rows = getattr(x.shape[0], "low", x.shape[0])
    loop = T.parallel if rows > 1 and rows * (heads * dim + 16 * half) >= PARALLEL_WORK else T.serial

    @T.prim_func(s_tir=True)
    def rope(x_: T.handle, positions_: T.handle, frequencies_: T.handle, out_: T.handle):
        n = T.int64()
        X = T.match_buffer(x_, (n, heads, dim), dtype, align=x.itemsize)
        P = T.match_buffer(positions_, (n,), "int32", align=4)
        F = T.match_buffer(frequencies_, (half,), "float32", align=4)
        Y = T.match_buffer(out_, (n, heads, dim), dtype, align=out.itemsize)
        for i in loop(n):
            cos = T.alloc_buffer((half,), "float32", scope="global")
            sin = T.alloc_buffer((half,), "float32", scope="global")
            for j in range(half):
                cos[j] = T.cos(T.Cast("float32", P[i]) * F[j]) * T.float32(scale)
                sin[j] = T.sin(T.Cast("float32", P[i]) * F[j]) * T.float32(scale)
            for h in range(heads):
                for j in range(half):
                    Y[i, h, first + step * j] = T.Cast(
                        dtype,
                        T.Cast("float32", X[i, h, first + step * j]) * cos[j]
                        - T.Cast("float32", X[i, h, second + step * j]) * sin[j],
                    )
                    Y[i, h, second + step * j] = T.Cast(
                        dtype,
                        T.Cast("float32", X[i, h, second + step * j]) * cos[j]
                        + T.Cast("float32", X[i, h, first + step * j]) * sin[j],
                    )
                for d in range(rest):
                    Y[i, h, 2 * half + d] = X[i, h, 2 * half + d]

    return rope
