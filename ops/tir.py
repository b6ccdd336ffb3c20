"""Small pieces of TIR that several kernels share. Expressions in, expressions out; portable, no intrinsics.

All take and give float32 unless said otherwise, and vectorise, which calls into the C library would not.
"""

from __future__ import annotations

import math

from tvm import tirx

# Cephes' expf: exp(f) on [-ln2/2, ln2/2] to 1 ulp or so, highest power first.
_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)


def f32(value: float | tirx.Expr) -> tirx.Expr:
    """A float32 constant, or an expression cast to float32."""
    return tirx.const(value, "float32") if isinstance(value, (int, float)) else value.astype("float32")


def exp(x: tirx.Expr) -> tirx.Expr:
    """e**x within 2e-7 relative; 0 below -87, and it saturates above 88."""
    x = tirx.min(tirx.max(x, _like(x, -87.3)), _like(x, 88.3))
    n = tirx.floor(x * _like(x, math.log2(math.e)) + _like(x, 0.5))
    # ln2 in two parts, so that x - n ln2 is exact
    f = x - n * _like(x, 0.693359375) - n * _like(x, -2.12194440e-4)
    p = _like(x, _EXP[0])
    for coefficient in _EXP[1:]:
        p = p * f + _like(x, coefficient)
    p = p * f * f + f + _like(x, 1.0)
    return p * _power_of_two(n)


def _like(x: tirx.Expr, value: float) -> tirx.Expr:
    return tirx.const(value, str(x.dtype))


def _power_of_two(n: tirx.Expr) -> tirx.Expr:
    lanes = str(n.dtype).removeprefix("float32")
    exponent = (n.astype("int32" + lanes) + tirx.const(127, "int32" + lanes)) << tirx.const(23, "int32" + lanes)
    return tirx.reinterpret("float32" + lanes, exponent)


def sigmoid(x: tirx.Expr) -> tirx.Expr:
    """1 / (1 + e**-x)."""
    return _like(x, 1.0) / (_like(x, 1.0) + exp(-x))


def silu(x: tirx.Expr) -> tirx.Expr:
    """x * sigmoid(x)."""
    return x / (_like(x, 1.0) + exp(-x))


def tanh(x: tirx.Expr) -> tirx.Expr:
    """Hyperbolic tangent, to 1e-6 absolute."""
    return _like(x, 1.0) - _like(x, 2.0) / (_like(x, 1.0) + exp(x + x))
