"""Float32 vectors in registers: what hand-scheduled CPU kernels are made of, for TVM's IRBuilder.

Storage is float32, float16 or bfloat16; a load converts in registers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
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
    return tirx.call_llvm_pure_intrin(f"float32x{lanes}" if lanes > 1 else "float32", intrinsic, a, b, c)


def lane_sums(vectors: Sequence[tirx.Expr], lanes: int) -> tirx.Expr:
    """The sum of each vector's lanes, by halves, as a vector; there are a power of two of them, up to `lanes`."""
    width = lanes
    while width > len(vectors):
        width //= 2
        halves = [list(range(width)), list(range(width, 2 * width))]
        bound = [T.bind(each) for each in vectors]
        vectors = [tirx.Shuffle([each], halves[0]) + tirx.Shuffle([each], halves[1]) for each in bound]
    vectors = [vectors[i] for i in _bit_reversed(width)]
    part = width
    while part > 1:
        part //= 2
        # Of each two vectors, one's lower halves and the other's upper ones stay where they are: that is no shuffle.
        stay = [lane + (width if lane & part else 0) for lane in range(width)]
        cross = [lane ^ part for lane in stay]
        bound = [[T.bind(a), T.bind(b)] for a, b in zip(vectors[::2], vectors[1::2], strict=True)]
        vectors = [tirx.Shuffle(pair, stay) + tirx.Shuffle(pair, cross) for pair in bound]
    return T.bind(vectors[0])


def _bit_reversed(count: int) -> list[int]:
    """0, 1, ... with their bits turned round; `count` is a power of two."""
    return [0] if count == 1 else [2 * i + odd for odd in (0, 1) for i in _bit_reversed(count // 2)]


@dataclass(frozen=True)
class Arithmetic:
    """How vectors of two operands are multiplied and added to a vector of `lanes` float32 sums.

    In float32, an element a lane; or in pairs, as bfloat16 is stored, two neighbours a lane, by vdpbf16ps. That takes
    numbers below float32's normal ones for zeros, in the operands and in the sums. A vector of pairs is held as float32
    words, because TVM 0.27 makes every vector of bfloat16 one of float32.
    """

    lanes: int
    pairs: bool = False

    @property
    def width(self) -> int:
        """How many elements of an operand a vector holds."""
        return 2 * self.lanes if self.pairs else self.lanes

    def load(self, buffer: Any, index: Sequence[Any], count: int | None = None) -> tirx.Expr:
        """The vector of `width` elements from `index` on along the last axis; from `count` on zeros, not read."""
        if not self.pairs:
            return load(buffer, index, self.lanes, count)
        if count is None or count == self.width:
            return tirx.reinterpret(f"float32x{self.lanes}", buffer.vload(list(index), f"bfloat16x{self.width}"))
        *outer, last = index
        values = [tirx.reinterpret("uint16", buffer[*outer, last + i64(i)]) for i in range(count)]
        values += [tirx.const(0, "uint16")] * (self.width - count)
        return tirx.reinterpret(f"float32x{self.lanes}", tirx.Shuffle(values, list(range(self.width))))

    def add(self, a: tirx.Expr, b: tirx.Expr, total: tirx.Expr) -> tirx.Expr:
        """total + a * b."""
        if not self.pairs:
            return fma(a, b, total, self.lanes)
        return tirx.call_pure_extern(f"float32x{self.lanes}", "bfloat16_pairs", total, a, b)

    def declared(self) -> contextlib.AbstractContextManager:
        """Where `add` may be used. It tells LLVM what TVM 0.27 cannot: that the words hold pairs."""
        if not self.pairs:
            return contextlib.nullcontext()
        sums, pairs, name = f"<{self.lanes} x float>", f"<{self.width} x bfloat>", f"dpbf16ps.{32 * self.lanes}"
        return T.attr(i64(0), "pragma_import_llvm", f"""
            declare {sums} @llvm.x86.avx512bf16.{name}({sums}, {pairs}, {pairs})
            define linkonce_odr {sums} @bfloat16_pairs({sums} %total, {sums} %a, {sums} %b) alwaysinline {{
              %x = bitcast {sums} %a to {pairs}
              %y = bitcast {sums} %b to {pairs}
              %result = call {sums} @llvm.x86.avx512bf16.{name}({sums} %total, {pairs} %x, {pairs} %y)
              ret {sums} %result
            }}""")  # fmt: skip


def prefetch(buffer: Any, index: Sequence[Any]) -> None:
    """Ask for the cache line of an element, which may lie past the end, in the second-level cache."""
    read, level, data = (tirx.const(value, "int32") for value in (0, 2, 1))
    intrinsic = tirx.IntImm("uint32", codegen.llvm_lookup_intrinsic_id("llvm.prefetch"))
    T.evaluate(tirx.call_llvm_intrin("void", intrinsic, tirx.address_of(buffer[tuple(index)]), read, level, data))


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
