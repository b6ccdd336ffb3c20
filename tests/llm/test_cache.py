"""The key/value cache: how it grows, what it forgets, and that an interrupted forward leaves it as it was."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import ops
from llm import Cache
from llm.errors import ContextOverflow, UserError
from llm.generate import Chat

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
        cache.commit(ops.integer(i))
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
        cache.commit(ops.tensor(np.arange(n, dtype="int32")))
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


def test_it_knows_the_tokens_it_holds(rng):
    small, ids = model(rng), rng.integers(0, 256, 30).tolist()
    cache = small.new_cache()
    small(ids[:20], cache)
    twin = cache.copy()
    small(ids[20:21], cache)
    small(np.array(ids[21:]), cache)
    assert (cache.ids, twin.ids, len(cache)) == (ids, ids[:20], 30)
    cache.truncate(7)
    assert (cache.ids, len(cache)) == (ids[:7], 7)


def test_a_cache_that_other_layers_filled_is_refused(rng):
    small, ids = model(rng), rng.integers(0, 256, 30).tolist()
    whole = small(ids).numpy().copy()
    cache, last = small.new_cache(), small.layers.pop()
    small(ids[:20], cache)
    small.layers.append(last)
    other = "the cache holds 20 tokens, and 0 of them in this layer: it was filled by other layers; start a new one"
    with pytest.raises(UserError, match=other):
        small(ids[20:], cache)
    cache.truncate(0)
    np.testing.assert_allclose(small(ids, cache).numpy(), whole, rtol=1e-4, atol=1e-4)
    cache.truncate(10)
    small.layers.pop()
    small(ids[10:25], cache)  # up to where the last layer has written before
    small.layers.append(last)
    for each in (cache, cache.copy()):
        with pytest.raises(UserError, match="the cache holds 25 tokens, and 10 of them in this layer"):
            small(ids[25:], each)


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


def test_the_dtype_of_a_cache_is_asked_for_or_the_models(rng):
    small = model(rng)
    assert small.new_cache().dtype is None
    assert small.new_cache("bfloat16").dtype == "bfloat16"
    small.cache_dtype = "float16"
    assert small.new_cache().dtype == "float16"
    assert small.new_cache("float32").dtype == "float32"
    for given, wanted in ((None, "float16"), ("bfloat16", "bfloat16")):
        stream = small.stream("ab", max_tokens=3, cache_dtype=given)
        stream.finish()
        keys, values = stream.cache[2].keys, stream.cache[2].values
        assert keys is not None and values is not None
        assert (keys.dtype, values.dtype) == (wanted, wanted)
    assert Chat(small, "float32").cache.dtype == "float32"
    assert small.stream("ab", cache=stream.cache, cache_dtype="bfloat16").cache is stream.cache
    with pytest.raises(UserError, match="cache_dtype is 'float16' and the given cache has 'bfloat16'"):
        small.stream("ab", cache=stream.cache, cache_dtype="float16")
    with pytest.raises(UserError, match="cache dtype 'int8' is not supported; choose one of float32"):
        small.generate("ab", cache_dtype="int8")


class Rounds(ops.Interceptor):
    """Rounds what is written to a cache."""

    def __init__(self, dtype: str):
        self.dtype = dtype

    def call(self, call: ops.Call, launch: Any) -> Any:
        if call.op is not ops.cache_write:
            return launch(call)
        cache, x, positions = call.args
        return launch(call.replace((cache, ops.cast(ops.cast(x, dtype=self.dtype), dtype="float32"), positions)))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_only_rounds_keys_and_values(rng, dtype):
    small, ids = model(rng), rng.integers(0, 256, 60).tolist()

    def run(cache: Cache) -> np.ndarray:
        return np.concatenate([small(ids[:50], cache).numpy(), *(small([each], cache).numpy() for each in ids[50:])])

    exact, rough = small.new_cache("float32"), small.new_cache(dtype)
    with ops.intercepted(Rounds(dtype)):
        wanted = run(exact)
    np.testing.assert_allclose(run(rough), wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())
    assert exact[2].values is not None and rough[2].values is not None
    np.testing.assert_allclose(
        rough[2].values.numpy()[:60].astype("float32"), exact[2].values.numpy()[:60], rtol=1e-2, atol=1e-2
    )
    assert 2 * rough.nbytes == exact.nbytes


def test_what_float16_cannot_hold_becomes_infinite():
    rows = ops.tensor(np.array([[[65504.0, 65536.0, -1e6, 1e-9]]], "float32"))
    for dtype, wanted in (("float16", [65504, np.inf, -np.inf, 0]), ("float32", rows.numpy()[0, 0])):
        cache = Cache(4, dtype)
        keys, _ = cache[0].write(rows, rows, cache.extend(1))
        assert np.array_equal(keys.numpy()[0, 0], wanted)


def test_an_empty_cache_is_true():
    assert Cache(4)
    assert len(Cache(4)) == 0
