"""The scan of a state-space model on the CPU: a state [heads, dim, size] that every token reads and writes.

The lanes of a vector run along a row of the state. A thread takes some rows of a head through all the tokens, so that
they stay in its first-level cache; of one token the state is read once, from memory, and written once. Sums are in one
order, whatever the number of tokens and of threads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from .. import target, tir
from . import vector
from .cpu import PARALLEL_WORK
from .flash import Register, held
from .vector import i64

TILE = 4  # rows of the state that share what is loaded of b and c
BLOCK = 16  # rows that go through all the tokens together


@dataclass(frozen=True)
class Scan:
    """The buffers of a call, in the order of its arguments; `n` tokens, `low` of them at the least.

    Where it is known that there is `one` token, the state is read where it comes from.
    """

    x: Any
    step: Any
    decay: Any
    b: Any
    c: Any
    skip: Any
    state: Any
    out: Any
    after: Any
    n: Any
    low: int
    one: bool

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Heads, rows of a head, values of a row."""
        heads, dim, size = (int(each) for each in self.state.shape)
        return heads, dim, size

    @property
    def share(self) -> int:
        """How many heads share a group's b and c."""
        return self.sizes[0] // int(self.b.shape[1])


def emit(p: Scan) -> None:
    """The loops of `p`, for the body of a prim_func that IRBuilder makes."""
    heads, dim, size = p.sizes
    block = math.gcd(dim, BLOCK)
    loop = T.parallel if p.low * heads * dim * size >= PARALLEL_WORK and target.threads() > 1 else T.serial
    with loop(i64(0), i64(heads * (dim // block))) as task:
        head = T.bind(task // i64(dim // block))
        first = T.bind(task % i64(dim // block) * i64(block))
        if not p.one:
            with T.serial(i64(0), i64(block)) as row, T.serial(i64(0), i64(size)) as s:
                T.buffer_store(p.after, p.state[head, first + row, s], [head, first + row, s])
        speed = held(tir.exp(p.decay[head]))
        with T.serial(i64(0), p.n) as i:
            _token(p, i, head, first, block, speed)


def _token(p: Scan, i: Any, head: Any, first: Any, block: int, speed: Any) -> None:
    """A token's turn at some rows of a head."""
    lanes, rows = target.lanes(), math.gcd(block, TILE)
    step = held(p.step[i, head])
    fade = held(T.broadcast(tir.exp(-(step * speed)), lanes))
    group = T.bind(head // i64(p.share))
    with T.serial(i64(0), i64(block // rows)) as tile:
        at = [T.bind(first + tile * i64(rows) + i64(r)) for r in range(rows)]
        values = [held(vector.widened(p.x[i, head, each], str(p.x.dtype))) for each in at]
        arriving = [held(T.broadcast(step * each, lanes)) for each in values]
        sums = [Register(vector.zeros(lanes)) for _ in at]
        with T.serial(i64(0), i64(p.sizes[2] // lanes)) as chunk:
            s = T.bind(chunk * i64(lanes))
            b, c = (held(vector.load(each, [i, group, s], lanes)) for each in (p.b, p.c))
            for row, more, total in zip(at, arriving, sums, strict=True):
                old = vector.load(p.state if p.one else p.after, [head, row, s], lanes)
                new = held(vector.fma(fade, old, more * b, lanes))
                vector.store(p.after, [head, row, s], new, lanes)
                total.value = vector.fma(new, c, total.value, lanes)
        totals = held(vector.lane_sums([each.value for each in sums], lanes))
        for r, (row, value) in enumerate(zip(at, values, strict=True)):
            total = totals if rows == 1 else tirx.Shuffle([totals], [r])
            T.buffer_store(p.out, (total + p.skip[head] * value).astype(str(p.out.dtype)), [i, head, row])
