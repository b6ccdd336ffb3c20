"""What a call must move and compute at the least: bytes and floating-point operations, by rules from its arguments.

Bytes: every input read once, every output and what is written of an argument written once, as if nothing were in a
cache. A flop is an addition, multiplication, division, comparison or a function such as exp; a fused multiply-add is
two. Conversions are none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from .call import Call
from .op import Op
from .tensor import Tensor


class Cost(NamedTuple):
    """Bytes that move between a kernel and memory, and floating-point operations."""

    bytes: int
    flops: int


Rule = Callable[[Call], Cost]
_rules: dict[str, Rule] = {}
_of_values: set[str] = set()  # ops whose cost depends on what is in the arguments

# Flops for an element of the output, of ops that do the same for each.
_EACH = {
    "add": 1, "sub": 1, "mul": 1, "div": 1, "add_row": 1, "mul_row": 1, "scale": 1, "offset": 1, "neg": 1, "tanh": 1,
    "clamp": 2, "softcap": 3, "silu": 4, "silu_mul": 5, "rms_norm": 4, "softmax": 5, "softmax_with_sinks": 5,
    "log_softmax": 5, "softplus": 3,
}  # fmt: skip


def cost(call: Call) -> Cost:
    """By the op's rule, or where it has none: all inputs and outputs once, no flops. To be asked before the launch."""
    return _rules.get(call.op.name, generic)(call)


def depends_on_values(op: Op) -> bool:
    """Whether calls of the op with the same shapes and constants may cost differently."""
    return op.name in _of_values


def rule(op: Op | str, of_values: bool = False) -> Callable[[Rule], Rule]:
    """`@ops.costs.rule(my_op)` registers a function of the Call that gives its Cost.

    It may be asked once for all calls of the same shapes and constants; `of_values` has it asked for each.
    """
    name = op if isinstance(op, str) else op.name

    def register(function: Rule) -> Rule:
        _rules[name] = function
        (_of_values.add if of_values else _of_values.discard)(name)
        return function

    return register


def generic(call: Call) -> Cost:
    """Inputs and outputs once; an argument that the kernel writes counts as written, whole."""
    given = sum(each.nbytes for each in call.args if isinstance(each, Tensor))
    return Cost(given + _given_back(call), _EACH.get(call.op.name, 0) * _size(call))


def _given_back(call: Call) -> int:
    return sum(spec.nbytes for spec in call.outputs)


def _size(call: Call) -> int:
    return sum(spec.size for spec in call.outputs)


def _nbytes(*tensors: Tensor | None) -> int:
    return sum(each.nbytes for each in tensors if each is not None)


@rule("linear")
def _(call: Call) -> Cost:
    bias = call.inputs.get("bias")
    return Cost(generic(call).bytes, _size(call) * (2 * call.inputs["weight"].shape[1] + (bias is not None)))


@rule("experts_linear", of_values=True)
def _(call: Call) -> Cost:
    """Of the experts only those that a token chose are read."""
    x, weight, ids = (call.inputs[name] for name in ("x", "weight", "ids"))
    bias, experts = call.inputs.get("bias"), call.constants["experts"]
    read = len(np.unique(ids.numpy())) * _nbytes(weight, bias) // experts
    return Cost(_nbytes(x, ids) + read + _given_back(call), _size(call) * (2 * weight.shape[1] + (bias is not None)))


@rule("layer_norm")
def _(call: Call) -> Cost:
    return Cost(generic(call).bytes, _size(call) * (6 + (call.inputs.get("bias") is not None)))


@rule("gelu")
@rule("gelu_mul")
def _(call: Call) -> Cost:
    each = {"none": 5, "tanh": 9}[call.constants.get("approximate", "none")] + (call.op.name == "gelu_mul")
    return Cost(generic(call).bytes, each * _size(call))


@rule("argmax")
@rule("top_k")
def _(call: Call) -> Cost:
    return Cost(generic(call).bytes, call.inputs["x"].size)


@rule("rope")
def _(call: Call) -> Cost:
    x, turned = call.inputs["x"], 2 * call.inputs["frequencies"].size
    return Cost(generic(call).bytes, 3 * x.shape[0] * x.shape[1] * turned)


@rule("causal_conv")
def _(call: Call) -> Cost:
    taps, biased = call.inputs["weight"].shape[1], call.inputs.get("bias") is not None
    return Cost(generic(call).bytes, call.inputs["x"].size * (2 * taps - 1 + biased))


@rule("selective_scan")
def _(call: Call) -> Cost:
    """For a value of the state a decay, what arrives and its sum, and the product with c: for each token."""
    x, step, state = (call.inputs[name] for name in ("x", "step", "state"))
    return Cost(generic(call).bytes, x.shape[0] * 5 * state.size + 3 * x.size + 2 * step.size)


@rule("embedding")
def _(call: Call) -> Cost:
    """Of the table only the rows that are looked up."""
    ids, weight = call.inputs["ids"], call.inputs["weight"]
    return Cost(ids.nbytes + ids.size * weight.nbytes // max(weight.shape[0], 1) + _given_back(call), 0)


@rule("cache_write")
def _(call: Call) -> Cost:
    """Of the cache only the rows that are written."""
    x, cache = call.inputs["x"], call.inputs["cache"]
    return Cost(_nbytes(x, call.inputs["positions"]) + x.size * cache.spec.itemsize, 0)


@rule("attention", of_values=True)
def _(call: Call) -> Cost:
    """Keys and values that a query sees, by its position; the scores' softmax is small beside the products."""
    q, k, v = (call.inputs[name] for name in ("q", "k", "v"))
    rows, pairs = _visible(call)
    held = rows * k.shape[1] * (k.shape[2] * k.spec.itemsize + v.shape[2] * v.spec.itemsize)
    moved = _nbytes(q, call.inputs["positions"], call.inputs.get("sinks")) + held + _given_back(call)
    return Cost(moved, 2 * pairs * q.shape[1] * (k.shape[2] + v.shape[2]))


@rule("scores", of_values=True)
def _(call: Call) -> Cost:
    q, k = call.inputs["q"], call.inputs["k"]
    rows, pairs = _visible(call)
    held = rows * k.shape[1] * k.shape[2] * k.spec.itemsize
    moved = _nbytes(q, call.inputs["positions"]) + held + _given_back(call)
    return Cost(moved, 2 * pairs * q.shape[1] * k.shape[2])


@rule("mix", of_values=True)
def _(call: Call) -> Cost:
    """Rows of v that no query gives a weight are not looked at."""
    weights, v = call.inputs["probabilities"], call.inputs["v"]
    seen = weights.numpy() != 0
    held = int(seen.any(axis=(0, 1)).sum()) * v.shape[1] * v.shape[2] * v.spec.itemsize
    return Cost(weights.nbytes + held + _given_back(call), 2 * int(np.count_nonzero(seen)) * v.shape[2])


def _visible(call: Call) -> tuple[int, int]:
    """Rows of the keys that any query sees, and pairs of a query and a key it sees."""
    window, held = call.constants.get("window"), call.inputs["k"].shape[0]
    stop = np.clip(
        call.inputs["positions"].numpy().astype("int64") + 1, 0, held
    )  # a wrong position: the kernel's error
    first = np.zeros_like(stop) if window is None else np.maximum(stop - window, 0)
    begun = np.bincount(first, minlength=held + 1) - np.bincount(stop, minlength=held + 1)
    return int(np.count_nonzero(np.cumsum(begun))), int((stop - first).sum())
