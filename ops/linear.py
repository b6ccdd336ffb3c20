"""Linear: y = x @ weight.T + bias. The weight is row-major [out, k], as checkpoints hold it, and often memory-mapped."""

from __future__ import annotations

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from . import target
from .errors import DTypeError, ShapeError
from .op import like, op
from .schedule import gemm
from .spec import FLOATS, Dim
from .tensor import Tensor


@op(symbolic={"x": "n"}, ranges=(1, 2, 17))
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, accumulated in float32.

    x: [n, k]; weight: [out, k]; bias: [out] or None. Each is float32, float16 or bfloat16, whatever the others are.
    Returns [n, out] in x's dtype. Row i of the result depends on row i of x only, to the bit: a prompt taken in pieces
    gives what it gives in one. HF and torch: nn.Linear.
    """
    for name, each, ndim in (("x", x, 2), ("weight", weight, 2), ("bias", bias, 1)):
        if each is not None and each.dtype not in FLOATS:
            raise DTypeError(f"{name} is {each}, expected one of {', '.join(FLOATS)}")
        if each is not None and each.ndim != ndim:
            raise ShapeError(f"{name} is {each}, expected {ndim} dimensions")
    if weight.shape[1] != x.shape[1]:
        raise ShapeError(f"weight is {weight}, expected [out, {x.shape[1]}] for x {x}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ShapeError(f"bias is {bias}, expected [{weight.shape[0]}] for weight {weight}")
    return like(x, (x.shape[0], weight.shape[0]))


@linear.reference
def _(x, weight, bias=None):
    y = x.astype("float64") @ weight.astype("float64").T
    return y if bias is None else y + bias.astype("float64")


@linear.template("cpu")
def _(x, weight, bias, out):
    n = x.shape[0]
    low, high = (n.low, n.high) if isinstance(n, Dim) else (n, n)
    if 0 in weight.shape:
        return None
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("linear")
            size = tirx.Var("n", "int64")
            X = T.arg("x", T.buffer((size, x.shape[1]), x.dtype, align=x.itemsize))
            W = T.arg("weight", T.buffer(weight.shape, weight.dtype, align=weight.itemsize))
            B = bias and T.arg("bias", T.buffer(bias.shape, bias.dtype, align=bias.itemsize))
            Y = T.arg("out", T.buffer((size, weight.shape[0]), out.dtype, align=out.itemsize))

            def epilogue(token, row, value):
                return value if B is None else value + B[row].astype("float32")

            gemm.emit(gemm.Product(X, W, Y, size, low, high, epilogue, target.lanes()))
    return builder.get()
