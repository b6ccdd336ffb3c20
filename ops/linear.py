"""y = x @ weight.T + bias: the weight row-major [out, k] at any address, as a mapped checkpoint holds it, or packed."""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from . import packed, target, tir
from .errors import DTypeError, ShapeError
from .op import like, op
from .quantize import KNOWN, round_activations
from .schedule import gemm, gpu, gpu_matmul, quantized
from .spec import FLOATS, Dim, Spec
from .tensor import Tensor


@op(symbolic={"x": "n"}, ranges=(1, 2, 17))
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, accumulated in float32.

    x: [n, k]; weight: [out, k]; bias: [out] or None. Each is float32, float16 or bfloat16, whatever the others are, and
    the weight may be packed (`ops.quantize`): then each token's activations are rounded, by groups of the weight's, to
    int8 times a scale, the group's largest magnitude / 127; products of a group are added exactly. A group that holds
    a NaN or an infinity makes the token's row NaN.
    Returns [n, out] in x's dtype. Row i of the result depends on row i of x only, to the bit: a prompt taken in pieces
    gives what it gives in one. Where x and weight are bfloat16 and the CPU multiplies pairs of them (AVX512-BF16),
    operands and sums below float32's smallest normal number, 1.2e-38, count as zero. HF and torch: nn.Linear.
    """
    for name, each, ndim in (("x", x, 2), ("weight", weight, 2), ("bias", bias, 1)):
        known = (*FLOATS, *KNOWN) if name == "weight" else FLOATS
        if each is not None and each.dtype not in known:
            raise DTypeError(f"{name} is {each}, expected one of {', '.join(known)}")
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
    form = getattr(weight, "format", None)
    x = x.astype("float64") if form is None else round_activations(x.astype("float32"), form)
    y = x @ np.asarray(weight, "float64").T
    return y if bias is None else y + bias.astype("float64")


@linear.kernel
def _(x, weight, bias, out):
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        X, W, B, Y = _arguments(x, weight, bias, out)
        n, (rows, k) = X.shape[0], weight.shape

        def dot(total: tirx.Expr, at: tuple) -> tirx.Expr:
            token, row, r = at
            return total + tir.f32(X[token, r]) * tir.f32(W[row, r])

        with tir.part("product", weight.dtype):
            if weight.format is None:
                sums = tir.folded("dot", (n, rows, k), tir.f32(0.0), dot)
            else:
                sums = packed.product(X, n, packed.Weight(W, weight))
        with tir.block("bias", (n, rows)) as (token, row):
            value = sums[token, row] if B is None else sums[token, row] + tir.f32(B[row])
            T.buffer_store(Y, value.astype(out.dtype), [token, row])
    return builder.get()


@linear.template("cpu")
def _(x, weight, bias, out):
    """The fast kernel; None when the weight has no rows."""
    if weight.shape[0] == 0:
        return None
    size = x.shape[0]
    low, high = (size.low, size.high) if isinstance(size, Dim) else (size, size)
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        X, W, B, Y = _arguments(x, weight, bias, out)
        n = X.shape[0]

        def add_bias(_: Any, row: Any, value: Any) -> Any:
            return value if B is None else value + tir.f32(B[row])

        if weight.format is None:
            gemm.emit(gemm.Product(X, W, Y, n, low, high, add_bias))
        else:
            quantized.emit(quantized.Product(X, W, Y, n, low, high, weight.shape[0], weight.format, add_bias))
    return builder.get()


@linear.template("gpu")
def _(x, weight, bias, out):
    """Tiles or warps, and a thread an element for a packed weight; None when the weight has no rows."""
    if weight.shape[0] == 0:
        return None
    size = x.shape[0]
    low, high = (size.low, size.high) if isinstance(size, Dim) else (size, size)
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        X, W, B, Y = _arguments(x, weight, bias, out)

        def add_bias(_: Any, row: Any, value: Any) -> Any:
            return value if B is None else value + tir.f32(B[row])

        product = gemm.Product(X, W, Y, X.shape[0], low, high, add_bias)
        if weight.format is None:
            gpu_matmul.emit(product)
        else:
            gpu_matmul.packed_product(product, packed.Weight(W, weight))
    device = target.gpu()
    return builder.get() if weight.format is None or device is None else gpu.schedule(builder.get(), device)


def _arguments(x: Spec, weight: Spec, bias: Spec | None, out: Spec) -> tuple[Any, Any, Any, Any]:
    """The parameters of a prim_func, the number of tokens left open; None for an absent bias."""
    n = tirx.Var("n", "int64")
    T.func_name("linear")
    X = packed.argument("x", x, (n, x.shape[1]))
    W = packed.argument("weight", weight)
    B = bias and packed.argument("bias", bias)
    return X, W, B, packed.argument("out", out, (n, out.shape[1]))
