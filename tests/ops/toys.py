"""Small ops for the tests of the core, each with a trait of its own; and the least that serves as a module."""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm.script import tirx as T

import ops
from ops import Tensor, like, op, scope


@op(symbolic={"x": "n"}, ranges=(1, 2, 17))
def toy_double(x: Tensor) -> Tensor:
    """2 x. x: float32 [n, width]."""
    if x.ndim != 2:
        raise ops.ShapeError(f"x is {x}, expected [n, width]")
    return like(x)


@toy_double.reference
def _(x):
    return 2 * x


@toy_double.kernel
def _(x, out):
    width = x.shape[1]

    @T.prim_func(s_tir=True)
    def toy_double(x_: T.handle, out_: T.handle):
        n = T.int64()
        X = T.match_buffer(x_, (n, width), "float32", align=4)
        Y = T.match_buffer(out_, (n, width), "float32", align=4)
        for i, k in T.grid(n, width):
            with T.sblock("double"):
                vi, vk = T.axis.remap("SS", [i, k])
                Y[vi, vk] = X[vi, vk] * T.float32(2)

    return toy_double


@op(symbolic={"x": "n"})
def toy_split(x: Tensor, shift: Tensor | None = None, factor: float = 1.0, *, sign: int = 1) -> tuple[Tensor, Tensor]:
    """(x * factor, sign * x + shift): two outputs, an optional tensor, a scalar with a default. x: float32 [n]."""
    if shift is not None and shift.shape != (1,):
        raise ops.ShapeError(f"shift is {shift}, expected [1]")
    return like(x), like(x)


@toy_split.reference
def _(x, shift=None, factor=1.0, *, sign=1):
    return x * factor, sign * x + (0 if shift is None else shift)


@toy_split.kernel
def _(x, shift, factor, scaled, moved, *, sign):
    assert factor is float

    if shift is None:

        @T.prim_func(s_tir=True)
        def toy_split(x_: T.handle, factor_: T.float32, scaled_: T.handle, moved_: T.handle):
            n = T.int64()
            X = T.match_buffer(x_, (n,), "float32", align=4)
            Y = T.match_buffer(scaled_, (n,), "float32", align=4)
            Z = T.match_buffer(moved_, (n,), "float32", align=4)
            for i in T.serial(n):
                with T.sblock("split"):
                    vi = T.axis.remap("S", [i])
                    Y[vi] = X[vi] * factor_
                    Z[vi] = X[vi] * T.float32(sign)

    else:

        @T.prim_func(s_tir=True)
        def toy_split(x_: T.handle, shift_: T.handle, factor_: T.float32, scaled_: T.handle, moved_: T.handle):
            n = T.int64()
            X = T.match_buffer(x_, (n,), "float32", align=4)
            S = T.match_buffer(shift_, (1,), "float32", align=4)
            Y = T.match_buffer(scaled_, (n,), "float32", align=4)
            Z = T.match_buffer(moved_, (n,), "float32", align=4)
            for i in T.serial(n):
                with T.sblock("split"):
                    vi = T.axis.remap("S", [i])
                    Y[vi] = X[vi] * factor_
                    Z[vi] = X[vi] * T.float32(sign) + S[0]

    return toy_split


@op(writes=("total",))
def toy_add_to(total: Tensor, x: Tensor, position: int) -> None:
    """total[position] += x, and nothing is returned. total: float32 [rows, width], x: [width]."""
    if x.shape != total.shape[1:]:
        raise ops.ShapeError(f"x is {x}, expected [{total.shape[1]}] for total {total}")


@toy_add_to.reference
def _(total, x, position):
    total = total.copy()
    total[position] += x
    return total


@toy_add_to.kernel
def _(total, x, position):
    rows, width = total.shape

    @T.prim_func(s_tir=True)
    def toy_add_to(total_: T.handle, x_: T.handle, position: T.int64):
        S = T.match_buffer(total_, (rows, width), "float32", align=4)
        X = T.match_buffer(x_, (width,), "float32", align=4)
        assert position >= 0 and position < T.int64(rows), "the position is outside of the rows"
        for k in T.serial(width):
            with T.sblock("add"):
                vk = T.axis.remap("S", [k])
                S[position, vk] = S[position, vk] + X[vk]

    return toy_add_to


@op(symbolic={"x": "n"}, ranges=(1, 2, 17))
def toy_quadruple(x: Tensor) -> Tensor:
    """4 x, with two steps."""
    return like(x)


@toy_quadruple.reference
def _(x):
    return 4 * x


@toy_quadruple.kernel
def _(x, out):
    width = x.shape[1]

    @T.prim_func(s_tir=True)
    def toy_quadruple(x_: T.handle, out_: T.handle):
        n = T.int64()
        X = T.match_buffer(x_, (n, width), "float32", align=4)
        Y = T.match_buffer(out_, (n, width), "float32", align=4)
        for i, k in T.grid(n, width):
            with T.sblock("quadruple"):
                vi, vk = T.axis.remap("SS", [i, k])
                Y[vi, vk] = X[vi, vk] * T.float32(4)

    return toy_quadruple


@toy_quadruple.composed
def _(x):
    return toy_double(toy_double(x))


@op(symbolic={"x": "n"})
def toy_unbuilt(x: Tensor) -> Tensor:
    """Its kernel must never be built."""
    return like(x)


@toy_unbuilt.kernel
def _(x, out):
    raise AssertionError("the kernel of toy_unbuilt was built")


class Block:
    """Doubles twice, and keeps a running total."""

    def __init__(self, name: str, total: Tensor):
        self.name, self.total = name, total

    def __call__(self, x: Tensor, fail: bool = False) -> Tensor:
        return scope.run(self, self.name, self.forward, (x,), {"fail": fail})

    def forward(self, x: Tensor, fail: bool = False) -> Tensor:
        x = toy_double(x)
        toy_add_to(self.total, x[0], 1)
        if fail:
            raise ValueError("the model failed")
        return toy_double(x)


class Model:
    """A few blocks; `totals` are what they write."""

    def __init__(self, blocks: int = 2, width: int = 8):
        self.totals = [ops.zeros((2, width)) for _ in range(blocks)]
        self.layers = [Block(f"layers.{i}", total) for i, total in enumerate(self.totals)]

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return scope.run(self, "", self.forward, args, kwargs)

    def forward(self, x: Tensor, fail: bool = False) -> Tensor:
        for layer in self.layers:
            x = layer(x, fail)
        return ops.rms_norm(x, ops.tensor(np.ones(x.shape[1], "float32")), eps=1e-6)


class Recorder(ops.Interceptor):
    """Sees: addresses, and what each call gave."""

    def __init__(self):
        self.calls: list[ops.Call] = []
        self.outputs: list = []

    def call(self, call, launch):
        index = len(self.calls)
        self.calls.append(call)
        self.outputs.append(None)
        self.outputs[index] = launch(call)
        return self.outputs[index]

    @property
    def addresses(self) -> list[str]:
        return [call.address for call in self.calls]
