"""Small calls of every op at the edges of what it takes: one row and many, widths that fill no vector, one head.

Generated kernels are tested with them, and a kernel that replaces an op's own is verified with them. An op of yours
gets its own beside its rule: `@my_op.examples` over a function of a NumPy generator and a float dtype that yields
(args, constants); arrays among the args become tensors. All values are finite, but for memory that must not be looked
at, and so is every result.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from . import pointwise, target
from .attention import attention
from .attention_steps import mix, scores, softmax_with_sinks
from .embedding import cache_write, columns, concat, embedding, join
from .experts import experts_linear
from .linear import linear
from .norm import layer_norm, rms_norm
from .op import Op
from .quantize import FORMATS, KNOWN, Format, Groups, assemble
from .recurrent import token_mix, wkv
from .reduce import argmax, log_softmax, softmax, top_k
from .rotary import rope
from .routing import combine, route
from .spec import DTYPES, FLOATS, Spec
from .state_space import causal_conv, selective_scan, softplus
from .tensor import Tensor, tensor, tensor_from_packed

Example = tuple[tuple, dict[str, Any]]
_SHAPES = ((1,), (1, 7), (3, 33), (2, 3, 20), (17, 64))  # of element-wise ops
_ROWS = ((1, 1), (1, 31), (5, 20), (3, 33), (17, 130), (2, 1024))  # of ops along the last axis


def of(op: Op, dtype: str = "float32", seed: int = 0) -> list[Example]:
    """Calls of `op` with float arguments of `dtype`: (args, constants) each. Empty where the op has no examples.

    Args are Tensors of their own, the same values for the same seed: a call may write them.
    """
    if dtype not in FLOATS:
        raise ValueError(f"dtype is {dtype!r}, expected one of {', '.join(FLOATS)}")
    if op._examples is None:
        return []
    found = op._examples(np.random.default_rng(seed), dtype)
    return [(tuple(_given(each) for each in args), dict(constants)) for args, constants in found]


def _given(value: Any) -> Any:
    return tensor(value.copy()) if isinstance(value, np.ndarray) else value


def _values(rng: np.random.Generator, shape: tuple[int, ...], dtype: str, scale: float = 1.0) -> np.ndarray:
    return (rng.standard_normal(shape) * scale).astype(DTYPES[dtype])


def _weight(rng: np.random.Generator, shape: tuple[int, int], held: str, scale: float = 1.0) -> Tensor:
    """Held in a float dtype or packed. What is not made from floats, only taken over, has codes drawn by chance."""
    if held in FLOATS or held in FORMATS:
        return tensor(_values(rng, shape, held if held in FLOATS else "float32", scale), held)
    drawn = partial(_groups, rng, KNOWN[held], shape[1])
    return tensor_from_packed(assemble(shape, held, lambda start, stop: drawn(stop - start)), Spec(shape, held))


def _groups(rng: np.random.Generator, form: Format, inputs: int, rows: int) -> Groups:
    groups = -(-inputs // form.group)
    codes = rng.integers(0, 2**form.bits, (rows, groups, form.group), "uint8")
    if form.shared == 1:
        return Groups(codes, (rng.uniform(0.5, 1, (rows, groups)) / np.ptp(form.values)).astype(form.scale))
    factors = (rows, -(-groups // form.shared))
    numbers = [rng.integers(1, 64, (rows, groups)).astype(form.scale) for _ in range(1 + form.minimum)]
    parts = [rng.uniform(-1, 1, factors) / 2**form.bits / 64 for _ in numbers]
    return Groups(codes, numbers[0], numbers[1] if form.minimum else None, tuple(p.astype("float16") for p in parts))


def _elements(rng: np.random.Generator, dtype: str, count: int = 1, **constants: Any) -> Iterator[Example]:
    for shape in _SHAPES:
        # Within what a function and its reference can both tell: gelu's tail cancels away in any arithmetic.
        yield tuple(_values(rng, shape, dtype, 2.0).clip(-3, 3) for _ in range(count)), constants


def _row(rng: np.random.Generator, dtype: str) -> Iterator[Example]:
    for shape in _SHAPES[1:]:
        yield (_values(rng, shape, dtype), _values(rng, shape[-1:], dtype)), {}


def _scalar(rng: np.random.Generator, dtype: str) -> Iterator[Example]:
    for (x,), _ in _elements(rng, dtype):
        yield (x, float(rng.uniform(0.5, 2))), {}


def _away_from_zero(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    return (rng.uniform(0.5, 2, shape) * rng.choice((-1, 1), shape)).astype(DTYPES[dtype])


for _op in (pointwise.neg, pointwise.tanh, pointwise.silu, pointwise.sigmoid, pointwise.relu):
    _op.examples(_elements)
for _op in (pointwise.add, pointwise.sub, pointwise.mul, pointwise.silu_mul):
    _op.examples(partial(_elements, count=2))
for _op in (pointwise.add_row, pointwise.mul_row):
    _op.examples(_row)
for _op in (pointwise.scale, pointwise.offset, pointwise.div_by):
    _op.examples(_scalar)
pointwise.softcap.examples(partial(_elements, cap=2.5))
pointwise.clamp.examples(partial(_elements, limit=0.75))
pointwise.clamped_swiglu.examples(partial(_elements, count=2, alpha=1.702, limit=1.5))


@pointwise.gelu.examples
def _(rng, dtype):
    yield from _elements(rng, dtype)
    yield from _elements(rng, dtype, approximate="tanh")


@pointwise.gelu_mul.examples
def _(rng, dtype):
    yield from _elements(rng, dtype, 2)
    yield from _elements(rng, dtype, 2, approximate="tanh")


@pointwise.div.examples
def _(rng, dtype):
    for shape in _SHAPES:
        yield (_values(rng, shape, dtype), _away_from_zero(rng, shape, dtype)), {}


@pointwise.div_into.examples
def _(rng, dtype):
    for shape in _SHAPES:
        yield (_away_from_zero(rng, shape, dtype), float(rng.uniform(0.5, 2))), {}


@pointwise.cast.examples
def _(rng, dtype):
    for shape in _SHAPES:
        for other in FLOATS:
            yield (_values(rng, shape, dtype),), {"dtype": other}
    if dtype == "float32":
        yield (_values(rng, (3, 33), dtype, 1000.0),), {"dtype": "int32"}
        yield (rng.integers(-1000, 1000, (3, 33), "int32"),), {"dtype": "float32"}


@pointwise.copy.examples
def _(rng, dtype):
    yield from _elements(rng, dtype)
    for other in ("int64", "int32", "int8", "uint8"):
        yield (rng.integers(0, 100, (3, 5)).astype(other),), {}


def _rows(rng: np.random.Generator, dtype: str) -> Iterator[Example]:
    for shape in (*_ROWS, (1, 1, 1), (3, 2, 33)):
        yield (_values(rng, shape, dtype, 4.0),), {}
    masked = _values(rng, (3, 2, 9), dtype)
    masked[..., 4:] = -np.inf  # what a query does not see
    yield (masked,), {}


softmax.examples(_rows)


@log_softmax.examples
def _(rng, dtype):
    yield from list(_rows(rng, dtype))[:-1]


def _ranked(rng: np.random.Generator, dtype: str) -> Iterator[np.ndarray]:
    for shape in _ROWS:
        yield _values(rng, shape, dtype)
    yield rng.integers(-2, 3, (5, 40)).astype(DTYPES[dtype])  # many are equal


@argmax.examples
def _(rng, dtype):
    for x in _ranked(rng, dtype):
        yield (x,), {}


@top_k.examples
def _(rng, dtype):
    for x in _ranked(rng, dtype):
        for k in sorted({1, min(5, x.shape[1])}):
            yield (x,), {"k": k}


@rms_norm.examples
def _(rng, dtype):
    for i, (n, width) in enumerate(_ROWS):
        weight = _values(rng, (width,), ("float32", dtype)[i % 2])
        yield (_values(rng, (n, width), dtype, 2.0), weight), {"eps": 1e-5, "plus_one": i == 2}


@layer_norm.examples
def _(rng, dtype):
    for i, (n, width) in enumerate(_ROWS[1:]):
        rows = [_values(rng, (width,), ("float32", dtype)[i % 2]) for _ in range(1 + i % 2)]
        yield (_values(rng, (n, width), dtype, 2.0), *rows), {"eps": 1e-5}


@linear.examples
def _(rng, dtype):
    for n, k, out, biased in ((1, 1, 1, False), (1, 33, 7, True), (3, 130, 17, False), (17, 64, 48, True)):
        for held in dict.fromkeys((dtype, "float32", *KNOWN)):
            bias = (_values(rng, (out,), dtype),) if biased else ()
            yield (_values(rng, (n, k), dtype), _weight(rng, (out, k), held, 0.3), *bias), {}
    yield (_values(rng, (70, 160), dtype), _values(rng, (130, 160), dtype, 0.3)), {}


@embedding.examples
def _(rng, dtype):
    for n, vocabulary, width, ids in ((1, 1, 5, "int32"), (3, 10, 33, "int64"), (17, 50, 64, "int32")):
        for held in (dtype, *KNOWN):
            weight = _weight(rng, (vocabulary, width), held)
            yield (rng.integers(0, vocabulary, n).astype(ids), weight), {"dtype": None if n == 1 else dtype}


@concat.examples
def _(rng, dtype):
    for n, m, rest in ((1, 1, ()), (0, 2, (3,)), (3, 0, (2, 5)), (5, 17, (3, 20))):
        yield (_values(rng, (n, *rest), dtype), _values(rng, (m, *rest), dtype)), {}
    yield (rng.integers(0, 9, (2, 3), "int32"), rng.integers(0, 9, (1, 3), "int32")), {}


@columns.examples
def _(rng, dtype):
    for shape, start, stop in (((1, 1), 0, 1), ((3, 33), 5, 12), ((17, 2, 20), 4, 20)):
        yield (_values(rng, shape, dtype),), {"start": start, "stop": stop}
    yield (rng.integers(0, 9, (2, 3), "int32"),), {"start": 1, "stop": 3}


@join.examples
def _(rng, dtype):
    for n, heads, others, a, b in ((1, 1, 1, 1, 1), (3, 2, 2, 20, 7), (17, 5, 1, 33, 8)):
        yield (_values(rng, (n, heads, a), dtype), _values(rng, (n, others, b), dtype)), {}
    yield (rng.integers(0, 9, (2, 2, 3), "int32"), rng.integers(0, 9, (2, 1, 1), "int32")), {}


@cache_write.examples
def _(rng, dtype):
    for n, t, heads, dim in ((1, 1, 1, 5), (3, 9, 2, 33), (17, 40, 3, 64)):
        for held in dict.fromkeys((dtype, "float32")):
            positions = rng.permutation(t)[:n].astype("int32")
            yield (_values(rng, (t, heads, dim), held), _values(rng, (n, heads, dim), dtype), positions), {}
    repeated = np.array([2, 0, 2, 2, 1], "int32")  # the last of equal positions stays
    yield (_values(rng, (4, 2, 6), dtype), _values(rng, (5, 2, 6), dtype), repeated), {}


@rope.examples
def _(rng, dtype):
    for n, heads, dim, half in ((1, 1, 2, 1), (3, 2, 12, 6), (17, 3, 40, 10), (2, 4, 64, 32)):
        positions = rng.integers(0, 200, n).astype("int32")
        frequencies = (10000.0 ** -(np.arange(half) / half)).astype("float32")
        for interleaved, scale in ((False, 1.0), (True, 1.25)):
            x = _values(rng, (n, heads, dim), dtype)
            yield (x, positions, frequencies), {"interleaved": interleaved, "scale": scale}


# n, t, heads, kv_heads, dim, v_dim, window, softcap
_ATTENTIONS = (
    (1, 1, 1, 1, 4, 4, None, None),
    (1, 37, 4, 2, 33, 20, None, None),
    (3, 9, 2, 2, 16, 16, 2, None),
    (17, 40, 6, 2, 32, 32, None, 5.0),
    (2, 300, 3, 1, 64, 64, 100, None),
)


def _keys(rng: np.random.Generator, dtype: str) -> Iterator[tuple]:
    for n, t, heads, kv_heads, dim, v_dim, window, softcap in _ATTENTIONS:
        used = max(n, t - 3)  # of the cache; the rows after hold what was in memory
        positions = np.arange(used - n, used).astype("int32")
        k, v = _values(rng, (t, kv_heads, dim), dtype), _values(rng, (t, kv_heads, v_dim), dtype)
        k[used:], v[used:] = np.nan, np.nan
        constants = {"scale": dim**-0.5, "window": window, "softcap": softcap}
        yield _values(rng, (n, heads, dim), dtype), k, v, positions, constants


@attention.examples
def _(rng, dtype):
    for q, k, v, positions, constants in _keys(rng, dtype):
        yield (q, k, v, positions), constants
        if q.shape[1] > 1:
            yield (q, k, v, positions, _values(rng, q.shape[1:2], dtype)), constants


@scores.examples
def _(rng, dtype):
    for q, k, _, positions, constants in _keys(rng, dtype):
        yield (q, k, positions), constants


@softmax_with_sinks.examples
def _(rng, dtype):
    for shape in ((1, 1, 1), (3, 2, 33), (17, 3, 130)):
        yield (_values(rng, shape, "float32", 4.0), _values(rng, shape[1:2], dtype)), {}


@mix.examples
def _(rng, dtype):
    for n, t, heads, kv_heads, _, v_dim, *_ in _ATTENTIONS:
        weights = rng.random((n, heads, t), "float32")
        weights[..., t // 2 + 1 :] = 0  # rows of v that nobody looks at
        v = _values(rng, (t, kv_heads, v_dim), dtype)
        v[t // 2 + 1 :] = np.nan
        yield (weights / weights.sum(-1, keepdims=True), v), {"dtype": dtype}


@experts_linear.examples
def _(rng, dtype):
    lanes = target.lanes()  # a packed expert has as many rows, or a multiple
    sizes = ((1, 1, 1, 1, 1), (1, 130, lanes, 3, 2), (3, 33, 2 * lanes, 4, 2), (17, 64, lanes, 8, 3))
    for n, inputs, outputs, experts, k in sizes:
        x = _values(rng, (n, k, inputs) if n == 3 else (n, inputs), dtype)
        ids = np.argsort(rng.random((n, experts)))[:, :k].astype("int32")
        for held in dict.fromkeys((dtype, "float32", *(KNOWN if outputs > 1 else ()))):
            bias = (_values(rng, (experts * outputs,), dtype),) if n > 1 else ()
            yield (x, _weight(rng, (experts * outputs, inputs), held, 0.3), ids, *bias), {"experts": experts}


@route.examples
def _(rng, dtype):
    yield (_values(rng, (1, 1), dtype),), {"k": 1}
    yield (_values(rng, (3, 9), dtype),), {"k": 4, "normalise": True}
    yield (_values(rng, (17, 32), dtype), _values(rng, (32,), "float32", 0.1)), {"k": 6, "scoring": "sigmoid"}
    grouped = {"groups": 4, "kept": 2, "scale": 2.5}
    yield (_values(rng, (5, 16), dtype),), {"k": 3, **grouped}
    biased = (_values(rng, (5, 16), dtype), _values(rng, (16,), dtype, 0.1))
    yield biased, {"k": 3, "scoring": "sigmoid", "normalise": True, "best": 2, **grouped}


@combine.examples
def _(rng, dtype):
    for n, k, width in ((1, 1, 1), (1, 4, 33), (3, 2, 20), (17, 8, 64)):
        yield (_values(rng, (n, k, width), dtype), rng.random((n, k), "float32")), {}


@token_mix.examples
def _(rng, dtype):
    for n, width in ((1, 1), (3, 33), (17, 64)):
        yield tuple(_values(rng, shape, dtype) for shape in ((n, width), (1, width), (width,))), {}


@wkv.examples
def _(rng, dtype):
    for n, width in ((1, 1), (3, 33), (17, 64)):
        decay, first, *state = (_values(rng, (width,), "float32") for _ in range(5))
        state = np.stack((state[0], 1 + abs(state[1]), state[2])) if n > 1 else np.array([[0], [0], [-1e38]], "float32")
        yield (_values(rng, (n, width), dtype, 2.0), _values(rng, (n, width), dtype), decay, first, state), {}


@softplus.examples
def _(rng, dtype):
    yield from _elements(rng, dtype)
    yield from _elements(rng, dtype, low=0.25, high=1.5)


@causal_conv.examples
def _(rng, dtype):
    for i, (n, width, taps) in enumerate(((1, 1, 2), (2, 20, 4), (3, 33, 4), (17, 64, 3))):
        shapes = ((n, width), (taps - 1, width), (width, taps), *([(width,)] if i % 2 else []))
        kinds = (dtype, dtype, *((dtype, "float32")[i // 2],) * 2)
        yield tuple(_values(rng, *each) for each in zip(shapes, kinds, strict=False)), {}


@selective_scan.examples
def _(rng, dtype):
    for n, heads, dim, groups, size in ((1, 1, 1, 1, 1), (1, 4, 20, 2, 16), (3, 6, 5, 3, 7), (17, 2, 16, 1, 32)):
        x, b, c = (_values(rng, shape, dtype) for shape in ((n, heads, dim), *((n, groups, size),) * 2))
        step = rng.random((n, heads), "float32")
        decay, skip, state = (_values(rng, shape, "float32") for shape in ((heads,), (heads,), (heads, dim, size)))
        yield (x, step, decay, b, c, skip, state), {}
