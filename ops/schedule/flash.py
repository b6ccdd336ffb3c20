"""Fused attention on the CPU: one pass over the keys with an online softmax; scores are never in memory as a whole.

What the two kernels share. `flash_decode` has one query a head, `flash_prefill` many. Both go through the keys in
blocks and keep, for every query, the maximum of the scores so far, the total of their exponentials (`total`) and the
values mixed so far, both relative to that maximum. Dao et al. 2022; Milakov and Gimelshein 2018.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from .. import tir
from . import vector
from .vector import i64

LOWEST = -3.0e38  # the score of what a query must not see: finite, so that the difference of two is no NaN
KEYS = 32  # keys a block
OUT_OF_RANGE = "a position lies outside the cache; expected 0 <= position < the rows of k"


def seen(key: Any, position: Any, window: int | None) -> tirx.Expr:
    """Whether the query at `position` sees `key`."""
    return key <= position if window is None else tirx.And(key <= position, key > position - window)


def capped(score: Any, softcap: float | None) -> Any:
    """A score, or a vector of them, bounded by `softcap`."""
    if softcap is None:
        return score
    dtype = str(score.ty.dtype)
    return tir.tanh(score * tirx.const(1 / softcap, dtype)) * tirx.const(softcap, dtype)


@dataclass(frozen=True)
class Problem:
    """The buffers of a call and what is known of it when the kernel is built. Sizes that stay open are variables."""

    q: Any
    k: Any
    v: Any
    positions: Any
    sinks: Any
    out: Any
    scale: float
    window: int | None
    softcap: float | None
    lanes: int

    @property
    def heads(self) -> int:
        return int(self.q.shape[1])

    @property
    def kv_heads(self) -> int:
        return int(self.k.shape[1])

    @property
    def group(self) -> int:
        """How many heads read one kv head."""
        return self.heads // self.kv_heads

    @property
    def dim(self) -> int:
        return int(self.q.shape[2])

    @property
    def v_dim(self) -> int:
        return int(self.v.shape[2])

    def check_positions(self) -> None:
        """Emit the check that every position has a row in the cache: before any of it is read."""
        with T.serial(0, self.q.shape[0]) as i:
            position = self.positions[i].astype("int64")
            with T.Assert(tirx.And(position >= i64(0), position < self.k.shape[0]), OUT_OF_RANGE, "ValueError"):
                T.evaluate(i32(0))

    def first_key(self, position: Any) -> Any:
        """The first key that the query at `position` sees."""
        return i32(0) if self.window is None else tirx.max(position - i32(self.window - 1), i32(0))

    def sink(self, head: Any) -> tuple[Any, Any]:
        """A head's maximum and total before the first key: its sink, where there is one."""
        if self.sinks is None:
            return tir.f32(LOWEST), tir.f32(0.0)
        return vector.widened(self.sinks[head], str(self.sinks.dtype)), tir.f32(1.0)


def i32(value: int) -> tirx.IntImm:
    return tirx.IntImm("int32", value)


def repeat(count: Any, body: Callable[[Any], None]) -> None:
    """Emit `body(index)` in a loop."""
    with T.serial(0, count) as index:
        body(index)


class Register:
    """A value or a vector of them that a loop changes; LLVM keeps it in a register.

    Also for a value that is used twice: TVM puts a bound one back in all its uses, and repeats the work.
    The buffer is one of scalars: TVM 0.27 lets buffers share memory, and fails where one of vectors meets another kind.
    """

    def __init__(self, value: Any):
        kind, _, width = str(value.ty.dtype).partition("x")
        lanes = int(width or 1)
        self._buffer = T.alloc_buffer((lanes,), kind, scope="global")
        self._index = [T.ramp(i32(0), 1, lanes) if lanes > 1 else i32(0)]
        self.value = value

    @property
    def value(self) -> Any:
        return self._buffer[self._index[0]]

    @value.setter
    def value(self, value: Any) -> None:
        T.buffer_store(self._buffer, value, self._index)


def held(value: Any) -> Any:
    """`value`, computed once."""
    return Register(value).value
