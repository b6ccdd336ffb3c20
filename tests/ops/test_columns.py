import pytest

import ops
from tests.ops.harness import DTYPE_NAMES, check, random


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
@pytest.mark.parametrize("shape", [(1, 7), (5, 33), (40, 3, 12), (2, 100)])
def test_columns(rng, dtype, shape):
    x = random(rng, shape, dtype)
    for start, stop, step in ((0, shape[-1], 1), (3, 7, 1), (1, shape[-1], 2), (shape[-1] - 1, shape[-1], 5)):
        check(ops.columns, x, tolerance=0.0, start=start, stop=stop, step=step)


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
@pytest.mark.parametrize("n, heads, a, b", [(1, 1, 1, 1), (3, 5, 7, 4), (33, 2, 16, 8)])
def test_join(rng, dtype, n, heads, a, b):
    x = random(rng, (n, heads, a), dtype)
    for others in {1, heads}:
        check(ops.join, x, random(rng, (n, others, b), dtype), tolerance=0.0)


def test_what_they_refuse():
    x = ops.zeros((2, 3, 8))
    for start, stop, step in ((-1, 3, 1), (4, 4, 1), (0, 9, 1), (0, 8, 0)):
        with pytest.raises(ops.OpError, match="are no part of the last axis of x"):
            ops.columns(x, start=start, stop=stop, step=step)
    with pytest.raises(ops.ShapeError, match=r"columns: x is q8\[32, 32\], expected \[n, ..., width\], not packed"):
        ops.columns(ops.zeros((32, 32), "q8"), start=0, stop=4)
    with pytest.raises(ops.ShapeError, match=r"join: y is float32\[2, 2, 4\], expected \[2, 3 or 1, b\]"):
        ops.join(x, ops.zeros((2, 2, 4)))
    with pytest.raises(ops.DTypeError, match=r"join: y is float16.* expected float32, the dtype of x"):
        ops.join(x, ops.zeros((2, 3, 4), "float16"))
