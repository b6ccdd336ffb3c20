import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ops
from tests.ops.harness import DTYPE_NAMES, check, random

SHAPES = [(1, 1), (1, 33), (3, 100), (17, 2048), (20, 5), (1, 1, 7), (18, 3, 65)]


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_softmax(rng, dtype, shape):
    x = random(rng, shape, dtype, 4.0)
    check(ops.softmax, x)
    check(ops.log_softmax, x)


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
@pytest.mark.parametrize("n, width", [(1, 1), (1, 33), (3, 100), (17, 2048), (1, 128256)])
def test_argmax_and_top_k(rng, dtype, n, width):
    x = random(rng, (n, width), dtype)  # the narrow dtypes bring many ties
    check(ops.argmax, x)
    for k in {1, min(7, width), min(50, width)}:
        check(ops.top_k, x, k=k, tolerance=0.0)


@settings(deadline=None, max_examples=30)
@given(n=st.integers(0, 40), width=st.sampled_from([1, 8, 50]), seed=st.integers(0), levels=st.integers(1, 5))
def test_ties_at_any_number_of_rows(n, width, seed, levels):
    x = np.random.default_rng(seed).integers(-levels, levels, (n, width)).astype("float32")
    x *= np.random.default_rng(seed + 1).choice([1, -1], x.shape)  # some zeros become -0
    check(ops.argmax, x)
    check(ops.top_k, x, k=width, tolerance=0.0)
    check(ops.softmax, x)


def test_softmax_of_large_and_infinite_values():
    x = np.array([[1e4, 1e4, -1e4], [-np.inf, 0, 0], [-3e38, -3e38, -3e38]], "float32")
    assert np.array_equal(ops.softmax(ops.tensor(x)).numpy()[:2], [[0.5, 0.5, 0], [0, 0.5, 0.5]])
    check(ops.softmax, x)
    check(ops.log_softmax, x)


@pytest.mark.parametrize("row", [[-np.inf, -np.inf], [np.inf, 0], [np.nan, 0], [0, -np.nan]])
def test_softmax_without_an_answer_is_nan_as_in_numpy(row):
    x = np.array([row, [0, 0]], "float32")
    for op in (ops.softmax, ops.log_softmax):
        assert np.array_equal(np.isnan(op(ops.tensor(x)).numpy()), np.isnan(op.reference(x)))
    assert np.isnan(ops.softmax(ops.tensor(x)).numpy()).tolist() == [[True, True], [False, False]]


def test_nan_counts_as_largest():
    x = np.array([[0, np.inf, np.nan, 1, -np.nan], [-np.inf, -np.inf, -np.inf, -np.inf, -np.inf]], "float32")
    assert ops.argmax(ops.tensor(x)).numpy().tolist() == np.argmax(x, axis=-1).tolist() == [2, 0]
    values, indices = ops.top_k(ops.tensor(x), k=3)
    assert indices.numpy().tolist() == [[2, 4, 1], [0, 1, 2]]
    assert np.isnan(values.numpy()[0, :2]).all() and values.numpy()[0, 2] == np.inf


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: ops.softmax(ops.zeros(5)), ops.ShapeError, r"softmax: x is float32\[5\], expected \[n, width\] or"),
        (lambda: ops.softmax(ops.zeros((2, 0))), ops.ShapeError, r"x is float32\[2, 0\].*width > 0"),
        (lambda: ops.argmax(ops.zeros((2, 2, 2))), ops.ShapeError, r"argmax: x is .*expected \[n, width\] with"),
        (lambda: ops.log_softmax(ops.zeros((2, 3), "int32")), ops.DTypeError, r"log_softmax: x is int32\[2, 3\]"),
        (lambda: ops.top_k(ops.zeros((2, 3)), k=4), ops.OpError, r"top_k: k is 4, expected 1 to 3 for x"),
        (lambda: ops.top_k(ops.zeros((2, 3)), k=0), ops.OpError, r"top_k: k is 0, expected 1 to 3 for x"),
    ],
)
def test_wrong_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_one_softmax_serves_every_length_of_a_cache(rng):
    check(ops.softmax, random(rng, (1, 2, 5), "float32"))
    before = len(ops.build.log)
    for width in (1, 2, 16, 33, 100):
        check(ops.softmax, random(rng, (1, 2, width), "float32"))
    assert ops.build.log[before:] == []
