"""Dot products of bytes: a vector of weight codes by a word of activations, by the instruction that the machine has.

A vector holds four codes for each of `lanes` weight rows, a word the four activations that they meet; the products of a
row are added up in its lane, int32. Every way below is exact, so that machines differ in speed and not in the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import tirx
from tvm.target import codegen
from tvm.tirx.script import builder as T

from ..quantize import Format, Plane
from ..target import Machine

Vector = Any  # an expression of a vector type


@dataclass(frozen=True)
class Dot:
    """The dot product of one group of a format on a machine."""

    machine: Machine
    form: Format

    @property
    def lanes(self) -> int:
        return self.machine.lanes

    @property
    def signed(self) -> bool:
        """The weights enter as signed bytes: nothing is to be corrected."""
        return self.machine.dot in ("sdot", "smull")

    @property
    def shift(self) -> int:
        """What is added to a value to make it the unsigned byte that enters."""
        if self.signed:
            return 0
        return self.form.offset if self.form.levels is None else 128

    def decode(self, codes: Vector) -> Vector:
        """Codes, uint8, as the bytes that enter the product."""
        form = self.form
        if form.levels is not None:
            table = [int(each) + self.shift for each in form.values]
            return _lookup(self.machine, table, codes)
        if self.signed and form.offset:
            return codes - _bytes(form.offset, self.lanes)
        return codes

    def unpack(self, words: Sequence[Vector]) -> list[Vector]:
        """The vectors of codes, in the order of the activations' words, of the packed vectors of a group."""
        codes: list[Vector] = []
        for plane in self.form.planes:
            count = self.form.group // (4 * plane.parts)
            found = self._parts(words[:count], plane)
            words = words[count:]
            codes = [low | high for low, high in zip(codes, found, strict=True)] if codes else found
        return codes

    def _parts(self, words: Sequence[Vector], plane: Plane) -> list[Vector]:
        """The bits of a plane, where they stand in a code, of each word of activations."""
        if plane.parts == 1:
            return list(words)
        kind = f"int32x{self.lanes}"
        mask = _constant((2**plane.bits - 1) * 0x01010101, kind)
        found = []
        for word in words:
            bits = _as(kind, word)
            for part in range(plane.parts):
                each = (bits if part == 0 else bits >> _constant(part * plane.bits, kind)) & mask
                each = each << _constant(plane.shift, kind) if plane.shift else each
                found.append(_as(f"uint8x{4 * self.lanes}", each))
        return found

    def product(self, weights: Sequence[Vector], words: Sequence[Vector], start: Vector) -> Vector:
        """int32: `start` plus the sum over a group of decoded weights by words of activations, int32 each."""
        kind = self.machine.dot
        if kind == "maddubs":
            return start + self._maddubs(weights, words)
        step = {"vnni": self._vnni, "sdot": self._neon, "usdot": self._neon, "smull": self._smull}
        for weight, word in zip(weights, words, strict=True):
            start = step.get(kind, self._portable)(start, weight, word)
        return start

    def _vnni(self, total: Vector, weight: Vector, word: Any) -> Vector:
        kind = f"int32x{self.lanes}"
        name = f"llvm.x86.avx512.vpdpbusd.{32 * self.lanes}"
        return _call(kind, name, total, weight, _as(f"int8x{4 * self.lanes}", T.broadcast(word, self.lanes)))

    def _maddubs(self, weights: Sequence[Vector], words: Sequence[Vector]) -> Vector:
        """Sums of pairs saturate at 16 bits, so codes of more than 4 bits enter in two halves."""
        lanes = self.lanes
        wide = self.form.bits > 4 or self.form.levels is not None
        halves = (_low, _high) if wide else (lambda each: each,)
        sums = []
        for half in halves:
            pairs = None  # at most 8 * 2 * 15 * 127 = 30480 in a lane
            for weight, word in zip(weights, words, strict=True):
                activations = _as(f"int8x{4 * lanes}", T.broadcast(word, lanes))
                two = _call(f"int16x{2 * lanes}", _PAIRS[lanes], half(weight), activations)
                pairs = two if pairs is None else pairs + two
            sums.append(_call(f"int32x{lanes}", _ADD_PAIRS[lanes], pairs, _constant(1, f"int16x{2 * lanes}")))
        return sums[0] if not wide else sums[0] + (sums[1] << _constant(4, f"int32x{lanes}"))

    def _neon(self, total: Vector, weight: Vector, word: Any) -> Vector:
        activations = _as("int8x16", T.broadcast(word, 4))
        name = f"llvm.aarch64.neon.{self.machine.dot}"
        weight = _as("int8x16", weight)
        return _call("int32x4", name, total, weight, activations)

    def _smull(self, total: Vector, weight: Vector, word: Any) -> Vector:
        """Two halves of eight products of 16 bits, added in pairs, then in pairs of 32 bits."""
        activations, weight = _as("int8x16", T.broadcast(word, 4)), _as("int8x16", weight)
        halves = [
            _call("int16x8", "llvm.aarch64.neon.smull", *(tirx.Shuffle([each], part) for each in (weight, activations)))
            for part in (list(range(8)), list(range(8, 16)))
        ]
        pairs = [_call("int32x4", "llvm.aarch64.neon.saddlp", half) for half in halves]
        return total + _call("int32x4", "llvm.aarch64.neon.addp", *pairs)

    def _portable(self, total: Vector, weight: Vector, word: Any) -> Vector:
        """Plain arithmetic on words, which LLVM turns into whatever there is."""
        kind = f"int32x{self.lanes}"
        bits = _as(kind, weight)
        for byte in range(4):
            code = (bits >> _constant(8 * byte, kind)) & _constant(255, kind)
            activation = (word << tirx.const(24 - 8 * byte, "int32")) >> tirx.const(24, "int32")
            total = total + code * T.broadcast(activation, self.lanes)
        return total


_PAIRS = {16: "llvm.x86.avx512.pmaddubs.w.512", 8: "llvm.x86.avx2.pmadd.ub.sw", 4: "llvm.x86.ssse3.pmadd.ub.sw.128"}
_ADD_PAIRS = {16: "llvm.x86.avx512.pmaddw.d.512", 8: "llvm.x86.avx2.pmadd.wd", 4: "llvm.x86.sse2.pmadd.wd"}
_LOOKUP = {16: "llvm.x86.avx512.pshuf.b.512", 8: "llvm.x86.avx2.pshuf.b", 4: "llvm.x86.ssse3.pshuf.b.128"}


def _lookup(machine: Machine, table: list[int], codes: Vector) -> Vector:
    """table[code] for each byte; at most 16 entries."""
    lanes = machine.lanes
    kind = f"uint8x{4 * lanes}"
    if machine.dot in ("vnni", "maddubs", "sdot", "usdot", "smull"):
        full = np.resize(np.asarray(table).astype("uint8"), 16).view("int32")
        words = [tirx.const(int(each), "int32") for each in full] * (lanes // 4)
        shuffled = _as(kind, tirx.Shuffle(words, list(range(lanes))))
        name = "llvm.aarch64.neon.tbl1" if "neon" in machine.features else _LOOKUP[lanes]
        return _call(kind, name, shuffled, codes)
    result = _constant(table[0], kind)
    for code, value in enumerate(table[1:], 1):
        result = tirx.Select(codes == _constant(code, kind), _constant(value, kind), result)
    return result


def _low(weight: Vector) -> Vector:
    return weight & _constant(15, str(weight.ty.dtype))


def _high(weight: Vector) -> Vector:
    kind = str(weight.ty.dtype)
    words = f"int32x{int(kind.removeprefix('uint8x')) // 4}"
    shifted = (_as(words, weight) >> _constant(4, words)) & _constant(0x0F0F0F0F, words)
    return _as(kind, shifted)


def _bytes(value: int, lanes: int) -> Vector:
    return _constant(value, f"uint8x{4 * lanes}")


def _constant(value: int, dtype: str) -> Vector:
    kind, _, lanes = dtype.partition("x")
    return T.broadcast(tirx.const(value, kind), int(lanes))


def _as(dtype: str, value: Any) -> Any:
    """The same bits as another type."""
    return value if str(value.ty.dtype) == dtype else tirx.reinterpret(dtype, value)


def _call(dtype: str, name: str, *arguments: Any) -> Any:
    intrinsic = tirx.IntImm("uint32", codegen.llvm_lookup_intrinsic_id(name))
    return tirx.call_llvm_pure_intrin(dtype, intrinsic, *arguments)
