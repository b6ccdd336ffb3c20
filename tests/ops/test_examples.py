"""The examples of every op: it takes them, its kernel agrees with its reference on them, and no op has none."""

from __future__ import annotations

import numpy as np
import pytest

import ops
from ops import Tensor, like, op
from ops.op import registry
from ops.spec import FLOATS

from . import harness

OPS = sorted(name for name, each in registry.items() if each.__module__.startswith("ops."))


def check(tested, args, constants):
    """As the harness does, with the arguments as they are: a packed weight is no array."""
    expected = tested.reference(*[each.copy() if isinstance(each, np.ndarray) else each for each in args], **constants)
    expected = expected if isinstance(expected, tuple) else (expected,)
    harness.poison(*ops.call.as_tuple(tested.spec(*args, **constants)))
    outputs = [*ops.call.as_tuple(tested(*args, **constants))]
    outputs += [args[tested.parameters.index(name)] for name in tested.writes]
    for output, reference in zip(outputs, expected, strict=True):
        error = harness.relative_error(output.numpy().astype("float64"), reference.astype("float64"), output.dtype)
        assert error <= harness.KERNEL.get(output.dtype, 0.0), f"{args} {constants}: {error}"


@pytest.mark.parametrize(
    "dtype", [each if each == "float32" else pytest.param(each, marks=pytest.mark.slow) for each in FLOATS]
)
@pytest.mark.parametrize("name", OPS)
def test_an_ops_kernel_agrees_with_its_reference_on_its_examples(name, dtype):
    examples = ops.examples.of(registry[name], dtype)
    assert len(examples) >= 3, f"{name} has no examples: give it some in ops/examples.py"
    for args, constants in examples:
        check(registry[name], args, constants)


def test_the_same_seed_gives_the_same_values_in_memory_of_their_own():
    (first, _), (again, _), (other, _) = (ops.examples.of(ops.add, "float32", seed)[2] for seed in (3, 3, 4))
    assert np.array_equal(first[0].numpy(), again[0].numpy())
    assert not np.array_equal(first[0].numpy(), other[0].numpy())
    first[0].numpy()[...] = 0
    assert not np.array_equal(first[0].numpy(), again[0].numpy())


def test_an_op_of_the_users_registers_its_own():
    @op(symbolic={"x": "n"})
    def triple(x: Tensor) -> Tensor:
        """3 x."""
        return like(x)

    try:
        assert ops.examples.of(triple) == []

        @triple.examples
        def _(rng, dtype):
            yield (rng.standard_normal((2, 3)).astype(dtype),), {}

        [((x,), constants)] = ops.examples.of(triple, "float16")
        assert isinstance(x, Tensor) and x.dtype == "float16" and x.shape == (2, 3) and constants == {}
    finally:
        del registry["triple"]


def test_a_dtype_that_no_op_computes_in_is_an_error():
    with pytest.raises(ValueError, match="dtype is 'int8', expected one of float32, float16, bfloat16"):
        ops.examples.of(ops.add, "int8")
