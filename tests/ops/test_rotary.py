import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ops
from ops.schedule import cpu
from tests.ops.harness import DTYPE_NAMES, check, random


def inputs(rng, n, heads, dim, half, dtype="float32"):
    positions = rng.integers(0, 131073, n).astype("int32")
    frequencies = (10000.0 ** -(np.arange(half) / half)).astype("float32")  # the first is 1
    return random(rng, (n, heads, dim), dtype), positions, frequencies


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
@pytest.mark.parametrize("n, heads, dim, half", [(1, 1, 2, 1), (1, 8, 64, 32), (5, 3, 20, 5), (40, 2, 33, 16)])
@pytest.mark.parametrize("interleaved", [False, True])
def test_rope(rng, dtype, n, heads, dim, half, interleaved):
    check(ops.rope, *inputs(rng, n, heads, dim, half, dtype), interleaved=interleaved, scale=1.25)


@given(n=st.integers(0, 70), layout=st.sampled_from([(1, 6, 3), (3, 10, 4)]), interleaved=st.booleans(), data=st.data())
@settings(max_examples=25, deadline=None)
def test_rope_of_any_length(n, layout, interleaved, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    check(ops.rope, *inputs(rng, n, *layout), interleaved=interleaved)


@pytest.mark.parametrize("interleaved", [False, True])
def test_block_definition(rng, interleaved):
    """What fusion reads agrees with the fast kernel."""
    x, positions, frequencies = map(ops.tensor, inputs(rng, 19, 3, 20, 7))
    request = ops.rope._request((x, positions, frequencies), {"interleaved": interleaved, "scale": 0.5})
    expected = ops.rope.reference(x, positions, frequencies, interleaved=interleaved, scale=0.5)
    with ops.rope.use(cpu.schedule(request.blocks(), request._rows())) as use:
        actual = ops.rope(x, positions, frequencies, interleaved=interleaved, scale=0.5)
    assert use.hits == 1
    np.testing.assert_allclose(actual.numpy(), expected, atol=1e-5)


def test_large_angles_are_exact(rng):
    """A frequency of 1 at positions up to 131072: the angle itself is exact, so cos and sin must be."""
    positions = np.array([0, 1, 8191, 65537, 131071, 131072], "int32")
    x = np.tile(np.array([1, 0], "float32"), (len(positions), 1, 1))
    y = ops.rope(ops.tensor(x), ops.tensor(positions), ops.tensor(np.ones(1, "float32"))).numpy()[:, 0]
    angle = positions.astype("float64")
    np.testing.assert_allclose(y, np.stack([np.cos(angle), np.sin(angle)], -1), atol=1e-7)


def test_the_rest_passes_through_to_the_bit(rng):
    x, positions, frequencies = inputs(rng, 4, 2, 12, 3)
    y = ops.rope(ops.tensor(x), ops.tensor(positions), ops.tensor(frequencies)).numpy()
    assert np.array_equal(y[..., 6:], x[..., 6:])
    assert not np.array_equal(y[..., :6], x[..., :6])


def test_interleaved_is_half_split_with_the_pairs_reordered(rng):
    x, positions, frequencies = inputs(rng, 6, 2, 16, 8)
    order = np.arange(16).reshape(8, 2).T.reshape(-1)  # evens, then odds
    p, f = ops.tensor(positions), ops.tensor(frequencies)
    split = ops.rope(ops.tensor(np.ascontiguousarray(x[..., order])), p, f).numpy()
    pairs = ops.rope(ops.tensor(x), p, f, interleaved=True).numpy()
    np.testing.assert_allclose(split, pairs[..., order], atol=1e-6)


def test_scores_depend_on_the_distance_only(rng):
    q, _, f = inputs(rng, 1, 1, 32, 16)
    k = random(rng, (1, 1, 32), "float32")

    def score(at, behind):
        turned = [
            ops.rope(ops.tensor(x), ops.tensor(np.array([p], "int32")), ops.tensor(f))
            for x, p in ((q, at), (k, behind))
        ]
        return float((turned[0].numpy() * turned[1].numpy()).sum())

    assert score(7, 3) == pytest.approx(score(1007, 1003), abs=2e-3)


def test_rope_refuses_what_does_not_fit(rng):
    x, positions, frequencies = map(ops.tensor, inputs(rng, 3, 2, 8, 4))
    with pytest.raises(ops.ShapeError, match=r"rope: positions is int32\[2\], expected \[3\]"):
        ops.rope(x, positions[:2], frequencies)
    with pytest.raises(ops.ShapeError, match=r"frequencies is float32\[5\], expected \[1\] to \[4\]"):
        ops.rope(x, positions, ops.empty(5))
    with pytest.raises(ops.DTypeError, match="positions int64"):
        ops.rope(x, ops.empty(3, "int64"), frequencies)
    with pytest.raises(ops.ShapeError, match=r"x is float32\[3, 16\], expected \[n, heads, dim\]"):
        ops.rope(x.reshape(3, 16), positions, frequencies)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_head_that_is_not_finite_harms_no_other(rng, bad):
    for n in (1, 20):
        x, positions, frequencies = inputs(rng, n, 3, 20, 5)
        x[-1, 1, 2] = bad
        with np.errstate(invalid="ignore"):
            result = check(ops.rope, x, positions, frequencies).numpy()
        assert np.isfinite(result[:, [0, 2]]).all() and not np.isfinite(result[-1, 1]).all()
