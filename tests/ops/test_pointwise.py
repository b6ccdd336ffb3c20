import inspect
import math
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ops
from ops import build, pointwise
from ops.op import Op, registry
from tests.ops.harness import DTYPE_NAMES, check, random

UNARY = [ops.neg, ops.silu, ops.tanh, ops.gelu]
BINARY = [ops.add, ops.sub, ops.mul, ops.div, ops.silu_mul, ops.gelu_mul]
SHAPES = [(1, 1), (1, 8192), (3, 33), (17,), (2, 3, 5), (19, 4100)]


def away_from_zero(array):
    """A divisor that does not blow one element up to be the scale of all."""
    return np.where(np.abs(array) < 0.5, array.dtype.type(1.5), array)


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_and_two_tensors(rng, dtype, shape):
    x, y = random(rng, shape, dtype, 3.0), away_from_zero(random(rng, shape, dtype))
    for op in UNARY:
        check(op, x)
    for op in BINARY:
        check(op, x, y)


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
@pytest.mark.parametrize("shape", [(1, 64), (3, 33), (20, 3, 7)], ids=str)
def test_rows_scalars_and_constants(rng, dtype, shape):
    x, row = random(rng, shape, dtype, 2.0), random(rng, shape[-1:], dtype)
    check(ops.add_row, x, row)
    check(ops.mul_row, x, row)
    check(ops.scale, x, -0.3)
    check(ops.offset, x, 2)
    check(ops.div_by, x, 3)
    check(ops.div_into, away_from_zero(x), -0.3)
    check(ops.softcap, x, cap=1.5)
    check(ops.softcap, x, cap=50.0)
    check(ops.clamp, x, limit=1.5)
    check(ops.clamp, x, limit=1e4)
    check(ops.gelu, x, approximate="tanh")
    check(ops.gelu_mul, x, x, approximate="tanh")
    check(ops.copy, x, tolerance=0.0)


@settings(deadline=None, max_examples=30)
@given(n=st.integers(0, 40), width=st.sampled_from([1, 33]), dtype=st.sampled_from(DTYPE_NAMES), seed=st.integers(0))
def test_any_number_of_rows(n, width, dtype, seed):
    rng = np.random.default_rng(seed)
    gate, up = random(rng, (n, width), dtype), random(rng, (n, width), dtype)
    check(ops.silu_mul, gate, up)
    check(ops.add_row, gate, random(rng, (width,), dtype))


def test_every_element_wise_op_is_exported():
    defined = {name for name, value in vars(pointwise).items() if isinstance(value, Op)}
    assert defined and all(getattr(ops, name) is registry[name] for name in defined)


@pytest.mark.parametrize(
    "op, reference, low, high, bound",
    [
        (ops.tanh, np.tanh, -20, 20, 5e-7),
        (ops.tanh, np.tanh, -1e-3, 1e-3, 5e-7),
        (ops.silu, ops.silu.reference, -80, 80, 5e-7),
        (ops.gelu, ops.gelu.reference, 0, 20, 5e-7),
        (ops.gelu, ops.gelu.reference, -5, 0, 5e-6),
        (ops.gelu, ops.gelu.reference, -12, -5, 3e-5),
    ],
)
def test_relative_accuracy_of_every_element(op, reference, low, high, bound):
    x = np.linspace(low, high, 1 << 16, dtype="float32").reshape(-1, 256)
    expected = reference(x.astype("float64"))
    error = np.abs(op(ops.tensor(x)).numpy() - expected) / np.maximum(np.abs(expected), 1e-36)
    assert error.max() < bound


def test_an_exponential_that_underflows_is_zero_and_one_that_overflows_is_infinite():
    x = np.array([[-88, -1e4, 89, 1e4, np.nan]], "float32")
    weights = ops.silu(ops.tensor(-x)).numpy() / -x  # 1 / (1 + e**x)
    assert np.array_equal(weights[0, :4], [1, 1, 0, 0])
    assert math.isnan(weights[0, 4])


@pytest.mark.parametrize("op", [*UNARY, *BINARY, ops.softcap, ops.clamp, ops.cast], ids=lambda op: op.name)
@pytest.mark.parametrize("dtype", DTYPE_NAMES)
def test_nan_stays_nan(op, dtype):
    x = ops.tensor(np.ones((3, 33), "float32"), dtype=dtype)
    x.numpy()[1, 3] = np.nan
    constants = {"softcap": {"cap": 30.0}, "clamp": {"limit": 0.5}, "cast": {"dtype": "bfloat16"}}.get(op.name, {})
    result = op(*[x] * len(op.parameters), **constants).numpy().astype("float32")
    assert np.isnan(result[1, 3]) and np.isnan(result).sum() == 1


@pytest.mark.parametrize("given_dtype", DTYPE_NAMES)
@pytest.mark.parametrize("dtype", DTYPE_NAMES)
def test_cast_rounds_as_numpy_does(rng, given_dtype, dtype):
    x = random(rng, (5, 77), given_dtype, 100.0)
    x[0, :6] = [0.0, -0.0, np.inf, -np.inf, 1e-7, 60000]
    check(ops.cast, x, dtype=dtype, tolerance=0.0)


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
def test_cast_keeps_every_kind_of_nan(dtype):
    x = np.array([[0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0xFFC00000]], "uint32").view("float32")
    assert np.isnan(ops.cast(ops.tensor(x), dtype=dtype).numpy().astype("float32")).all()


def test_cast_between_integers_and_floats(rng):
    check(ops.cast, rng.integers(-(2**31), 2**31, (3, 50)).astype("int32"), dtype="float32", tolerance=0.0)
    check(ops.cast, random(rng, (3, 50), "float32", 1000.0), dtype="int32", tolerance=0.0)


@pytest.mark.parametrize("dtype", ["int64", "int32", "int8", "uint8"])
def test_copy_takes_every_dtype(rng, dtype):
    x = ops.tensor(rng.integers(0, 100, (3, 5)).astype(dtype))
    y = ops.copy(x)
    y.numpy()[0, 0] = 101
    assert x.numpy()[0, 0] != 101 and np.array_equal(x.numpy()[1:], y.numpy()[1:])


def test_operators_are_ops(rng):
    a, b, row = random(rng, (4, 6), "float32"), random(rng, (4, 6), "float32"), random(rng, (6,), "float32")
    x, y, r = ops.tensor(a), ops.tensor(b), ops.tensor(row)
    cases = [
        (x + y, a + b), (x - y, a - b), (x * y, a * b), (x / y, a / b), (-x, -a),
        (x + r, a + row), (r + x, a + row), (x * r, a * row), (r * x, a * row),
        (x + 2, a + 2), (2 + x, a + 2), (x - 2.5, a - 2.5), (2.5 - x, 2.5 - a),
        (x * 3, a * 3), (3.0 * x, a * 3), (x / 3, a / 3), (2 / y, 2 / b),
        (np.float32(3) * x, a * 3), (x * np.int64(3), a * 3),
    ]  # fmt: skip
    for result, expected in cases:
        assert isinstance(result, ops.Tensor) and result.dtype == "float32"
        np.testing.assert_allclose(result.numpy(), expected, rtol=1e-6, atol=1e-6)


def test_division_by_numbers_is_numpys(rng):
    a = random(rng, (40, 100), "float32")
    a[0, :3] = 0, np.inf, np.nan
    x, number = ops.tensor(a), rng.uniform(1, 100)
    with np.errstate(divide="ignore", invalid="ignore"):
        cases: list[Any] = [
            (x / 3, a / np.float32(3)),
            (x / number, a / np.float32(number)),
            (x / 0, a / np.float32(0)),
        ]
        cases += [(1 / x, np.float32(1) / a), (number / x, np.float32(number) / a), (np.float32(7) / x, 7 / a)]
    for result, expected in cases:
        np.testing.assert_array_equal(result.numpy(), expected)
    assert np.isposinf((ops.tensor([2.0]) / 0).numpy()).all()


@pytest.mark.parametrize("dtype", ["int32", "int64", "uint8"])
def test_how_to_convert_is_true(dtype):
    x = ops.tensor(np.arange(6).reshape(2, 3), dtype)
    for wrong in (lambda: x + 1, lambda: ops.tensor(x, "float32") + x):
        with pytest.raises(ops.DTypeError, match=f"{dtype}.*expected .*float32.*; convert it with ops") as caught:
            wrong()
        way = str(caught.value).rpartition("convert it with ")[2]
        converted = eval(way, {"ops": ops, "x": x, "y": x})
        assert (converted + 1).numpy().tolist() == [[1, 2, 3], [4, 5, 6]]


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda x: x + ops.zeros((3, 5)), ops.ShapeError, r"add: y is float32\[3, 5\], expected \[4, 6\]"),
        (lambda x: x + ops.zeros(5), ops.ShapeError, r"add_row: y is float32\[5\], expected \[6\], the last axis of x"),
        (lambda x: x - ops.zeros(6), ops.ShapeError, r"sub: y is float32\[6\], expected \[4, 6\]"),
        (lambda x: x * ops.zeros((4, 6), "float16"), ops.DTypeError, r"mul: y is float16, expected float32"),
        (lambda x: x + np.ones(6), ops.OpError, r"not ndarray; pass ops.tensor"),
        (lambda x: np.ones(6) + x, ops.OpError, r"not ndarray; pass ops.tensor"),
        (lambda x: "a" + x, ops.OpError, r"not str"),
        (lambda x: ops.add(x, cast(Any, 2.0)), ops.OpError, r"add: y is float, expected Tensor; pass ops.tensor"),
        (lambda x: ops.silu(ops.zeros((2, 2), "int32")), ops.DTypeError, r"silu: x is int32\[2, 2\], expected one of"),
        (lambda x: ops.silu_mul(x, ops.zeros((4, 7))), ops.ShapeError, r"silu_mul: up is float32\[4, 7\], .* of gate"),
        (lambda x: ops.mul_row(x, ops.zeros(6, "float16")), ops.DTypeError, r"mul_row: y is float16, expected float32"),
        (lambda x: ops.add_row(ops.zeros(6), ops.zeros(6)), ops.ShapeError, r"add_row: x is .*expected rows: \[n, "),
        (lambda x: ops.neg(ops.zeros(())), ops.ShapeError, r"neg: x is float32\[\], expected at least one axis"),
        (lambda x: ops.softcap(x, cap=0.0), ops.OpError, r"softcap: cap is 0.0, expected a number above 0"),
        (lambda x: ops.clamp(x, limit=-1.0), ops.OpError, r"clamp: limit is -1.0, expected a number above 0"),
        (
            lambda x: ops.gelu(x, approximate=cast(Any, "erf")),
            ops.OpError,
            r"approximate is 'erf', expected 'none' or 'tanh'",
        ),
        (lambda x: ops.cast(x, dtype="int8"), ops.DTypeError, r"dtype is 'int8'; float32 casts to bfloat16, .*int32"),
        (lambda x: ops.cast(ops.zeros((1,), "uint8"), dtype="float32"), ops.DTypeError, r"uint8 casts to nothing"),
    ],
)
def test_wrong_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call(ops.zeros((4, 6)))


def test_a_run_time_number_compiles_nothing():
    x = ops.tensor(np.ones((3, 11), "float32"))
    ops.scale(x, 2.0)
    before = len(build.log)
    assert ops.scale(x, 7).numpy()[0, 0] == 7 and ops.scale(x, 0.5).numpy()[0, 0] == 0.5
    assert len(build.log) == before


def test_the_definition_is_readable():
    text = ops.silu_mul.tir(ops.empty((3, 4)), ops.empty((3, 4)))
    assert "T.exp(gate[v0, v1] * T.float32(-1.0))" in text
    reference = ops.tanh._reference
    assert reference is not None and inspect.unwrap(reference) is np.tanh
