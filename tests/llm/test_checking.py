"""A tool that checks every call against its reference, over the embedded model: the seam gives it all that it needs."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest

import llm
import ops
from ops.difference import difference
from ops.tolerance import KERNEL

PROMPT = "Mia gave the red ball to Tom."


class Checks(ops.Interceptor):
    """Runs each call's reference on copies of its inputs, and compares what the kernel gave and wrote."""

    def __init__(self) -> None:
        self.errors: dict[str, float] = {}
        self.ops: set[str] = set()

    def call(self, call: ops.Call, launch: Any) -> Any:
        given = [each.numpy().copy() if isinstance(each, ops.Tensor) else each for each in call.args]
        with np.errstate(invalid="ignore"):  # beyond its length a cache may hold anything
            wanted = call.op.reference(*given, **call.constants)
        output = launch(call)
        made = [*(output if isinstance(output, tuple) else () if output is None else (output,)), *call.written.values()]
        wanted = wanted if isinstance(wanted, tuple) else (wanted,)
        for result, reference in zip(made, wanted, strict=True):
            with np.errstate(invalid="ignore"):
                error = difference(result.numpy(), reference, result.dtype).error
            if not error <= KERNEL.get(result.dtype, 0.0):
                self.errors[call.full_address] = error
        self.ops.add(call.op.name)
        return output


@pytest.mark.parametrize("steps", [False, True], ids=["one kernel", "steps"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_call_agrees_with_its_reference(dtype, steps):
    model, checks = llm.load("tiny", dtype=dtype), Checks()
    ids, cache = model.tokenizer.encode(PROMPT), model.new_cache()
    model(ids, cache)
    with ops.attention.steps() if steps else contextlib.nullcontext(), ops.intercepted(checks):
        for part in (ids, ids[:3], [5]):  # each of the kernels for many, for some and for one
            model(part, cache)
    assert checks.errors == {}
    attention = {"scores", "softmax", "mix"} if steps else {"attention"}
    assert (
        checks.ops - {"cast"}
        == {"embedding", "rms_norm", "linear", "rope", "cache_write", "add", "silu_mul"} | attention
    )


@pytest.mark.parametrize(
    ("op", "wrong"),
    [
        (ops.rms_norm, lambda x, weight, **_: x),
        (
            ops.cache_write,
            lambda cache, x, positions: np.zeros_like(cache),
        ),  # has no output: it is wrong in what it writes
    ],
)
def test_a_wrong_kernel_is_found_where_it_is(op, wrong):
    model, checks = llm.load("tiny", dtype="float32"), Checks()
    with op.use(wrong, where="layers.2"), ops.intercepted(checks):
        model(model.tokenizer.encode(PROMPT))
    assert checks.errors and {address.rpartition("@")[0] for address in checks.errors} <= {
        "layers.2.input_layernorm/rms_norm[0]", "layers.2.post_attention_layernorm/rms_norm[0]",
        "layers.2.self_attn/cache_write[0]", "layers.2.self_attn/cache_write[1]",
    }  # fmt: skip
    assert min(checks.errors.values()) > 0.1 and not np.isnan([*checks.errors.values()]).any()
