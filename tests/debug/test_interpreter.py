"""The interpreter on small block definitions: what TIR states, to the bit, and only what an element asks for."""

# pyright: reportInvalidTypeForm=false
# TVMScript writes shapes into annotations.

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from tvm import tirx
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder

from debug.interpreter import Interpreter
from ops import OpError, Spec, tir


def elementwise(function: Any, *arrays: np.ndarray, dtype: str = "float32") -> list[Any]:
    """out[i] = function(arrays[i]...) for all i, by interpretation."""
    with IRBuilder() as ir, builder.prim_func(s_tir=True):
        builder.func_name("each")
        n = tirx.Var("n", "int64")
        given = [builder.arg(f"x{i}", builder.buffer((n,), str(each.dtype))) for i, each in enumerate(arrays)]
        out = builder.arg("out", builder.buffer((n,), dtype))
        with tir.block("each", (n,)) as at:
            builder.buffer_store(out, function(*(each[at] for each in given)), at)
    named = {f"x{i}": each for i, each in enumerate(arrays)}
    interpreter = Interpreter(ir.get(), named | {"out": Spec(arrays[0].shape, dtype)})
    return [interpreter.element("out", (i,))[0] for i in range(len(arrays[0]))]


def test_floats_are_rounded_after_each_operation(rng):
    a, b = (rng.standard_normal(50).astype("float32") for _ in range(2))
    assert elementwise(lambda x, y: x * y + x / y - x, a, b) == list(a * b + a / b - a)
    assert elementwise(lambda x, y: tirx.sqrt(tirx.abs(x)) * tirx.max(x, y), a, b) == list(
        np.sqrt(np.abs(a)) * np.maximum(a, b)
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_casts_round_to_nearest_even(dtype, rng):
    x = (rng.standard_normal(200) * 1000).astype("float32")
    narrow = x.astype(getattr(ml_dtypes, dtype) if dtype == "bfloat16" else dtype)
    assert elementwise(lambda v: v.astype(dtype).astype("float32"), x) == list(narrow.astype("float32"))


def test_integers_are_as_wide_as_they_are():
    x = np.array([127, -128, 5, -7], "int8")
    assert elementwise(lambda v: v + tirx.const(1, "int8"), x, dtype="int8") == [-128, -127, 6, -6]
    assert elementwise(lambda v: v.astype("uint8"), x, dtype="uint8") == [127, 128, 5, 249]
    assert elementwise(lambda v: v.astype("int32") >> 1, x, dtype="int32") == [63, -64, 2, -4]
    assert elementwise(lambda v: tirx.truncdiv(v.astype("int32"), 4), x, dtype="int32") == [31, -32, 1, -1]
    assert elementwise(lambda v: tirx.floordiv(v.astype("int32"), 4), x, dtype="int32") == [31, -32, 1, -2]
    bits = np.array([200, 255, 3, 0], "uint8")
    found = elementwise(lambda v: (v.astype("uint16") << tirx.const(9, "uint16")).astype("int32"), bits, dtype="int32")
    assert found == [(int(v) << 9) % 65536 for v in bits]


def test_bits_of_floats(rng):
    x = rng.standard_normal(20).astype("float32")
    assert elementwise(lambda v: tirx.reinterpret("int32", v), x, dtype="int32") == x.view("int32").tolist()
    half = rng.integers(0, 2**15, 20).astype("uint16")
    found = elementwise(lambda v: tirx.reinterpret("float16", v).astype("float32"), half)
    assert np.array_equal(found, half.view("float16").astype("float32"), equal_nan=True)


def test_nan_and_infinity_go_through_as_in_the_kernel():
    x = np.array([np.nan, np.inf, -np.inf, 0.0], "float32")
    zero, one = tir.f32(0.0), tir.f32(1.0)
    assert np.array_equal(elementwise(lambda v: v - v, x), [np.nan] * 3 + [0], equal_nan=True)
    assert elementwise(lambda v: one / tirx.abs(v), x[1:]) == [0, 0, np.inf]
    assert elementwise(lambda v: tirx.max(v, zero), x) == [0, np.inf, 0, 0]  # a comparison with NaN picks the second
    assert elementwise(lambda v: tirx.Select(tirx.isnan(v), one, zero), x) == [1, 0, 0, 0]


def test_a_sum_is_added_up_in_the_blocks_order(rng):
    x = (rng.standard_normal((2, 300)) * 10.0 ** rng.integers(-3, 4, (2, 300))).astype("float32")

    @T.prim_func(s_tir=True)
    def total(x: T.Buffer((2, 300), "float32"), out: T.Buffer((2,), "float32")):
        for i, k in T.grid(2, 300):
            with T.sblock("total"):
                vi, vk = T.axis.remap("SR", [i, k])
                with T.init():
                    out[vi] = T.float32(0.5)
                out[vi] = out[vi] + x[vi, vk]

    interpreter = Interpreter(total, {"x": x, "out": Spec((2,), "float32")})
    rounded, exact = interpreter.element("out", (1,))
    assert rounded == np.add.accumulate(np.concatenate([[np.float32(0.5)], x[1]]), dtype="float32")[-1]
    assert exact == pytest.approx(0.5 + x[1].astype("float64").sum(), rel=1e-13)
    assert set(interpreter.loads["x"]) == {(1, k) for k in range(300)}
    (found,) = interpreter.sums
    assert interpreter.operands(found, 7) == {("x", (1, 7)): x[1, 7]}
    assert found.partial == np.add.accumulate(np.concatenate([[np.float32(0.5)], x[1]]), dtype="float32")[1:].tolist()


def test_what_a_condition_leaves_out_is_not_read():
    x = np.array([1.0, np.nan, 3.0], "float32")

    @T.prim_func(s_tir=True)
    def shifted(x: T.Buffer((3,), "float32"), out: T.Buffer((4,), "float32")):
        for i in range(4):
            with T.sblock("shifted"):
                vi = T.axis.spatial(4, i)
                out[vi] = T.if_then_else(vi > 0, x[vi - 1], T.float32(0))

    interpreter = Interpreter(shifted, {"x": x, "out": Spec((4,), "float32")})
    assert interpreter.element("out", (0,)) == (0, 0)
    assert not interpreter.loads["x"]
    assert interpreter.element("out", (3,)) == (3, 3)
    assert interpreter.loads["x"] == {(2,): 3}


def test_of_elements_written_twice_the_last_one_stays_and_others_are_the_arguments():
    x, at = np.array([10, 20, 30], "int32"), np.array([1, 2, 1], "int32")

    @T.prim_func(s_tir=True)
    def scattered(out: T.Buffer((4,), "int32"), x: T.Buffer((3,), "int32"), at: T.Buffer((3,), "int32")):
        for i in range(3):
            with T.sblock("scattered"):
                vi = T.axis.opaque(3, i)
                out[at[vi]] = out[at[vi]] + x[vi]

    interpreter = Interpreter(scattered, {"out": np.full(4, 7, "int32"), "x": x, "at": at}, ["out"])
    assert [interpreter.element("out", (i,))[0] for i in range(4)] == [7, 47, 27, 7]


def test_blocks_that_follow_on_one_another_in_one_buffer(rng):
    x = rng.standard_normal(3).astype("float32")

    @T.prim_func(s_tir=True)
    def twice(x: T.Buffer((3,), "float32"), out: T.Buffer((3,), "float32")):
        for i in range(3):
            with T.sblock("first"):
                vi = T.axis.spatial(3, i)
                out[vi] = x[vi]
        for i in range(3):
            with T.sblock("second"):
                vi = T.axis.spatial(3, i)
                out[vi] = out[vi] * T.float32(3)

    assert Interpreter(twice, {"x": x, "out": Spec((3,), "float32")}).element("out", (1,))[0] == x[1] * np.float32(3)


def test_errors_say_what_is_wrong():
    x = np.zeros(3, "float32")

    @T.prim_func(s_tir=True)
    def beyond(x: T.Buffer((3,), "float32"), out: T.Buffer((3,), "float32")):
        for i in range(3):
            with T.sblock("beyond"):
                vi = T.axis.spatial(3, i)
                out[vi] = x[vi - 1]

    interpreter = Interpreter(beyond, {"x": x, "out": Spec((3,), "float32")})
    with pytest.raises(OpError, match=r"x\[-1\] is read, which is outside x \[3\]"):
        interpreter.element("out", (0,))

    @T.prim_func(s_tir=True)
    def unset(x: T.Buffer((3,), "float32"), out: T.Buffer((3,), "float32")):
        for i in range(3):
            with T.sblock("unset"):
                vi = T.axis.spatial(3, i)
                out[vi] = out[vi] + x[vi]

    with pytest.raises(OpError, match=r"out\[2\] is read before a block stores it"):
        Interpreter(unset, {"x": x, "out": Spec((3,), "float32")}).element("out", (2,))

    @T.prim_func(s_tir=True)
    def unknown(x: T.Buffer((3,), "float32"), out: T.Buffer((3,), "float32")):
        for i in range(3):
            with T.sblock("unknown"):
                vi = T.axis.spatial(3, i)
                out[vi] = T.acosh(x[vi])

    with pytest.raises(OpError, match=r"knows no tirx\.acosh of float32"):
        Interpreter(unknown, {"x": x, "out": Spec((3,), "float32")}).element("out", (0,))

    @T.prim_func(s_tir=True)
    def nest(x: T.Buffer((3,), "float32"), out: T.Buffer((3,), "float32")):
        for i in range(3):
            out[i] = x[i]

    with pytest.raises(OpError, match="nest is a loop nest, not a definition in blocks"):
        Interpreter(nest, {"x": x, "out": Spec((3,), "float32")})
