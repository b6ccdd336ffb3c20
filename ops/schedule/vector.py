"""Float32 vectors in registers: what hand-scheduled CPU kernels are made of, for TVM's IRBuilder.

Storage is float32, float16 or bfloat16; a load converts in registers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import tirx
from tvm.target import codegen
from tvm.tirx.script import builder as T


def i64(value: int) -> tirx.IntImm:
    """A size or an index; 64 bits, because a large weight has more elements than an int32 counts."""
    return tirx.IntImm("int64", value)


def zeros(lanes: int) -> tirx.Expr:
    return T.broadcast(tirx.const(0.0, "float32"), lanes)


def load(buffer: Any, index: Sequence[Any], lanes: int, count: int | None = None) -> tirx.Expr:
    """The `lanes` values from `index` on along the last axis as float32; from `count` on zeros, which are not read."""
    if count is None or count == lanes:
        return widened(buffer.vload(list(index), f"{buffer.dtype}x{lanes}"), str(buffer.dtype), f"x{lanes}")
    *outer, last = index
    values = [widened(buffer[*outer, last + i64(i)], str(buffer.dtype)) for i in range(count)]
    values += [tirx.const(0.0, "float32")] * (lanes - count)
    return tirx.Shuffle(values, list(range(lanes)))


def widened(value: tirx.Expr, dtype: str, lanes: str = "") -> tirx.Expr:
    """A stored value, or `lanes` such as "x8" of them, as float32."""
    if dtype != "bfloat16":
        return value.astype("float32" + lanes)
    # Spelled out: TVM 0.27 forgets the shift when a cast from bfloat16 is bound to a name.
    bits = tirx.reinterpret("uint16" + lanes, value).astype("uint32" + lanes)
    return tirx.reinterpret("float32" + lanes, bits << tirx.const(16, "uint32" + lanes))


def store(buffer: Any, index: Sequence[Any], vector: tirx.Expr, lanes: int) -> None:
    """Store a vector to `index` and on along the last axis."""
    *outer, last = index
    T.buffer_store(buffer, vector, [*outer, T.ramp(last, 1, lanes)])


def fma(a: tirx.Expr, b: tirx.Expr, c: tirx.Expr, lanes: int) -> tirx.Expr:
    """a * b + c, rounded once."""
    intrinsic = tirx.IntImm("uint32", codegen.llvm_lookup_intrinsic_id("llvm.fma"))
    return tirx.call_llvm_pure_intrin(f"float32x{lanes}", intrinsic, a, b, c)


def lane_sum(vector: tirx.Expr, lanes: int) -> tirx.Expr:
    """The sum of a vector's lanes, by halves."""
    while lanes > 1:
        lanes //= 2
        vector = T.bind(vector)
        low, high = list(range(lanes)), list(range(lanes, 2 * lanes))
        vector = tirx.Shuffle([vector], low) + tirx.Shuffle([vector], high)
    return T.bind(vector)


class Register:
    """A float32 vector that a loop changes. LLVM keeps it in a register as long as there are enough of them."""

    def __init__(self, lanes: int):
        # Scope "local" would become a heap allocation inside a loop.
        self._buffer = T.alloc_buffer((1,), f"float32x{lanes}", scope="global")
        self.value = zeros(lanes)

    @property
    def value(self) -> Any:
        return self._buffer[0]

    @value.setter
    def value(self, vector: Any) -> None:
        T.buffer_store(self._buffer, vector, [0])
