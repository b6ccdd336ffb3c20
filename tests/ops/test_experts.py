"""Mixtures of experts: the choice, the products with the chosen matrices, the sum."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ops
from ops import target
from ops.quantize import KNOWN
from tests.ops.harness import DTYPE_NAMES, check, held, random

TOKENS = (1, 2, 3, 16, 17, 70)
FORMS = [each if each in ("q4", "q4k") else pytest.param(each, marks=pytest.mark.slow) for each in KNOWN]


def operands(rng, n, k, experts, inputs, outputs, x_dtype="float32", weight_dtype="float32", each=False):
    """x, weight and ids; x has a row for each expert of a token where `each` is set. A packed weight is a tensor."""
    x = random(rng, (n, k, inputs) if each else (n, inputs), x_dtype)
    shape = experts * outputs, inputs
    weight: Any = held(rng, shape, weight_dtype) if weight_dtype in KNOWN else random(rng, shape, weight_dtype)
    ids = np.argsort(rng.random((n, experts)), axis=1)[:, :k].astype("int32")
    return x, weight, ids


@pytest.mark.parametrize("x_dtype", DTYPE_NAMES)
@pytest.mark.parametrize("weight_dtype", DTYPE_NAMES)
def test_every_pair_of_dtypes(rng, x_dtype, weight_dtype):
    each = x_dtype == weight_dtype
    for n in TOKENS:
        x, weight, ids = operands(rng, n, 3, 5, 45, 19, x_dtype, weight_dtype, each)
        check(ops.experts_linear, x, weight, ids, random(rng, (5 * 19,), weight_dtype), experts=5)


@pytest.mark.parametrize(
    "inputs, outputs, k, experts", [(1, 1, 1, 1), (7, 130, 8, 64), (33, 7, 2, 3), (257, 33, 1, 4), (1024, 66, 8, 8)]
)
def test_odd_sizes(rng, inputs, outputs, k, experts):
    for n in TOKENS:
        check(ops.experts_linear, *operands(rng, n, k, experts, inputs, outputs), experts=experts)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 90), st.integers(0, 2**32 - 1))
def test_any_number_of_tokens(n, seed):
    check(ops.experts_linear, *operands(np.random.default_rng(seed), n, 3, 7, 45, 19), experts=7)


@pytest.mark.parametrize(
    "kind, each",
    [("float32", False), ("bfloat16", True), ("q4", False), ("q8", True), ("q4k", False), ("q4k", True), ("q6k", True)],
)
def test_a_token_does_not_depend_on_the_others(rng, kind, each):
    x, weight, ids = operands(rng, 70, 3, 5, 130, 48, weight_dtype=kind, each=each)
    weight = ops.tensor(weight) if isinstance(weight, np.ndarray) else weight
    whole = check(ops.experts_linear, x, weight, ids, experts=5).numpy()
    for rows in (slice(0, 1), slice(69, 70), slice(3, 19), slice(0, 17)):
        part = check(ops.experts_linear, x[rows].copy(), weight, ids[rows].copy(), experts=5).numpy()
        assert np.array_equal(part, whole[rows])


@pytest.mark.parametrize("kind", ["float32", *FORMS])
def test_all_tokens_of_one_expert(rng, kind):
    x, weight, ids = operands(rng, 300, 1, 4, 70, 64, weight_dtype=kind)
    ids[:] = 2
    check(ops.experts_linear, x, weight, ids, experts=4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "x_dtype, inputs, each", [("float32", 96, False), ("bfloat16", 77, True), ("float16", 512, True)]
)
def test_packed(rng, form, x_dtype, inputs, each):
    for n in TOKENS:
        x, weight, ids = operands(rng, n, 2, 5, inputs, 2 * target.lanes(), x_dtype, form, each)
        check(ops.experts_linear, x, weight, ids, random(rng, (weight.shape[0],), x_dtype), experts=5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("inputs, k, experts", [(1, 1, 1), (257, 1, 3), (300, 8, 64)])
def test_packed_of_odd_sizes(rng, form, inputs, k, experts):
    """Groups, and those that share a factor, filled in part; a token with one expert; most chosen by nobody."""
    for n in (1, 17):
        check(
            ops.experts_linear, *operands(rng, n, k, experts, inputs, target.lanes(), "float32", form), experts=experts
        )


@pytest.mark.parametrize("kind", ["float32", *FORMS])
def test_on_all_threads(rng, kind):
    for n in (1, 5, 40):
        x, weight, ids = operands(rng, n, 2, 4, 256, 1040, weight_dtype=kind)
        check(ops.experts_linear, x, weight, ids, experts=4)


@pytest.mark.parametrize(
    "kind, each",
    [("float32", False), ("bfloat16", True), ("q8", False), ("q4", True), ("q4k", False), ("q4k", True), ("q6k", True)],
)
def test_the_block_definition(rng, kind, each):
    for n in (1, 5, 20):
        x, weight, ids = operands(rng, n, 2, 3, 45, target.lanes(), weight_dtype=kind, each=each)
        bias = random(rng, (weight.shape[0],), "float32" if kind in KNOWN else kind)
        arrays = [ops.tensor(a) if isinstance(a, np.ndarray) else a for a in (x, weight, ids, bias)]
        with ops.experts_linear.use(ops.experts_linear._request(tuple(arrays), {"experts": 3}).blocks()) as use:
            check(ops.experts_linear, *arrays, experts=3)
        assert use.hits == 1


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("n", [1, 20])
def test_packed_experts_that_nobody_chose_are_not_read(rng, form, n):
    x, weight, ids = operands(rng, n, 2, 6, 64, 2 * target.lanes(), weight_dtype=form)
    ids[ids == 4] = 5
    tensors = ops.tensor(x), weight, ops.tensor(ids)
    clean = ops.experts_linear(*tensors, experts=6).numpy().copy()
    size = weight.nbytes // 6
    np.from_dlpack(weight.buffer.data)[4 * size : 5 * size] = 0xFF  # scales and factors are NaN
    assert np.isnan(weight.numpy()[-4 * target.lanes() : -2 * target.lanes()]).all()
    assert np.array_equal(ops.experts_linear(*tensors, experts=6).numpy(), clean)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_token_that_is_not_finite_is_nan_and_harms_no_other(rng, form, bad):
    x, weight, ids = operands(rng, 20, 2, 3, 64, target.lanes(), weight_dtype=form)
    clean = check(ops.experts_linear, x.copy(), weight, ids, experts=3).numpy().copy()
    x[3, 40] = bad
    result = check(ops.experts_linear, x, weight, ids, experts=3).numpy()
    assert np.isnan(result[3]).all() and np.array_equal(np.delete(result, 3, 0), np.delete(clean, 3, 0))


def test_only_the_chosen_experts_are_read(rng):
    x, weight, ids = operands(rng, 9, 2, 6, 64, 16)
    ids[ids == 4] = 5
    clean = ops.experts_linear(*map(ops.tensor, (x, weight, ids)), experts=6).numpy().copy()
    weight[4 * 16 : 5 * 16] = np.nan
    assert np.array_equal(ops.experts_linear(*map(ops.tensor, (x, weight, ids)), experts=6).numpy(), clean)


@pytest.mark.parametrize("n", [1, 20])
@pytest.mark.parametrize("wrong", [-1, 6])
def test_an_expert_that_is_none(rng, n, wrong):
    x, weight, ids = operands(rng, n, 2, 6, 64, 16)
    ids[-1, 1] = wrong
    with pytest.raises(ops.KernelError, match=r"ids hold a value outside \[0, 6\)"):
        ops.experts_linear(*map(ops.tensor, (x, weight, ids)), experts=6)


@pytest.mark.parametrize(
    "x, weight, ids, experts, error",
    [
        ((2, 8), (15, 8), (2, 2), 2, r"weight is float32\[15, 8\], expected \[experts \* outputs, inputs\]"),
        ((2, 8), (16, 7), (2, 2), 2, r"weight is float32\[16, 7\], expected \[experts \* outputs, 8\]"),
        ((2, 8), (16, 8), (3, 2), 2, r"ids is int32\[3, 2\], expected int32 \[n, k\]"),
        ((2, 3, 8), (16, 8), (2, 2), 2, r"ids is int32\[2, 2\], expected int32 \[n, k\]"),
    ],
)
def test_shapes_it_refuses(x, weight, ids, experts, error):
    with pytest.raises(ops.ShapeError, match=error):
        ops.experts_linear(ops.zeros(x), ops.zeros(weight), ops.zeros(ids, "int32"), experts=experts)


@pytest.mark.parametrize("form", FORMS)
def test_packed_experts_that_share_a_record_are_refused(form):
    rows = target.lanes() + 1
    with pytest.raises(ops.OpError, match=rf"weight is {form}\[.*leave the experts unpacked"):
        ops.experts_linear(ops.zeros((1, 32)), ops.zeros((2 * rows, 32), form), ops.zeros((1, 1), "int32"), experts=2)


def test_dtypes_it_refuses():
    x, ids, weight = ops.zeros((1, 32)), ops.zeros((1, 1), "int32"), ops.zeros((32, 32), "q4k")
    with pytest.raises(ops.DTypeError, match=r"weight is int8\[32, 32\], expected one of .*q4, q8, q4k, q6k, mxfp4"):
        ops.experts_linear(x, ops.zeros((32, 32), "int8"), ids, experts=2)
    with pytest.raises(ops.DTypeError, match=r"x is q4k\[32, 32\], expected one of float32"):
        ops.experts_linear(weight, weight, ids, experts=2)


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
@pytest.mark.parametrize(
    "experts, k, scoring, normalise",
    [(1, 1, "softmax", False), (5, 2, "sigmoid", True), (64, 6, "softmax", True), (33, 33, "sigmoid", False)],
)
def test_route(rng, dtype, experts, k, scoring, normalise):
    for n in (1, 3, 40):
        logits = random(rng, (n, experts), dtype, 2.0)
        check(ops.route, logits, k=k, scoring=scoring, normalise=normalise, scale=1.5)


@pytest.mark.parametrize("scoring, best", [("softmax", 1), ("sigmoid", 1), ("sigmoid", 2), ("softmax", 2)])
@pytest.mark.parametrize("groups, kept", [(4, 1), (4, 3), (8, 8)])
@pytest.mark.parametrize("biased", [False, True])
def test_route_by_groups(rng, scoring, best, groups, kept, biased):
    logits, bias = random(rng, (30, 32), "float32"), (random(rng, (32,), "float32"),) * biased
    weights, ids = check(ops.route, logits, *bias, k=4, scoring=scoring, groups=groups, kept=kept, best=best)
    assert all(len(set(row)) == 4 and len(set(row // (32 // groups))) <= kept for row in ids.numpy())
    assert (weights.numpy() > 0).all()


def test_of_equal_experts_the_first(rng):
    logits = np.array([[1, 2, 2, 0, 2, 1]], "float32")
    assert ops.route(ops.tensor(logits), k=4)[1].numpy().tolist() == [[1, 2, 4, 0]]
    assert ops.route(ops.tensor(np.zeros((1, 8), "float32")), k=3, groups=4, kept=2)[1].numpy().tolist() == [[0, 1, 2]]


def test_nan_stays_and_hurts_no_other_token(rng):
    logits = random(rng, (3, 8), "float32")
    logits[1, 5] = np.nan
    for scoring in ("softmax", "sigmoid"):
        weights, ids = ops.route(ops.tensor(logits), k=8, scoring=scoring, normalise=True)
        assert np.isnan(weights.numpy()[1]).any() and np.isfinite(weights.numpy()[[0, 2]]).all()
        assert ((ids.numpy() >= 0) & (ids.numpy() < 8)).all()


def test_routes_that_are_refused():
    logits = ops.zeros((2, 8))
    wrong: dict[str, Any]
    for wrong in ({"k": 0}, {"k": 9}, {"k": 3, "groups": 4}, {"k": 1, "groups": 3}, {"k": 1, "groups": 8, "best": 2}):
        with pytest.raises(ops.OpError):
            ops.route(logits, **wrong)
    with pytest.raises(ops.ShapeError, match=r"expected \[n, experts\] and \[experts\]"):
        ops.route(logits, ops.zeros(7), k=1)


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
@pytest.mark.parametrize("n, k, width", [(1, 1, 1), (3, 8, 33), (40, 2, 512)])
def test_combine(rng, dtype, n, k, width):
    check(ops.combine, random(rng, (n, k, width), dtype), random(rng, (n, k), "float32"))


def test_combine_refuses_other_shapes():
    with pytest.raises(ops.ShapeError, match=r"weights float32\[2, 3\], expected \[n, k, width\] and \[n, k\]"):
        ops.combine(ops.zeros((2, 4, 8)), ops.zeros((2, 3)))
