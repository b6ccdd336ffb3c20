"""Element-wise ops: arithmetic, activations, casts. Computed in float32, whatever the storage; NaN stays NaN."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any, Literal

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.tirx import builder as T

from . import tir
from .errors import DTypeError, OpError, ShapeError
from .op import Op, like, op
from .spec import DTYPES, FLOATS, Spec
from .tensor import Number, Tensor

_rows = partial(op, ranges=(1, 2, 17))
Approximation = Literal["none", "tanh"]
_CASTS = {*((a, b) for a in FLOATS for b in FLOATS), ("int32", "float32"), ("float32", "int32")}


def blocks(name: str, function: Callable, parameters: Sequence[str], specs: Sequence[Any], out: Spec) -> Any:
    """The block definition of out[i...] = function(arguments[i...]), the arguments as float32 unless they are copied.

    An argument of lower rank than `out` is indexed by out's last axes; one that is no tensor is a float32 scalar.
    """
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name(name)
        shape = (tirx.Var("n", "int64"), *out.shape[1:])
        arguments = [_argument(*each, shape) for each in zip(parameters, specs, strict=True)]
        result = T.arg("out", T.buffer(shape, out.dtype, align=out.itemsize))
        with tir.block(name, shape) as axes:
            values = [argument(axes) for argument in arguments]
            T.buffer_store(result, function(*values).astype(out.dtype), axes)
    return builder.get()


def _argument(name: str, spec: Any, shape: tuple) -> Callable[[Sequence], Any]:
    """Declares a parameter of the kernel; gives its value at axes."""
    if not isinstance(spec, Spec):
        scalar = T.arg(name, tirx.Var(name, "float32"))
        return lambda axes: scalar
    sizes = shape if spec.ndim == len(shape) else spec.shape
    buffer = T.arg(name, T.buffer(sizes, spec.dtype, align=spec.itemsize))
    return lambda axes: buffer[tuple(axes[-spec.ndim :])]


def _defined(op: Op, function: Callable, reference: Callable | None = None) -> None:
    """Gives the op its kernel and its reference: one function of float32 TIR and of float64 arrays, or one for each."""
    compute = reference or function

    @op.reference
    @wraps(compute)
    def _(*arrays, **constants):
        wide = [a.astype("float64") if isinstance(a, np.ndarray) else a for a in arrays]
        with np.errstate(all="ignore"):  # inf and NaN are results here, as in the kernel
            return compute(*wide, **constants)

    @op.kernel
    def _(*specs, **constants):
        def in_float32(*values):
            return function(*map(tir.f32, values), **constants)

        return blocks(op.name, in_float32, op.parameters, specs[:-1], specs[-1])


def _same(**tensors: Tensor) -> Tensor:
    """The rule of most: float tensors of one shape and dtype, and an output like them."""
    (first, x), *rest = tensors.items()
    if x.dtype not in FLOATS:
        raise DTypeError(f"{first} is {x}, expected one of {', '.join(FLOATS)}; {_converted(first, x, 'float32')}")
    if x.ndim < 1:
        raise ShapeError(f"{first} is {x}, expected at least one axis")
    for name, y in rest:
        if y.shape != x.shape:
            raise ShapeError(f"{name} is {y}, expected [{', '.join(map(str, x.shape))}], the shape of {first}")
        if y.dtype != x.dtype:
            raise DTypeError(_other_dtype(name, y, first, x))
    return like(x)


def _other_dtype(name: str, y: Tensor, first: str, x: Tensor) -> str:
    return f"{name} is {y.dtype}, expected {x.dtype}, the dtype of {first}; {_converted(name, y, x.dtype)}"


def _converted(name: str, x: Tensor, dtype: str) -> str:
    """How to convert it: not every dtype casts."""
    way = f"ops.cast({name}, dtype={dtype!r})" if (x.dtype, dtype) in _CASTS else f"ops.tensor({name}, {dtype!r})"
    return f"convert it with {way}"


def _row(x: Tensor, y: Tensor) -> Tensor:
    output = _same(x=x)
    if x.ndim < 2:
        raise ShapeError(f"x is {x}, expected rows: [n, ..., width]")
    if y.shape != x.shape[-1:]:
        raise ShapeError(f"y is {y}, expected [{x.shape[-1]}], the last axis of x {x}")
    if y.dtype != x.dtype:
        raise DTypeError(_other_dtype("y", y, "x", x))
    return output


@_rows(symbolic={"x": "n", "y": "n"})
def add(x: Tensor, y: Tensor) -> Tensor:
    """x + y: float tensors of one shape, at least one axis, and one dtype, which the result has too."""
    return _same(x=x, y=y)


@_rows(symbolic={"x": "n", "y": "n"})
def sub(x: Tensor, y: Tensor) -> Tensor:
    """x - y: float tensors of one shape and dtype."""
    return _same(x=x, y=y)


@_rows(symbolic={"x": "n", "y": "n"})
def mul(x: Tensor, y: Tensor) -> Tensor:
    """x * y, element by element: float tensors of one shape and dtype."""
    return _same(x=x, y=y)


@_rows(symbolic={"x": "n", "y": "n"})
def div(x: Tensor, y: Tensor) -> Tensor:
    """x / y, element by element: float tensors of one shape and dtype. Division by 0 gives inf or NaN."""
    return _same(x=x, y=y)


@_rows(symbolic={"x": "n"})
def add_row(x: Tensor, y: Tensor) -> Tensor:
    """x + y, the same y in every row, such as a bias. x: [n, ..., width], y: [width], one float dtype."""
    return _row(x, y)


@_rows(symbolic={"x": "n"})
def mul_row(x: Tensor, y: Tensor) -> Tensor:
    """x * y, the same y in every row. x: [n, ..., width], y: [width], one float dtype."""
    return _row(x, y)


@_rows(symbolic={"x": "n"})
def scale(x: Tensor, factor: float) -> Tensor:
    """x * factor. The factor is a run-time value, rounded to float32: another one compiles nothing."""
    return _same(x=x)


@_rows(symbolic={"x": "n"})
def offset(x: Tensor, value: float) -> Tensor:
    """x + value. The value is a run-time value, rounded to float32: another one compiles nothing."""
    return _same(x=x)


@_rows(symbolic={"x": "n"})
def div_by(x: Tensor, divisor: float) -> Tensor:
    """x / divisor, the divisor a run-time value as in `scale`. Division by 0 gives inf or NaN."""
    return _same(x=x)


@_rows(symbolic={"x": "n"})
def div_into(x: Tensor, dividend: float) -> Tensor:
    """dividend / x, the dividend a run-time value as in `scale`. Division by 0 gives inf or NaN."""
    return _same(x=x)


@_rows(symbolic={"x": "n"})
def neg(x: Tensor) -> Tensor:
    """-x."""
    return _same(x=x)


@_rows(symbolic={"x": "n"})
def tanh(x: Tensor) -> Tensor:
    """The hyperbolic tangent."""
    return _same(x=x)


@_rows(symbolic={"x": "n"})
def softcap(x: Tensor, *, cap: float) -> Tensor:
    """cap * tanh(x / cap): nearly x near 0, never beyond +-cap. Gemma 2 (Gemma Team 2024), HF `*_logit_softcapping`."""
    if not cap > 0:
        raise OpError(f"cap is {cap}, expected a number above 0")
    return _same(x=x)


@_rows(symbolic={"x": "n"})
def clamp(x: Tensor, *, limit: float) -> Tensor:
    """x within +-limit, which is above 0; NaN stays. HF `clip_qkv`, torch.clamp."""
    if not limit > 0:
        raise OpError(f"limit is {limit}, expected a number above 0")
    return _same(x=x)


@_rows(symbolic={"x": "n"})
def silu(x: Tensor) -> Tensor:
    """x * sigmoid(x), also called swish. Elfwing et al. 2017; HF ACT2FN["silu"]."""
    return _same(x=x)


@_rows(symbolic={"x": "n"})
def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x))."""
    return _same(x=x)


@_rows(symbolic={"x": "n"})
def relu(x: Tensor) -> Tensor:
    """max(x, 0)."""
    return _same(x=x)


@_rows(symbolic={"gate": "n", "up": "n"})
def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, the heart of a SwiGLU feed-forward layer (Shazeer 2020): one shape and float dtype."""
    return _same(gate=gate, up=up)


@_rows(symbolic={"x": "n"})
def gelu(x: Tensor, *, approximate: Approximation = "none") -> Tensor:
    """x * cdf(x), with the normal distribution's cdf by erf, or for "tanh" by its approximation.

    Hendrycks and Gimpel 2016; HF ACT2FN["gelu"] and, for "tanh", ACT2FN["gelu_pytorch_tanh"], ACT2FN["gelu_new"].
    """
    _check_approximation(approximate)
    return _same(x=x)


@_rows(symbolic={"gate": "n", "up": "n"})
def gelu_mul(gate: Tensor, up: Tensor, *, approximate: Approximation = "none") -> Tensor:
    """gelu(gate) * up, the heart of a GeGLU feed-forward layer (Shazeer 2020): one shape and float dtype."""
    _check_approximation(approximate)
    return _same(gate=gate, up=up)


@_rows(symbolic={"gate": "n", "up": "n"})
def clamped_swiglu(gate: Tensor, up: Tensor, *, alpha: float, limit: float) -> Tensor:
    """g * sigmoid(alpha * g) * (u + 1), of g = min(gate, limit) and u = up within +-limit. HF GptOssExperts."""
    if not limit > 0:
        raise OpError(f"limit is {limit}, expected a number above 0")
    return _same(gate=gate, up=up)


@_rows(symbolic={"x": "n"})
def cast(x: Tensor, *, dtype: str) -> Tensor:
    """x as another dtype: between float dtypes, rounding to nearest even, and between float32 and int32.

    To int32 it drops the fraction; values beyond int32, infinities and NaN give an unspecified integer.
    """
    if (x.dtype, dtype) not in _CASTS:
        known = ", ".join(sorted(to for given, to in _CASTS if given == x.dtype)) or "nothing"
        raise DTypeError(f"x is {x} and dtype is {dtype!r}; {x.dtype} casts to {known}")
    if x.ndim < 1:
        raise ShapeError(f"x is {x}, expected at least one axis")
    return like(x, dtype=dtype)


@_rows(symbolic={"x": "n"})
def copy(x: Tensor) -> Tensor:
    """The same values in memory of their own. Any dtype, at least one axis."""
    if x.ndim < 1:
        raise ShapeError(f"x is {x}, expected at least one axis")
    return like(x)


def _check_approximation(approximate: str) -> None:
    if approximate not in ("none", "tanh"):
        raise OpError(f"approximate is {approximate!r}, expected 'none' or 'tanh'")


def _gelu(x: Any, approximate: str) -> Any:
    if approximate == "none":
        return x * tir.normal_cdf(x)
    cubic = x + x * x * x * tir.f32(0.044715)
    return x * tir.sigmoid(cubic * tir.f32(math.sqrt(8 / math.pi)))  # (1 + tanh(u)) / 2 is sigmoid(2u)


def _numpy_gelu(x: np.ndarray, approximate: str = "none") -> np.ndarray:
    if approximate == "none":
        return x * np.vectorize(math.erfc, otypes=[float])(-x / math.sqrt(2)) / 2
    return x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


def _numpy_silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def _clamped_swiglu(gate: Any, up: Any, alpha: float, limit: float) -> Any:
    top = tir.f32(limit)
    gate, up = tirx.min(top, gate), tirx.max(-top, tirx.min(top, up))  # the bound first, so that NaN stays
    return gate * tir.sigmoid(gate * tir.f32(alpha)) * (up + tir.f32(1.0))


def _numpy_clamped_swiglu(gate: np.ndarray, up: np.ndarray, alpha: float, limit: float) -> np.ndarray:
    gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
    return gate / (1 + np.exp(-alpha * gate)) * (up + 1)


def _castable(x: Any, dtype: str) -> Any:
    # TVM rounds to bfloat16 by adding to the bits, which turns some NaNs into numbers.
    return tirx.Select(tirx.isnan(x), tir.f32(math.nan), x) if dtype == "bfloat16" else x


_defined(add, lambda x, y: x + y)
_defined(sub, lambda x, y: x - y)
_defined(mul, lambda x, y: x * y)
_defined(div, lambda x, y: x / y)
_defined(add_row, lambda x, y: x + y)
_defined(mul_row, lambda x, y: x * y)
_defined(scale, lambda x, factor: x * factor)
_defined(offset, lambda x, value: x + value)
_defined(div_by, lambda x, divisor: x / divisor)
_defined(div_into, lambda x, dividend: dividend / x)
_defined(neg, lambda x: -x)
_defined(tanh, tir.tanh, np.tanh)
_defined(softcap, lambda x, cap: tir.tanh(x / tir.f32(cap)) * tir.f32(cap), lambda x, cap: cap * np.tanh(x / cap))
_defined(
    clamp,
    lambda x, limit: tirx.max(tir.f32(-limit), tirx.min(tir.f32(limit), x)),
    lambda x, limit: np.clip(x, -limit, limit),
)
_defined(silu, tir.silu, _numpy_silu)
_defined(sigmoid, tir.sigmoid, lambda x: 1 / (1 + np.exp(-x)))
_defined(relu, lambda x: tirx.max(tir.f32(0.0), x), lambda x: np.maximum(x, 0))
_defined(clamped_swiglu, _clamped_swiglu, _numpy_clamped_swiglu)
_defined(silu_mul, lambda gate, up: tir.silu(gate) * up, lambda gate, up: _numpy_silu(gate) * up)
_defined(gelu, _gelu, _numpy_gelu)
_defined(
    gelu_mul,
    lambda gate, up, approximate: _gelu(gate, approximate) * up,
    lambda gate, up, approximate="none": _numpy_gelu(gate, approximate) * up,
)
_defined(cast, _castable, lambda x, dtype: x.astype(DTYPES[dtype]))


@copy.reference
def _(x):
    return x.copy()


@copy.kernel
def _(x, out):
    return blocks("copy", lambda x: x, copy.parameters, (x,), out)


def _number(y: Any) -> float:
    if isinstance(y, (int, float, np.integer, np.floating)):
        return float(y)
    raise OpError(f"arithmetic takes tensors and numbers, not {type(y).__name__}; pass ops.tensor(...)")


def _plus(x: Tensor, y: Tensor | Number) -> Tensor:
    if isinstance(y, Tensor):
        if x.spec.ndim == y.spec.ndim:
            return add(x, y)
        return add_row(x, y) if x.ndim > y.ndim else add_row(y, x)
    return offset(x, _number(y))


def _minus(x: Tensor, y: Tensor | Number) -> Tensor:
    return sub(x, y) if isinstance(y, Tensor) else offset(x, -_number(y))


def _minus_from(x: Tensor, y: Number) -> Tensor:
    return offset(neg(x), _number(y))


def _times(x: Tensor, y: Tensor | Number) -> Tensor:
    if isinstance(y, Tensor):
        if x.spec.ndim == y.spec.ndim:
            return mul(x, y)
        return mul_row(x, y) if x.ndim > y.ndim else mul_row(y, x)
    return scale(x, _number(y))


def _over(x: Tensor, y: Tensor | Number) -> Tensor:
    return div(x, y) if isinstance(y, Tensor) else div_by(x, _number(y))


def _under(x: Tensor, y: Number) -> Tensor:
    return div_into(x, _number(y))


def _negative(x: Tensor) -> Tensor:
    return neg(x)


Tensor.__add__ = Tensor.__radd__ = _plus
Tensor.__sub__, Tensor.__rsub__ = _minus, _minus_from
Tensor.__mul__ = Tensor.__rmul__ = _times
Tensor.__truediv__, Tensor.__rtruediv__ = _over, _under
Tensor.__neg__ = _negative
