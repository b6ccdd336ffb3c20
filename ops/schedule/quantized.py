"""y = x @ weight.T on the CPU for packed weights: activations become int8 by groups, products are added up as integers.

One kernel serves any number of tokens: a thread takes a few blocks of `lanes` weight rows at a time and goes through
their records in the order of memory. A record is unpacked to registers and multiplied with all tokens at hand; the sum
over the group becomes a float and is added to the token's. All sums are in this order, so that a token's result is the
same to the bit however many tokens come with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx.script import builder as T

from .. import target
from ..quantize import TINIEST, Format
from . import vector
from .cpu import PARALLEL_WORK
from .dot import Dot
from .flash import held
from .vector import i64

FEW = 16  # tokens, up to which reading the weight takes longer than multiplying it
STREAMS = 2  # blocks of rows that a thread takes at a time
ROWS_OF_ONE = 32  # rows a thread takes at a time for one token, which waits for memory alone: 4 blocks of 8, 2 of 16
MOST = 128  # tokens a tile, whose sums stay in the first-level cache
AHEAD = 4096  # bytes between the record that is multiplied and the one that is fetched
LINE = 64  # bytes of a cache line


@dataclass(frozen=True)
class Product:
    """The product to compute: x [n, k] and y [n, rows] are buffers, `weight` is the bytes of a packed [rows, k].

    n lies in `low` to `high`, which is None when it has no bound. `epilogue(token, row, value)` is what y holds, as
    float32, of a sum `value`. Where there is a `prologue`, x says only what its shape is: `prologue(token)` emits what
    comes before a row of x, and gives its elements, as float32, by index.
    """

    x: Any
    weight: Any
    y: Any
    n: Any
    low: int
    high: int | None
    rows: int
    form: Format
    epilogue: Callable[[Any, Any, Any], Any]
    prologue: Callable[[Any], Callable[[Any], Any]] | None = None

    @property
    def k(self) -> int:
        return int(self.x.shape[1])

    @property
    def lanes(self) -> int:
        return target.lanes()

    @property
    def blocks(self) -> int:
        return _ceil(self.rows, self.lanes)

    @property
    def groups(self) -> int:
        return _ceil(self.k, self.form.group)

    @property
    def threads(self) -> int:
        return min(target.threads(), self.blocks) if self.low * self.rows * self.k >= PARALLEL_WORK else 1

    @property
    def few(self) -> bool:
        """Whether reading the weight takes longer than multiplying it."""
        return self.high is not None and self.high <= FEW

    @property
    def tile(self) -> int:
        """How many tokens are multiplied with a record once it is unpacked, at the most."""
        if self.few:
            return self.high or 1
        # As int8 they take half of the second-level cache.
        return max(32, min(MOST, target.machine().l2 // 2 // self.k // 16 * 16))

    @property
    def together(self) -> int:
        """How many blocks of rows meet a token at once, and share the loads of its activations."""
        return STREAMS if target.registers() == 32 and self.high != 1 else 1

    @property
    def streams(self) -> int:
        """How many blocks of rows a thread takes at a time."""
        return min(4, ROWS_OF_ONE // self.lanes) if self.high == 1 else STREAMS

    @property
    def steps(self) -> int:
        """How many times a thread takes blocks of rows."""
        return _ceil(self.blocks, self.threads * self.streams)

    def block(self, thread: Any, step: Any, stream: int) -> Any:
        """The block of rows that a thread takes in a step. There may be fewer of them."""
        if self.few:  # far apart, as long runs through memory
            return (thread * self.streams + stream) * self.steps + step
        return (thread * self.steps + step) * self.streams + stream  # side by side, as whole cache lines of y


def emit(p: Product) -> None:
    """The loops of `p`, for the body of a prim_func that IRBuilder makes."""
    activations = Activations(p)
    activations.fill()
    with _loop(p.threads, p.threads > 1) as thread:
        totals = T.alloc_buffer((p.streams * p.tile, p.lanes), "float32", scope="global")
        with T.grid(activations.tiles, i64(p.steps)) as (tile, step):
            blocks = [T.bind(p.block(thread, step, stream)) for stream in range(p.streams)]
            _multiply(p, activations, tile, blocks, totals)
            for stream, block in enumerate(blocks):
                _store(p, activations, tile, block, stream, totals)


def _multiply(p: Product, activations: Activations, tile: Any, blocks: list, totals: Any) -> None:
    """The sums of blocks of rows for the tokens of a tile."""
    dot, count = Dot(target.machine(), p.form), activations.count(tile)
    with T.grid(i64(p.streams), count) as (stream, m):
        vector.store(totals, [stream * p.tile + m, i64(0)], vector.zeros(p.lanes), p.lanes)
    first = [T.bind(tirx.min(block, i64(p.blocks - 1)) * p.groups) for block in blocks]
    with T.serial(i64(0), i64(p.groups)) as group:
        for stream in range(0, p.streams, p.together):
            records = [Record(p, dot, each + group) for each in first[stream : stream + p.together]]
            with T.serial(i64(0), count) as m:
                at = activations.at(tile, group, m)
                rows = [[(stream + i) * p.tile + m, i64(0)] for i in range(p.together)]
                # All is computed before any is stored: after a store the activations would be loaded again.
                words, start = activations.words(at), activations.start(at)
                products = [held(dot.product(record.weights, words, start)) for record in records]
                added = [
                    held(with_group(record, activations, at, product, vector.load(totals, row, p.lanes)))
                    for record, product, row in zip(records, products, rows, strict=True)
                ]
                for row, total in zip(rows, added, strict=True):
                    vector.store(totals, row, total, p.lanes)


def with_group(record: Record, activations: Activations, at: Any, product: Any, total: Any) -> Any:
    """A token's total with a group's sum of products, int32, put to it."""
    lanes = target.lanes()
    factor = record.scale * T.broadcast(activations.scales[at], lanes)
    total = vector.fma(product.astype(f"float32x{lanes}"), factor, total, lanes)
    if record.minimum is None or activations.sums is None:
        return total
    return vector.fma(record.minimum, T.broadcast(activations.sums[at], lanes), total, lanes)


class Record:
    """The weights, scales and minima of record `index`, those of a block of rows and a group, in registers."""

    def __init__(self, p: Product, dot: Dot, index: Any):
        form, lanes = p.form, p.lanes
        size, factors = 4 * lanes, None
        if form.shared == 1:
            start = held(index * form.record(lanes))
        else:
            block, group = held(index // p.groups * form.block(p.groups, lanes)), held(index % p.groups)
            start, factors = held(block + form.start(group, lanes)), held(block + form.factor(group, lanes))
        if p.high != 1:  # one token's loads come so fast that the processor runs ahead by itself, and does it better
            for line in range(0, form.record(lanes), LINE):
                vector.prefetch(p.weight, [start + i64(AHEAD + line)])
        words = [held(p.weight.vload([start + i64(at)], f"uint8x{size}")) for at in range(0, form.codes(lanes), size)]
        self.weights = [held(dot.decode(each)) for each in dot.unpack(words)]
        scales = []
        for which in range(1 + form.minimum):
            at = form.codes(lanes) + which * lanes * np.dtype(form.scale).itemsize
            scale = _floats(p.weight, start + i64(at), form.scale, lanes)
            if factors is not None:
                scale = _floats(p.weight, factors + i64(which * 2 * lanes), "float16", lanes) * scale
            scales.append(held(scale))
        self.scale, self.minimum = scales[0], scales[1] if form.minimum else None


def _floats(source: Any, start: Any, dtype: str, lanes: int) -> tirx.Expr:
    """`lanes` numbers of `dtype` from byte `start` on, as float32."""
    kind, raw = f"{dtype}x{lanes}", source.vload([start], f"uint8x{lanes * np.dtype(dtype).itemsize}")
    return vector.widened(raw if dtype == "uint8" else tirx.reinterpret(kind, raw), dtype, f"x{lanes}")


class Activations:
    """The tokens as int8, in the order in which the kernel reads them: `tiles` of tokens, groups, tokens, inputs.

    For each token and group: its scale, what the sum of products begins with, and, where the format has a minimum, the
    sum of the group's values.
    """

    def __init__(self, p: Product):
        self.p = p
        self.tiles = i64(1) if p.few else T.bind(_ceil(p.n, p.tile))
        # Tokens are shared out evenly: a weight is not read once more for one that is left over.
        self.tokens = i64(p.tile) if p.few else T.bind(_ceil(p.n, tirx.max(self.tiles, i64(1))))
        size = self.tiles * self.tokens * p.groups
        self.codes = T.alloc_buffer((size * p.form.group,), "int8", scope="global")
        self.scales = T.alloc_buffer((size,), "float32", scope="global")
        self.starts = T.alloc_buffer((size,), "int32", scope="global")
        self.sums = T.alloc_buffer((size,), "float32", scope="global") if p.form.minimum else None

    def at(self, tile: Any, group: Any, m: Any) -> Any:
        """The index of a token's group."""
        return T.bind((tile * self.p.groups + group) * self.tokens + m)

    def count(self, tile: Any) -> Any:
        """How many tokens a tile has."""
        return i64(1) if self.p.high == 1 else T.bind(tirx.min(self.p.n - tile * self.tokens, self.tokens))

    def words(self, at: Any) -> list:
        """The group's activations, four in an int32."""
        group = self.p.form.group
        return [
            tirx.reinterpret("int32", self.codes.vload([at * group + i64(i)], "int8x4")) for i in range(0, group, 4)
        ]

    def start(self, at: Any) -> Any:
        return T.broadcast(self.starts[at], self.p.lanes)

    def fill(self) -> None:
        """Quantise all tokens."""
        p = self.p
        most = 4 * FEW if p.high is None else p.high
        with _loop(p.n, most * p.k >= PARALLEL_WORK and p.threads > 1) as token:
            tile, m = T.bind(token // self.tokens), T.bind(token % self.tokens)
            element = p.prologue(token) if p.prologue else partial(self._element, token)
            with T.serial(i64(0), i64(p.groups)) as group:
                self._quantize(element, group, self.at(tile, group, m))

    def _element(self, token: Any, i: Any) -> Any:
        return vector.widened(self.p.x[token, i], str(self.p.x.dtype))

    def _quantize(self, element: Callable[[Any], Any], group: Any, at: Any) -> None:
        """As in `ops.quantize.quantize_activations`, to the bit."""
        p, size = self.p, self.p.form.group
        first = group * size
        inside = i64(size) if p.k % size == 0 else tirx.min(i64(p.k) - first, i64(size))
        shift = Dot(target.machine(), p.form).shift
        scratch = T.alloc_buffer((size,), "float32", scope="global")
        largest, total = (T.alloc_buffer((1,), "int32", scope="global") for _ in range(2))
        for each in (largest, total):
            T.buffer_store(each, _i32(0), [0])
        if p.k % size:
            with T.serial(i64(0), i64(size)) as i:
                T.buffer_store(scratch, _f32(0), [i])
        with T.serial(i64(0), inside) as i:
            T.buffer_store(scratch, element(first + i), [i])
        with T.serial(i64(0), i64(size)) as i:
            # As integers, magnitudes are in order, and a NaN is above all of them.
            magnitude = tirx.reinterpret("int32", scratch[i]) & _i32(0x7FFFFFFF)
            T.buffer_store(largest, tirx.max(largest[0], magnitude), [0])
        magnitude = held(tirx.reinterpret("float32", largest[0]))
        finite = largest[0] < _i32(0x7F800000)
        used = tirx.And(finite, magnitude >= _f32(TINIEST))
        inverse = held(tirx.Select(used, _f32(127) / magnitude, _f32(0)))
        with T.serial(i64(0), i64(size)) as i:
            code = held(_nearest(tirx.Select(used, scratch[i], _f32(0)), inverse))
            T.buffer_store(self.codes, code.astype("int8"), [at * size + i])
            T.buffer_store(total, total[0] + code, [0])
        scale = tirx.Select(used, magnitude * _f32(1 / 127), tirx.Select(finite, _f32(0), _f32(np.nan)))
        T.buffer_store(self.scales, scale, [at])
        T.buffer_store(self.starts, total[0] * _i32(-shift), [at])
        if self.sums is not None:
            T.buffer_store(self.sums, total[0].astype("float32") * scale, [at])


def _nearest(x: Any, factor: Any) -> Any:
    """The integer nearest to x * factor, int32, rounded once: added to 1.5 * 2**23, a float's last bit counts ones."""
    if target.features() & {"fma", "neon"}:
        ones = vector.fma(x, factor, _f32(1.5 * 2**23), 1)
        return tirx.reinterpret("int32", ones) - _i32(0x4B400000)
    product = x.astype("float64") * factor.astype("float64")  # exact, whatever else is contracted
    ones = tirx.reinterpret("int64", product + tirx.const(1.5 * 2**52, "float64"))
    return ones.astype("int32")


def _store(p: Product, activations: Activations, tile: Any, block: Any, stream: int, totals: Any) -> None:
    """Rows of y of a block, where there is one."""
    count, whole, rest = activations.count(tile), p.rows // p.lanes, p.rows % p.lanes

    def store(m: Any, r: Any) -> None:
        token, row = tile * activations.tokens + m, block * p.lanes + r
        value = p.epilogue(token, row, totals[stream * p.tile + m, r])
        T.buffer_store(p.y, value.astype(p.y.dtype), [token, row])

    if whole:
        with T.If(block < whole), T.Then(), T.serial(i64(0), count) as m, T.vectorized(i64(0), i64(p.lanes)) as r:
            store(m, r)
    if rest:
        with T.If(block == whole), T.Then(), T.grid(count, i64(rest)) as (m, r):
            store(m, r)


def _f32(value: float) -> tirx.Expr:
    return tirx.const(float(value), "float32")


def _i32(value: int) -> tirx.Expr:
    return tirx.const(value, "int32")


def _loop(count: Any, parallel: bool) -> Any:
    return (T.parallel if parallel else T.serial)(i64(0), i64(count) if isinstance(count, int) else count)


def _ceil(value: Any, divisor: int) -> Any:
    """value / divisor, rounded up: for an int or an expression."""
    return (value + divisor - 1) // divisor
