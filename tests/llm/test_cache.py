"""The key/value cache: how it grows, what it forgets, and that an interrupted forward leaves it as it was."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import ops
from llm import Cache
from llm.errors import ContextOverflow

from .small import CONFIG, model

LIMIT = CONFIG["max_position_embeddings"]


def test_growth_copies_less_than_it_holds(rng):
    cache, copied, capacities = Cache(1000), 0, []
    rows = ops.tensor(rng.standard_normal((1, 2, 4)).astype("float32"))
    for i in range(1000):
        before = cache[0].keys
        cache[0].write(rows, rows, cache.extend(1))
        if cache[0].keys is not before:
            copied += 2 * i * rows.nbytes
            capacities.append(cache.capacity)
        cache.commit(1)
    assert capacities == [64, 128, 256, 512, 1000]
    assert copied <= 2 * 1000 * rows.nbytes
    assert cache.nbytes == 2 * 1000 * rows.nbytes


def test_growth_keeps_what_was_written(rng):
    cache, written, held = Cache(LIMIT), [], ()
    while len(cache) < LIMIT:
        n = int(min(rng.integers(1, 90), LIMIT - len(cache)))
        keys, values = (rng.standard_normal((n, 2, 4)).astype("float32") for _ in "kv")
        written.append((keys, values))
        held = cache[0].write(ops.tensor(keys), ops.tensor(values), cache.extend(n))
        cache.commit(n)
        assert held[0].shape == held[1].shape == (cache.capacity, 2, 4)
    for buffer, parts in zip(held, zip(*written, strict=True), strict=True):
        assert np.array_equal(buffer.numpy()[:LIMIT], np.concatenate(parts))


def test_overflow_leaves_the_cache_usable(rng):
    small, ids = model(rng), rng.integers(0, 256, LIMIT).tolist()
    cache = small.new_cache()
    small(ids[:-2], cache)
    expected = (
        f"{LIMIT - 2} tokens in the cache and 3 more do not fit: this model's context holds {LIMIT}; shorten the prompt"
    )
    with pytest.raises(ContextOverflow) as caught:
        small([1, 2, 3], cache)
    assert str(caught.value) == expected
    with pytest.raises(ContextOverflow, match=f"^{LIMIT + 1} tokens do not fit"):
        small([1] * (LIMIT + 1))
    assert len(cache) == LIMIT - 2
    last = small(ids[-2:], cache).numpy()[-1].copy()
    assert len(cache) == LIMIT
    np.testing.assert_allclose(last, small(ids).numpy()[-1], rtol=1e-4, atol=1e-4)
    with pytest.raises(ContextOverflow):
        small([1], cache)


def test_truncate_forgets_what_came_after(rng):
    small, ids = model(rng), rng.integers(0, 256, 30).tolist()
    cache = small.new_cache()
    wanted = small(ids, cache).numpy()[20:].copy()
    small([7, 7, 7], cache)
    cache.truncate(20)
    assert len(cache) == 20
    assert np.array_equal(small(ids[20:], cache).numpy(), wanted)
    for length in (-1, 31):
        with pytest.raises(ValueError, match="cannot truncate a cache of 30 tokens"):
            cache.truncate(length)
    cache.truncate(0)
    np.testing.assert_allclose(small(ids, cache).numpy()[20:], wanted, rtol=1e-5, atol=1e-5)


def test_a_copy_is_independent(rng):
    small, ids = model(rng), rng.integers(0, 256, 70).tolist()
    cache = small.new_cache()
    small(ids, cache)
    twin = cache.copy()
    assert (len(twin), twin.nbytes, twin.limit, twin.dtype) == (len(cache), cache.nbytes, cache.limit, cache.dtype)
    wanted = small([5], cache).numpy().copy()
    small([9, 9, 9], cache)
    assert len(twin) == 70
    assert np.array_equal(small([5], twin).numpy(), wanted)
    assert "71 tokens, 3 layers" in repr(twin)
    assert len(Cache(8).copy()) == 0


class Fails(ops.Interceptor):
    """Raises at the `at`-th call."""

    def __init__(self, at: int, error: BaseException):
        self.at, self.error = at, error

    def call(self, call: ops.Call, launch: Any) -> Any:
        self.at -= 1
        if self.at < 0:
            raise self.error
        return launch(call)


def test_an_interrupted_forward_leaves_the_cache_as_it_was(rng):
    small, ids = model(rng), rng.integers(0, 256, 80).tolist()
    cache = small.new_cache()
    small(ids[:60], cache)
    wanted = small(ids[60:], cache.copy()).numpy().copy()  # which grows the buffers
    counted = Fails(10**6, KeyboardInterrupt())
    with ops.intercepted(counted):
        small(ids[60:], cache.copy())
    calls = 10**6 - counted.at
    for at in [*rng.integers(0, calls, 8).tolist(), 0, calls - 1]:  # the last call is the head's
        with pytest.raises(KeyboardInterrupt), ops.intercepted(Fails(at, KeyboardInterrupt())):
            small(rng.integers(0, 256, int(rng.integers(1, 100))).tolist(), cache)
        assert len(cache) == 60, f"interrupted at call {at}"
        again = small(ids[60:], cache.copy()).numpy()  # from larger buffers, maybe: the sums may be cut otherwise
        np.testing.assert_allclose(again, wanted, rtol=1e-4, atol=1e-4, err_msg=f"interrupted at call {at}")


def test_half_precision_under_float32(rng):
    small, ids = model(rng), rng.integers(0, 256, 40).tolist()
    exact = small(ids).numpy().copy()
    cache = Cache(LIMIT, "float16")
    rough = np.concatenate([small(ids[:30], cache).numpy(), small(ids[30:], cache).numpy()])
    assert cache[0].keys is not None
    assert cache[0].keys.dtype == "float16"
    assert cache.copy().nbytes == cache.nbytes == 3 * 2 * 64 * 2 * 8 * 2
    assert 0 < np.abs(rough - exact).max() / np.abs(exact).max() < 2e-2


def test_an_empty_cache_is_true():
    assert Cache(4)
    assert len(Cache(4)) == 0
