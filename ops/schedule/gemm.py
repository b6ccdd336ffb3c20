"""y = x @ weight.T on the CPU, with the weight row-major as checkpoints hold it: tiles of dot products.

A tile is some tokens by some weight rows, with one vector of partial sums in a register for each pair and its lanes
along k. After every BLOCK of k the lanes are summed and the sum is added to the pair's total. All kernels add in that
order, so a token's result is the same to the bit however many tokens come with it.
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

FAR, AHEAD = True, 0
BLOCK = 1024  # of k: two tiles' worth of vectors fit in the first-level cache
TOKENS_BYTES = 384 * 2**10  # of float32 activations, which stay in the second-level cache
CHUNK_ROWS = 256  # weight rows that a thread goes through before it starts on the next block of k

Epilogue = Callable[[Any, Any, Any], Any]


@dataclass(frozen=True)
class Product:
    """The product to compute: x [n, k], weight [out, k], y [n, out], and what is done to an element before it is stored.

    `epilogue(token, row, value)` takes and gives float32. `low` and `high` bound n; no `high` is no bound.
    """

    x: Any
    weight: Any
    y: Any
    n: Any
    low: int
    high: int | None
    epilogue: Epilogue
    lanes: int

    @property
    def rows(self) -> int:
        return int(self.weight.shape[0])

    @property
    def k(self) -> int:
        return int(self.weight.shape[1])

    @property
    def vectors(self) -> int:
        """How many vectors hold a row, the last one perhaps in part."""
        return -(-self.k // self.lanes)

    @property
    def block(self) -> int:
        """How many vectors are in a block of k."""
        return min(BLOCK // self.lanes, self.vectors)

    @property
    def blocks(self) -> int:
        return -(-self.vectors // self.block)

    @property
    def threads(self) -> int:
        return target.threads() if self.low * self.rows * self.k >= PARALLEL_WORK else 1


def emit(product: Product) -> None:
    """The loops for `product`: to be called inside a prim_func of IRBuilder."""
    if product.high is not None and product.high <= 16:
        _stream(product, 1 if product.high == 1 else 4, 4)
    else:
        _blocked(product, *((4, 4) if target.registers() == 32 else (3, 4)))


def _stream(p: Product, mt: int, nt: int) -> None:
    """Few tokens: the weight's bytes are what takes time. Each thread reads `nt` streams of rows that lie far apart."""
    tiles = -(-p.high // mt)
    length = -(-p.rows // (p.threads * nt))
    with _threads(p.threads) as thread:
        tokens = T.alloc_buffer((tiles * p.vectors * mt, p.lanes), "float32", scope="global")
        totals = T.alloc_buffer((mt * nt,), "float32", scope="global")
        used = T.bind((p.n + i64(mt - 1)) // i64(mt))
        _pack(p, p.x, p.n - 1, i64(0), used, mt, tokens, i64(0), i64(p.vectors))
        with T.serial(i64(0), i64(length)) as i:
            rows = [T.bind((thread * nt + s) * length + i if FAR else (thread * length + i) * nt + s) for s in range(nt)]
            safe = [T.bind(tirx.min(row, i64(p.rows - 1))) for row in rows]
            with T.serial(i64(0), used) as tile:
                for pair in range(mt * nt):
                    T.buffer_store(totals, tirx.const(0.0, "float32"), [pair])
                with T.serial(i64(0), i64(p.blocks)) as block:
                    sums = _dots_in_memory(p, mt, safe, tokens, tile, block)
                    for pair, value in enumerate(sums):
                        T.buffer_store(totals, totals[pair] + value, [pair])
                for m in range(mt):
                    for s in range(nt):
                        _store(p, tile * mt + m, rows[s], totals[m * nt + s], mt > 1, p.threads * nt * length > p.rows)


def _dots_in_memory(p: Product, mt: int, rows: list, tokens: Any, tile: Any, block: Any) -> list:
    """The sums of a tile over a block of k, weight rows read where they are."""
    whole = p.k // p.lanes
    sums = [[Register(p.lanes) for _ in rows] for _ in range(mt)]

    def step(v: Any, count: int | None = None) -> None:
        x = [T.bind(tokens.vload([(tile * p.vectors + v) * mt + m, 0], f"float32x{p.lanes}")) for m in range(mt)]
        for s, row in enumerate(rows):
            w = T.bind(vector.load(p.weight, [row, v * p.lanes], p.lanes, count))
            if AHEAD and count is None:
                T.evaluate(tirx.call_intrin("void", "tirx.prefetch", T.address_of(p.weight[row, v * p.lanes + i64(AHEAD)]), 0, 3, 1))
            for m in range(mt):
                sums[m][s].value = vector.fma(x[m], w, sums[m][s].value, p.lanes)

    first = T.bind(block * p.block)
    with T.serial(i64(0), tirx.min(i64(whole) - first, i64(p.block))) as v:
        step(first + v)
    if whole < p.vectors:
        with T.If(block == p.blocks - 1), T.Then():
            step(i64(whole), p.k % p.lanes)
    return [vector.lane_sum(each.value, p.lanes) for row in sums for each in row]


def _blocked(p: Product, mt: int, nt: int) -> None:
    """Many tokens: the multiplications are what takes time. A block of both operands is packed and used often."""
    tiles = max(1, TOKENS_BYTES // (4 * p.lanes * p.block * mt))
    per_thread = -(-p.rows // p.threads)
    chunks = p.threads * -(-per_thread // CHUNK_ROWS)
    length = -(-p.rows // chunks // nt) * nt if p.rows % chunks == 0 else -(-(p.rows // chunks + 1) // nt) * nt
    with _threads(chunks) as chunk:
        tokens = T.alloc_buffer((tiles * p.block * mt, p.lanes), "float32", scope="global")
        weights = T.alloc_buffer((p.block * nt, p.lanes), "float32", scope="global")
        totals = T.alloc_buffer((tiles * mt, length), "float32", scope="global")
        start = T.bind(chunk * length)
        rows = T.bind(tirx.max(tirx.min(i64(p.rows) - start, i64(length)), i64(0)))
        with T.serial(i64(0), (p.n + i64(tiles * mt - 1)) // i64(tiles * mt)) as outer:
            token = T.bind(outer * (tiles * mt))
            count = T.bind(tirx.min(p.n - token, i64(tiles * mt)))
            used = T.bind((count + i64(mt - 1)) // i64(mt))
            with T.serial(i64(0), i64(p.blocks)) as block:
                first = T.bind(block * p.block)
                width = T.bind(tirx.min(i64(p.vectors) - first, i64(p.block)))
                _pack(p, p.x, p.n - 1, token, used, mt, tokens, first, width)
                with T.serial(i64(0), (rows + i64(nt - 1)) // i64(nt)) as j:
                    _pack(p, p.weight, i64(p.rows - 1), start + j * nt, i64(1), nt, weights, first, width)
                    with T.serial(i64(0), used) as tile:
                        sums = _dots_packed(p, mt, nt, tokens, weights, tile, width)
                        for m in range(mt):
                            for s in range(nt):
                                at = [tile * mt + m, j * nt + s]
                                old = tirx.Select(block == 0, tirx.const(0.0, "float32"), totals[at[0], at[1]])
                                T.buffer_store(totals, old + sums[m * nt + s], at)
            with T.serial(i64(0), count) as m, T.serial(i64(0), rows) as j:
                _store(p, token + m, start + j, totals[m, j], False, False)


def _dots_packed(p: Product, mt: int, nt: int, tokens: Any, weights: Any, tile: Any, width: Any) -> list:
    """The sums of a tile over a block of k, both operands packed."""
    sums = [[Register(p.lanes) for _ in range(nt)] for _ in range(mt)]
    kind = f"float32x{p.lanes}"
    with T.serial(i64(0), width) as v:
        w = [T.bind(weights.vload([v * nt + s, 0], kind)) for s in range(nt)]
        for m in range(mt):
            x = T.bind(tokens.vload([(tile * width + v) * mt + m, 0], kind))
            for s in range(nt):
                sums[m][s].value = vector.fma(x, w[s], sums[m][s].value, p.lanes)
    return [vector.lane_sum(each.value, p.lanes) for row in sums for each in row]


def _pack(
    p: Product, source: Any, last: Any, row: Any, tiles: Any, height: int, packed: Any, first: Any, width: Any
) -> None:
    """Vectors `first` to `first + width` of `tiles` tiles of `height` rows from `row` on, as one stream per tile.

    Rows past `last` repeat it; a vector that is there in part is filled up with zeros.
    """
    whole = p.k // p.lanes
    with T.serial(i64(0), tiles) as tile:
        safe = [T.bind(tirx.min(row + tile * height + r, last)) for r in range(height)]
        with T.serial(i64(0), tirx.min(i64(whole) - first, width)) as v:
            for r in range(height):
                value = vector.load(source, [safe[r], (first + v) * p.lanes], p.lanes)
                vector.store(packed, [(tile * width + v) * height + r, 0], value, p.lanes)
        if whole < p.vectors:
            with T.If(first + width == p.vectors), T.Then():
                for r in range(height):
                    value = vector.load(source, [safe[r], i64(whole * p.lanes)], p.lanes, p.k % p.lanes)
                    vector.store(packed, [(tile * width + width - 1) * height + r, 0], value, p.lanes)


def _store(p: Product, token: Any, row: Any, value: Any, check_token: bool, check_row: bool) -> None:
    def write() -> None:
        T.buffer_store(p.y, p.epilogue(token, row, value).astype(str(p.y.dtype)), [token, row])

    checks = [token < p.n] * check_token + [row < p.rows] * check_row
    if not checks:
        write()
        return
    with T.If(checks[0] if len(checks) == 1 else tirx.all(*checks)), T.Then():
        write()


def _threads(count: int) -> Any:
    return T.parallel(i64(0), i64(count)) if count > 1 else T.serial(i64(0), i64(1))
