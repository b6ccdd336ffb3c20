"""Attention with one query a head: a decode step.

The lanes of a vector run along a head's dim, and the heads of a group share what is loaded of keys and values. The
limit is memory: keys and values are read in order, once, and asked for ahead of time.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from .. import target, tir
from ..spec import DTYPES
from . import vector
from .flash import KEYS, LOWEST, Problem, Register, capped, held, i32, repeat
from .vector import i64

AHEAD = 8  # keys that are asked for before they are needed; values are when the key is, and used after the block's keys
PARALLEL_WORK = 2**19  # multiplications below which one thread is faster


def applies(a: Problem) -> bool:
    """Large groups and odd dims are better served by the tiles of `flash_prefill`, for one row too."""
    return a.group <= 8 and min(math.gcd(a.dim, a.lanes), math.gcd(a.v_dim, a.lanes)) >= 4


def emit(a: Problem) -> None:
    """The kernel's body."""
    position = T.bind(a.positions[0])
    low, stop = T.bind(a.first_key(position)), T.bind(position + i32(1))
    threads = min(target.threads(), a.kv_heads)
    if threads == 1:
        _Step(a, i32(0), a.kv_heads).emit(low, stop)
        return
    share = -(-a.kv_heads // threads)
    with T.If(stop - low >= i32(-(-PARALLEL_WORK // (a.heads * (a.dim + a.v_dim))))):
        with T.Then(), T.parallel(0, -(-a.kv_heads // share)) as thread:
            _Step(a, T.bind(thread * i32(share)), share).emit(low, stop)
        with T.Else():
            _Step(a, i32(0), a.kv_heads).emit(low, stop)


class _Step:
    """The one query of each head of up to `share` kv heads, from kv head `first` on.

    All heads take a key before the next key, so that memory is read in order.
    Scratch buffers are [kv head, what varies]; g is a head of the group.
    """

    def __init__(self, a: Problem, first: Any, share: int):
        self.a, self.first = a, first
        self.width, self.v_width = math.gcd(a.dim, a.lanes), math.gcd(a.v_dim, a.lanes)
        self.heads = T.bind(tirx.min(i32(share), i32(a.kv_heads) - first))

        def scratch(size: int) -> Any:
            return T.alloc_buffer((share, size), "float32", scope="global")

        self.q, self.mixed, self.score = scratch(a.group * a.dim), scratch(a.group * a.v_dim), scratch(a.group * KEYS)
        self.top, self.total, self.decay = scratch(a.group), scratch(a.group), scratch(a.group)

    def emit(self, low: Any, stop: Any) -> None:
        repeat(self.heads, self._start)
        with T.serial(0, T.ceildiv(stop - low, i32(KEYS))) as block:
            start = T.bind(low + block * i32(KEYS))
            count = T.bind(tirx.min(stop - start, i32(KEYS)))
            with T.serial(0, count) as key, T.serial(0, self.heads) as h:
                self._scores(h, (start + key).astype("int64"), key)
            with T.serial(0, self.heads) as h:
                for g in range(self.a.group):
                    self._softmax(h, g, count)
                self._mix(h, start, count)
        repeat(self.heads, self._finish)

    def _start(self, h: Any) -> None:
        a = self.a
        head = T.bind((self.first + h) * i32(a.group))
        with T.serial(0, a.group) as g:
            for buffer, value in zip((self.top, self.total), a.sink(head + g), strict=True):
                T.buffer_store(buffer, value, [h, g])
            with T.serial(0, a.dim) as d:
                value = vector.widened(a.q[0, head + g, d], str(a.q.dtype))
                T.buffer_store(self.q, value * tir.f32(a.scale), [h, g * a.dim + d])
        with T.serial(0, a.group * a.v_dim) as d:
            T.buffer_store(self.mixed, tir.f32(0.0), [h, d])

    def _scores(self, h: Any, row: Any, key: Any) -> None:
        """The dot products of one key with the queries of the group."""
        a, width = self.a, self.width
        _prefetch(a.k, row + i64(AHEAD), self.first + h)
        _prefetch(a.v, row, self.first + h)
        sums = [Register(vector.zeros(width)) for _ in range(a.group)]
        for d in range(0, a.dim, width):
            k = T.bind(vector.load(a.k, [row, self.first + h, i32(d)], width))
            for g, each in enumerate(sums):
                each.value = vector.fma(vector.load(self.q, [h, i32(g * a.dim + d)], width), k, each.value, width)
        for g, each in enumerate(sums):
            T.buffer_store(self.score, _across(operator.add, [each.value], width), [h, key + i32(g * KEYS)])

    def _softmax(self, h: Any, g: int, count: Any) -> None:
        """A head's scores of a block become weights; its maximum and total take the block in."""
        lanes = self.a.lanes
        vectors = []
        for j in range(0, KEYS, lanes):
            alive = T.ramp(i32(j), 1, lanes) < T.broadcast(count, lanes)
            value = capped(vector.load(self.score, [h, i32(g * KEYS + j)], lanes), self.a.softcap)
            vectors.append(held(tirx.Select(alive, value, T.broadcast(tir.f32(LOWEST), lanes))))
        old = held(self.top[h, g])
        new = held(tirx.max(old, _across(tirx.max, vectors, lanes)))
        decay = held(tir.exp(old - new))
        weights = [held(tir.exp(each - T.broadcast(new, lanes))) for each in vectors]
        for j, each in enumerate(weights):
            vector.store(self.score, [h, i32(g * KEYS + j * lanes)], each, lanes)
        total = self.total[h, g] * decay + _across(operator.add, weights, lanes)
        for buffer, value in ((self.top, new), (self.decay, decay), (self.total, total)):
            T.buffer_store(buffer, value, [h, g])

    def _mix(self, h: Any, start: Any, count: Any) -> None:
        """The values of a block, weighed, are added to what was mixed before."""
        a, width = self.a, self.v_width
        vectors = a.v_dim // width
        step = max(1, target.registers() // 2 // a.group)
        for first in range(0, vectors, step):
            columns = [c * width for c in range(first, min(first + step, vectors))]
            sums = {}
            for g, d in itertools.product(range(a.group), columns):
                before = vector.load(self.mixed, [h, i32(g * a.v_dim + d)], width)
                sums[g, d] = Register(before * T.broadcast(self.decay[h, g], width))
            with T.serial(0, count) as key:
                row = T.bind((start + key).astype("int64"))
                values = {d: T.bind(vector.load(a.v, [row, self.first + h, i32(d)], width)) for d in columns}
                for (g, d), each in sums.items():
                    factor = T.broadcast(self.score[h, key + i32(g * KEYS)], width)
                    each.value = vector.fma(factor, values[d], each.value, width)
            for (g, d), each in sums.items():
                vector.store(self.mixed, [h, i32(g * a.v_dim + d)], each.value, width)

    def _finish(self, h: Any) -> None:
        a = self.a
        with T.serial(0, a.group) as g:
            inverse = held(tir.f32(1.0) / self.total[h, g])
            with T.serial(0, a.v_dim) as d:
                value = (self.mixed[h, g * a.v_dim + d] * inverse).astype(str(a.out.dtype))
                T.buffer_store(a.out, value, [0, (self.first + h) * a.group + g, d])


def _prefetch(buffer: Any, row: Any, h: Any) -> None:
    """Ask for a row early, into the second-level cache: the hardware alone gets half the speed from cold memory."""
    row = tirx.min(row, buffer.shape[0] - i64(1))
    for d in range(0, int(buffer.shape[2]), 64 // DTYPES[str(buffer.dtype)].itemsize):
        address = tirx.address_of(buffer[row, h, d])
        T.evaluate(tirx.call_llvm_intrin("void", "llvm.prefetch", address, i32(0), i32(2), i32(1)))


def _across(function: Callable, vectors: list, lanes: int) -> Any:
    """All lanes of all vectors, combined by halves."""
    while len(vectors) > 1:
        vectors = [held(function(*pair)) for pair in zip(vectors[::2], vectors[1::2], strict=True)]
    (value,) = vectors
    while lanes > 1:
        lanes //= 2
        value = held(function(*(tirx.Shuffle([value], list(range(i, i + lanes))) for i in (0, lanes))))
    return value
