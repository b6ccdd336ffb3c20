"""why: its value is the kernel's, and it reads what the op must read, over all ops."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

import debug.statistics
import ops
from debug.explain import why
from debug.record import Record
from debug.trace import trace
from ops import Call, OpError
from ops.op import registry
from ops.quantize import FORMATS
from ops.scope import Scope
from ops.tolerance import KERNEL
from tests.ops.harness import DTYPE_NAMES, random

ROWS, WIDTH = 3, 37
OWN = sorted(name for name, op in registry.items() if op.__module__.split(".")[0] == "ops")


def call(op: Any, *args: Any, **constants: Any) -> Call:
    """A call as a tool sees it, of `layers.2` in the fourth pass."""
    tensors = [ops.tensor(each) if isinstance(each, np.ndarray) else each for each in args]
    bound, constants = op._bound(tuple(tensors), constants)
    return Call(op, bound, constants, Scope("layers.2", 4), 1)


def example(name: str, rng: np.random.Generator, dtype: str) -> Call:
    """A call of the op with odd shapes."""
    x = random(rng, (ROWS, WIDTH), dtype)
    row = random(rng, (WIDTH,), dtype)
    heads = random(rng, (ROWS, 6, 10), dtype)
    k, v = random(rng, (21, 2, 10), dtype), random(rng, (21, 2, 7), dtype)
    at = rng.permutation(21)[:ROWS].astype("int32")
    sinks = random(rng, (6,), dtype)
    scores = random(rng, (ROWS, 6, 13), "float32")
    decay = [np.abs(random(rng, (*rows, WIDTH), "float32")) for rows in ((), (), (3,))]
    op = registry[name]
    arguments: dict[str, tuple[tuple, dict[str, Any]]] = {
        "linear": ((x, random(rng, (11, WIDTH), "bfloat16"), random(rng, (11,), "float16")), {}),
        "rms_norm": ((x, row), {"eps": 1e-5, "plus_one": bool(rng.integers(2))}),
        "layer_norm": ((x, row, random(rng, (WIDTH,), "float32")), {"eps": 1e-5}),
        "attention": ((heads, k, v, at, sinks), {"scale": 0.3, "window": 9, "softcap": 4.0}),
        "scores": ((heads, k, at), {"scale": 0.3, "softcap": 4.0}),
        "softmax_with_sinks": ((scores, sinks), {}),
        "mix": ((scores, random(rng, (13, 3, 5), dtype)), {"dtype": dtype}),
        "rope": ((heads, at, random(rng, (4,), "float32")), {"interleaved": bool(rng.integers(2)), "scale": 1.5}),
        "top_k": ((x,), {"k": 5}),
        "embedding": ((at[:2], random(rng, (21, WIDTH), dtype)), {}),
        "columns": ((x,), {"start": 2, "stop": 7}),
        "join": ((heads, random(rng, (ROWS, 1, 4), dtype)), {}),
        "experts_linear": (
            (x, random(rng, (33, WIDTH), "bfloat16"), (at % 3).reshape(ROWS, 1), random(rng, (33,), dtype)),
            {"experts": 3},
        ),
        "route": ((x, row), {"k": 4, "scoring": "sigmoid", "normalise": True, "scale": 1.5}),
        "combine": ((heads, random(rng, (ROWS, 6), "float32")), {}),
        "clamped_swiglu": ((x, x[::-1].copy()), {"alpha": 1.7, "limit": 0.8}),
        "token_mix": ((x, x[:1].copy(), row), {}),
        "wkv": ((x, x[::-1].copy(), *decay), {}),
        "softplus": ((x,), {"low": 0.2, "high": 1.1}),
        "causal_conv": ((x, x[:3].copy(), random(rng, (WIDTH, 4), dtype), row), {}),
        "selective_scan": (
            (
                heads,
                np.abs(scores[..., 0]),
                -np.abs(scores[0, :, 1]),
                *2 * (random(rng, (ROWS, 2, 8), dtype),),
                scores[1, :, 2].copy(),
                random(rng, (6, 10, 8), "float32"),
            ),
            {},
        ),
        "concat": ((x, random(rng, (2, WIDTH), dtype)), {}),
        "cache_write": ((k, random(rng, (ROWS, 2, 10), "float32"), at), {}),
        "softcap": ((x,), {"cap": 2.5}),
        "clamp": ((x,), {"limit": 0.5}),
        "gelu_mul": ((x, x[::-1].copy()), {"approximate": "tanh"}),
        "silu_mul": ((x, x[::-1].copy()), {}),
        "cast": ((x,), {"dtype": "bfloat16"}),
        "add_row": ((x, row), {}),
        "mul_row": ((x, row), {}),
    }
    if name in arguments:
        args, constants = arguments[name]
    else:
        args = tuple(1.7 if kind is float else random(rng, x.shape, dtype) for kind, _ in op._kinds)
        constants = {}
    return call(op, *args, **constants)


def results(made: Call) -> dict[str, tuple[int, ...]]:
    """The shapes of what a call gives."""
    shapes = {f"output {i}" if i else "output": spec.shape for i, spec in enumerate(made.outputs)}
    return shapes | {name: each.shape for name, each in made.written.items()}


def check(made: Call, rng: np.random.Generator, elements: int = 3) -> None:
    """The value of random elements of each result is the kernel's within the table's bound."""
    references = made.op.reference(*[np.copy(x) if i == 0 and made.op.writes else x for i, x in enumerate(made.args)],
                                   **made.constants)  # fmt: skip
    references = references if isinstance(references, tuple) else (references,)
    for (name, shape), reference in zip(results(made).items(), references, strict=True):
        for _ in range(elements):
            index = tuple(int(rng.integers(size)) for size in shape)
            found = why(made, index, name)
            dtype = (made.written[name] if name in made.written else made.outputs[int(name[7:] or 0)]).dtype
            finite = np.abs(np.asarray(reference, "float64"))
            bound = KERNEL.get(dtype, 0.0) * float(finite[np.isfinite(finite)].max(initial=0.0))
            assert same(found.value, found.actual, bound), (name, index, found)
            assert same(found.exact, float(reference[index]), bound), (name, index, found)


def same(value: float, other: float, bound: float) -> bool:
    return value == other or abs(value - other) <= bound


@pytest.mark.parametrize("name", OWN)
def test_value_is_the_kernels(name, rng):
    check(example(name, rng, str(rng.choice(DTYPE_NAMES))), rng)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", ["linear", "embedding"])
def test_value_is_the_kernels_of_packed_weights(name, kind, rng):
    weight = ops.tensor(random(rng, (19, 75), "float32"), kind)
    if name == "linear":
        check(call(ops.linear, random(rng, (2, 75), str(rng.choice(DTYPE_NAMES))), weight), rng)
    else:
        check(call(ops.embedding, np.array([18, 3], "int32"), weight), rng)


def loads(made: Call, index: tuple[int, ...], result: str | None = None) -> dict[str, int]:
    return {name: len(each) for name, each in why(made, index, result).loads.items()}


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
def test_linear_reads_a_row_of_x_and_of_weight(dtype, rng):
    x, weight = random(rng, (2, 29), dtype), random(rng, (5, 29), dtype)
    assert loads(call(ops.linear, x, weight), (1, 4)) == {"x": 29, "weight": 29}
    found = why(call(ops.linear, x, weight, random(rng, (5,), dtype)), (1, 4))
    assert {name: len(each) for name, each in found.loads.items()} == {"x": 29, "weight": 29, "bias": 1}
    assert found.load_count == 59
    assert all(value == x[at] for at, value in found.loads["x"].items())
    assert {at[0] for at in found.loads["weight"]} == {4}


@pytest.mark.parametrize("kind", FORMATS)
def test_packed_linear_reads_the_bytes_of_its_row(kind, rng):
    form, inputs = FORMATS[kind], 70  # two groups and 6 of a third
    made = call(ops.linear, random(rng, (1, inputs), "float32"), ops.tensor(random(rng, (9, inputs), "float32"), kind))
    codes = 64 * form.bits // 8 + (6 if form.parts == 1 else 4)  # of the last six, two share bytes with others in q4
    assert loads(made, (0, 8)) == {"x": inputs, "weight": codes + 3 * np.dtype(form.scale).itemsize}


def test_norm_and_embedding_read_no_more_than_they_must(rng):
    x = random(rng, (3, 41), "float32")
    assert loads(call(ops.rms_norm, x, x[0].copy(), eps=1e-5), (1, 7)) == {"x": 41, "weight": 1}
    assert loads(call(ops.embedding, np.array([5, 2], "int32"), random(rng, (9, 4), "float32")), (1, 3)) == {
        "ids": 1, "weight": 1,
    }  # fmt: skip


@pytest.mark.parametrize("window", [None, 4])
def test_attention_reads_only_the_keys_that_the_query_sees(window, rng):
    q, k, v = (random(rng, shape, "float32") for shape in ((2, 4, 8), (30, 2, 8), (30, 2, 6)))
    k[18:], v[18:] = np.nan, np.nan
    found = why(call(ops.attention, q, k, v, np.array([3, 17], "int32"), scale=0.2, window=window), (1, 3, 5))
    visible = range(18) if window is None else range(14, 18)
    assert {name: len(each) for name, each in found.loads.items()} == {
        "positions": 1, "q": 8, "k": 8 * len(visible), "v": len(visible),
    }  # fmt: skip
    assert {at[0] for at in found.loads["v"]} == set(visible)
    assert {at[1] for at in found.loads["v"]} == {1}


def test_cache_write_explains_what_was_written_and_what_was_left(rng):
    cache, x = random(rng, (6, 1, 2), "float16"), random(rng, (3, 1, 2), "float32")
    made = call(ops.cache_write, cache.copy(), x, np.array([4, 1, 4], "int32"))
    assert why(made, (4, 0, 1)).value == np.float16(x[2, 0, 1])
    untouched = why(made, (0, 0, 1), "cache")
    assert untouched.value == untouched.actual == cache[0, 0, 1]
    assert np.array_equal(made.args[0].numpy(), cache)  # the kernel ran on a copy


def test_of_a_record(rng):
    x, weight = (ops.tensor(random(rng, shape, "bfloat16")) for shape in ((4, 50), (6, 50)))
    with trace(keep=True) as t:
        output = ops.linear(x, weight)
    found = why(t.records[0], (-1, 2))
    assert (found.address, found.index, found.kernel) == (t.records[0].full_address, (3, 2), "tvm")
    assert found.actual == float(output.numpy()[3, 2])
    assert found.value == pytest.approx(found.actual, rel=1e-2)
    assert found.worst is not None
    assert found.worst.block == "bias"  # the store as bfloat16 rounds most
    assert found.worst.rounded == found.value


def test_of_a_record_of_a_call_that_writes(rng):
    cache, x = random(rng, (5, 2, 3), "float32"), random(rng, (1, 2, 3), "float32")
    with trace(keep=True) as t:
        ops.cache_write(ops.tensor(cache.copy()), ops.tensor(x), ops.tensor(np.array([2], "int32")))
    assert why(t.records[0], (2, 1, 1)).value == x[0, 1, 1]
    assert why(t.records[0], (3, 1, 1)).value == cache[3, 1, 1]


def test_a_wrong_kernel_is_shown_beside_the_definition(rng):
    def doubled(x):
        return 2 * x

    x = ops.tensor(random(rng, (2, 3), "float32"))
    with ops.neg.use(doubled), trace(keep=True) as t:
        ops.neg(x)
    found = why(t.records[0], (1, 2))
    assert (found.actual, found.value, found.kernel) == (2 * x.numpy()[1, 2], -x.numpy()[1, 2], "doubled")


def test_partial_sums_and_the_place_of_most_rounding():
    x = np.ones((1, 64), "float32")
    x[0, 20], x[0, 40] = 2**24, -(2**24)  # what is added in between is lost: 2**24 + 1 is 2**24
    found = why(call(ops.linear, x, np.ones((1, 64), "float32")), (0, 0))
    assert (found.value, found.exact) == (20 + 23, 62)
    assert found.partial[20:40] == (2**24 + 20,) * 20  # 20 stand before it
    assert found.partial_exact[39] == 2**24 + 20 + 19
    assert found.worst is not None
    assert found.worst.block == "dot"
    assert found.worst.exact - found.worst.rounded == 19
    assert found.script.splitlines()[found.worst.line - 1].strip() == found.worst.text
    assert found.worst.text.startswith("dot_of_row[v0, v1] = dot_of_row[v0, v1] + ")
    assert [term.value for term in found.terms[:2]] == [2**24, -(2**24)]
    assert found.terms[0].step == "v2=20"
    assert found.terms[0].operands == {"x[0, 20]": 2.0**24, "weight[0, 20]": 1.0}


def test_the_line_is_that_of_the_result(rng):
    made = call(ops.top_k, random(rng, (2, 9), "float32"), k=2)
    for result in ("output", "output 1"):
        found = why(made, (1, 1), result)
        assert found.script == ops.top_k.tir(*made.args, k=2)
        assert found.script.splitlines()[found.line - 1].strip() == found.source
    assert found.source.endswith("= c")


def test_text_and_html(rng):
    made = call(ops.linear, random(rng, (2, 9), "float32"), random(rng, (3, 9), "float32"))
    found = why(made, (1, 2))
    text = repr(found)
    for part in ("layers.2/linear[1]@4  output[1, 2]", f"{found.actual:.9g}", "18: 9 x, 9 weight", "weight[2, "):
        assert part in text
    assert "dot_of_row[v0, v1] = " in found._repr_html_()
    assert "<x>" not in found._repr_html_()


def test_long_sums_take_moments(rng):
    x, weight = random(rng, (1, 2048), "float32"), random(rng, (2, 2048), "float32")
    linear = call(ops.linear, x, weight)
    q, k, v = (random(rng, shape, "float32") for shape in ((1, 2, 64), (1024, 1, 64), (1024, 1, 64)))
    attention = call(ops.attention, q, k, v, np.array([1023], "int32"), scale=0.125)
    for made, index, bound in ((linear, (0, 1), 2), (attention, (0, 1, 63), 5)):
        assert why(made, index).load_count > 0  # the kernel is built
        began = time.process_time()
        why(made, index)
        assert time.process_time() - began < bound


def test_errors(rng):
    x = ops.tensor(random(rng, (2, 3), "float32"))
    with trace(keep=True) as t:
        ops.neg(x)
    record = t.records[0]
    with pytest.raises(OpError, match=r"output is float32\[2, 3\]: there is no element \[2, 0\]"):
        why(record, (2, 0))
    with pytest.raises(OpError, match="an element has 2 indices, given \\[1\\]"):
        why(record, 1)
    with pytest.raises(OpError, match="gives output, not 'output 1'"):
        why(record, (0, 0), "output 1")
    with trace() as bare, trace(keep="outputs") as outputs:
        ops.neg(x)
    with pytest.raises(OpError, match=r"/neg\[\d+\]@0: input x was not kept, and is needed; trace with keep=True"):
        why(bare.records[0], (0, 0))
    with pytest.raises(OpError, match="input x was not kept"):
        why(outputs.records[0], (0, 0))
    with pytest.raises(OpError, match="moments has no block definition"):
        why(call(debug.statistics.moments, x.reshape(-1)), 0)
    assert isinstance(record, Record)
    record.op_name = "nothing"
    with pytest.raises(OpError, match="this process has no op nothing"):
        why(record, (0, 0))
