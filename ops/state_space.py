"""What state-space models are made of: steps in time, a causal convolution, and Mamba 2's scan over a state."""

from __future__ import annotations

import numpy as np
from tvm import tirx
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.script.tirx import builder

from . import pointwise, target, tir
from .errors import DTypeError, OpError, ShapeError
from .op import like, op
from .schedule import scan
from .spec import FLOATS, Dim
from .tensor import Tensor


@op(symbolic={"x": "n"}, ranges=(1, 2, 17))
def softplus(x: Tensor, *, low: float = 0.0, high: float | None = None) -> Tensor:
    """log(1 + e**x), not less than `low` and not more than `high`: what makes any number a step in time.

    x: any float, at least one axis, which the result is like. torch.nn.functional.softplus and clamp; HF Mamba2Mixer.
    """
    if x.dtype not in FLOATS:
        raise DTypeError(f"x is {x}, expected one of {', '.join(FLOATS)}")
    if x.ndim < 1:
        raise ShapeError(f"x is {x}, expected at least one axis")
    if not low >= 0 or (high is not None and not low <= high):
        raise OpError(f"low is {low} and high {high}, expected 0 <= low <= high, or None for no upper limit")
    return like(x)


@op(symbolic={"x": "n"}, ranges=(1, 2, 17))
def causal_conv(x: Tensor, before: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y[i] = bias + sum_j weight[:, j] * x[i - (k - 1) + j], each column by itself, in float32.

    x: [n, width]; before: [k - 1, width], the rows before the first of x, zeros where a text begins; both floats of one
    dtype, which the result has too. weight: [width, k] with k of 2 or more, and bias: [width], float32 or x's dtype.
    LeCun et al. 1989; HF causal_conv1d_fn, nn.Conv1d(groups=width, padding=k - 1).
    """
    for name, each, shape in (("before", before, None), ("weight", weight, None), ("bias", bias, x.shape[-1:])):
        kinds = (x.dtype,) if name == "before" else ("float32", x.dtype)
        if x.dtype not in FLOATS or (each is not None and each.dtype not in kinds):
            raise DTypeError(f"x is {x} and {name} {each}, expected floats, {name} as {' or '.join(kinds)}")
        if each is not None and shape is not None and each.shape != shape:
            raise ShapeError(f"{name} is {each}, expected {list(shape)} for x {x}: [n, width]")
    if x.ndim != 2 or weight.ndim != 2 or weight.shape[0] != x.shape[1] or weight.shape[1] < 2:
        raise ShapeError(f"x is {x} and weight {weight}, expected [n, width] and [width, k], k at least 2")
    if before.shape != (weight.shape[1] - 1, x.shape[1]):
        raise ShapeError(f"before is {before}, expected {[weight.shape[1] - 1, x.shape[1]]} for weight {weight}")
    return like(x)


@op(symbolic={"x": "n", "step": "n", "b": "n", "c": "n"}, ranges=(1, 2))
def selective_scan(
    x: Tensor, step: Tensor, decay: Tensor, b: Tensor, c: Tensor, skip: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Mamba 2's recurrence, token after token: state = fade * state + step * x b^T, then y = state c + skip * x.

    For each head by itself, in float32, with fade = e**(-step exp(decay)). x: [n, heads, dim]; b and c:
    [n, groups, size], of which heads / groups neighbouring heads share one; floats of one dtype. step: float32
    [n, heads]; decay and skip: float32 [heads]; state: float32 [heads, dim, size], zeros where a text begins.
    Returns y like x, and the state after the last token.
    Dao and Gu 2024 (Mamba 2), -exp(decay) being A and skip D; HF mamba2_chunk_scan, mamba2_selective_state_update.
    """
    if x.dtype not in FLOATS or b.dtype != x.dtype or c.dtype != x.dtype:
        raise DTypeError(f"x is {x}, b {b} and c {c}, expected floats of one dtype")
    if x.ndim != 3 or b.ndim != 3 or c.shape != b.shape or b.shape[0] != x.shape[0]:
        raise ShapeError(f"x is {x}, b {b} and c {c}, expected [n, heads, dim] and [n, groups, size] twice")
    n, heads, dim = x.shape
    _, groups, size = b.shape
    if not groups or heads % groups or not size:
        raise ShapeError(f"x has {heads} heads and b is {b}, expected a number of groups that divides them, and a size")
    vectors = (("step", step, (n, heads)), ("decay", decay, (heads,)), ("skip", skip, (heads,)))
    for name, each, shape in (*vectors, ("state", state, (heads, dim, size))):
        if each.dtype != "float32" or each.shape != shape:
            raise ShapeError(f"{name} is {each}, expected float32 {list(shape)} for x {x} and b {b}")
    return like(x), like(state)


@softplus.reference
def _(x, *, low=0.0, high=None):
    return np.clip(np.logaddexp(0, x.astype("float64")), low, high)


@causal_conv.reference
def _(x, before, weight, bias=None):
    rows, weight = np.concatenate([before, x]).astype("float64"), weight.astype("float64")
    y = sum(rows[j : j + len(x)] * weight[:, j] for j in range(weight.shape[1]))
    return y if bias is None else y + bias.astype("float64")


@selective_scan.reference
def _(x, step, decay, b, c, skip, state):
    """By the recurrence, in float64; a test holds it against the sums that it stands for."""
    x, step, b, c, skip, state = (each.astype("float64") for each in (x, step, b, c, skip, state))
    fade = np.exp(-step * np.exp(decay.astype("float64")))
    b, c = (np.repeat(each, x.shape[1] // each.shape[1], axis=1) for each in (b, c))
    y = x * skip[:, None]
    for i in range(len(x)):
        arriving = step[i][:, None, None] * x[i][:, :, None] * b[i][:, None, :]
        state = fade[i][:, None, None] * state + arriving
        y[i] += np.einsum("hds,hs->hd", state, c[i])
    return y, state


# log(1 + e) = 2 atanh(z), z = e / (2 + e): its series in z**2, highest power first; 1 + e would lose what is small.
_ATANH = tuple(2 / power for power in range(13, 0, -2))


def _softplus(x: tirx.Expr, low: float, high: float | None) -> tirx.Expr:
    e = tir.exp(-tirx.max(x, -x))
    z = e / (e + tir.f32(2.0))
    value = tirx.max(tir.f32(0.0), x) + z * tir.polynomial(z * z, _ATANH)
    value = tirx.max(tir.f32(low), value) if low else value  # the bound first, so that NaN stays
    return value if high is None else tirx.min(tir.f32(high), value)


@softplus.kernel
def _(x, out, *, low, high):
    return pointwise.blocks("softplus", lambda x: _softplus(tir.f32(x), low, high), ("x",), (x,), out)


@causal_conv.kernel
def _(x, before, weight, bias, out):
    with IRBuilder() as ir, builder.prim_func(s_tir=True):
        builder.func_name("causal_conv")
        n, (width, taps) = tirx.Var("n", "int64"), weight.shape
        source = builder.arg("x", builder.buffer((n, width), x.dtype, align=x.itemsize))
        held = builder.arg("before", builder.buffer((taps - 1, width), x.dtype, align=x.itemsize))
        factors = builder.arg("weight", builder.buffer((width, taps), weight.dtype, align=weight.itemsize))
        offsets = bias and builder.arg("bias", builder.buffer((width,), bias.dtype, align=bias.itemsize))
        y = builder.arg("out", builder.buffer((n, width), out.dtype, align=out.itemsize))
        with tir.block("causal_conv", (n, width)) as (token, column):
            total = tir.f32(0.0) if offsets is None else tir.f32(offsets[column])
            for tap in range(taps):
                back = taps - 1 - tap
                value = tir.f32(source[tirx.max(token - back, 0), column])
                if back:  # both are in memory: chosen without a branch, it is vectorised
                    early = tir.f32(held[tirx.min(token + tap, taps - 2), column])
                    value = tirx.Select(token < back, early, value)
                total = total + value * tir.f32(factors[column, tap])
            builder.buffer_store(y, total.astype(out.dtype), (token, column))
    return ir.get()


@selective_scan.kernel
def _(x, step, decay, b, c, skip, state, out, after):
    (heads, dim, size), groups, dtype = state.shape, b.shape[1], x.dtype
    share = heads // groups

    @T.prim_func(s_tir=True)
    def selective_scan(
        x_: T.handle, step_: T.handle, decay_: T.handle, b_: T.handle, c_: T.handle, skip_: T.handle,
        state_: T.handle, out_: T.handle, after_: T.handle,
    ):  # fmt: skip
        n = T.int64()
        X = T.match_buffer(x_, (n, heads, dim), dtype, align=x.itemsize)
        P = T.match_buffer(step_, (n, heads), "float32", align=4)
        D = T.match_buffer(decay_, (heads,), "float32", align=4)
        B = T.match_buffer(b_, (n, groups, size), dtype, align=x.itemsize)
        C = T.match_buffer(c_, (n, groups, size), dtype, align=x.itemsize)
        K = T.match_buffer(skip_, (heads,), "float32", align=4)
        S = T.match_buffer(state_, (heads, dim, size), "float32", align=4)
        Y = T.match_buffer(out_, (n, heads, dim), out.dtype, align=out.itemsize)
        A = T.match_buffer(after_, (heads, dim, size), "float32", align=4)
        fade = T.alloc_buffer((heads, dim), "float32")
        total = T.alloc_buffer((heads, dim), "float32")
        for h, d in T.grid(heads, dim):
            with T.sblock("row"):
                vh, vd = T.axis.remap("SS", [h, d])
                for s in range(size):
                    A[vh, vd, s] = S[vh, vd, s]
                for i in range(n):
                    fade[vh, vd] = tir.exp(T.float32(0) - P[i, vh] * tir.exp(D[vh]))
                    total[vh, vd] = K[vh] * T.Cast("float32", X[i, vh, vd])
                    for s in range(size):
                        A[vh, vd, s] = fade[vh, vd] * A[vh, vd, s] + P[i, vh] * T.Cast(
                            "float32", X[i, vh, vd]
                        ) * T.Cast("float32", B[i, vh // share, s])
                        total[vh, vd] = total[vh, vd] + A[vh, vd, s] * T.Cast("float32", C[i, vh // share, s])
                    Y[i, vh, vd] = T.Cast(out.dtype, total[vh, vd])

    return selective_scan


@selective_scan.template("cpu")
def _(x, step, decay, b, c, skip, state, out, after):
    """The fast kernel; None where no whole number of vectors makes up a row of the state."""
    if state.shape[2] % target.lanes():
        return None
    tokens, given = x.shape[0], {"x": x, "step": step, "decay": decay, "b": b, "c": c, "skip": skip, "state": state}
    with IRBuilder() as ir, builder.prim_func(s_tir=True):
        builder.func_name("selective_scan")
        n, buffers = tirx.Var("n", "int64"), {}
        for name, spec in {**given, "out": out, "after": after}.items():
            shape = (n, *spec.shape[1:]) if name in ("x", "step", "b", "c", "out") else spec.shape
            buffers[name] = builder.arg(name, builder.buffer(shape, spec.dtype, align=spec.itemsize))
        low = tokens.low if isinstance(tokens, Dim) else tokens
        scan.emit(scan.Scan(**buffers, n=n, low=low, one=tokens == 1))
    return ir.get()
