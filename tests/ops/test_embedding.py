import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ops
from tests.ops.harness import DTYPE_NAMES, check, random


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
@pytest.mark.parametrize("ids_dtype", ["int32", "int64"])
@pytest.mark.parametrize("n", [0, 1, 5, 40])
def test_embedding(rng, dtype, ids_dtype, n):
    ids = rng.integers(0, 50, n).astype(ids_dtype)
    check(ops.embedding, ids, random(rng, (50, 33), dtype), tolerance=0.0)


@pytest.mark.parametrize("ids", [[50], [-1], [3, 1 << 40], [*range(30), -(1 << 31)]])
@pytest.mark.parametrize("width", [8, 8192])  # the wide one runs its rows on several threads
def test_embedding_refuses_ids_outside_the_vocabulary(ids, width):
    with pytest.raises(ops.KernelError, match=r"embedding\(int64.*ids hold a value outside \[0, 50\)"):
        ops.embedding(ops.tensor(np.array(ids)), ops.zeros((50, width)))


@settings(deadline=None, max_examples=25)
@given(
    n=st.integers(0, 40), m=st.integers(0, 40), rest=st.sampled_from([(), (3,), (2, 5)]),
    dtype=st.sampled_from([*DTYPE_NAMES, "int32"]), seed=st.integers(0),
)  # fmt: skip
def test_concat(n, m, rest, dtype, seed):
    rng = np.random.default_rng(seed)
    check(ops.concat, random(rng, (n, *rest), dtype, 9.0), random(rng, (m, *rest), dtype, 9.0), tolerance=0.0)


def test_concat_of_symbolic_sizes_is_their_sum():
    x, y = ops.Spec((ops.Dim("n"), 4), "float32"), ops.Spec((ops.Dim("m"), 4), "float32")
    assert str(ops.concat.spec(x, y)) == "float32[(n+m), 4]"


@settings(deadline=None, max_examples=25)
@given(
    n=st.integers(0, 40), rest=st.sampled_from([(), (3,), (2, 5)]), width=st.integers(1, 70), data=st.data(),
    dtype=st.sampled_from([*DTYPE_NAMES, "int32"]), seed=st.integers(0),
)  # fmt: skip
def test_columns(n, rest, width, data, dtype, seed):
    start = data.draw(st.integers(0, width - 1))
    stop = data.draw(st.integers(start + 1, width))
    x = random(np.random.default_rng(seed), (n, *rest, width), dtype, 9.0)
    check(ops.columns, x, tolerance=0.0, start=start, stop=stop)


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (2, 2), (3, 2), (0, 6)])
def test_columns_that_are_not_there(start, stop):
    with pytest.raises(ops.ShapeError, match=rf"start {start} and stop {stop} are no columns of x float32\[2, 5"):
        ops.columns(ops.zeros((2, 5)), start=start, stop=stop)


@settings(deadline=None, max_examples=30)
@given(
    t=st.integers(1, 40), n=st.integers(0, 40), shape=st.sampled_from([(1, 1), (2, 5), (8, 64)]),
    dtypes=st.sampled_from([(a, b) for a in DTYPE_NAMES for b in DTYPE_NAMES]), seed=st.integers(0),
)  # fmt: skip
def test_cache_write(t, n, shape, dtypes, seed):
    rng = np.random.default_rng(seed)
    cache, x = random(rng, (t, *shape), dtypes[0]), random(rng, (n, *shape), dtypes[1])
    check(ops.cache_write, cache, x, rng.integers(0, t, n).astype("int32"), tolerance=0.0)  # with repeated positions


@pytest.mark.parametrize("positions", [[0, 1, 4], [-1, 0, 1], [0, 2**31 - 1, 1]])
def test_cache_write_checks_all_positions_before_it_writes(positions):
    cache = ops.zeros((4, 2, 3))
    with pytest.raises(ops.KernelError, match=r"cache_write\(float32\[4, 2, 3\].*outside the cache"):
        ops.cache_write(cache, ops.tensor(np.ones((3, 2, 3), "float32")), ops.tensor(np.array(positions, "int32")))
    assert not cache.numpy().any()


def ints(*shape):
    return ops.zeros(shape, "int32")


@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lambda: ops.embedding(ops.zeros(3), ops.zeros((5, 2))),
            ops.DTypeError,
            r"ids is float32\[3\], expected int32",
        ),
        (lambda: ops.embedding(ints(3), ints(5, 2)), ops.DTypeError, r"weight is int32\[5, 2\], expected one of"),
        (lambda: ops.embedding(ints(3, 1), ops.zeros((5, 2))), ops.ShapeError, r"ids is int32\[3, 1\], expected \[n\]"),
        (lambda: ops.embedding(ints(3), ops.zeros(5)), ops.ShapeError, r"weight is float32\[5\], expected \[vocab"),
        (lambda: ops.columns(ints(3), start=0, stop=1), ops.ShapeError, r"columns: x is int32\[3\], expected rows"),
        (lambda: ops.concat(ints(3, 2), ints(3, 4)), ops.ShapeError, r"concat: y is int32\[3, 4\], expected \[m, 2\]"),
        (lambda: ops.concat(ints(3), ints(3, 4)), ops.ShapeError, r"concat: y is int32\[3, 4\], expected \[m\]"),
        (lambda: ops.concat(ints(3), ops.zeros(3)), ops.DTypeError, r"concat: y is float32, expected int32"),
        (
            lambda: ops.cache_write(ops.zeros((4, 2, 3)), ops.zeros((1, 2, 4)), ints(1)),
            ops.ShapeError,
            r"x is float32\[1, 2, 4\], expected \[n, 2, 3\] for cache",
        ),
        (
            lambda: ops.cache_write(ops.zeros((4, 2, 3)), ops.zeros((1, 2, 3)), ints(2)),
            ops.ShapeError,
            r"positions is int32\[2\], expected \[1\]",
        ),
        (
            lambda: ops.cache_write(ops.zeros((4, 6)), ops.zeros((1, 2, 3)), ints(1)),
            ops.ShapeError,
            r"cache is float32\[4, 6\], expected \[t, heads, dim\]",
        ),
        (
            lambda: ops.cache_write(ops.zeros((4, 2, 3)), ops.zeros((1, 2, 3)), ops.zeros(1)),
            ops.DTypeError,
            r"positions is float32\[1\], expected int32",
        ),
        (
            lambda: ops.cache_write(ints(4, 2, 3), ops.zeros((1, 2, 3)), ints(1)),
            ops.DTypeError,
            r"cache is int32\[4, 2, 3\], expected one of",
        ),
    ],
)
def test_wrong_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()
