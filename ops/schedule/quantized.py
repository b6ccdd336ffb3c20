"""y = x @ weight.T on the CPU for packed weights: activations become int8 by groups, products are added up as integers.

One kernel serves any number of tokens: a thread takes blocks of `lanes` weight rows, several streams of them at once,
and goes through their records in the order of memory. A record is unpacked to registers and multiplied with all tokens
at hand, a group of them at a time; the group's sum becomes a float and is added to the token's. All sums are in this
order, so that a token's result is the same to the bit however many tokens come with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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
_ACTIVATIONS = 256 * 2**10  # bytes of quantised activations that stay in a core's second-level cache


@dataclass(frozen=True)
class Product:
    """The product to compute: x [n, k] and y [n, rows] are buffers, `weight` is the bytes of a packed [rows, k].

    n lies in `low` to `high`, which is None when it has no bound. `epilogue(token, row, value)` is what y holds, as
    float32, of a sum `value`.
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
    def tile(self) -> int:
        """How many tokens are multiplied with a record once it is unpacked, at the most."""
        if self.high is not None and self.high <= FEW:
            return self.high
        return max(32, min(128, _ACTIVATIONS // self.k // 16 * 16))

    @property
    def streams(self) -> int:
        """Blocks of rows that a thread takes at a time. Memory is read fastest in several places at once."""
        share = _ceil(self.blocks, self.threads)
        if self.high is None or self.high > FEW:
            return 1
        return max((4, 3, 6, 2, 1), key=lambda s: share / _ceil(share, s) / s * (1 if s > 2 else 0.8))


def emit(p: Product) -> None:
    """The loops of `p`, for the body of a prim_func that IRBuilder makes."""
    tiles = T.bind(_ceil(p.n, p.tile))
    activations = Activations(p, tiles)
    activations.fill()
    length = _ceil(p.blocks, p.threads * p.streams)
    with _loop(p.threads, p.threads > 1) as thread:
        totals = T.alloc_buffer((p.streams * p.tile, p.lanes), "float32", scope="global")
        with T.serial(i64(0), tiles) as tile:
            count = i64(1) if p.high == 1 else T.bind(tirx.min(p.n - tile * p.tile, i64(p.tile)))
            with T.serial(i64(0), i64(length)) as i:
                blocks = [T.bind((thread * p.streams + s) * length + i) for s in range(p.streams)]
                _multiply(p, activations, tile, count, blocks, totals)
                for s, block in enumerate(blocks):
                    _store(p, tile, count, block, s, totals)


def _multiply(p: Product, activations: Activations, tile: Any, count: Any, blocks: list, totals: Any) -> None:
    """The sums of blocks of rows for the tokens of a tile."""
    dot, lanes = Dot(target.machine(), p.form), p.lanes
    with T.serial(i64(0), i64(p.streams)) as s, T.serial(i64(0), count) as m:
        vector.store(totals, [s * p.tile + m, i64(0)], vector.zeros(lanes), lanes)
    first = [T.bind(tirx.min(block, i64(p.blocks - 1)) * p.groups) for block in blocks]
    with T.serial(i64(0), i64(p.groups)) as group:
        for s, start in enumerate(first):
            record = Record(p, dot, (start + group) * p.form.record(lanes))
            with T.serial(i64(0), count) as m:
                at = activations.at(tile, group, m)
                product = dot.product(record.weights, activations.words(at), activations.start(at, lanes))
                factor = record.scale * T.broadcast(activations.scales[at], lanes)
                index = [s * p.tile + m, i64(0)]
                total = vector.fma(product.astype(f"float32x{lanes}"), factor, vector.load(totals, index, lanes), lanes)
                if record.minimum is not None and activations.sums is not None:
                    total = vector.fma(record.minimum, T.broadcast(activations.sums[at], lanes), total, lanes)
                vector.store(totals, index, total, lanes)


class Record:
    """The weights, scales and minima of a block of rows and a group, in registers."""

    def __init__(self, p: Product, dot: Dot, start: Any):
        form, lanes = p.form, p.lanes
        size = 4 * lanes
        count = form.group // (4 * form.parts)
        start = held(start)
        words = [held(p.weight.vload([start + i64(size * i)], f"uint8x{size}")) for i in range(count)]
        self.weights = [held(dot.decode(each)) for each in dot.unpack(words)]
        bytes_a_scale = np.dtype(form.scale).itemsize
        scales = [
            held(_floats(p.weight, start + i64(size * count + lanes * bytes_a_scale * i), form.scale, lanes))
            for i in range(1 + form.minimum)
        ]
        self.scale, self.minimum = scales[0], scales[1] if form.minimum else None


def _floats(source: Any, start: Any, dtype: str, lanes: int) -> tirx.Expr:
    """`lanes` floats of `dtype` from byte `start` on, as float32."""
    raw = source.vload([start], f"uint8x{lanes * np.dtype(dtype).itemsize}")
    return vector.widened(tirx.reinterpret(f"{dtype}x{lanes}", raw), dtype, f"x{lanes}")


class Activations:
    """The tokens as int8, in the order in which the kernel reads them: tiles of tokens, groups, tokens, inputs.

    For each token and group: its scale, what the sum of products begins with, and, where the format has a minimum, the
    sum of the group's values.
    """

    def __init__(self, p: Product, tiles: Any):
        self.p, self.tiles = p, tiles
        size = tiles * (p.groups * p.tile)
        self.codes = T.alloc_buffer((size * p.form.group,), "int8", scope="global")
        self.scales = T.alloc_buffer((size,), "float32", scope="global")
        self.starts = T.alloc_buffer((size,), "int32", scope="global")
        self.sums = T.alloc_buffer((size,), "float32", scope="global") if p.form.minimum else None

    def at(self, tile: Any, group: Any, m: Any) -> Any:
        """The index of a token's group."""
        return T.bind((tile * self.p.groups + group) * self.p.tile + m)

    def words(self, at: Any) -> list:
        """The group's activations, four in an int32."""
        group = self.p.form.group
        return [
            tirx.reinterpret("int32", self.codes.vload([at * group + i64(i)], "int8x4")) for i in range(0, group, 4)
        ]

    def start(self, at: Any, lanes: int) -> Any:
        return T.broadcast(self.starts[at], lanes)

    def fill(self) -> None:
        """Quantise all tokens."""
        p = self.p
        parallel = p.low * p.k >= PARALLEL_WORK and target.threads() > 1
        with (T.parallel if parallel else T.serial)(i64(0), p.n) as token:
            tile, m = T.bind(token // i64(p.tile)), T.bind(token % i64(p.tile))
            with T.serial(i64(0), i64(p.groups)) as group:
                self._quantize(token, group, self.at(tile, group, m))

    def _quantize(self, token: Any, group: Any, at: Any) -> None:
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
            T.buffer_store(scratch, vector.widened(p.x[token, first + i], str(p.x.dtype)), [i])
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


def _store(p: Product, tile: Any, count: Any, block: Any, s: int, totals: Any) -> None:
    """Rows of y of a block, where there is one."""
    rows = i64(p.lanes) if p.rows % p.lanes == 0 else tirx.min(i64(p.rows) - block * p.lanes, i64(p.lanes))
    with T.If(block < p.blocks), T.Then(), T.serial(i64(0), count) as m, T.serial(i64(0), rows) as r:
        token, row = tile * p.tile + m, block * p.lanes + r
        value = p.epilogue(token, row, totals[s * p.tile + m, r])
        T.buffer_store(p.y, value.astype(p.y.dtype), [token, row])


def _f32(value: float) -> tirx.Expr:
    return tirx.const(float(value), "float32")


def _i32(value: int) -> tirx.Expr:
    return tirx.const(value, "int32")


def _loop(count: int, parallel: bool) -> Any:
    return (T.parallel if parallel else T.serial)(i64(0), i64(count))


def _ceil(value: Any, divisor: int) -> Any:
    """value / divisor, rounded up: for an int or an expression."""
    return (value + divisor - 1) // divisor
