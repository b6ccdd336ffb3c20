"""Metal that TVM generates from the ops' own block definitions runs in the emulator as it is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm
from tvm import s_tir, tirx

import ops
from ops.languages.base import Launch, Source
from ops.languages.emulator import EmulatedProgram
from ops.languages.metal import Metal
from ops.spec import DTYPES
from ops.tolerance import KERNEL, relative_error

_THREADS = 64


def _blocks(op: Any, args: tuple, constants: dict, narrow: bool = True) -> s_tir.Schedule:
    specs = [ops.tensor(each) if isinstance(each, np.ndarray) else each for each in args]
    function = op._request(*op._bound(tuple(specs), constants)).blocks().with_attr("global_symbol", op.name)
    if narrow:
        module = tirx.transform.ForceNarrowIndexToInt32()(tvm.IRModule.from_expr(function))
        function = next(iter(module.functions.values())).with_attr("global_symbol", op.name)
    return s_tir.Schedule(function)


def _a_row_a_threadgroup(sch: s_tir.Schedule) -> None:
    total, written = sch.get_sblock("sum_of_squares"), sch.get_sblock("normalise")
    sch.set_scope(total, 0, "shared")
    row, column = sch.get_loops(written)
    sch.bind(row, "blockIdx.x")
    sch.bind(sch.split(column, [None, _THREADS])[1], "threadIdx.x")
    sch.compute_at(total, row)
    sch.bind(sch.split(sch.get_loops(total)[-1], [None, _THREADS])[1], "threadIdx.x")


def _an_element_a_thread(sch: s_tir.Schedule, name: str) -> None:
    fused = sch.fuse(*sch.get_loops(sch.get_sblock(name)))
    block, thread = sch.split(fused, [None, _THREADS])
    sch.bind(block, "blockIdx.x")
    sch.bind(thread, "threadIdx.x")


def _generated(sch: s_tir.Schedule) -> str:
    target = tvm.target.Target("metal", host="llvm")
    return tvm.compile(sch.mod, target).mod.imports[0].inspect_source()


def _ran(text: str, entry: str, arrays: dict[str, np.ndarray], numbers: dict[str, Any], launch: Launch) -> None:
    language, source = Metal(), Source(text, entry, "generated.metal", 1)
    parameters = language.parse(source)
    assert parameters is not None
    assert {p.name for p in parameters if not p.pointer} <= {*numbers}
    program = language.compile(source, parameters)
    assert isinstance(program, EmulatedProgram)
    given = {f"{name}_ptr": array for name, array in arrays.items()} | numbers
    for each in (program, program.watched()):
        arrays[[*arrays][-1]][...] = np.nan
        each.run([given[p.name] for p in parameters], launch)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("shape", [(2, 37), (3, 60), (4, 130)])
def test_rms_norm(shape: tuple[int, int], dtype: str):
    rng = np.random.default_rng()
    x, weight = (rng.standard_normal(size).astype(DTYPES[dtype]) for size in (shape, shape[1:]))
    sch = _blocks(ops.rms_norm, (x, weight), {"eps": 1e-5})
    _a_row_a_threadgroup(sch)
    text, out = _generated(sch), np.empty_like(x)
    assert "threadgroup_barrier" in text and "constant rms_norm_kernel_args_t& arg" in text
    launch = Launch((shape[0], 1, 1), (_THREADS, 1, 1))
    _ran(text, "rms_norm_kernel", {"X": x, "W": weight, "Y": out}, {"n": shape[0]}, launch)
    expected = ops.rms_norm.reference(x, weight, eps=1e-5)
    assert relative_error(out, expected, dtype) <= KERNEL[dtype]


@pytest.mark.parametrize("narrow", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_silu_mul(dtype: str, narrow: bool):
    rng = np.random.default_rng()
    gate, up = (rng.standard_normal((5, 33)).astype(DTYPES[dtype]) for _ in range(2))
    sch = _blocks(ops.silu_mul, (gate, up), {}, narrow)
    _an_element_a_thread(sch, "silu_mul")
    out, launch = np.empty_like(gate), Launch((-(-gate.size // _THREADS), 1, 1), (_THREADS, 1, 1))
    numbers = {"cse_v1": gate.size, "n": len(gate)}
    text = _generated(sch)
    assert ("int cse_v1[2];" if narrow else "long cse_v1;") in text  # each has 8 bytes
    _ran(text, "silu_mul_kernel", {"gate": gate, "up": up, "out": out}, numbers, launch)
    assert relative_error(out, ops.silu_mul.reference(gate, up), dtype) <= KERNEL[dtype]


def test_numbers_of_a_call_come_in_the_struct():
    x = np.random.default_rng().standard_normal((3, 50)).astype("float32")
    sch = _blocks(ops.scale, (x, 2.5), {})
    _an_element_a_thread(sch, "scale")
    text, out, launch = _generated(sch), np.empty_like(x), Launch((-(-x.size // _THREADS), 1, 1), (_THREADS, 1, 1))
    assert "float factor[2];" in text
    _ran(text, "scale_kernel", {"x": x, "out": out}, {"cse_v1": x.size, "n": len(x), "factor": 2.5}, launch)
    assert relative_error(out, ops.scale.reference(x, 2.5)) <= KERNEL["float32"]
