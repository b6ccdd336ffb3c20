import numpy as np
import pytest

import ops
from tests.ops.harness import DTYPE_NAMES, check, random


def scanned(rng, n, heads, dim, groups, size, dtype="float32"):
    """Arguments of a scan that goes on from some state."""
    x, b, c = (random(rng, shape, dtype) for shape in ((n, heads, dim), (n, groups, size), (n, groups, size)))
    decay, skip, state = (random(rng, shape, "float32") for shape in ((heads,), (heads,), (heads, dim, size)))
    return x, rng.random((n, heads), "float32"), decay, b, c, skip, state


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
@pytest.mark.parametrize("shape", [(1,), (3, 33), (17, 2, 20)])
def test_softplus(rng, dtype, shape):
    x = random(rng, shape, dtype, 3.0)
    check(ops.softplus, x)
    check(ops.softplus, x, low=0.5)
    y = check(ops.softplus, x, low=0.25, high=2.0).numpy()
    assert y.min() >= 0.25 and y.max() <= 2.0


def test_softplus_of_small_and_of_large_numbers():
    """A step of 1e-3 is as exact as one of 1: 1 + e**x would round it away."""
    x = np.linspace(-80, 80, 1601).astype("float32")
    y, wanted = ops.softplus(ops.tensor(x)).numpy(), ops.softplus.reference(x)
    assert np.abs(y / wanted - 1).max() < 1e-6
    special = ops.softplus(ops.tensor(np.array([-np.inf, np.inf, np.nan, -200, 3e38], "float32")), low=0.0).numpy()
    assert np.array_equal(special, np.array([0, np.inf, np.nan, 0, 3e38], "float32"), equal_nan=True)
    assert np.isnan(ops.softplus(ops.tensor(np.array([np.nan], "float32")), low=0.1, high=2.0).numpy()).all()


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
@pytest.mark.parametrize("n, width, taps", [(1, 1, 2), (1, 33, 4), (2, 33, 4), (17, 100, 3), (40, 7, 6), (5, 20000, 4)])
def test_causal_conv(rng, dtype, n, width, taps):
    x, before = random(rng, (n, width), dtype), random(rng, (taps - 1, width), dtype)
    for held in dict.fromkeys((dtype, "float32")):
        weight, bias = random(rng, (width, taps), held), random(rng, (width,), held)
        check(ops.causal_conv, x, before, weight)
        check(ops.causal_conv, x, before, weight, bias)


def test_causal_conv_is_a_convolution(rng):
    x, before, weight = rng.standard_normal((9, 5)), rng.standard_normal((3, 5)), rng.standard_normal((5, 4))
    rows = np.concatenate([before, x])
    wanted = np.stack([np.convolve(rows[:, c], weight[c, ::-1], "valid") for c in range(5)], 1)
    assert np.allclose(ops.causal_conv.reference(x, before, weight), wanted, rtol=1e-12)


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
@pytest.mark.parametrize(
    "n, heads, dim, groups, size",
    [(1, 1, 1, 1, 1), (1, 4, 20, 2, 32), (2, 6, 5, 3, 7), (17, 3, 33, 1, 16), (40, 2, 6, 2, 48), (3, 24, 64, 1, 128)],
)
def test_selective_scan(rng, dtype, n, heads, dim, groups, size):
    *arguments, state = scanned(rng, n, heads, dim, groups, size, dtype)
    check(ops.selective_scan, *arguments, state)
    check(ops.selective_scan, *arguments, np.zeros_like(state))


@pytest.mark.parametrize("size", [7, 16])
def test_selective_scan_is_the_sum_that_defines_it(rng, size):
    """y[i] = sum of x[j] for j up to i, by the product of c[i] and b[j] and all that has faded between."""
    x, step, decay, b, c, skip, _ = scanned(rng, 9, 4, 6, 2, size)
    wanted, gone = x * skip[:, None], np.cumsum(step * np.exp(decay), 0)
    for i in range(9):
        for j in range(i + 1):
            weight = np.repeat((c[i] * b[j]).sum(-1), 2) * np.exp(gone[j] - gone[i]) * step[j]
            wanted[i] += weight[:, None] * x[j]
    state = np.zeros((4, 6, size), "float32")
    assert np.allclose(ops.selective_scan.reference(x, step, decay, b, c, skip, state)[0], wanted, atol=1e-5)
    y, _ = ops.selective_scan(*map(ops.tensor, (x, step, decay, b, c, skip, state)))
    assert np.abs(y.numpy() - wanted).max() < 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("dim, size", [(16, 64), (5, 7)])
def test_a_text_in_pieces_gives_what_it_gives_whole(rng, dim, size):
    x, step, decay, b, c, skip, state = map(ops.tensor, scanned(rng, 40, 4, dim, 2, size))
    whole, end = ops.selective_scan(x, step, decay, b, c, skip, state)
    pieces = []
    for rows in (slice(0, 17), slice(17, 18), slice(18, 19), slice(19, 40)):
        piece, state = ops.selective_scan(x[rows], step[rows], decay, b[rows], c[rows], skip, state)
        pieces.append(piece.numpy())
    assert np.array_equal(np.concatenate(pieces), whole.numpy()) and np.array_equal(state.numpy(), end.numpy())


def test_huge_steps_forget_and_none_remember_everything(rng):
    x, _, decay, b, c, skip, state = scanned(rng, 3, 2, 4, 1, 16)
    nothing = ops.selective_scan(*map(ops.tensor, (x, np.zeros((3, 2), "float32"), decay, b, c, skip, state)))
    assert np.array_equal(nothing[1].numpy(), state)
    check(ops.selective_scan, x, np.full((3, 2), 1e4, "float32"), decay, b, c, skip, state)


def test_what_they_refuse():
    x, before, weight = ops.zeros((2, 8)), ops.zeros((3, 8)), ops.zeros((8, 4))
    with pytest.raises(ops.OpError, match=r"low is 2.0 and high 1.0, expected 0 <= low <= high"):
        ops.softplus(x, low=2.0, high=1.0)
    with pytest.raises(ops.DTypeError, match=r"x is int32\[2\], expected one of float32"):
        ops.softplus(ops.zeros(2, "int32"))
    with pytest.raises(ops.ShapeError, match=r"before is float32\[2, 8\], expected \[3, 8\]"):
        ops.causal_conv(x, x, weight)
    with pytest.raises(ops.ShapeError, match=r"weight float32\[8, 1\], expected .* k at least 2"):
        ops.causal_conv(x, before, ops.zeros((8, 1)))
    with pytest.raises(ops.ShapeError, match=r"bias is float32\[4\], expected \[8\]"):
        ops.causal_conv(x, before, weight, ops.zeros(4))
    with pytest.raises(ops.DTypeError, match=r"before float16\[3, 8\], expected floats, before as float32"):
        ops.causal_conv(x, ops.zeros((3, 8), "float16"), weight)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": ((2, 12), "float32")}, r"expected \[n, heads, dim\]"),
        ({"b": ((2, 3, 16), "float32"), "c": ((2, 3, 16), "float32")}, "x has 4 heads and b is .* that divides them"),
        ({"c": ((2, 2, 8), "float32")}, r"c float32\[2, 2, 8\], expected .* \[n, groups, size\] twice"),
        ({"b": ((2, 2, 16), "float16")}, "expected floats of one dtype"),
        ({"step": ((2, 2), "float32")}, r"step is float32\[2, 2\], expected float32 \[2, 4\]"),
        ({"decay": ((4,), "float16")}, r"decay is float16\[4\], expected float32 \[4\]"),
        ({"state": ((4, 16, 3), "float32")}, r"state is float32\[4, 16, 3\], expected float32 \[4, 3, 16\]"),
    ],
)
def test_what_the_scan_refuses(changes, message):
    specs = {
        "x": (2, 4, 3), "step": (2, 4), "decay": (4,), "b": (2, 2, 16), "c": (2, 2, 16), "skip": (4,),
        "state": (4, 3, 16),
    }  # fmt: skip
    given = {name: (shape, "float32") for name, shape in specs.items()} | changes
    with pytest.raises(ops.OpError, match=message):
        ops.selective_scan(*[ops.zeros(*each) for each in given.values()])
