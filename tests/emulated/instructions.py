"""What x86's instructions for bytes compute, from Intel's Intrinsics Guide, as arithmetic that any processor has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from ops.schedule import vector

Vector = Any  # an expression of a vector type


def documented(dtype: str, name: str, *arguments: Vector) -> Vector:
    """In the place of `ops.schedule.dot._call`: the result of an LLVM intrinsic, by the arithmetic of its manual."""
    for part, compute in _ARITHMETIC.items():
        if part in name:
            return compute(*arguments).astype(dtype)
    raise NotImplementedError(f"{name}: its arithmetic is not written down here")


def _vpdpbusd(total: Vector, unsigned: Vector, signed: Vector) -> Vector:
    """To each int32, the products of four unsigned by four signed bytes are added, without saturation."""
    return total + _neighbours(_wide(unsigned) * _wide(signed), 4)


def _vpmaddubsw(unsigned: Vector, signed: Vector) -> Vector:
    """The products of two unsigned by two signed bytes, added up and saturated to 16 bits."""
    sums = _neighbours(_wide(unsigned) * _wide(signed), 2)
    low, high = (T.broadcast(tirx.const(bound, "int32"), _lanes(sums)) for bound in (-(2**15), 2**15 - 1))
    return tirx.min(tirx.max(sums, low), high)


def _vpmaddwd(a: Vector, b: Vector) -> Vector:
    """The products of two pairs of int16, added up in 32 bits."""
    return _neighbours(_wide(a) * _wide(b), 2)


def _vpshufb(table: Vector, codes: Vector) -> Vector:
    """In each 128 bits, the byte of the table that the low four bits of a code name, or 0 where its top bit is set."""
    lanes = _lanes(codes)

    def same(value: int) -> Vector:
        return T.broadcast(tirx.const(value, "uint8"), lanes)

    result = same(0)
    for entry in range(16):
        byte = tirx.Shuffle([table], [16 * (lane // 16) + entry for lane in range(lanes)])
        result = tirx.Select((codes & same(0x8F)) == same(entry), byte, result)
    return result


def vdpbf16ps(arithmetic: vector.Arithmetic, a: Vector, b: Vector, total: Vector) -> Vector:
    """In the place of `Arithmetic.add`: to each float32, the products of two pairs of bfloat16, the odd ones first.

    That numbers below the normal ones count as zero is left out: no test has them.
    """
    lanes = arithmetic.lanes
    if not arithmetic.pairs:
        return vector.fma(a, b, total, lanes)
    words = [tirx.reinterpret(f"uint32x{lanes}", each) for each in (a, b)]
    sixteen, upper = (T.broadcast(tirx.const(value, "uint32"), lanes) for value in (16, 0xFFFF0000))
    odd = [tirx.reinterpret(f"float32x{lanes}", each & upper) for each in words]
    even = [tirx.reinterpret(f"float32x{lanes}", each << sixteen) for each in words]
    return vector.fma(even[0], even[1], vector.fma(odd[0], odd[1], total, lanes), lanes)


_ARITHMETIC: dict[str, Callable[..., Vector]] = {
    "vpdpbusd": _vpdpbusd,
    "pmaddubs.w": _vpmaddubsw,
    "pmadd.ub.sw": _vpmaddubsw,
    "pmaddw.d": _vpmaddwd,
    "pmadd.wd": _vpmaddwd,
    "pshuf.b": _vpshufb,
}


def _neighbours(values: Vector, count: int) -> Vector:
    """The sums of `count` neighbouring lanes each."""
    parts = [tirx.Shuffle([values], list(range(first, _lanes(values), count))) for first in range(count)]
    return sum(parts[1:], start=parts[0])


def _wide(vector: Vector) -> Vector:
    return vector.astype(f"int32x{_lanes(vector)}")


def _lanes(vector: Vector) -> int:
    return int(str(vector.ty.dtype).rpartition("x")[2])
