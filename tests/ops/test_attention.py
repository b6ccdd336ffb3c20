import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ops
from ops.schedule import cpu, flash, flash_decode
from ops.tolerance import KERNEL, relative_error
from tests.ops.harness import DTYPE_NAMES, check, random

LAYOUTS = {
    "mha": (3, 3, 16, 16),
    "gqa": (8, 2, 32, 32),
    "mqa": (6, 1, 20, 12),
    "odd": (2, 1, 1, 7),
    "wide": (4, 4, 80, 48),
}
VARIANTS = {
    "plain": {},
    "window": {"window": 9},
    "softcap": {"softcap": 3.0},
    "sinks": {"sinks": True},
    "all": {"window": 40, "softcap": 20.0, "sinks": True},
}


def inputs(rng, n, layout, capacity, start=0, dtype="float32", cache="float32", sinks=False):
    """n new tokens from position `start` on over a cache of `capacity` rows, those not yet written NaN."""
    heads, kv_heads, dim, v_dim = layout
    q, k = random(rng, (n, heads, dim), dtype), random(rng, (capacity, kv_heads, dim), cache)
    v = random(rng, (capacity, kv_heads, v_dim), cache)
    k[start + n :], v[start + n :] = np.nan, np.nan
    positions = np.arange(start, start + n, dtype="int32")
    return (q, k, v, positions, *([random(rng, (heads,), "float32", 2.0)] if sinks else []))


def constants(layout, window=None, softcap=None, sinks=False):
    return {"scale": layout[2] ** -0.5, "window": window, "softcap": softcap}


@pytest.mark.parametrize(
    "layout, variant", [*[("gqa", each) for each in VARIANTS], *[(each, "all") for each in LAYOUTS], ("odd", "plain")]
)
def test_attention(rng, layout, variant):
    layout, variant = LAYOUTS[layout], VARIANTS[variant]
    for n, start, capacity in [(1, 0, 1), (1, 70, 90), (1, 31, 32), (2, 0, 2), (5, 60, 70), (40, 0, 50), (33, 30, 63)]:
        args = inputs(rng, n, layout, capacity, start, sinks=variant.get("sinks", False))
        check(ops.attention, *args, **constants(layout, **variant))


@pytest.mark.parametrize("cache", DTYPE_NAMES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtypes(rng, dtype, cache):
    layout = LAYOUTS["gqa"]
    for n in (1, 20):
        out = check(ops.attention, *inputs(rng, n, layout, 64, 30, dtype, cache), **constants(layout))
        assert (out.dtype, out.shape) == (dtype, (n, 8, 32))


@given(
    n=st.integers(0, 80),
    start=st.integers(0, 100),
    spare=st.integers(0, 40),
    layout=st.sampled_from([LAYOUTS["gqa"], LAYOUTS["mqa"]]),
    variant=st.sampled_from([VARIANTS["plain"], VARIANTS["all"]]),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=40, deadline=None)
def test_any_lengths(n, start, spare, layout, variant, seed):
    args = inputs(np.random.default_rng(seed), n, layout, n + start + spare, start, sinks=variant.get("sinks", False))
    check(ops.attention, *args, **constants(layout, **variant))


@pytest.mark.parametrize("n", [1, 9, 50])
def test_positions_in_any_order(rng, n):
    layout = LAYOUTS["gqa"]
    q, k, v, _ = inputs(rng, n, layout, 100 + n, 100)
    positions = rng.integers(0, 100, n).astype("int32")
    check(ops.attention, q, k, v, positions, **constants(layout, window=17))


@pytest.mark.parametrize("variant", ["plain", "all"])
def test_pieces_agree_with_the_whole(rng, variant):
    """A prompt in one piece, in chunks and token by token."""
    layout, variant = LAYOUTS["gqa"], VARIANTS[variant]
    q, k, v, positions, *sinks = map(ops.tensor, inputs(rng, 75, layout, 75, sinks=variant.get("sinks", False)))

    def run(*sizes):
        ends = np.cumsum(sizes)
        pieces = [
            ops.attention(q[end - n : end], k, v, positions[end - n : end], *sinks, **constants(layout, **variant))
            for n, end in zip(sizes, ends, strict=True)
        ]
        return np.concatenate([each.numpy() for each in pieces])

    whole = run(75)
    for sizes in ((40, 3, 1, 31), (1,) * 75):
        assert relative_error(run(*sizes), whole) <= KERNEL["float32"]


def test_long_decode_uses_all_threads_and_agrees(rng):
    layout = (8, 4, 64, 64)
    check(ops.attention, *inputs(rng, 1, layout, 4100, 4090), **constants(layout))


@pytest.mark.parametrize("cache", ["float16", "float32"])
@pytest.mark.parametrize("layout", [(8, 4, 64, 64), (32, 8, 64, 64), (6, 2, 32, 48)])
def test_decode_around_the_edges_of_blocks_and_parts(rng, layout, cache):
    enough = flash_decode.PARALLEL_WORK // (layout[0] * (layout[2] + layout[3]))  # keys that are taken in parts
    edges = [flash.KEYS, flash.KEYS * flash_decode.PARTS, enough, enough + flash.KEYS * flash_decode.PARTS]
    for length in [1, *(edge + aside for edge in edges for aside in (-1, 0, 1, 2))]:
        args = inputs(rng, 1, layout, length + 3, length - 1, cache=cache, sinks=True)
        check(ops.attention, *args, **constants(layout))
    check(
        ops.attention, *inputs(rng, 1, layout, 2 * enough, 2 * enough - 1, cache=cache), **constants(layout, enough + 5)
    )


@pytest.mark.parametrize("cache", ["float16", "float32"])
def test_prompts_around_the_edges_of_blocks(rng, cache):
    for n in (63, 64, 65, 511, 512, 513):
        args = inputs(rng, n, (4, 2, 32, 32), n + 20, 7, cache=cache, sinks=True)
        check(ops.attention, *args, **constants((4, 2, 32, 32)))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("n, t", [(1, 9), (20, 60), (1, 1500)])
def test_values_that_are_not_finite(rng, bad, n, t):
    for which in range(3):
        arrays = inputs(rng, n, (4, 2, 32, 32), t, t - n)
        arrays[which][0, 1, 5] = bad
        with np.errstate(invalid="ignore"):
            check(ops.attention, *arrays, **constants((4, 2, 32, 32)))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("layout", ["gqa", "odd"])
@pytest.mark.parametrize("n, window", [(2, None), (3, None), (20, 5), (40, None)])
def test_what_a_query_does_not_see_may_be_anything(rng, n, window, layout, bad):
    """The last row is seen by the last query alone; with a window, the first row by the first queries alone."""
    layout = LAYOUTS[layout]
    for which, row in [(1, -1), (2, -1), *([(1, 0), (2, 0)] if window else [])]:
        arrays = inputs(rng, n, layout, n)
        clean = ops.attention(*map(ops.tensor, arrays), **constants(layout, window)).numpy().copy()
        arrays[which][row] = bad
        with np.errstate(invalid="ignore"):
            out = check(ops.attention, *arrays, **constants(layout, window)).numpy()
        blind = slice(0, n - 1) if row else slice(window, None)
        assert np.array_equal(out[blind], clean[blind])


def test_decode_does_not_depend_on_the_threads(rng):
    arrays = inputs(rng, 1, (32, 8, 64, 64), 700, 690, cache="float16")
    build = ops.attention._request(tuple(map(ops.tensor, arrays)), constants((32, 8, 64, 64)))
    results = []
    for threads in ("1", "2", "5", "8", "32"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ops.target, "threads", lambda threads=threads: int(threads))
            run = ops.build.compiled(build.scheduled(), "attention")
        out = ops.zeros((1, 32, 64))
        run(*[ops.tensor(each).buffer.data for each in arrays], out.buffer.data)
        results.append(out.numpy().copy())
    for each in results[1:]:
        assert np.array_equal(each, results[0])


@pytest.mark.parametrize("n", [1, 4])
def test_large_groups(rng, n):
    layout = (24, 2, 16, 16)
    check(ops.attention, *inputs(rng, n, layout, 60, 40, sinks=True), **constants(layout))


@pytest.mark.parametrize("n", [1, 20])
def test_large_scores_do_not_overflow(rng, n):
    layout = LAYOUTS["gqa"]
    q, k, v, positions = inputs(rng, n, layout, 64, 40)
    q, scale = q * np.float32(300), 10.0
    magnitude = scale * np.linalg.norm(q, axis=-1).max() * np.nanmax(np.linalg.norm(k, axis=-1))
    # Where two keys tie, a weight is off by as much as its score, which float32 holds to eps * |q| * |k|.
    check(ops.attention, q, k, v, positions, scale=scale, tolerance=float(np.finfo(np.float32).eps * magnitude))


@pytest.mark.parametrize("n", [1, 20])
def test_nan_of_a_key_in_sight_is_not_hidden(rng, n):
    layout = LAYOUTS["gqa"]
    q, k, v, positions = inputs(rng, n, layout, 64, 40)
    k[40, 0, 0] = np.nan
    y = ops.attention(*map(ops.tensor, (q, k, v, positions)), **constants(layout)).numpy()
    assert np.isnan(y[:, :4]).all() and not np.isnan(y[:, 4:]).any()


@pytest.mark.parametrize("position", [-1, 8, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("n", [1, 3, 20])
def test_a_position_outside_the_cache_is_an_error(rng, n, position):
    layout = LAYOUTS["gqa"]
    q, k, v, _ = map(ops.tensor, inputs(rng, n, layout, 8 + n, 8))
    positions = np.zeros(n, "int32")
    positions[-1] = position
    for attention in (ops.attention, stepped):
        with pytest.raises(ops.KernelError, match=r"attention.*position.*outside the cache"):
            attention(q, k[:8], v[:8], ops.tensor(positions), **constants(layout))


def stepped(*args, **constants):
    with ops.attention.steps():
        return ops.attention(*args, **constants)


@pytest.mark.parametrize("variant", ["plain", "all"])
def test_steps_agree_with_the_fused_kernel(rng, variant):
    layout, variant = LAYOUTS["gqa"], VARIANTS[variant]
    for n in (1, 21):
        args = [*map(ops.tensor, inputs(rng, n, layout, 60, 15, "float16", sinks=variant.get("sinks", False)))]
        fused, composed = (f(*args, **constants(layout, **variant)) for f in (ops.attention, stepped))
        assert (composed.dtype, composed.shape) == (fused.dtype, fused.shape)
        assert relative_error(composed.numpy(), fused.numpy()) <= KERNEL["float16"]


def test_steps_show_the_live_part_of_the_cache(rng):
    layout = LAYOUTS["gqa"]
    seen = {}

    class Look(ops.Interceptor):
        def call(self, call, launch):
            seen[call.op.name] = output = launch(call)
            return output

    with ops.intercepted(Look()):
        stepped(*map(ops.tensor, inputs(rng, 4, layout, 60, 15)), **constants(layout, window=7))
    assert seen["scores"].shape == seen["softmax"].shape == (4, 8, 19)
    assert np.isneginf(seen["scores"].numpy()).sum(axis=-1).tolist() == [[12] * 8] * 4
    np.testing.assert_allclose(seen["softmax"].numpy().sum(axis=-1), 1, atol=1e-6)
    assert seen["mix"].shape == (4, 8, 32)


@pytest.mark.parametrize("variant, cache", [("plain", "float32"), ("window", "bfloat16"), ("softcap", "float16")])
def test_scores_and_mix(rng, variant, cache):
    layout, variant = LAYOUTS["mqa"], VARIANTS[variant]
    for n, start in [(1, 20), (7, 0), (18, 13)]:
        q, k, v, positions = inputs(rng, n, layout, 50, start, cache=cache)
        s = check(ops.scores, q, k, positions, **constants(layout, **variant))
        p = np.exp(s.numpy() - s.numpy().max(axis=-1, keepdims=True))
        assert check(ops.mix, p, v, dtype=cache).dtype == cache
        check(ops.softmax_with_sinks, s.numpy(), random(rng, (layout[0],), cache))


def test_no_length_of_the_cache_compiles_anew(rng):
    layout = LAYOUTS["gqa"]
    args = [inputs(rng, 1, layout, t, t - 1) for t in (40, 41, 97)]
    requests = {op: set() for op in (ops.attention, ops.scores, ops.mix, ops.softmax_with_sinks)}
    for q, k, v, positions in args:
        x = np.zeros((1, 8, len(k)), "float32")
        calls = {
            ops.attention: (q, k, v, positions), ops.scores: (q, k, positions), ops.mix: (x, v),
            ops.softmax_with_sinks: (x, np.zeros(8, "float32")),
        }  # fmt: skip
        for op, arrays in calls.items():
            known = constants(layout) if op in (ops.attention, ops.scores) else {}
            requests[op].add(op._request(tuple(map(ops.tensor, arrays)), known).key)
    assert [len(keys) for keys in requests.values()] == [1, 1, 1, 1]


@pytest.mark.parametrize("variant", ["plain", "all"])
def test_block_definition(rng, variant):
    """What fusion reads agrees with the fast kernel."""
    layout, variant = LAYOUTS["gqa"], VARIANTS[variant]
    args = inputs(rng, 5, layout, 40, 20, sinks=variant.get("sinks", False))
    request = ops.attention._request(tuple(map(ops.tensor, args)), constants(layout, **variant))
    with ops.attention.use(cpu.schedule(request.blocks(), request._rows())) as use:
        check(ops.attention, *args, **constants(layout, **variant))
    assert use.hits == 1


def test_attention_refuses_what_does_not_fit(rng):
    layout = LAYOUTS["gqa"]
    q, k, v, positions = map(ops.tensor, inputs(rng, 3, layout, 10))
    known = constants(layout)
    with pytest.raises(ops.ShapeError, match=r"attention: k is float32\[10, 2, 16\], expected \[t, kv_heads, 32\]"):
        ops.attention(q, ops.empty((10, 2, 16)), v, positions, **known)
    with pytest.raises(ops.ShapeError, match=r"k is float32\[10, 3, 32\], .*divisor of 8"):
        ops.attention(q, ops.empty((10, 3, 32)), ops.empty((10, 3, 32)), positions, **known)
    with pytest.raises(ops.ShapeError, match=r"v is float32\[9, 2, 32\], expected \[10, 2, v_dim\]"):
        ops.attention(q, k, v[:9], positions, **known)
    with pytest.raises(ops.ShapeError, match=r"positions is int32\[2\], expected \[3\]"):
        ops.attention(q, k, v, positions[:2], **known)
    with pytest.raises(ops.ShapeError, match=r"sinks is float32\[7\], expected \[8\]"):
        ops.attention(q, k, v, positions, ops.empty(7), **known)
    with pytest.raises(ops.DTypeError, match=r"positions is int64\[3\], expected int32"):
        ops.attention(q, k, v, ops.empty(3, "int64"), **known)
    with pytest.raises(ops.DTypeError, match=r"k is int8"):
        ops.attention(q, ops.empty((10, 2, 32), "int8"), v, positions, **known)
    with pytest.raises(ops.ShapeError, match="window is 0, expected at least 1"):
        ops.attention(q, k, v, positions, scale=1.0, window=0)
    with pytest.raises(ops.ShapeError, match=r"softcap is 0\.0, expected more than 0"):
        ops.attention(q, k, v, positions, scale=1.0, softcap=0.0)
    with pytest.raises(ops.ShapeError, match=r"v is float32\[10, 2, 32\], expected \[9, kv_heads, v_dim\]"):
        ops.mix(ops.empty((3, 8, 9)), v)
