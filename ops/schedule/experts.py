"""Products with the matrices of chosen experts on the CPU.

Pairs of a token and an expert are first put in the order of the experts, by counting. A thread takes a part of every
expert's rows; for each expert that somebody chose it reads its rows once, and goes with them through the expert's
tokens. All sums are in one order: a token's result does not depend on the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from .. import target
from ..quantize import Format
from . import quantized, vector
from .cpu import PARALLEL_WORK
from .dot import Dot
from .flash import held
from .vector import Register, i64

ROWS = 4  # weight rows of a tile
MOST = 128  # pairs whose sums a thread keeps at a time


class Flat:
    """Activations [n, inputs] or [n, slots, inputs] as rows [n * slots, inputs]."""

    def __init__(self, buffer: Any, slots: int):
        self.buffer, self.slots, self.dtype = buffer, slots, str(buffer.dtype)

    def _index(self, row: Any, i: Any) -> list:
        return [row, i] if len(self.buffer.shape) == 2 else [row // self.slots, row % self.slots, i]

    def __getitem__(self, at: tuple) -> Any:
        return self.buffer[tuple(self._index(*at))]

    def vload(self, at: list, dtype: str) -> Any:
        return self.buffer.vload(self._index(*at), dtype)


@dataclass(frozen=True)
class Mixture:
    """The product to compute: x, ids [n, k], y [n, k, outputs] are buffers, and so is `weight`, of all experts."""

    x: Any
    weight: Any
    ids: Any
    bias: Any
    y: Any
    n: Any
    low: int
    high: int | None
    experts: int
    form: Format | None

    @property
    def k(self) -> int:
        return int(self.ids.shape[1])

    @property
    def inputs(self) -> int:
        return int(self.x.shape[-1])

    @property
    def outputs(self) -> int:
        return int(self.y.shape[2])

    @property
    def slots(self) -> int:
        """Rows of x for a token."""
        return 1 if len(self.x.shape) == 2 else self.k

    @property
    def threads(self) -> int:
        return target.threads() if self.low * self.k * self.outputs * self.inputs >= PARALLEL_WORK else 1

    def line(self, pair: Any) -> Any:
        """The row of x that a pair takes."""
        return pair // self.k if self.slots == 1 else pair

    def store(self, pair: Any, expert: Any, output: Any, value: Any) -> None:
        if self.bias is not None:
            value = value + vector.widened(self.bias[expert * self.outputs + output], str(self.bias.dtype))
        T.buffer_store(self.y, value.astype(self.y.dtype), [pair // self.k, pair % self.k, output])


def emit(p: Mixture) -> None:
    """The loops of `p`, for the body of a prim_func that IRBuilder makes."""
    first, order = _sorted(p)
    products = _floats(p) if p.form is None else _packed(p)
    threads = p.threads
    with (T.parallel if threads > 1 else T.serial)(i64(0), i64(threads)) as thread:
        chunk = products(thread)
        with T.serial(i64(0), i64(p.experts)) as expert:
            begin = T.bind(first[expert].astype("int64"))
            count = T.bind(first[expert + 1].astype("int64") - begin)
            with T.If(count > 0), T.Then():
                chunk(expert, count, lambda i: order[begin + i].astype("int64"))


def _sorted(p: Mixture) -> tuple[Any, Any]:
    """Where each expert's pairs begin, and the pairs by expert, in the order of the tokens."""
    pairs = T.bind(p.n * p.k)
    first = T.alloc_buffer((p.experts + 1,), "int32", scope="global")
    place = T.alloc_buffer((p.experts,), "int32", scope="global")
    order = T.alloc_buffer((p.n * p.k,), "int32", scope="global")
    one = tirx.const(1, "int32")

    def expert(pair: Any) -> Any:
        return p.ids[pair // p.k, pair % p.k]

    with T.serial(i64(0), i64(p.experts + 1)) as e:
        T.buffer_store(first, tirx.const(0, "int32"), [e])
    with T.serial(i64(0), pairs) as pair:
        T.buffer_store(first, first[expert(pair) + one] + one, [expert(pair) + one])
    with T.serial(i64(0), i64(p.experts)) as e:
        T.buffer_store(place, first[e], [e])
        T.buffer_store(first, first[e + 1] + first[e], [e + 1])
    with T.serial(i64(0), pairs) as pair:
        T.buffer_store(order, pair.astype("int32"), [place[expert(pair)]])
        T.buffer_store(place, place[expert(pair)] + one, [expert(pair)])
    return first, order


def _floats(p: Mixture) -> Any:
    """Float weights: tiles of a few tokens by a few rows, a vector of partial sums for each, its lanes along k."""
    lanes, height = target.lanes(), 1 if p.high == 1 else 2
    arithmetic, x = vector.Arithmetic(lanes), Flat(p.x, p.slots)
    whole = p.inputs // lanes
    length = _ceil(_ceil(p.outputs, p.threads), ROWS) * ROWS

    def products(thread: Any) -> Any:
        sums = T.alloc_buffer((height, ROWS), "float32", scope="global")

        def tile(expert: Any, count: Any, pair: Any, row: Any, i: Any) -> None:
            pairs = [T.bind(pair(tirx.min(i + m, count - 1))) for m in range(height)]
            lines = [T.bind(p.line(each)) for each in pairs]
            rows = [T.bind(expert * p.outputs + tirx.min(row + s, i64(p.outputs - 1))) for s in range(ROWS)]
            totals = [[Register(lanes) for _ in range(ROWS)] for _ in range(height)]

            def step(v: Any, filled: int = lanes) -> None:
                tokens = [T.bind(arithmetic.load(x, [line, v * lanes], filled)) for line in lines]
                for s in range(ROWS):
                    weight = T.bind(arithmetic.load(p.weight, [rows[s], v * lanes], filled))
                    for m in range(height):
                        totals[m][s].value = arithmetic.add(tokens[m], weight, totals[m][s].value)

            with T.serial(i64(0), i64(whole)) as v:
                step(v)
            if p.inputs % lanes:
                step(i64(whole), p.inputs % lanes)
            for m in range(height):
                vector.store(sums, [m, i64(0)], vector.lane_sums([each.value for each in totals[m]], lanes), ROWS)
            for m in range(height):
                with T.If(i + m < count), T.Then(), T.serial(i64(0), tirx.min(i64(p.outputs) - row, i64(ROWS))) as s:
                    p.store(pairs[m], expert, row + s, sums[m, s])

        def chunk(expert: Any, count: Any, pair: Any) -> None:
            with T.serial(i64(0), i64(length // ROWS)) as r:
                row = T.bind(thread * length + r * ROWS)
                with T.If(row < p.outputs), T.Then(), T.serial(i64(0), _ceil(count, height)) as i:
                    tile(expert, count, pair, row, i * height)

        return chunk

    return products


def _packed(p: Mixture) -> Any:
    """Packed weights: activations become int8 once; a record is unpacked to registers and meets all the tokens."""
    assert p.form is not None
    lanes, x = target.lanes(), Flat(p.x, p.slots)
    rows = T.bind(p.n * p.slots)
    high = None if p.high is None else p.high * p.slots
    inner = quantized.Product(
        _Shape(p.inputs), p.weight, p.y, rows, p.low * p.slots, high, p.experts * p.outputs, p.form, _unused,
        lambda row: partial(lambda row, i: vector.widened(x[row, i], x.dtype), row),
    )  # fmt: skip
    activations = quantized.Activations(inner)
    activations.fill()
    dot, blocks = Dot(target.machine(), p.form), p.outputs // lanes
    length = _ceil(blocks, p.threads)

    def products(thread: Any) -> Any:
        totals = T.alloc_buffer((MOST, lanes), "float32", scope="global")

        def block_of(expert: Any, count: Any, pair: Any, block: Any, start: Any) -> None:
            some = T.bind(tirx.min(count - start, i64(MOST)))
            with T.serial(i64(0), some) as i:
                vector.store(totals, [i, i64(0)], vector.zeros(lanes), lanes)
            with T.serial(i64(0), i64(inner.groups)) as group:
                record = quantized.Record(inner, dot, (expert * blocks + block) * inner.groups + group)
                with T.serial(i64(0), some) as i:
                    line = T.bind(p.line(pair(start + i)))
                    at = activations.at(line // activations.tokens, group, line % activations.tokens)
                    product = held(dot.product(record.weights, activations.words(at), activations.start(at)))
                    before = vector.load(totals, [i, i64(0)], lanes)
                    total = held(quantized.with_group(record, activations, at, product, before))
                    vector.store(totals, [i, i64(0)], total, lanes)
            with T.grid(some, i64(lanes)) as (i, r):
                p.store(pair(start + i), expert, block * lanes + r, totals[i, r])

        def chunk(expert: Any, count: Any, pair: Any) -> None:
            with T.serial(i64(0), i64(length)) as b:
                block = T.bind(thread * length + b)
                with T.If(block < blocks), T.Then(), T.serial(i64(0), _ceil(count, MOST)) as i:
                    block_of(expert, count, pair, block, i * MOST)

        return chunk

    return products


@dataclass(frozen=True)
class _Shape:
    """What `quantized.Product` asks of x where a prologue gives its elements."""

    inputs: int

    @property
    def shape(self) -> tuple[int, int]:
        return 0, self.inputs


def _unused(*_: Any) -> Any:
    raise AssertionError("the sums of a mixture are stored by `Mixture.store`")


def _ceil(value: Any, divisor: int) -> Any:
    """value / divisor, rounded up: for an int or an expression."""
    return (value + divisor - 1) // divisor
