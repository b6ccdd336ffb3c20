"""y = x @ weight.T on the CPU, with the weight row-major as checkpoints hold it: tiles of dot products.

A tile is a few tokens by a few weight rows. Each pair of them has a vector of partial sums in a register, its lanes
along k. After every block of k the lanes are summed, and the sum is added to the pair's total. All kernels multiply by
the same instruction and add in this order, so that a token's result is the same to the bit however many come with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from .. import target
from . import vector
from .cpu import PARALLEL_WORK
from .vector import Register, i64

BLOCK_BYTES = 2048  # of a packed row: a tile's weight rows stay in the first-level cache while tokens pass by
FEW = 16  # tokens, up to which reading the weight takes longer than multiplying it
TOKEN_CACHE = 16 * 2**10  # bytes of a token that stay in the first-level cache; past it more rows share a load
TOKEN_BYTES = 512 * 2**10  # of packed tokens at the most; they take half of a core's second-level cache
CHUNK_ROWS = 1024  # weight rows that a thread takes at a time when tokens are many; for each chunk they are packed anew
LINE = 16  # float32 sums in a cache line


@dataclass(frozen=True)
class Product:
    """The product to compute: x [n, k], weight [rows, k] and y [n, rows] are buffers, n lies in `low` to `high`.

    `epilogue(token, row, value)` is what y holds, as float32, of a sum `value`. `high` is None when n has no bound.
    """

    x: Any
    weight: Any
    y: Any
    n: Any
    low: int
    high: int | None
    epilogue: Callable[[Any, Any, Any], Any]

    @property
    def rows(self) -> int:
        return int(self.weight.shape[0])

    @property
    def k(self) -> int:
        return int(self.weight.shape[1])

    @property
    def lanes(self) -> int:
        return target.lanes()

    @property
    def arithmetic(self) -> vector.Arithmetic:
        """How elements are multiplied: the same way in all kernels for these dtypes."""
        stored = {str(self.x.dtype), str(self.weight.dtype)}
        return vector.Arithmetic(self.lanes, pairs=stored == {"bfloat16"} and target.machine().bf16)

    @property
    def width(self) -> int:
        """How many elements of a row a vector holds."""
        return self.arithmetic.width

    @property
    def vectors(self) -> int:
        """How many vectors hold a row; the last one may be filled in part."""
        return _ceil(self.k, self.width)

    @property
    def block(self) -> int:
        """How many vectors a block of k has; the last block may have fewer."""
        return min(BLOCK_BYTES // (4 * self.lanes), self.vectors)

    @property
    def blocks(self) -> int:
        return _ceil(self.vectors, self.block)

    @property
    def threads(self) -> int:
        return target.threads() if self.low * self.rows * self.k >= PARALLEL_WORK else 1


def emit(product: Product) -> None:
    """The loops of `product`, for the body of a prim_func that IRBuilder makes."""
    # The tiles that measured best. Their sums, the tokens' vectors and a weight's vector just fit in the registers.
    many = target.registers() == 32
    with product.arithmetic.declared():
        if product.high == 1:
            _stream(product, 1, 4 if 4 * product.lanes * product.vectors <= TOKEN_CACHE else 6)
        elif product.high is not None and product.high <= FEW:
            _stream(product, 4 if many else 2, 6)
        else:
            _blocked(product, *((2, 8) if many else (3, 4)))


def _stream(p: Product, mt: int, nt: int) -> None:
    """Few tokens: every weight is read once, from memory. A thread reads `nt` streams of rows that lie far apart."""
    length = _ceil(p.rows, p.threads * nt)
    with _loop(p.threads, p.threads > 1) as thread:
        tiles = T.bind(_ceil(p.n, mt))
        tokens = _Panel(p, p.x, p.n, _ceil(p.high, mt), mt, p.vectors)
        tokens.fill(i64(0), tiles, i64(0), i64(p.vectors))
        most = _ceil(p.high, mt) * mt
        totals = _Totals(p, most, nt)
        lines = T.alloc_buffer((most * nt, LINE), "float32", scope="global")  # sums that wait for a vector of them
        with T.serial(i64(0), i64(_ceil(length, LINE))) as line:
            first, count = T.bind(line * LINE), T.bind(tirx.min(i64(length) - line * LINE, i64(LINE)))
            with T.serial(i64(0), count) as i:
                rows = [T.bind(tirx.min((thread * nt + s) * length + first + i, i64(p.rows - 1))) for s in range(nt)]
                with T.serial(i64(0), i64(p.blocks)) as block, T.serial(i64(0), tiles) as tile:
                    totals.add(tile * mt, i64(0), _sums_in_memory(p, tokens, tile, rows, block), block == 0)
                with T.grid(p.n, i64(nt)) as (m, s):
                    T.buffer_store(lines, totals.buffer[m, s], [m * nt + s, i])
            with T.grid(p.n, i64(nt)) as (m, s):
                row = T.bind((thread * nt + s) * length + first)
                _store_line(p, m, row, tirx.min(i64(p.rows) - row, count), lambda r, m=m, s=s: lines[m * nt + s, r])


def _sums_in_memory(p: Product, tokens: _Panel, tile: Any, rows: list, block: Any) -> list[list[Register]]:
    """The sums of a tile over a block of k, with the weight rows read where they are."""
    sums = _registers(p, tokens.height, len(rows))

    def step(v: Any, count: int = p.width) -> None:
        weights = (T.bind(p.arithmetic.load(p.weight, [row, v * p.width], count)) for row in rows)
        _multiply(p, sums, [tokens.load(tile, v, m) for m in range(tokens.height)], weights)

    first = T.bind(block * p.block)
    whole = p.k // p.width
    with T.serial(i64(0), tirx.min(i64(whole) - first, i64(p.block))) as v:
        step(first + v)
    if whole < p.vectors:
        with T.If(block == p.blocks - 1), T.Then():
            step(i64(whole), p.k % p.width)
    return sums


def _blocked(p: Product, mt: int, nt: int) -> None:
    """Many tokens: blocks of both operands are packed, converted once, and multiplied out of the caches."""
    tiles = max(1, min(TOKEN_BYTES, target.machine().l2 // 2) // (4 * p.lanes * p.block * mt))
    chunk_rows = nt * _ceil(_ceil(p.rows, p.threads * _ceil(p.rows, p.threads * CHUNK_ROWS)), nt)
    with _loop(_ceil(p.rows, chunk_rows), p.threads > 1) as chunk:
        tokens = _Panel(p, p.x, p.n, tiles, mt, p.block)
        weights = _Panel(p, p.weight, i64(p.rows), 1, nt, p.block)
        totals = _Totals(p, tiles * mt, chunk_rows)
        row = T.bind(chunk * chunk_rows)
        rows = T.bind(tirx.min(i64(p.rows) - row, i64(chunk_rows)))
        with T.serial(i64(0), _ceil(p.n, tiles * mt)) as group:
            token = T.bind(group * (tiles * mt))
            count = T.bind(tirx.min(p.n - token, i64(tiles * mt)))
            with T.serial(i64(0), i64(p.blocks)) as block:
                first = T.bind(block * p.block)
                width = T.bind(tirx.min(i64(p.vectors) - first, i64(p.block)))
                tokens.fill(token, _ceil(count, mt), first, width)
                with T.serial(i64(0), _ceil(rows, nt)) as j:
                    weights.fill(row + j * nt, i64(1), first, width)
                    with T.serial(i64(0), _ceil(count, mt)) as tile:
                        with T.If(tile < width), T.Then():
                            weights.prefetch(row + (j + 1) * nt, first + tile)
                        totals.add(tile * mt, j * nt, _sums_packed(p, tokens, tile, weights, width), block == 0)
            with T.grid(count, rows) as (m, s):
                _store(p, token + m, row + s, totals.buffer[m, s])


def _sums_packed(p: Product, tokens: _Panel, tile: Any, weights: _Panel, width: Any) -> list[list[Register]]:
    """The sums of a tile over a block of k, with both operands packed."""
    sums = _registers(p, tokens.height, weights.height)
    with T.serial(i64(0), width) as v:
        rows = (weights.load(i64(0), v, s) for s in range(weights.height))
        _multiply(p, sums, [tokens.load(tile, v, m) for m in range(tokens.height)], rows)
    return sums


class _Panel:
    """Scratch for rows of a matrix, as vectors to multiply: tiles of `height` rows, each in the order it is read."""

    def __init__(self, p: Product, source: Any, rows: Any, tiles: int, height: int, width: int):
        self.p, self.source, self.rows, self.height, self.width = p, source, rows, height, width
        self.buffer = T.alloc_buffer((tiles * width * height, p.lanes), "float32", scope="global")

    def load(self, tile: Any, v: Any, r: int) -> tirx.Expr:
        """Vector `v` of row `r` of a tile."""
        return T.bind(vector.load(self.buffer, [self._at(tile, v, r), i64(0)], self.p.lanes))

    def _at(self, tile: Any, v: Any, r: int) -> Any:
        return (tile * self.width + v) * self.height + r

    def fill(self, row: Any, tiles: Any, first: Any, width: Any) -> None:
        """Pack `tiles` tiles of rows from `row` on, their vectors `first` to `first + width`.

        Past the last row it is repeated; a vector that is there in part is filled up with zeros.
        """
        p, whole = self.p, self.p.k // self.p.width
        with T.serial(i64(0), tiles) as tile:
            rows = [T.bind(tirx.min(row + tile * self.height + r, self.rows - 1)) for r in range(self.height)]

            def copy(v: Any, count: int = p.width) -> None:
                for r in range(self.height):
                    value = p.arithmetic.load(self.source, [rows[r], (first + v) * p.width], count)
                    vector.store(self.buffer, [self._at(tile, v, r), i64(0)], value, p.lanes)

            with T.serial(i64(0), tirx.min(i64(whole) - first, width)) as v:
                copy(v)
            if whole < p.vectors:
                with T.If(first + width == p.vectors), T.Then():
                    copy(width - 1, p.k % p.width)

    def prefetch(self, row: Any, v: Any) -> None:
        """Ask for vector `v` of the rows of a tile that is packed later; rows past the last do no harm."""
        for r in range(self.height):
            vector.prefetch(self.source, [row + r, v * self.p.width])


class _Totals:
    """Scratch for the sums of tokens by weight rows, which a kernel goes through a tile at a time."""

    def __init__(self, p: Product, tokens: int, rows: int):
        # Tokens lie an odd number of cache lines apart: a tile's would otherwise all meet in one place of the cache.
        self.p, stride = p, rows if rows <= LINE else LINE * (_ceil(rows, LINE) | 1)
        self.buffer = T.alloc_buffer((tokens, stride), "float32", scope="global")

    def add(self, token: Any, row: Any, sums: list[list[Register]], first: Any) -> None:
        """Add a tile's sums, once their lanes are summed, to those from `token` and `row` on; or begin with them."""
        for m, each in enumerate(sums):
            s = 0
            while s < len(each):
                count = min(self.p.lanes, 1 << (len(each) - s).bit_length() - 1)
                value = vector.lane_sums([register.value for register in each[s : s + count]], self.p.lanes)
                at = [token + m, row + s]
                before = tirx.Select(first, vector.zeros(count), vector.load(self.buffer, at, count))
                vector.store(self.buffer, at, before + value, count)
                s += count


def _registers(p: Product, mt: int, nt: int) -> list[list[Register]]:
    return [[Register(p.lanes) for _ in range(nt)] for _ in range(mt)]


def _multiply(p: Product, sums: list[list[Register]], tokens: list, weights: Any) -> None:
    """One step along k: each weight vector is used with all tokens before the next one is loaded."""
    for s, weight in enumerate(weights):
        for m, token in enumerate(tokens):
            sums[m][s].value = p.arithmetic.add(token, weight, sums[m][s].value)


def _store(p: Product, token: Any, row: Any, value: Any) -> None:
    T.buffer_store(p.y, p.epilogue(token, row, value).astype(p.y.dtype), [token, row])


def _store_line(p: Product, token: Any, row: Any, count: Any, value: Callable[[Any], Any]) -> None:
    """Up to `LINE` neighbours of y, from `row` on: as vectors, where there are as many."""
    with T.If(count == LINE):
        with T.Then(), T.vectorized(i64(0), i64(LINE)) as r:
            _store(p, token, row + r, value(r))
        with T.Else(), T.serial(i64(0), count) as r:
            _store(p, token, row + r, value(r))


def _loop(count: int, parallel: bool) -> Any:
    return (T.parallel if parallel else T.serial)(i64(0), i64(count))


def _ceil(value: Any, divisor: int) -> Any:
    """value / divisor, rounded up: for an int or an expression."""
    return (value + divisor - 1) // divisor
