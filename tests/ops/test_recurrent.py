import numpy as np
import pytest

import ops
from tests.ops.harness import DTYPE_NAMES, check, random


def start(width):
    state = np.zeros((3, width), "float32")
    state[2] = -1e38
    return state


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
@pytest.mark.parametrize("n, width", [(1, 1), (2, 33), (17, 100), (40, 7)])
def test_token_mix(rng, dtype, n, width):
    check(ops.token_mix, *(random(rng, shape, dtype) for shape in ((n, width), (1, width), (width,))))


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
@pytest.mark.parametrize("n, width", [(1, 1), (2, 33), (17, 100), (40, 7), (5, 2048)])
def test_wkv(rng, dtype, n, width):
    key, value = random(rng, (n, width), dtype, 2.0), random(rng, (n, width), dtype)
    decay, first = random(rng, (width,), "float32"), random(rng, (width,), "float32")
    check(ops.wkv, key, value, decay, first, start(width))
    state = np.stack([rng.standard_normal(width), 1 + rng.random(width), rng.standard_normal(width)]).astype("float32")
    check(ops.wkv, key, value, decay, first, state)


def test_wkv_is_the_sum_that_defines_it(rng):
    key, value = rng.standard_normal((9, 5)), rng.standard_normal((9, 5))
    decay, first = rng.standard_normal(5), rng.standard_normal(5)
    expected = np.empty((9, 5))
    for i in range(9):
        weights = [np.exp(key[j] - (i - 1 - j) * np.exp(decay)) for j in range(i)] + [np.exp(first + key[i])]
        expected[i] = sum(w * value[j] for j, w in enumerate(weights)) / sum(weights)
    arrays = [each.astype("float32") for each in (key, value, decay, first)]
    assert np.allclose(ops.wkv.reference(*arrays, start(5))[0], expected, rtol=1e-5)
    k, v, d, f = map(ops.tensor, arrays)
    assert np.allclose(ops.wkv(k, v, d, f, ops.tensor(start(5)))[0].numpy(), expected, rtol=1e-5, atol=1e-6)


def test_a_text_in_pieces_gives_what_it_gives_whole(rng):
    arrays = [random(rng, shape, "float32") for shape in ((40, 33), (40, 33), (33,), (33,))]
    key, value, decay, first = map(ops.tensor, arrays)
    whole, end = ops.wkv(key, value, decay, first, ops.tensor(start(33)))
    state, pieces = ops.tensor(start(33)), []
    for rows in (slice(0, 17), slice(17, 18), slice(18, 40)):
        piece, state = ops.wkv(key[rows], value[rows], decay, first, state)
        pieces.append(piece.numpy())
    assert np.array_equal(np.concatenate(pieces), whole.numpy()) and np.array_equal(state.numpy(), end.numpy())


def test_huge_keys_do_not_overflow(rng):
    key, value = random(rng, (6, 8), "float32", 300.0), random(rng, (6, 8), "float32")
    check(ops.wkv, key, value, *(random(rng, (8,), "float32") for _ in range(2)), start(8))


def test_what_they_refuse():
    x, row = ops.zeros((2, 8)), ops.zeros(8)
    with pytest.raises(ops.ShapeError, match=r"before is float32\[2, 8\], expected \[1, 8\]"):
        ops.token_mix(x, x, row)
    with pytest.raises(ops.DTypeError, match=r"mix float16\[8\], expected floats of one dtype"):
        ops.token_mix(x, ops.zeros((1, 8)), ops.zeros(8, "float16"))
    with pytest.raises(ops.ShapeError, match=r"state is float32\[8\], expected float32 \[3, 8\]"):
        ops.wkv(x, x, row, row, row)
