"""A whole model with packed weights on other machines: every op call equals its reference."""

import numpy as np
import pytest

import llm
import ops
from ops.tolerance import KERNEL, relative_error

pytestmark = [
    pytest.mark.emulated,
    pytest.mark.usefixtures("emulator"),
]


class Compared(ops.Interceptor):
    """Compares what each call gives and writes with its reference; `seen` are the names of the ops."""

    def __init__(self):
        self.seen: set[str] = set()

    def call(self, call, launch):
        given = [each.numpy().copy() if isinstance(each, ops.Tensor) else each for each in call.args]
        expected = call.op.reference(*given, **call.constants)
        result = launch(call)
        outputs = result if isinstance(result, tuple) else () if result is None else (result,)
        expected = expected if isinstance(expected, tuple) else (expected,)
        for actual, reference in zip((*outputs, *call.written.values()), expected, strict=True):
            error = relative_error(actual.numpy().astype("float64"), np.asarray(reference, "float64"), actual.dtype)
            assert error <= KERNEL.get(actual.dtype, 0.0), f"{call.address}: {error:.3g}"
        self.seen.add(call.op.name)
        return result


@pytest.mark.parametrize("machine, weights", [("avx-vnni", "q8"), ("neon-i8mm", "q4")], indirect=["machine"])
def test_a_prompt_and_a_decode_step(rng, weights):
    model, compared = llm.load(weights=weights), Compared()
    cache = model.new_cache()
    handle = ops.install(compared)  # around what the emulator computes
    try:
        model(rng.integers(0, model.config.vocab_size, 20).tolist(), cache)
        model([5], cache)
    finally:
        handle.remove()
    assert {"linear", "embedding", "rms_norm", "rope", "cache_write", "attention", "silu_mul", "add"} <= compared.seen
