import pytest

import ops
from tests.ops.harness import DTYPE_NAMES, check, random


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
@pytest.mark.parametrize("n, heads, a, b", [(1, 1, 1, 1), (3, 5, 7, 4), (33, 2, 16, 8)])
def test_join(rng, dtype, n, heads, a, b):
    x = random(rng, (n, heads, a), dtype)
    for others in {1, heads}:
        check(ops.join, x, random(rng, (n, others, b), dtype), tolerance=0.0)


def test_what_join_refuses():
    x = ops.zeros((2, 3, 8))
    with pytest.raises(ops.ShapeError, match=r"join: y is float32\[2, 2, 4\], expected \[2, 3 or 1, b\]"):
        ops.join(x, ops.zeros((2, 2, 4)))
    with pytest.raises(ops.DTypeError, match=r"join: y is float16.* expected float32, the dtype of x"):
        ops.join(x, ops.zeros((2, 3, 4), "float16"))
