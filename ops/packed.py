"""Packed weights in block definitions: the elements of the records, and the product with quantised activations.

Everything here says what a kernel computes, one element at a time; `ops.schedule.quantized` computes it fast.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx.script import builder as T

from . import target, tir
from .quantize import TINIEST, Format
from .spec import Spec

_LARGEST_FINITE = 0x7F7FFFFF  # float32's bits


def argument(name: str, spec: Spec, shape: tuple[Any, ...] | None = None) -> Any:
    """In an IRBuilder: the parameter for a tensor of `spec`, or of another `shape`; a packed weight's bytes."""
    if spec.format is not None:
        return T.arg(name, T.buffer((tirx.const(spec.nbytes, "int64"),), "uint8", align=1))
    return T.arg(name, T.buffer(spec.shape if shape is None else shape, spec.dtype, align=spec.itemsize))


class Weight:
    """The elements of a packed weight [rows, inputs] whose bytes are `buffer`."""

    def __init__(self, buffer: Any, spec: Spec):
        assert spec.format is not None
        self.buffer, self.form = buffer, spec.format
        self.rows, self.inputs = spec.shape
        self.lanes = target.lanes()
        self.groups = self.form.records(spec.shape, self.lanes)[1]

    def value(self, row: Any, column: Any) -> tirx.Expr:
        """An element, float32."""
        group = column // self.form.group
        value = self.level(row, column).astype("float32") * self.scale(row, group)
        return value if not self.form.minimum else value + self.minimum(row, group)

    def level(self, row: Any, column: Any) -> tirx.Expr:
        """What an element's code stands for, without scale and minimum, int32."""
        form, inside = self.form, column % self.form.group
        start, code = self._record(row, column // form.group), None
        for plane in form.planes:
            word, part, byte = inside // (4 * plane.parts), inside // 4 % plane.parts, inside % 4
            bits = self.buffer[start + (word * self.lanes + row % self.lanes) * 4 + byte].astype("int32")
            if plane.parts > 1:
                bits = (bits >> (part * plane.bits).astype("int32")) & (2**plane.bits - 1)
            code = bits if code is None else code | (bits << plane.shift)
            start = start + self.lanes * form.group // plane.parts
        assert code is not None
        if form.levels is None:
            return code - form.offset
        level = tirx.const(form.levels[0], "int32")
        for each, value in enumerate(form.levels[1:], 1):
            level = tirx.Select(code == each, tirx.const(value, "int32"), level)
        return level

    def scale(self, row: Any, group: Any) -> tirx.Expr:
        """A group's scale, float32."""
        return self._float(row, group, 0)

    def minimum(self, row: Any, group: Any) -> tirx.Expr:
        """A group's minimum, float32, of a format that has them."""
        return self._float(row, group, 1)

    def _float(self, row: Any, group: Any, which: int) -> tirx.Expr:
        form, lanes = self.form, self.lanes
        size = np.dtype(form.scale).itemsize
        at = self._record(row, group) + form.codes(lanes) + (which * lanes + row % lanes) * size
        value = self._number(at, form.scale)
        if form.shared == 1:
            return value
        factor = self._block(row) + form.factor(group, lanes) + (which * lanes + row % lanes) * 2
        return self._number(factor, "float16") * value

    def _number(self, at: Any, dtype: str) -> tirx.Expr:
        """The number of `dtype` at a byte, float32."""
        size = np.dtype(dtype).itemsize
        kind = f"uint{8 * size}"
        bits = self.buffer[at].astype(kind)
        for i in range(1, size):
            bits = bits | (self.buffer[at + i].astype(kind) << tirx.const(8 * i, kind))
        if dtype == "float16":
            return tir.half(bits)
        return (bits if kind == dtype else tirx.reinterpret(dtype, bits)).astype("float32")

    def _block(self, row: Any) -> Any:
        return row // self.lanes * self.form.block(self.groups, self.lanes)

    def _record(self, row: Any, group: Any) -> Any:
        return self._block(row) + self.form.start(group, self.lanes)


def quantized(x: Any, n: Any, k: int, form: Format) -> tuple[Any, Any, Any]:
    """In an IRBuilder: blocks that make int8 of activations x [n, k], as `ops.quantize.quantize_activations` does.

    Gives codes int8 [n, k], scales float32 [n, groups], and for a format with minima sums of codes int32 [n, groups].
    """
    groups = -(-k // form.group)

    def inside(group: Any, i: Any) -> Any:
        return group * form.group + i

    def magnitude(largest: Any, at: tuple) -> Any:
        # As integers, magnitudes are in order, and a NaN is above all of them.
        token, group, i = at
        bits = tirx.reinterpret("int32", tir.f32(x[token, tirx.min(inside(group, i), k - 1)])) & 0x7FFFFFFF
        return tirx.max(largest, bits)

    largest = tir.folded("largest", (n, groups, form.group), tirx.const(0, "int32"), magnitude)

    def used(token: Any, group: Any) -> Any:
        bits = largest[token, group]
        return tirx.And(bits <= _LARGEST_FINITE, tirx.reinterpret("float32", bits) >= tir.f32(TINIEST))

    scales = T.sblock_alloc_buffer((n, groups), "float32")
    with tir.block("scale", (n, groups)) as (token, group):
        bits = largest[token, group]
        idle = tirx.Select(bits <= _LARGEST_FINITE, tir.f32(0.0), tir.f32(float("nan")))
        scale = tirx.reinterpret("float32", bits) * tir.f32(1 / 127)
        T.buffer_store(scales, tirx.Select(used(token, group), scale, idle), [token, group])
    codes = T.sblock_alloc_buffer((n, k), "int8")
    with tir.block("codes", (n, k)) as (token, column):
        group = column // form.group
        inverse = tir.f32(127.0) / tirx.reinterpret("float32", largest[token, group])
        scaled = tir.rounded_product(x[token, column].astype("float32"), inverse)
        code = tirx.Select(used(token, group), scaled, tirx.const(0, str(scaled.ty.dtype)))
        T.buffer_store(codes, code.astype("int8"), [token, column])

    if not form.minimum:
        return codes, scales, None

    def add(total: Any, at: tuple) -> Any:
        token, group, i = at
        code = codes[token, tirx.min(inside(group, i), k - 1)].astype("int32")
        return total + tirx.Select(inside(group, i) < k, code, 0)

    sums = tir.folded("sum", (n, groups, form.group), tirx.const(0, "int32"), add)
    return codes, scales, sums


def product(x: Any, n: Any, weight: Weight) -> Any:
    """In an IRBuilder: blocks that multiply activations x [n, inputs] by the weight. Gives sums float32 [n, rows]."""
    form, k, groups = weight.form, weight.inputs, weight.groups
    codes, scales, sums = quantized(x, n, k, form)

    def dot(total: Any, at: tuple) -> Any:
        token, row, group, i = at
        column = group * form.group + i
        last = tirx.min(column, k - 1)
        each = codes[token, last].astype("int32") * weight.level(row, last)
        return total + tirx.Select(column < k, each, 0)

    shape = (n, weight.rows, groups)
    dots = tir.folded("dot", (*shape, form.group), tirx.const(0, "int32"), dot)

    def scaled(total: Any, at: tuple) -> Any:
        token, row, group = at
        value = dots[token, row, group].astype("float32") * weight.scale(row, group)
        if form.minimum:
            value = value + sums[token, group].astype("float32") * weight.minimum(row, group)
        return total + value * scales[token, group]

    return tir.folded("scaled", shape, tir.f32(0.0), scaled)
