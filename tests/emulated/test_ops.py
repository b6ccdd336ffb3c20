"""Every op with a kernel for floats on every machine, through the same check as on this one."""

import numpy as np
import pytest

import ops
from ops.quantize import KNOWN
from ops.spec import FLOATS
from tests.ops import test_attention, test_rotary
from tests.ops.harness import check, held, random

# The others differ from one of these in nothing but the dot product of bytes.
MACHINES = ("portable", "avx2", "avx512", "avx512-bf16", "neon")
pytestmark = [
    pytest.mark.emulated,
    pytest.mark.usefixtures("emulator"),
    pytest.mark.parametrize("machine", MACHINES, indirect=True),
]
TOKENS = (1, 3, 16, 17, 70)


@pytest.mark.parametrize("x, weight", [*(("float32", weight) for weight in FLOATS), ("bfloat16", "bfloat16")])
def test_linear(rng, x, weight):
    for k, rows in ((69, 19), (517, 300), (1061, 7)):
        for n in TOKENS:
            check(ops.linear, random(rng, (n, k), x), random(rng, (rows, k), weight), random(rng, (rows,), "float32"))


def test_a_tokens_result_does_not_depend_on_the_others(rng):
    x, weight = random(rng, (70, 1061), "float32"), ops.tensor(random(rng, (37, 1061), "float16"))
    whole = ops.linear(ops.tensor(x), weight).numpy()
    for n in (1, 5, 16):
        assert np.array_equal(ops.linear(ops.tensor(x[:n].copy()), weight).numpy(), whole[:n])


@pytest.mark.parametrize(
    "layout, variant, cache",
    [
        ("gqa", "plain", "float16"),
        ("mqa", "all", "float32"),
        ("odd", "plain", "float32"),
        ("wide", "sinks", "bfloat16"),
    ],
)
def test_attention_over_a_cache(rng, layout, variant, cache):
    layout, variant = test_attention.LAYOUTS[layout], test_attention.VARIANTS[variant]
    for n, start, capacity in ((1, 0, 1), (1, 70, 90), (5, 60, 70), (40, 23, 63)):
        sinks = variant.get("sinks", False)
        args = test_attention.inputs(rng, n, layout, capacity, start, cache=cache, sinks=sinks)
        check(ops.attention, *args, **test_attention.constants(layout, **variant))


def test_the_steps_of_attention(rng):
    layout = test_attention.LAYOUTS["gqa"]
    q, k, v, positions = test_attention.inputs(rng, 7, layout, 50, 20)
    s = check(ops.scores, q, k, positions, **test_attention.constants(layout)).numpy()
    p = check(ops.softmax, s).numpy()
    check(ops.mix, p, v, dtype="float32")
    check(ops.softmax_with_sinks, s, random(rng, layout[:1], "float32"))


@pytest.mark.parametrize("dtype", FLOATS)
def test_norms_and_activations(rng, dtype):
    for n in (1, 5):
        x, y, weight = random(rng, (n, 100), dtype), random(rng, (n, 100), dtype), random(rng, (100,), dtype)
        check(ops.rms_norm, x, weight, eps=1e-5)
        check(ops.layer_norm, x, weight, weight, eps=1e-5)
        for op in (ops.silu_mul, ops.gelu_mul, ops.add):
            check(op, x, y)
        check(ops.tanh, x)
        check(ops.add_row, x, weight)
        check(ops.softcap, x, cap=3.0)
        check(ops.scale, x, -0.3)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("interleaved", [False, True])
def test_rope(rng, dtype, interleaved):
    for n in (1, 5):
        check(ops.rope, *test_rotary.inputs(rng, n, 3, 20, 7, dtype), interleaved=interleaved, scale=1.25)


@pytest.mark.parametrize("dtype", FLOATS)
def test_rows_are_reduced(rng, dtype):
    for n, width in ((1, 33), (17, 1000)):
        x = random(rng, (n, width), dtype)
        check(ops.softmax, x)
        check(ops.log_softmax, x)
        check(ops.argmax, x)
        check(ops.top_k, x, k=7, tolerance=0.0)


@pytest.mark.parametrize("dtype", FLOATS)
def test_rows_are_looked_up_and_stored(rng, dtype):
    for n in (1, 20):
        check(ops.embedding, rng.integers(0, 50, n), random(rng, (50, 33), dtype), tolerance=0.0)
        x, cache = random(rng, (n, 2, 5), "float32"), random(rng, (40, 2, 5), dtype)
        check(ops.cache_write, cache, x, rng.integers(0, 40, n).astype("int32"), tolerance=0.0)
        check(ops.concat, x, x[:1].copy(), tolerance=0.0)
        check(ops.columns, x, tolerance=0.0, start=1, stop=4)
        check(ops.join, x, x[:, :1].copy(), tolerance=0.0)


@pytest.mark.parametrize("kind", [*FLOATS, *KNOWN])
def test_mixtures_of_experts(rng, kind):
    for n in (1, 5, 20):
        weights, ids = check(ops.route, random(rng, (n, 4), "float32"), k=2, normalise=True)
        x, weight = random(rng, (n, 69), "float32"), held(rng, (4 * 16, 69), kind)
        y = check(ops.experts_linear, x, weight, ids.numpy(), experts=4)
        check(ops.combine, y.numpy(), weights.numpy())


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_recurrent_layer(rng, dtype):
    for n in (1, 5):
        x, before, row = random(rng, (n, 33), dtype), random(rng, (1, 33), dtype), random(rng, (33,), dtype)
        check(ops.token_mix, x, before, row)
        decay, first, state = (random(rng, shape, "float32") for shape in ((33,), (33,), (3, 33)))
        check(ops.wkv, x, x[::-1].copy(), decay, first, np.abs(state))
        check(ops.sigmoid, x)
        check(ops.softplus, x, low=0.1, high=1.5)
        check(ops.causal_conv, x, random(rng, (3, 33), dtype), random(rng, (33, 4), dtype), row)
        for dim, size in ((20, 32), (5, 7)):
            y, b, c = (random(rng, shape, dtype) for shape in ((n, 4, dim), (n, 2, size), (n, 2, size)))
            numbers = (random(rng, (4,), "float32") for _ in range(2))
            step, state = rng.random((n, 4), "float32"), random(rng, (4, dim, size), "float32")
            check(ops.selective_scan, y, step, next(numbers), b, c, next(numbers), state)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("given", FLOATS)
def test_casts_round_as_numpy_does(rng, given, dtype):
    x = random(rng, (5, 77), given, 100.0)
    x[0, :6] = [0.0, -0.0, np.inf, -np.inf, 1e-7, 60000]
    check(ops.cast, x, dtype=dtype, tolerance=0.0)


def test_what_a_kernel_refuses_is_an_error():
    with pytest.raises(ops.KernelError, match=r"ids hold a value outside \[0, 50\)"):
        ops.embedding(ops.tensor(np.array([3, 50])), ops.zeros((50, 8)))
