import pytest

import ops
from tests.ops.harness import DTYPE_NAMES, check, random


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
@pytest.mark.parametrize("n, width", [(1, 1), (1, 64), (3, 33), (17, 100), (40, 2048)])
@pytest.mark.parametrize("plus_one", [False, True])
def test_rms_norm(rng, dtype, n, width, plus_one):
    x, weight = random(rng, (n, width), dtype), random(rng, (width,), dtype)
    check(ops.rms_norm, x, weight, eps=1e-5, plus_one=plus_one)


def test_rms_norm_float32_weight(rng):
    check(ops.rms_norm, random(rng, (5, 48), "bfloat16"), random(rng, (48,), "float32"), eps=1e-6)


def test_rms_norm_refuses_a_weight_of_another_width(rng):
    x, weight = ops.tensor(random(rng, (2, 8), "float32")), ops.tensor(random(rng, (9,), "float32"))
    with pytest.raises(ops.ShapeError, match=r"rms_norm: weight is float32\[9\], expected \[8\]"):
        ops.rms_norm(x, weight, eps=1e-5)
