"""How every kernel is tested: outputs poisoned before the launch, compared with the NumPy reference by dtype."""

from __future__ import annotations

from typing import Any

import numpy as np

import ops
from debug.poison import poison
from ops.spec import DTYPES, FLOATS
from ops.tolerance import KERNEL, relative_error

DTYPE_NAMES = tuple(FLOATS)


def random(rng: np.random.Generator, shape: tuple[int, ...], dtype: str, scale: float = 1.0) -> np.ndarray:
    """Normal values, rounded to `dtype`."""
    return (rng.standard_normal(shape) * scale).astype(DTYPES[dtype])


def held(rng: np.random.Generator, shape: tuple[int, int], kind: str) -> ops.Tensor:
    """A weight in a float dtype, or packed; codes of what is only taken over are drawn by chance."""
    return ops.examples._weight(rng, shape, kind)


def check(op: Any, *args: Any, tolerance: float | None = None, **constants: Any) -> Any:
    """Run `op` on tensors over `args` (arrays; other values pass as they are) and compare with its reference.

    Written arguments are compared too. Gives the op's output.
    """
    tensors = [ops.tensor(each) if isinstance(each, np.ndarray) else each for each in args]
    expected = op.reference(*[each.copy() if isinstance(each, np.ndarray) else each for each in args], **constants)
    specs = op.spec(*tensors, **constants)
    poison(*(specs if isinstance(specs, tuple) else (specs,)))
    output = op(*tensors, **constants)
    written = [tensors[op.parameters.index(name)] for name in op.writes]
    actual = [*(output if isinstance(output, tuple) else () if output is None else (output,)), *written]
    expected = expected if isinstance(expected, tuple) else (expected,)
    assert len(actual) == len(expected), f"{len(actual)} outputs, {len(expected)} in the reference"
    for each, reference in zip(actual, expected, strict=True):
        bound = KERNEL.get(each.dtype, 0.0) if tolerance is None else tolerance
        error = relative_error(each.numpy().astype("float64"), np.asarray(reference, "float64"), each.dtype)
        assert error <= bound, (
            f"{op.name}: error {error:.3g} > {bound:.3g} for {[getattr(t, 'spec', t) for t in tensors]}"
        )
    return output
