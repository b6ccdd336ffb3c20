import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ops
from tests.ops.harness import DTYPE_NAMES, check, random


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
@pytest.mark.parametrize("n, width", [(1, 1), (1, 64), (3, 33), (17, 100), (40, 2048)])
@pytest.mark.parametrize("plus_one", [False, True])
def test_rms_norm(rng, dtype, n, width, plus_one):
    x, weight = random(rng, (n, width), dtype), random(rng, (width,), dtype)
    check(ops.rms_norm, x, weight, eps=1e-5, plus_one=plus_one)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(0, 40), width=st.sampled_from([1, 29]), dtype=st.sampled_from(DTYPE_NAMES), seed=st.integers(0))
def test_any_number_of_rows(n, width, dtype, seed):
    rng = np.random.default_rng(seed)
    x, weight = random(rng, (n, width), dtype), random(rng, (width,), dtype)
    check(ops.rms_norm, x, weight, eps=1e-5)
    check(ops.layer_norm, x, weight, eps=1e-5)


def test_rms_norm_float32_weight(rng):
    check(ops.rms_norm, random(rng, (5, 48), "bfloat16"), random(rng, (48,), "float32"), eps=1e-6)


def test_rms_norm_refuses_a_weight_of_another_width(rng):
    x, weight = ops.tensor(random(rng, (2, 8), "float32")), ops.tensor(random(rng, (9,), "float32"))
    with pytest.raises(ops.ShapeError, match=r"rms_norm: weight is float32\[9\], expected \[8\]"):
        ops.rms_norm(x, weight, eps=1e-5)


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
@pytest.mark.parametrize("n, width", [(1, 1), (1, 64), (3, 33), (17, 100), (40, 2048)])
def test_layer_norm(rng, dtype, n, width):
    x, weight, bias = random(rng, (n, width), dtype) + 3, random(rng, (width,), dtype), random(rng, (width,), dtype)
    x = x.astype(weight.dtype)
    check(ops.layer_norm, x, weight, bias, eps=1e-5)
    check(ops.layer_norm, x, weight, eps=1e-5)
    check(ops.layer_norm, x, weight.astype("float32"), bias.astype("float32"), eps=1e-5)


@pytest.mark.parametrize(
    "x, weight, bias, error, message",
    [
        ((2, 8), 9, 8, ops.ShapeError, r"layer_norm: weight is float32\[9\], expected \[8\]"),
        ((2, 8), 8, 7, ops.ShapeError, r"layer_norm: bias is float32\[7\], expected \[8\]"),
        ((8,), 8, 8, ops.ShapeError, r"layer_norm: x is float32\[8\], expected \[n, width\]"),
    ],
)
def test_layer_norm_refuses_other_shapes(x, weight, bias, error, message):
    with pytest.raises(error, match=message):
        ops.layer_norm(ops.zeros(x), ops.zeros(weight), ops.zeros(bias), eps=1e-5)


def test_layer_norm_refuses_integers():
    with pytest.raises(ops.DTypeError, match=r"layer_norm: bias is int32\[8\], expected float32"):
        ops.layer_norm(ops.zeros((2, 8)), ops.zeros(8), ops.zeros(8, "int32"), eps=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_harms_no_other(rng, bad):
    for n in (1, 20):
        x, weight = random(rng, (n, 40), "float32"), random(rng, (40,), "float32")
        x[-1, 7] = bad
        with np.errstate(invalid="ignore"):
            for norm in (ops.rms_norm, ops.layer_norm):
                result = check(norm, x, weight, eps=1e-5).numpy()
                assert np.isfinite(result[:-1]).all() and not np.isfinite(result[-1]).all()
