"""An op by itself: what it takes and gives, what it remembers, and what it says when it is used wrongly."""

import inspect
import traceback
from typing import Any

import numpy as np
import pytest

import ops
from ops import Dim, Spec, build, memory
from ops import scope as scopes

from .harness import random
from .toys import Model, Recorder, toy_add_to, toy_double, toy_split, toy_unbuilt


def test_errors_name_the_op_the_scope_and_the_argument(x):
    double: Any = toy_double  # what a checker of types would not let pass
    split: Any = toy_split
    norm: Any = ops.rms_norm
    add_to: Any = toy_add_to

    class Wrong(Model):
        def forward(self, x, fail=False):
            return scopes.run(None, "layers.0.mlp", lambda: double(x[0]), (), {})

    with pytest.raises(ops.ShapeError, match=r"^toy_double in layers.0.mlp: x is float32\[8\], expected \[n, width\]$"):
        Wrong()(x)
    with pytest.raises(ops.OpError, match=r"^toy_double\(x: Tensor\) -> Tensor: missing a required argument: 'x'"):
        double()
    with pytest.raises(ops.OpError, match=r"too many positional"):
        double(x, x)
    with pytest.raises(ops.OpError, match=r"unexpected keyword argument 'epsilon'"):
        norm(x, x[0], eps=1e-5, epsilon=1e-5)
    with pytest.raises(ops.OpError, match=r"x is numpy.ndarray, expected Tensor; pass ops.tensor"):
        double(x.numpy())
    with pytest.raises(ops.OpError, match=r"toy_double: x is NoneType, expected Tensor"):
        double(None)
    with pytest.raises(ops.OpError, match=r"x is ops.spec.Spec, expected Tensor"):
        double(x.spec)
    with pytest.raises(ops.OpError, match=r"shift is list, expected Tensor or None"):
        split(x[0], [1.0])
    with pytest.raises(ops.OpError, match=r"factor is str, expected float"):
        split(x[0], None, "2")
    with pytest.raises(ops.OpError, match=r"position is float, expected int"):
        add_to(ops.zeros((3, 8)), x[0], 1.0)
    with pytest.raises(ops.OpError, match=r"toy_split: a constant is a number, a string or a tuple, not unhashable"):
        split(x[0], sign=[1])
    with pytest.raises(ops.OpError, match=r"sign is ops.tensor.Tensor; it is a compile-time constant"):
        split(x[0], sign=x)
    with pytest.raises(
        ops.KernelError, match=r"toy_add_to\(float32\[2, 8\], float32\[8\], 7\): the position is outside"
    ):
        add_to(ops.zeros((2, 8)), x[0], 7)


def test_an_error_is_raised_once_and_its_cause_is_chained(x):
    def broken(x):
        raise ZeroDivisionError("mine")

    with toy_double.use(broken), pytest.raises(ops.KernelError, match=r"toy_double\(float32\[3, 8\]\): mine") as caught:
        toy_double(x)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    with pytest.raises(ops.KernelError) as caught:
        toy_unbuilt(ops.tensor(np.ones((2, 2), "float32")))
    assert caught.value.__cause__ is not caught.value
    assert "broken" not in "".join(traceback.format_exception(caught.value))


def test_spec_infers_without_allocating():
    n = Dim("n", 2, 16)
    before = memory.statistics()["allocations"]
    assert toy_double.spec(Spec((n, 8), "float32")) == Spec((n, 8), "float32")
    assert toy_split.spec(Spec((n,), "float32"), factor=2.0) == (Spec((n,), "float32"),) * 2
    assert ops.rms_norm.spec(Spec((n, 8), "bfloat16"), Spec((8,), "float32"), eps=1e-5).shape == (n, 8)
    assert toy_add_to.spec(Spec((2, 3), "float32"), Spec((3,), "float32"), 1) == ()
    with pytest.raises(ops.ShapeError, match=r"weight is float32\[9\], expected \[8\] for x bfloat16\[n:2-16, 8\]"):
        ops.rms_norm.spec(Spec((n, 8), "bfloat16"), Spec((9,), "float32"), eps=1e-5)
    assert memory.statistics()["allocations"] == before


def test_several_outputs_scalars_defaults_and_names(rng):
    values, one = random(rng, (6,), "float32"), np.array([0.5], "float32")
    x, shift = ops.tensor(values), ops.tensor(one)
    for _ in range(3):  # the first call of a form makes its plan, the others find it
        for given, wanted in [
            (toy_split(x), (values, values)),
            (toy_split(x, None), (values, values)),
            (toy_split(x, shift), (values, values + one)),
            (toy_split(x, shift=shift), (values, values + one)),
            (toy_split(x=x, factor=3), (3 * values, values)),
            (toy_split(x, None, 2), (2 * values, values)),
            (toy_split(x, None, 2.5), (np.float32(2.5) * values, values)),
            (toy_split(x, shift, 0.5, sign=-1), (np.float32(0.5) * values, -values + one)),
        ]:
            assert isinstance(given, tuple) and len(given) == 2
            np.testing.assert_allclose(given[0].numpy(), wanted[0], rtol=1e-6)
            np.testing.assert_allclose(given[1].numpy(), wanted[1], rtol=1e-6)
    total = ops.zeros((3, 6))
    assert toy_add_to(total, x, 2) is None
    toy_add_to(total=total, position=2, x=x)
    np.testing.assert_array_equal(total.numpy()[2], 2 * values)
    seen = Recorder()
    with ops.intercepted(seen):
        toy_split(x, None)
        toy_split(shift=None, x=x, sign=-1)
    assert [call.args for call in seen.calls] == [(x, None, 1.0), (x, None, 1.0)]
    assert [call.constants for call in seen.calls] == [{"sign": 1}, {"sign": -1}]


def test_a_scalar_is_no_part_of_a_kernel():
    toy_split(ops.zeros((4,)), None, 1.25)
    before = len(build.log)
    for size in range(1, 6):
        for factor in (0.5, 7, -1.0):
            given = toy_split(ops.tensor(np.ones(size, "float32")), None, factor)
            assert (given[0].numpy() == factor).all()
    assert len(build.log) == before


def test_the_memo_is_bounded(monkeypatch):
    monkeypatch.setattr(inspect.getmodule(ops.Op), "_MEMO_LIMIT", 20)
    for size in range(1, 100):
        toy_split(ops.zeros((size,)))
    assert len(toy_split._plans) <= 40


def test_nothing_to_compute_is_no_launch():
    assert toy_unbuilt(ops.empty((0, 8))).shape == (0, 8)


def test_an_op_says_what_it_is_when_its_declaration_is_wrong():
    with pytest.raises(TypeError, match=r"toy_wrong: writes= and symbolic= name \['y'\], which are no arguments"):

        @ops.op(symbolic={"y": "n"})
        def toy_wrong(x: ops.Tensor) -> ops.Tensor:
            return ops.like(x)

    with pytest.raises(TypeError, match=r"toy_untyped: x must be annotated as Tensor, int or float"):

        @ops.op()
        def toy_untyped(x) -> ops.Tensor:
            return ops.like(x)

    @ops.op()
    def toy_plain(x: ops.Tensor, y: ops.Tensor | None, n: int) -> ops.Tensor:  # annotations that are no strings
        return ops.like(x)

    assert toy_plain.spec(Spec((2,), "int8"), None, 3) == Spec((2,), "int8")
    with pytest.raises(ops.KernelError, match=r"toy_plain has no kernel; register one with @toy_plain.kernel"):
        toy_plain(ops.zeros((2,)), None, 3)
    with pytest.raises(ops.OpError, match=r"toy_plain has no reference; register one with @toy_plain.reference"):
        toy_plain.reference(1, 2)
