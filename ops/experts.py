"""The matrices of a mixture of experts: each token is multiplied by those of its own experts, the others are not read.

The experts' matrices lie one after another in one weight [experts * outputs, inputs], float or packed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from . import packed, target, tir
from .errors import DTypeError, OpError, ShapeError
from .op import like, op
from .quantize import KNOWN, round_activations
from .schedule import experts as schedule
from .spec import FLOATS, Dim
from .tensor import Tensor

_OUT_OF_RANGE = "ids hold a value outside [0, {})"


@op(symbolic={"ids": "n", "x": "n"}, ranges=(1, 2, 17))
def experts_linear(x: Tensor, weight: Tensor, ids: Tensor, bias: Tensor | None = None, *, experts: int) -> Tensor:
    """x @ weight_e.T + bias_e for each expert e of a token, accumulated in float32.

    ids: int32 [n, k], the experts of each token; x: [n, inputs], the same for all of a token's experts, or
    [n, k, inputs], one for each; weight: [experts * outputs, inputs], expert e's rows from e * outputs on; bias:
    [experts * outputs] or None. Floats of any dtype; the weight may be packed, and then activations are rounded as
    `linear` does, and outputs is a multiple of a vector's lanes. Returns [n, k, outputs] in x's dtype; a row of it
    depends on that row of x only, to the bit. An id outside [0, experts) raises KernelError.
    Shazeer et al. 2017; HF MixtralExperts.
    """
    for name, each, ndims in (("x", x, (2, 3)), ("weight", weight, (2,)), ("bias", bias, (1,))):
        known = (*FLOATS, *KNOWN) if name == "weight" else FLOATS
        if each is not None and each.dtype not in known:
            raise DTypeError(f"{name} is {each}, expected one of {', '.join(known)}")
        if each is not None and each.ndim not in ndims:
            raise ShapeError(f"{name} is {each}, expected {' or '.join(map(str, ndims))} dimensions")
    if ids.dtype != "int32" or ids.ndim != 2 or ids.shape[0] != x.shape[0] or x.shape[1:-1] not in ((), ids.shape[1:]):
        raise ShapeError(f"ids is {ids}, expected int32 [n, k] for x {x}: [n, inputs] or [n, k, inputs]")
    if experts < 1 or weight.shape[0] % experts:
        raise ShapeError(f"weight is {weight}, expected [experts * outputs, inputs] for experts={experts}")
    if x.shape[-1] == 0 or weight.shape[1] != x.shape[-1]:
        raise ShapeError(f"weight is {weight}, expected [experts * outputs, {x.shape[-1]}] for x {x}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ShapeError(f"bias is {bias}, expected [{weight.shape[0]}] for weight {weight}")
    outputs = weight.shape[0] // experts
    if weight.dtype in KNOWN and outputs % target.lanes():
        raise OpError(
            f"weight is {weight}: a packed expert has a multiple of {target.lanes()} rows, these {outputs}; "
            f"leave the experts unpacked"
        )
    return like(x, (*ids.shape, outputs))


@experts_linear.reference
def _(x, weight, ids, bias=None, *, experts):
    if ids.size and not (ids.min() >= 0 and ids.max() < experts):
        raise IndexError(_OUT_OF_RANGE.format(experts))
    form = getattr(weight, "format", None)
    if form is None:
        x = x.astype("float64")
    else:
        x = round_activations(x.astype("float32").reshape(-1, x.shape[-1]), form).reshape(x.shape)
    rows = np.broadcast_to(x[:, None] if x.ndim == 2 else x, (*ids.shape, x.shape[-1]))
    matrices = np.asarray(weight, "float64").reshape(experts, -1, x.shape[-1])
    y = np.zeros((*ids.shape, matrices.shape[1]))
    for e in np.unique(ids):
        y[ids == e] = rows[ids == e] @ matrices[e].T
    return y if bias is None else y + bias.astype("float64").reshape(experts, -1)[ids]


@experts_linear.kernel
def _(x, weight, ids, bias, out, *, experts):
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        X, W, ID, B, Y = _arguments(x, weight, ids, bias, out)
        n, (k, outputs), inputs = X.shape[0], out.shape[1:], x.shape[-1]
        outside = _OUT_OF_RANGE.format(experts)
        slots = max(k, 1)
        with (
            tir.block("check", (n * k,), reduces=True) as (i,),  # not in parallel: a worker's error may be lost
            T.Assert(_known(ID[i // slots, i % slots], experts), outside),
        ):
            T.evaluate(0)

        def row(token: Any, slot: Any, output: Any) -> Any:
            return ID[token, slot].astype("int64") * outputs + output

        def element(at: tuple) -> Any:
            token, slot, _, i = at
            return tir.f32(X[token, i] if x.ndim == 2 else X[token, slot, i])

        if weight.format is None:

            def dot(total: Any, at: tuple) -> Any:
                return total + element(at) * tir.f32(W[row(*at[:3]), at[3]])

            sums = tir.folded("dot", (n, k, outputs, inputs), tir.f32(0.0), dot)
        else:
            sums = _packed(X, x.ndim, n, k, outputs, packed.Weight(W, weight), row)
        with tir.block("bias", (n, k, outputs)) as at:
            value = sums[at] if B is None else sums[at] + tir.f32(B[row(*at)])
            T.buffer_store(Y, value.astype(out.dtype), at)
    return builder.get()


def _packed(X: Any, ndim: int, n: Any, k: int, outputs: int, weight: packed.Weight, row: Any) -> Any:
    """In an IRBuilder: the sums of products with a packed weight, as `packed.product` has them for one matrix."""
    form, inputs, slots = weight.form, weight.inputs, 1 if ndim == 2 else k
    flat = schedule.Flat(X, slots)
    codes, scales, sums = packed.quantized(flat, n * slots, inputs, form)

    def line(token: Any, slot: Any) -> Any:
        return token if ndim == 2 else token * k + slot

    def dot(total: Any, at: tuple) -> Any:
        token, slot, output, group, i = at
        column = group * form.group + i
        last = tirx.min(column, inputs - 1)
        each = codes[line(token, slot), last].astype("int32") * weight.level(row(token, slot, output), last)
        return total + tirx.Select(column < inputs, each, 0)

    shape = (n, k, outputs, weight.groups)
    dots = tir.folded("product", (*shape, form.group), tirx.const(0, "int32"), dot)

    def scaled(total: Any, at: tuple) -> Any:
        token, slot, output, group = at
        value = dots[at].astype("float32") * weight.scale(row(token, slot, output), group)
        if form.minimum:
            minimum = weight.minimum(row(token, slot, output), group)
            value = value + sums[line(token, slot), group].astype("float32") * minimum
        return total + value * scales[line(token, slot), group]

    return tir.folded("scaled", shape, tir.f32(0.0), scaled)


@experts_linear.template("cpu")
def _(x, weight, ids, bias, out, *, experts):
    if out.shape[2] == 0 or out.shape[1] == 0:
        return None
    if weight.format is None and target.lanes() <= schedule.ROWS:  # TVM 0.27 does not lower the tiles of such vectors
        return None
    size = x.shape[0]
    low, high = (size.low, size.high) if isinstance(size, Dim) else (size, size)
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        X, W, ID, B, Y = _arguments(x, weight, ids, bias, out)
        n, outside = X.shape[0], _OUT_OF_RANGE.format(experts)
        with T.grid(n, out.shape[1]) as (i, j), T.Assert(_known(ID[i, j], experts), outside, "ValueError"):
            T.evaluate(0)
        schedule.emit(schedule.Mixture(X, W, ID, B, Y, n, low, high, experts, weight.format))
    return builder.get()


def _known(number: Any, experts: int) -> Any:
    return tirx.And(number >= 0, number < experts)


def _arguments(x: Any, weight: Any, ids: Any, bias: Any, out: Any) -> tuple[Any, Any, Any, Any, Any]:
    n = tirx.Var("n", "int64")
    T.func_name("experts_linear")
    X = packed.argument("x", x, (n, *x.shape[1:]))
    W = packed.argument("weight", weight)
    ID = packed.argument("ids", ids, (n, ids.shape[1]))
    B = bias and packed.argument("bias", bias)
    return X, W, ID, B, packed.argument("out", out, (n, *out.shape[1:]))
