"""Kernels that TVM generates as WGSL and OpenCL C, with schedules of the plainest kind, against the references.

`test_gpu_wgsl` has those of every op, by the schedules that are used.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
from tvm import s_tir, tirx

import ops
from ops import KernelError, target
from ops.languages import generated, hosted
from ops.languages.base import SourceError

from ..harness import random
from .running import judge

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


def check(language: str, schedule: Any, op: Any, *arrays: np.ndarray, **constants: Any) -> None:
    """Generate with `schedule`, run on outputs full of NaN, compare."""
    with target.building_for_gpu(language) as gpu:
        kernel = hosted.build(schedule(op, *arrays, **constants), gpu, generated.Launches(language))
    tensors = [ops.tensor(each) for each in arrays]
    spec = op.spec(*tensors, **constants)
    out = ops.empty(spec.shape, spec.dtype)
    out.numpy().view("uint8")[...] = 0xFF
    kernel(*[each.buffer.data for each in (*tensors, out)])
    judge(out.numpy(), np.asarray(op.reference(*arrays, **constants)), spec.dtype)


def has(language: str, dtype: str) -> bool:
    if language == "wgsl" or dtype != "float16":
        return True
    from ops.languages import opencl_program

    return opencl_program.device().f16


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("op", [ops.add, ops.silu_mul], ids=lambda op: op.name)
def test_element_by_element(rng, language, dtype, op):
    for shape in SHAPES:
        x, y = random(rng, shape, dtype), random(rng, shape, dtype)
        if not has(language, dtype):
            with pytest.raises(RuntimeError, match="has no cl_khr_fp16"):
                check(language, bound, op, x, y)
            return
        check(language, bound, op, x, y)


@pytest.mark.parametrize("schedule", [bound, by_rows])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_rms_norm(rng, language, dtype, schedule):
    if not has(language, dtype):
        pytest.skip("the device has no cl_khr_fp16: see test_element_by_element")
    for shape in SHAPES:
        x, weight = random(rng, shape, dtype), random(rng, shape[1:], dtype)
        check(language, schedule, ops.rms_norm, x, weight, eps=1e-5)


@pytest.mark.parametrize("op", [ops.softmax, ops.log_softmax, ops.argmax], ids=lambda op: op.name)
def test_several_kernels(rng, language, op):
    """Scratch from one to the next, some of it written in place; the least int32."""
    for shape in SHAPES:
        check(language, bound, op, random(rng, shape, "float32"))


def test_a_grid_longer_than_an_axis(rng, language):
    x, y = random(rng, (17, 4001), "float32"), random(rng, (17, 4001), "float32")
    check(language, partial(bound, threads=1), ops.add, x, y)


def test_a_kernel_that_the_text_has_not(language):
    with pytest.raises(SourceError, match=r"no .* strange in the text"):
        text = "@compute @workgroup_size(1) fn other() {}" if language == "wgsl" else "__kernel void other() {}"
        generated.Launches(language)("strange", [], (1, 1, 1), (1, 1, 1), text)
    with pytest.raises(KernelError, match="the generated source has no kernel strange"):
        generated.Launches(language)("strange", [], (1, 1, 1), (1, 1, 1), "")


def test_arrays_that_are_read_only(language):
    """What TVM does not declare as read may be, and is copied."""
    text = {
        "wgsl": "@group(0) @binding(0) var<storage, read> x_ptr : array<f32>;\n"
        "@group(0) @binding(1) var<storage, read_write> out_ptr : array<f32>;\n"
        "@compute @workgroup_size(1) fn copy() { out_ptr[0] = x_ptr[0]; }",
        "opencl": "__kernel void copy(__global float* x_ptr, __global float* out_ptr) { out_ptr[0] = x_ptr[0]; }",
    }[language]
    x, out = np.array([3], "float32"), np.zeros(1, "float32")
    x.flags.writeable = False
    generated.Launches(language)("copy", [x, out], (1, 1, 1), (1, 1, 1), text)
    assert out == 3
