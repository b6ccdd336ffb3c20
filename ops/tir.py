"""Small pieces of TIR that several kernels share. Expressions in, expressions out; float32 unless said otherwise.

`exp` and `tanh` stay TIR's own calls, which are easy to read and fast on a GPU. For a CPU they are lowered to the
arithmetic below, which LLVM vectorises; it would not vectorise calls into the C library.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import tvm
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.tirx import builder as T

from . import target

# Cephes' expf: exp(f) on [-ln2/2, ln2/2] to 1 ulp or so, highest power first.
_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
# erfc(z) = t P(t) exp(-z**2) with t = 1 / (1 + step z): P fitted by least squares, reweighted until the relative
# error is level, below 6e-8 on 0 <= z <= 9.5, highest power first.
_ERFC_STEP = 0.4
_ERFC = (
    4.026746078e-02,
    -1.354709325e-01,
    7.384185678e-02,
    9.972986144e-02,
    7.150815067e-02,
    1.969630769e-01,
    2.009585749e-01,
    2.265757104e-01,
    2.256262982e-01,
)


_part: ContextVar[dict[str, str] | None] = ContextVar("part", default=None)


@contextmanager
def part(name: str, kind: str) -> Iterator[None]:
    """In an IRBuilder: blocks made in the `with` are annotated as this `kind` of a part that a schedule looks for."""
    token = _part.set({name: kind})
    try:
        yield
    finally:
        _part.reset(token)


@contextmanager
def block(name: str, shape: Sequence[Any], reduces: bool = False) -> Iterator[tuple]:
    """In an IRBuilder: a block in a loop nest over `shape`. Gives its axes; the last one may be a reduction."""
    with T.grid(*shape) as nest, T.sblock(name):
        loops = nest if len(shape) > 1 else [nest]
        kinds = [T.axis.spatial] * (len(shape) - reduces) + [T.axis.reduce] * reduces
        axes = tuple(kind(size, loop) for kind, size, loop in zip(kinds, shape, loops, strict=True))
        for i, (loop, axis) in enumerate(zip(loops, axes, strict=True)):
            IRBuilder.name(f"i{i}", loop)
            IRBuilder.name(f"v{i}", axis)
        if marks := _part.get():
            T.sblock_attr(marks)
        yield axes


def scratch(name: str, shape: Sequence[Any], dtype: str) -> Any:
    """In an IRBuilder: a buffer of the kernel's own, one value a row."""
    buffer = T.sblock_alloc_buffer(shape, dtype)
    IRBuilder.name(f"{name}_of_row", buffer)
    return buffer


def folded(
    name: str, shape: Sequence[Any], start: tirx.Expr, step: Callable[[Any, tuple], tirx.Expr], out: Any = None
) -> Any:
    """In an IRBuilder: a block that folds the last axis of `shape`, by `step` of the result so far and the axes.

    Gives the buffer of results, one a row: `out`, or a new one of start's dtype.
    """
    out = scratch(name, shape[:-1], str(start.ty.dtype)) if out is None else out
    with block(name, shape, reduces=True) as axes:
        with T.init():
            T.buffer_store(out, start, axes[:-1])
        T.buffer_store(out, step(out[axes[:-1]], axes), axes[:-1])
    return out


def without(function: Any, index: int) -> Any:
    """A PrimFunc without a parameter that its body does not use: that of an argument left out."""
    parameters = [each for i, each in enumerate(function.params) if i != index]
    return tirx.PrimFunc(parameters, function.body, function.ret_type, function.attrs)


def f32(value: float | tirx.Expr) -> tirx.Expr:
    """A float32 constant, or an expression cast to float32."""
    return tirx.const(value, "float32") if isinstance(value, (int, float)) else value.astype("float32")


def exp(x: tirx.Expr) -> tirx.Expr:
    """e**x, on a CPU within 2e-7 relative; 0 below -87.7, infinite above 88.4, and NaN stays NaN."""
    return tirx.exp(x)


def _exp(x: tirx.Expr) -> tirx.Expr:
    power, q = _split_exp(x)
    return (q + _like(x, 1.0)) * power


def _split_exp(x: tirx.Expr) -> tuple[tirx.Expr, tirx.Expr]:
    """2**n and q with e**x = 2**n * (1 + q), |q| < 0.42; the ends of the clamp give 2**-127 as 0 and 2**128 as inf."""
    x = _clamp(x, -88.0, 88.8)
    n = tirx.floor(x * _like(x, math.log2(math.e)) + _like(x, 0.5))
    # ln2 in two parts, so that x - n ln2 is exact
    f = x - n * _like(x, 0.693359375) - n * _like(x, -2.12194440e-4)
    return _power_of_two(n), polynomial(f, _EXP) * f * f + f


def polynomial(x: tirx.Expr, coefficients: Sequence[float]) -> tirx.Expr:
    """Horner's scheme, highest power first."""
    value = _like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        value = value * x + _like(x, coefficient)
    return value


def _clamp(x: tirx.Expr, low: float, high: float) -> tirx.Expr:
    # The bound stands first: a comparison with NaN is false, which then picks x, and NaN is not hidden.
    return tirx.min(_like(x, high), tirx.max(_like(x, low), x))


def _like(x: tirx.Expr, value: float) -> tirx.Expr:
    return tirx.const(value, str(x.ty.dtype))


def _power_of_two(n: tirx.Expr) -> tirx.Expr:
    lanes = str(n.ty.dtype).removeprefix("float32")
    exponent = (n.astype("int32" + lanes) + tirx.const(127, "int32" + lanes)) << tirx.const(23, "int32" + lanes)
    return tirx.reinterpret("float32" + lanes, exponent)


def sigmoid(x: tirx.Expr) -> tirx.Expr:
    """1 / (1 + e**-x)."""
    return _like(x, 1.0) / (_like(x, 1.0) + exp(-x))


def silu(x: tirx.Expr) -> tirx.Expr:
    """x * sigmoid(x)."""
    return x / (_like(x, 1.0) + exp(-x))


def tanh(x: tirx.Expr) -> tirx.Expr:
    """Hyperbolic tangent, on a CPU within 5e-7 relative, near 0 too, and NaN stays NaN."""
    return tirx.tanh(x)


def _tanh(x: tirx.Expr) -> tirx.Expr:
    power, q = _split_exp(_clamp(x + x, -40.0, 40.0))
    e = power * q + (power - _like(x, 1.0))  # exp(2x) - 1 without cancelling
    return e / (e + _like(x, 2.0))


def normal_cdf(x: tirx.Expr) -> tirx.Expr:
    """(1 + erf(x / sqrt(2))) / 2 within 3e-7 absolute; relative, 2e-6 for x > -5 and 2e-5 for x > -13."""
    z = tirx.max(x, -x) * _like(x, math.sqrt(0.5))  # |x|, for which TVM's C has no function
    t = _like(x, 1.0) / (_like(x, 1.0) + _like(x, _ERFC_STEP) * z)
    half = _like(x, 0.5) * t * polynomial(t, _ERFC) * exp(-z * z)
    return tirx.Select(x > _like(x, 0.0), _like(x, 1.0) - half, half)


def half(bits: tirx.Expr) -> tirx.Expr:
    """The float32 of a float16's bits, uint16."""
    device = target.gpu()
    if device is None or "float16" not in device.lacks:
        return tirx.reinterpret("float16", bits).astype("float32")
    wide = bits.astype("uint32")
    sign, rest = (wide & 0x8000) << tirx.const(16, "uint32"), wide & 0x7FFF
    # A product by 2**112 moves the exponent to its place, of subnormal numbers too; infinities and NaN keep the last.
    moved = tirx.reinterpret("float32", rest << tirx.const(13, "uint32")) * f32(2.0**112)
    special = (rest << tirx.const(13, "uint32")) | tirx.const(0x7F800000, "uint32")
    value = tirx.Select(rest >= 0x7C00, special, tirx.reinterpret("uint32", moved))
    return tirx.reinterpret("float32", sign | value)


def rounded_product(a: tirx.Expr, b: tirx.Expr) -> tirx.Expr:
    """a * b to the nearest integer, of a tie the even one, the product being rounded once. a, b: float32."""
    device = target.gpu()
    if device is None or device.double:
        return tirx.nearbyint(a.astype("float64") * b.astype("float64"))  # where the product is exact
    product = a * b
    # What the product has lost decides where it is a tie, and only there: a half is a float32.
    lost = tirx.call_pure_extern("float32", "fma", a, b, -product)
    tie = product - tirx.floor(product) == f32(0.5)
    away = tirx.Select(lost > f32(0.0), tirx.ceil(product), tirx.floor(product))
    return tirx.Select(tirx.And(tie, lost != f32(0.0)), away, tirx.nearbyint(product))


def _lower_on_cpu(name: str, function: Callable[[tirx.Expr], tirx.Expr]) -> None:
    """LLVM kernels compute float32 calls of the intrinsic by `function`, other dtypes as TVM does."""
    tvms = tvm.ir.Op.get(f"tirx.{name}").get_attr("llvm.FLowerIntrinsic")

    def lower(call: tirx.Call) -> tirx.Expr:
        return function(call.args[0]) if str(call.ty.dtype).startswith("float32") else tvms(call)

    tirx.op.register_intrin_lowering(f"tirx.{name}", target="llvm", f=lower, level=200)


def _lower_tanh(call: tirx.Call) -> tirx.Expr:
    return _tanh(call.args[0].astype("float32")).astype(str(call.ty.dtype))


for _kind in ("metal", "webgpu"):  # TVM's own there cancels near 0
    tirx.op.register_intrin_lowering("tirx.tanh", target=_kind, f=_lower_tanh, level=200)
_lower_on_cpu("exp", _exp)
_lower_on_cpu("tanh", _tanh)
