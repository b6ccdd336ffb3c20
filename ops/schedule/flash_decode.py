"""Attention with one query a head: a decode step.

The lanes of a vector run along a head's dim, and the heads of a group share what is loaded of keys and values. The
limit is memory: keys and values are read in order, once, and asked for ahead of time.
"""

from __future__ import annotations

import functools
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

PARTS = 4  # of the keys, where there are many
PARALLEL_WORK = 2**19  # multiplications below which one thread is faster


def applies(a: Problem) -> bool:
    """Large groups and odd dims are better served by the tiles of `flash_prefill`, for one row too."""
    return a.group <= 8 and min(math.gcd(a.dim, a.lanes), math.gcd(a.v_dim, a.lanes)) >= 4


def emit(a: Problem) -> None:
    """The kernel's body."""
    position = T.bind(a.positions[0])
    low, stop = T.bind(a.first_key(position)), T.bind(position + i32(1))
    with T.If(stop - low >= i32(-(-PARALLEL_WORK // (a.heads * (a.dim + a.v_dim))))):
        with T.Then():
            _emit_parts(a, low, stop, PARTS)
        with T.Else():
            _emit_parts(a, low, stop, 1)


def _emit_parts(a: Problem, low: Any, stop: Any, parts: int) -> None:
    """Part after part of the keys, each by one thread, which reads memory in order; then what they found is joined.

    How many parts there are does not depend on the threads, so that neither does the result. Where there are more
    threads than parts, the heads are shared out too.
    """
    threads = target.threads() if parts > 1 else 1
    groups = min(-(-threads // parts), a.kv_heads)
    share = -(-a.kv_heads // groups)
    found = _Found(a, parts)
    length = T.bind(T.ceildiv(stop - low, i32(KEYS * parts)) * i32(KEYS))
    with (T.parallel if threads > 1 else T.serial)(i32(0), i32(parts * groups)) as task:
        part, first = T.bind(task // i32(groups)), T.bind(task % i32(groups) * i32(share))
        start = T.bind(low + part * length)
        end = T.bind(tirx.max(tirx.min(start + length, stop), start))
        _Step(a, found, part, first, share).emit(start, end)
    repeat(i32(a.heads), found.join)


class _Found:
    """What the parts found, by part and head: the greatest score, and relative to it the total and the values."""

    def __init__(self, a: Problem, parts: int):
        self.a, self.parts = a, parts

        def memory(size: int) -> Any:
            return T.alloc_buffer((parts, a.heads * size), "float32", scope="global")

        self.top, self.total, self.mixed = memory(1), memory(1), memory(a.v_dim)

    def begin(self, part: Any, head: Any) -> None:
        """Nothing seen yet. The sink belongs to the first part."""
        for buffer, value, nothing in zip((self.top, self.total), self.a.sink(head), (LOWEST, 0.0), strict=True):
            T.buffer_store(buffer, tirx.Select(part == i32(0), value, tir.f32(nothing)), [part, head])
        with T.serial(0, self.a.v_dim) as d:
            T.buffer_store(self.mixed, tir.f32(0.0), [part, head * self.a.v_dim + d])

    def join(self, head: Any) -> None:
        """A head's result from all the parts."""
        a = self.a
        top = held(functools.reduce(tirx.max, [self.top[part, head] for part in range(self.parts)]))
        shares = [held(tir.exp(self.top[part, head] - top)) for part in range(self.parts)]
        total = sum((self.total[part, head] * each for part, each in enumerate(shares)), tir.f32(0.0))
        inverse = held(tir.f32(1.0) / total)
        with T.serial(0, a.v_dim) as d:
            parts = (self.mixed[part, head * a.v_dim + d] * each for part, each in enumerate(shares))
            T.buffer_store(a.out, (sum(parts, tir.f32(0.0)) * inverse).astype(str(a.out.dtype)), [0, head, d])


class _Step:
    """The one query of each head of up to `share` kv heads, from kv head `first` on, over a part of the keys.

    All heads take some keys before the next ones, so that memory is read in order.
    Scratch buffers are [kv head, what varies]; g is a head of the group.
    """

    def __init__(self, a: Problem, found: _Found, part: Any, first: Any, share: int):
        self.a, self.found, self.part, self.first = a, found, part, first
        self.width, self.v_width = math.gcd(a.dim, a.lanes), math.gcd(a.v_dim, a.lanes)
        most = max(1, min(self.width, target.registers() // 2) // a.group)
        self.keys = 1 << most.bit_length() - 1  # whose scores are summed at a time
        self.heads = T.bind(tirx.min(i32(share), i32(a.kv_heads) - first))

        def scratch(size: int) -> Any:
            return T.alloc_buffer((share, size), "float32", scope="global")

        self.q, self.score, self.decay = scratch(a.group * a.dim), scratch(a.group * KEYS), scratch(a.group)

    def _head(self, h: Any, g: Any) -> Any:
        """Which head of all it is."""
        return (self.first + h) * i32(self.a.group) + g

    def emit(self, low: Any, stop: Any) -> None:
        repeat(self.heads, self._start)
        with T.serial(0, tirx.min(stop - low, i32(KEYS))) as key, T.serial(0, self.heads) as h:
            _prefetch(self.a.k, (low + key).astype("int64"), self.first + h)
        with T.serial(0, T.ceildiv(stop - low, i32(KEYS))) as block:
            start = T.bind(low + block * i32(KEYS))
            count = T.bind(tirx.min(stop - start, i32(KEYS)))
            with T.serial(0, T.ceildiv(count, i32(self.keys))) as step, T.serial(0, self.heads) as h:
                self._scores(h, start, T.bind(step * i32(self.keys)), stop)
            with T.serial(0, self.heads) as h:
                for g in range(self.a.group):
                    self._softmax(h, g, count)
                self._mix(h, start, count, stop)

    def _start(self, h: Any) -> None:
        a = self.a
        with T.serial(0, a.group) as g:
            head = T.bind(self._head(h, g))
            self.found.begin(self.part, head)
            with T.serial(0, a.dim) as d:
                value = vector.widened(a.q[0, head, d], str(a.q.dtype))
                T.buffer_store(self.q, value * tir.f32(a.scale), [h, g * a.dim + d])

    def _scores(self, h: Any, start: Any, key: Any, stop: Any) -> None:
        """The dot products of some keys with the queries of the group; what is past the last key is not looked at.

        Meanwhile the values of these keys come from memory, as the next block's keys do while values are mixed.
        """
        a, width = self.a, self.width
        rows = [T.bind(tirx.min(start + key + i32(j), stop - i32(1)).astype("int64")) for j in range(self.keys)]
        for row in rows:
            _prefetch(a.v, row, self.first + h)
        sums = [[Register(vector.zeros(width)) for _ in rows] for _ in range(a.group)]
        for d in range(0, a.dim, width):
            keys = [T.bind(vector.load(a.k, [row, self.first + h, i32(d)], width)) for row in rows]
            for g, of_head in enumerate(sums):
                q = T.bind(vector.load(self.q, [h, i32(g * a.dim + d)], width))
                for k, each in zip(keys, of_head, strict=True):
                    each.value = vector.fma(q, k, each.value, width)
        flat = [each.value for of_head in sums for each in of_head]
        done = 0
        while done < len(flat):
            count = min(width, 1 << (len(flat) - done).bit_length() - 1)
            scores = held(vector.lane_sums(flat[done : done + count], width))
            for i in range(0, count, self.keys):
                g = (done + i) // self.keys
                part = tirx.Shuffle([scores], list(range(i, i + self.keys))) if count > 1 else scores
                _store(self.score, [h, key + i32(g * KEYS)], part, self.keys)
            done += count

    def _softmax(self, h: Any, g: int, count: Any) -> None:
        """A head's scores of a block become weights; its maximum and total take the block in."""
        lanes = self.a.lanes
        vectors = []
        for j in range(0, KEYS, lanes):
            alive = T.ramp(i32(j), 1, lanes) < T.broadcast(count, lanes)
            value = capped(vector.load(self.score, [h, i32(g * KEYS + j)], lanes), self.a.softcap)
            vectors.append(held(tirx.Select(alive, value, T.broadcast(tir.f32(LOWEST), lanes))))
        at = [self.part, self._head(h, i32(g))]
        top, total = self.found.top, self.found.total
        old = held(top[*at])
        new = held(tirx.max(old, _across(tirx.max, vectors, lanes)))
        decay = held(tir.exp(old - new))
        weights = [held(tir.exp(each - T.broadcast(new, lanes))) for each in vectors]
        for j, each in enumerate(weights):
            vector.store(self.score, [h, i32(g * KEYS + j * lanes)], each, lanes)
        T.buffer_store(total, total[*at] * decay + _across(operator.add, weights, lanes), at)
        T.buffer_store(top, new, at)
        T.buffer_store(self.decay, decay, [h, g])

    def _mix(self, h: Any, start: Any, count: Any, stop: Any) -> None:
        """The values of a block, weighed, are added to what was mixed before."""
        a, width = self.a, self.v_width
        vectors = a.v_dim // width
        step = max(1, target.registers() // 2 // a.group)
        for first in range(0, vectors, step):
            columns = [c * width for c in range(first, min(first + step, vectors))]
            sums = {}
            for g, d in itertools.product(range(a.group), columns):
                before = vector.load(self.found.mixed, self._mixed(h, g, d), width)
                sums[g, d] = Register(before * T.broadcast(self.decay[h, g], width))
            with T.serial(0, count) as key:
                row = T.bind((start + key).astype("int64"))
                if first == 0:
                    later = tirx.min(start + key + i32(KEYS), stop - i32(1))
                    _prefetch(a.k, later.astype("int64"), self.first + h)
                values = {d: T.bind(vector.load(a.v, [row, self.first + h, i32(d)], width)) for d in columns}
                for (g, d), each in sums.items():
                    factor = T.broadcast(self.score[h, key + i32(g * KEYS)], width)
                    each.value = vector.fma(factor, values[d], each.value, width)
            for (g, d), each in sums.items():
                vector.store(self.found.mixed, self._mixed(h, g, d), each.value, width)

    def _mixed(self, h: Any, g: int, d: int) -> list:
        """Where an element of a head's mixed values is."""
        return [self.part, self._head(h, i32(g)) * self.a.v_dim + i32(d)]


def _store(buffer: Any, index: list, value: Any, lanes: int) -> None:
    if lanes == 1:
        T.buffer_store(buffer, value, index)
    else:
        vector.store(buffer, index, value, lanes)


def _prefetch(buffer: Any, row: Any, h: Any) -> None:
    """Ask for a row early, into the second-level cache: the hardware alone gets half the speed from cold memory."""
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
