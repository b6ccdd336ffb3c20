"""y = x @ weight.T + bias, with the weight row-major [out, k] and at any address, as a mapped checkpoint holds it."""

from __future__ import annotations

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from . import tir
from .errors import DTypeError, ShapeError
from .op import like, op
from .schedule import gemm
from .spec import FLOATS
from .tensor import Tensor


@op(symbolic={"x": "n"}, ranges=(1, 2, 17))
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, accumulated in float32.

    x: [n, k]; weight: [out, k]; bias: [out] or None. Each is float32, float16 or bfloat16, whatever the others are.
    Returns [n, out] in x's dtype. Row i of the result depends on row i of x only, to the bit: a prompt taken in pieces
    gives what it gives in one. Where x and weight are bfloat16 and the CPU multiplies pairs of them (AVX512-BF16),
    operands and sums below float32's smallest normal number, 1.2e-38, count as zero. HF and torch: nn.Linear.
    """
    for name, each, ndim in (("x", x, 2), ("weight", weight, 2), ("bias", bias, 1)):
        if each is not None and each.dtype not in FLOATS:
            raise DTypeError(f"{name} is {each}, expected one of {', '.join(FLOATS)}")
        if each is not None and each.ndim != ndim:
            raise ShapeError(f"{name} is {each}, expected {ndim} dimensions")
    if x.shape[1] == 0:
        raise ShapeError(f"x is {x}, expected [n, k] with k > 0")
    if weight.shape[1] != x.shape[1]:
        raise ShapeError(f"weight is {weight}, expected [out, {x.shape[1]}] for x {x}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ShapeError(f"bias is {bias}, expected [{weight.shape[0]}] for weight {weight}")
    return like(x, (x.shape[0], weight.shape[0]))


@linear.reference
def _(x, weight, bias=None):
    y = x.astype("float64") @ weight.astype("float64").T
    return y if bias is None else y + bias.astype("float64")


@linear.kernel
def _(x, weight, bias, out):
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        X, W, B, Y = gemm.arguments(x, weight, bias, out)
        n, (rows, k) = X.shape[0], W.shape

        def dot(total: tirx.Expr, at: tuple) -> tirx.Expr:
            token, row, r = at
            return total + tir.f32(X[token, r]) * tir.f32(W[row, r])

        sums = tir.folded("dot", (n, rows, k), tir.f32(0.0), dot)
        with tir.block("bias", (n, rows)) as (token, row):
            value = sums[token, row] if B is None else sums[token, row] + tir.f32(B[row])
            T.buffer_store(Y, value.astype(out.dtype), [token, row])
    return builder.get()


linear.template("cpu")(gemm.linear)
