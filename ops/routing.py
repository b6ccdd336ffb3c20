"""Mixtures of experts: which experts a token takes and how much each counts. The choice stays in tensors."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from tvm import tirx
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.script.tirx import builder

from . import tir
from .errors import DTypeError, OpError, ShapeError
from .op import like, op
from .spec import FLOATS
from .tensor import Tensor

_LOWEST = -3.0e38


@op(symbolic={"logits": "n"}, ranges=(1, 2, 17))
def route(
    logits: Tensor, bias: Tensor | None = None, *, k: int, scoring: Literal["softmax", "sigmoid"] = "softmax",
    normalise: bool = False, scale: float = 1.0, groups: int = 1, kept: int = 1, best: int = 1,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The k experts of each token, the best first, and how much each counts.

    logits: [n, experts], float. Scores are `scoring` of the logits, in float32, and experts are chosen by score, plus
    `bias` [experts] where there is one; of equal ones the lower index comes first. With `groups` above 1 the experts
    are cut into as many, and only those of the `kept` best groups may be chosen: a group is worth the sum of its
    `best` (1 or 2) best experts. The weights are the scores, without the bias; `normalise` divides them by their sum;
    then they are multiplied by `scale`. NaN counts as best. Returns weights float32 [n, k] and ids int32 [n, k].
    HF MixtralTopKRouter, Qwen3MoeTopKRouter, GptOssTopKRouter, DeepseekV2TopkRouter, DeepseekV3TopkRouter.
    """
    if logits.dtype not in FLOATS or (bias is not None and bias.dtype not in FLOATS):
        raise DTypeError(f"logits is {logits} and bias {bias}, expected floats")
    if logits.ndim != 2 or (bias is not None and bias.shape != logits.shape[1:]):
        raise ShapeError(f"logits is {logits} and bias {bias}, expected [n, experts] and [experts]")
    if scoring not in ("softmax", "sigmoid") or best not in (1, 2):
        raise OpError(f"scoring is {scoring!r} and best {best}, expected 'softmax' or 'sigmoid', and 1 or 2")
    experts = logits.shape[1]
    if not (groups >= 1 and experts % groups == 0 and 1 <= kept <= groups and best <= experts // groups):
        raise OpError(f"{experts} experts in groups={groups}, kept={kept}, best={best}: expected equal groups")
    if not 1 <= k <= experts // groups * kept:
        raise OpError(f"k is {k}, expected 1 to {experts // groups * kept}, the experts of {kept} of {groups} groups")
    return like(logits, (logits.shape[0], k), "float32"), like(logits, (logits.shape[0], k), "int32")


@op(symbolic={"x": "n", "weights": "n"}, ranges=(1, 2, 17))
def combine(x: Tensor, weights: Tensor) -> Tensor:
    """The sum of what a token's experts gave, each times its weight, in float32.

    x: [n, k, width], float; weights: float32 [n, k]. Returns [n, width] in x's dtype. NaN or infinity in x is kept.
    """
    if x.dtype not in FLOATS or weights.dtype != "float32":
        raise DTypeError(f"x is {x} and weights {weights}, expected a float and float32")
    if x.ndim != 3 or weights.shape != x.shape[:2]:
        raise ShapeError(f"x is {x} and weights {weights}, expected [n, k, width] and [n, k]")
    return like(x, (x.shape[0], x.shape[2]))


@route.reference
def _(logits, bias=None, *, k, scoring="softmax", normalise=False, scale=1.0, groups=1, kept=1, best=1):
    wide = logits.astype("float64")
    with np.errstate(over="ignore", invalid="ignore"):
        powers = np.exp(wide - wide.max(axis=1, keepdims=True))
        scores = powers / powers.sum(axis=1, keepdims=True) if scoring == "softmax" else 1 / (1 + np.exp(-wide))
    worth = wide if _by_logits(bias, scoring, best) else scores + (0 if bias is None else bias.astype("float64"))
    worth = np.where(np.isnan(worth), -_LOWEST, worth)
    ranked = np.sort(worth.reshape(len(wide), groups, -1), axis=2)[:, :, ::-1][:, :, :best].sum(axis=2)
    best_groups = np.argsort(-ranked, axis=1, kind="stable")[:, :kept]
    allowed = (best_groups[:, :, None] == np.arange(groups)).any(axis=1).repeat(wide.shape[1] // groups, axis=1)
    ids = np.argsort(-np.where(allowed, worth, -np.inf), axis=1, kind="stable")[:, :k]
    weights = np.take_along_axis(scores, ids, axis=1)
    if normalise:
        weights = weights / (weights.sum(axis=1, keepdims=True) + 1e-20)
    return weights * scale, ids.astype("int32")


@combine.reference
def _(x, weights):
    with np.errstate(invalid="ignore"):
        return (x.astype("float64") * weights.astype("float64")[:, :, None]).sum(axis=1)


def _by_logits(bias: Any, scoring: str, best: int) -> bool:
    """Softmax keeps the order of the logits: by them the choice is exact."""
    return scoring == "softmax" and bias is None and best == 1


@route.kernel
def _(logits, bias, weights, ids, *, k, scoring, normalise, scale, groups, kept, best):
    experts, inside = logits.shape[1], logits.shape[1] // groups
    by_logits, bias_dtype = _by_logits(bias, scoring, best), bias.dtype if bias else "float32"

    def score(x, top, total):
        return tir.exp(x - top) / total if scoring == "softmax" else tir.sigmoid(x)

    def worth(x, value, bias_buffer, e):
        found = x if by_logits else value if bias is None else value + bias_buffer[e].astype("float32")
        return tirx.Select(tirx.isnan(found), tir.f32(-_LOWEST), found)  # it is chosen, so that nothing hides it

    @T.prim_func(s_tir=True)
    def route(logits_: T.handle, bias_: T.handle, weights_: T.handle, ids_: T.handle):
        n = T.int64()
        X = T.match_buffer(logits_, (n, experts), logits.dtype, align=logits.itemsize)
        B = T.match_buffer(bias_, (experts,), bias_dtype, align=1)
        W = T.match_buffer(weights_, (n, k), "float32", align=4)
        ID = T.match_buffer(ids_, (n, k), "int32", align=4)
        top = T.alloc_buffer((n,), "float32")
        total = T.alloc_buffer((n,), "float32")
        scores = T.alloc_buffer((n, experts), "float32")
        worths = T.alloc_buffer((n, experts), "float32")
        left = T.alloc_buffer((n, experts), "float32")
        ranks = T.alloc_buffer((n, groups), "float32")
        second = T.alloc_buffer((n,), "float32")
        group = T.alloc_buffer((n,), "int32")
        summed = T.alloc_buffer((n,), "float32")
        for i in range(n):
            with T.sblock("route"):
                vi = T.axis.spatial(n, i)
                top[vi] = T.float32(_LOWEST)
                for e in range(experts):
                    top[vi] = T.max(top[vi], T.Cast("float32", X[vi, e]))
                total[vi] = T.float32(0)
                for e in range(experts):
                    total[vi] = total[vi] + tir.exp(T.Cast("float32", X[vi, e]) - top[vi])
                for e in range(experts):
                    scores[vi, e] = score(T.Cast("float32", X[vi, e]), top[vi], total[vi])
                    worths[vi, e] = worth(T.Cast("float32", X[vi, e]), scores[vi, e], B, e)
                for e in range(experts):
                    left[vi, e] = worths[vi, e] if groups == 1 else T.float32(_LOWEST)
                if groups > 1:
                    for g in range(groups):
                        # The best of the group, and the second best, in order.
                        ranks[vi, g] = T.float32(_LOWEST)
                        second[vi] = T.float32(_LOWEST)
                        for e in range(inside):
                            if worths[vi, g * inside + e] > ranks[vi, g]:
                                second[vi] = ranks[vi, g]
                                ranks[vi, g] = worths[vi, g * inside + e]
                            elif worths[vi, g * inside + e] > second[vi]:
                                second[vi] = worths[vi, g * inside + e]
                        if best == 2:
                            ranks[vi, g] = ranks[vi, g] + second[vi]
                    for _turn in range(kept):
                        group[vi] = 0
                        for g in range(groups):
                            if ranks[vi, g] > ranks[vi, group[vi]]:
                                group[vi] = g
                        ranks[vi, group[vi]] = T.float32(_LOWEST)
                        for e in range(inside):
                            left[vi, group[vi] * inside + e] = worths[vi, group[vi] * inside + e]
                summed[vi] = T.float32(0)
                for j in range(k):
                    ID[vi, j] = 0
                    for e in range(experts):
                        if left[vi, e] > left[vi, ID[vi, j]]:
                            ID[vi, j] = e
                    left[vi, ID[vi, j]] = T.float32(_LOWEST)
                    W[vi, j] = scores[vi, ID[vi, j]]
                    summed[vi] = summed[vi] + W[vi, j]
                for j in range(k):
                    if normalise:
                        W[vi, j] = W[vi, j] / (summed[vi] + T.float32(1e-20))
                    W[vi, j] = W[vi, j] * T.float32(scale)

    return route if bias else tir.without(route, 1)


@combine.kernel
def _(x, weights, out):
    _, k, width = x.shape
    with IRBuilder() as ir, builder.prim_func(s_tir=True):
        builder.func_name("combine")
        n = tirx.Var("n", "int64")
        source = builder.arg("x", builder.buffer((n, k, width), x.dtype, align=x.itemsize))
        factors = builder.arg("weights", builder.buffer((n, k), "float32", align=4))
        target = builder.arg("out", builder.buffer((n, width), out.dtype, align=out.itemsize))

        def add(total: Any, at: tuple) -> Any:
            token, column, j = at
            return total + tir.f32(source[token, j, column]) * factors[token, j]

        sums = tir.folded("sum", (n, width, k), tir.f32(0.0), add)
        with tir.block("combine", (n, width)) as at:
            builder.buffer_store(target, sums[at].astype(out.dtype), at)
    return ir.get()
