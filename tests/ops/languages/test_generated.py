"""Kernels that TVM generates as WGSL and OpenCL C, with schedules of the plainest kind, against the references."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tvm import s_tir, tirx

import ops
from ops.languages.base import LaunchError, SourceError
from ops.languages.generated import Generated, generate

from ..harness import random
from .running import empty, judge

SHAPES = [(1, 1), (3, 7), (5, 48), (17, 131)]


@pytest.fixture(params=["wgsl", "opencl"])
def language(request) -> str:
    """A language whose package and driver are here."""
    if request.param == "wgsl":
        pytest.importorskip("wgpu", reason="WGSL kernels need wgpu: pip install -e '.[wgsl]'")
        from ops.languages import wgpu_program as program
    else:
        pytest.importorskip("pyopencl", reason="OpenCL kernels need pyopencl: pip install -e '.[opencl]'")
        from ops.languages import opencl_program as program
    try:
        program.device()
    except SourceError as error:
        pytest.skip(str(error))
    return request.param


def blocks(op: Any, *arrays: np.ndarray, **constants: Any) -> Any:
    return op._request(tuple(map(ops.tensor, arrays)), constants).blocks()


def named(schedule: Any, op: Any) -> Any:
    return next(iter(schedule.mod.functions.values())).with_attr("global_symbol", op.name)


def bound(op: Any, *arrays: np.ndarray, threads: int = 32, **constants: Any) -> Any:
    """Each block a kernel: all its outputs in one loop, bound to blocks and threads."""
    schedule = s_tir.Schedule(blocks(op, *arrays, **constants))
    for block in schedule.get_child_blocks(schedule.get_sblock("root")):
        axes = zip(schedule.get_loops(block), schedule.get(block).iter_vars, strict=True)
        spatial = [loop for loop, axis in axes if axis.iter_type == tirx.IterVar.DataPar]
        loop = schedule.fuse(*spatial) if len(spatial) > 1 else spatial[0]
        outer, inner = schedule.split(loop, [None, threads])
        schedule.bind(outer, "blockIdx.x")
        schedule.bind(inner, "threadIdx.x")
    return named(schedule, op)


def by_rows(op: Any, *arrays: np.ndarray, threads: int = 32, **constants: Any) -> Any:
    """One kernel: a row to a block, whose threads add it up together in shared memory."""
    schedule = s_tir.Schedule(blocks(op, *arrays, **constants))
    total, last = schedule.get_child_blocks(schedule.get_sblock("root"))
    schedule.set_scope(total, 0, "shared")
    row, column = schedule.get_loops(last)
    _, inner = schedule.split(column, [None, threads])
    schedule.bind(row, "blockIdx.x")
    schedule.bind(inner, "threadIdx.x")
    schedule.compute_at(total, row, preserve_unit_loops=True)
    _, inner = schedule.split(schedule.get_loops(total)[-1], [None, threads])
    schedule.bind(inner, "threadIdx.x")
    return named(schedule, op)


def check(generated: Generated, op: Any, *arrays: np.ndarray, **constants: Any) -> None:
    expected = np.asarray(op.reference(*arrays, **constants))
    dtype = str(op.spec(*map(ops.tensor, arrays), **constants).dtype)
    out = empty(expected.shape, dtype)
    generated.run(*arrays, out)
    judge(out, expected, dtype)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("op", [ops.add, ops.silu_mul], ids=lambda op: op.name)
def test_element_by_element(rng, language, dtype, op):
    for shape in SHAPES:
        x, y = random(rng, shape, dtype), random(rng, shape, dtype)
        if not has(language, dtype):
            with pytest.raises(SourceError, match="has no cl_khr_fp16"):
                check(generate(bound(op, x, y), language), op, x, y)
            return
        check(generate(bound(op, x, y), language), op, x, y)


@pytest.mark.parametrize("schedule", [bound, by_rows])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_rms_norm(rng, language, dtype, schedule):
    if not has(language, dtype):
        pytest.skip("the device has no cl_khr_fp16: see test_element_by_element")
    for shape in SHAPES:
        x, weight = random(rng, shape, dtype), random(rng, shape[1:], dtype)
        generated = generate(schedule(ops.rms_norm, x, weight, eps=1e-5), language)
        check(generated, ops.rms_norm, x, weight, eps=1e-5)


def has(language: str, dtype: str) -> bool:
    if language == "wgsl" or dtype != "float16":
        return True
    from ops.languages import opencl_program

    return opencl_program.device().f16


@pytest.mark.parametrize("op", [ops.softmax, ops.log_softmax, ops.argmax], ids=lambda op: op.name)
def test_several_kernels(rng, language, op):
    """Scratch from one to the next, some of it written in place; the least int32."""
    for shape in SHAPES:
        x = random(rng, shape, "float32")
        check(generate(bound(op, x), language), op, x)


def test_one_source_for_every_length(rng, language):
    width, dtype = 48, "float32"
    x, weight = random(rng, (2, width), dtype), random(rng, (width,), dtype)
    generated = generate(bound(ops.rms_norm, x, weight, eps=1e-5), language)
    for rows in (2, 16, 3):
        check(generated, ops.rms_norm, random(rng, (rows, width), dtype), weight, eps=1e-5)


def test_a_grid_longer_than_an_axis(rng, language):
    x, y = random(rng, (17, 4001), "float32"), random(rng, (17, 4001), "float32")
    check(generate(bound(ops.add, x, y, threads=1), language), ops.add, x, y)


def test_inputs_that_are_read_only(rng, language):
    x, y = random(rng, (3, 7), "float32"), random(rng, (3, 7), "float32")
    x.flags.writeable = y.flags.writeable = False
    check(generate(bound(ops.add, x, y), language), ops.add, x, y)


def test_dtypes_that_a_language_lacks(rng, language):
    x = random(rng, (3, 7), "bfloat16")
    with pytest.raises(SourceError, match=f"{language} has no bfloat16, of x; it has "):
        generate(bound(ops.add, x, x), language)


def test_what_cannot_be_generated_or_run(rng, language):
    x, weight = random(rng, (3, 7), "float32"), random(rng, (7,), "float32")
    unbound = s_tir.Schedule(blocks(ops.rms_norm, x, weight, eps=1e-5))
    with pytest.raises(SourceError, match="rms_norm has no loop that is bound to blockIdx or threadIdx"):
        generate(named(unbound, ops.rms_norm), language)
    unbound.bind(unbound.get_loops(unbound.get_sblock("normalise"))[0], "blockIdx.x")
    with pytest.raises(SourceError, match="rms_norm has a loop that is not bound to blockIdx or threadIdx"):
        generate(named(unbound, ops.rms_norm), language)
    if language == "wgsl":  # OpenCL takes scratch of an open size
        unbound = s_tir.Schedule(blocks(ops.rms_norm, x, weight, eps=1e-5))
        row = unbound.get_loops(unbound.get_sblock("sum_of_squares"))[0]
        unbound.reverse_compute_at(unbound.get_sblock("normalise"), row)
        unbound.bind(row, "blockIdx.x")
        with pytest.raises(SourceError, match=r"TVM generates no wgsl for rms_norm: .*upper bound"):
            generate(named(unbound, ops.rms_norm), language)
    generated = generate(bound(ops.rms_norm, x, weight, eps=1e-5), language)
    out = empty((3, 7), "float32")
    wrong = {
        "2 values for ": (x, weight),
        r"W is float32\[7\], got float32\[8\]": (x, np.zeros(8, "float32"), out),
        r"X is float32\[n, 7\], got float16\[3, 7\]": (x.astype("float16"), weight, out),
        r"Y is float32\[n, 7\], got float32\[2, 7\], where n is 3": (x, weight, out[:2]),
    }
    for message, values in wrong.items():
        with pytest.raises(LaunchError, match=message):
            generated.run(*values)
