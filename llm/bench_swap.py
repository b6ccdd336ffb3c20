"""`limpid bench swap`: rms_norm by hand in every language: how long until it computes, and what a call costs then."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import ops
from ops import KernelError, OpError
from ops.interleave import interleaved
from ops.languages.source import Origin

_ROUNDS = 5
_CALLS = 20  # at a time
_ROWS, _WIDTH = 1, 2048

_C = """
void block_norm(const float* x, const float* weight, float* out, int rows, int width, float eps, bool plus_one) {
  for (int r = 0; r < rows; r++, x += width, out += width) {
    float sum = 0;
    for (int i = 0; i < width; i++) sum += x[i] * x[i];
    float scale = 1 / sqrtf(sum / width + eps);
    for (int i = 0; i < width; i++) out[i] = x[i] * scale * (weight[i] + plus_one);
  }
}"""
_CUDA = """
extern "C" __global__ void block_norm(const float* x, const float* weight, float* out, int width, float eps,
                                      bool plus_one) {
  __shared__ float part[64];
  int t = threadIdx.x, start = blockIdx.x * width;
  float sum = 0;
  for (int i = t; i < width; i += 64) sum += x[start + i] * x[start + i];
  part[t] = sum;
  __syncthreads();
  for (int o = 32; o; o >>= 1) { if (t < o) part[t] += part[t + o]; __syncthreads(); }
  float scale = rsqrtf(part[0] / width + eps);
  for (int i = t; i < width; i += 64) out[start + i] = x[start + i] * scale * (weight[i] + plus_one);
}"""
_METAL = """
using namespace metal;
kernel void block_norm(device const float* x, device const float* weight, device float* out, constant int& width,
                       constant float& eps, constant bool& plus_one, uint row [[threadgroup_position_in_grid]],
                       uint t [[thread_position_in_threadgroup]]) {
  threadgroup float part[64];
  int start = row * width;
  float sum = 0;
  for (int i = t; i < width; i += 64) sum += x[start + i] * x[start + i];
  part[t] = sum;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint o = 32; o; o >>= 1) { if (t < o) part[t] += part[t + o]; threadgroup_barrier(mem_flags::mem_threadgroup); }
  float scale = rsqrt(part[0] / width + eps);
  for (int i = t; i < width; i += 64) out[start + i] = x[start + i] * scale * (weight[i] + plus_one);
}"""
_OPENCL = """
__kernel void block_norm(__global const float* x, __global const float* weight, __global float* out, int width,
                         float eps, int plus_one) {
  __local float part[64];
  int t = get_local_id(0), start = get_group_id(0) * width;
  float sum = 0;
  for (int i = t; i < width; i += 64) sum += x[start + i] * x[start + i];
  part[t] = sum;
  barrier(CLK_LOCAL_MEM_FENCE);
  for (int o = 32; o; o >>= 1) { if (t < o) part[t] += part[t + o]; barrier(CLK_LOCAL_MEM_FENCE); }
  float scale = rsqrt(part[0] / width + eps);
  for (int i = t; i < width; i += 64) out[start + i] = x[start + i] * scale * (weight[i] + plus_one);
}"""
_WGSL = """
struct Numbers { width: u32, eps: f32, plus_one: u32 }
@group(0) @binding(0) var<storage, read> x: array<f32>;
@group(0) @binding(1) var<storage, read> weight: array<f32>;
@group(0) @binding(2) var<storage, read_write> out: array<f32>;
@group(0) @binding(3) var<uniform> numbers: Numbers;
var<workgroup> part: array<f32, 64>;
@compute @workgroup_size(64)
fn block_norm(@builtin(workgroup_id) row: vec3<u32>, @builtin(local_invocation_id) lane: vec3<u32>) {
  let start = row.x * numbers.width;
  var sum = 0.0;
  for (var i = lane.x; i < numbers.width; i += 64u) { sum += x[start + i] * x[start + i]; }
  part[lane.x] = sum;
  workgroupBarrier();
  for (var o = 32u; o > 0u; o /= 2u) { if (lane.x < o) { part[lane.x] += part[lane.x + o]; } workgroupBarrier(); }
  let scale = inverseSqrt(part[0] / f32(numbers.width) + numbers.eps);
  for (var i = lane.x; i < numbers.width; i += 64u) {
    out[start + i] = x[start + i] * scale * (weight[i] + f32(numbers.plus_one));
  }
}"""
_GRID = {"grid": lambda x, *_: x.shape[0], "block": 64}
_TEXTS: dict[str, tuple[str, dict[str, Any]]] = {
    "c": (_C, {}),
    "c++": (_C, {}),
    "cuda": (_CUDA, _GRID),
    "metal": (_METAL, _GRID),
    "opencl": (_OPENCL, _GRID),
    "wgsl": (_WGSL, _GRID),
}


def measure() -> dict[str, Any]:
    """For each language: seconds from the decorator to the first verified call, the first time and again with another
    text (medians of 5), and microseconds of a call once it is proven, beside TVM's kernel through the same seam."""
    rng = np.random.default_rng(0)
    x = ops.tensor(rng.standard_normal((_ROWS, _WIDTH), "float32"))
    weight = ops.tensor(rng.standard_normal(_WIDTH, "float32"))

    def call() -> Any:
        return ops.rms_norm(x, weight, eps=1e-5)

    rows = [_row(name, swap, call) for name, swap in _swaps().items()]
    return {"op": f"rms_norm {x.spec}", "rounds": _ROUNDS, "rows": rows}


def _swaps() -> dict[str, Callable[[int], Any]]:
    """By language what puts the kernel in use; another number is another text."""

    def of_text(language: str) -> Callable[[int], Any]:
        text, options = _TEXTS[language]
        return lambda salt: ops.rms_norm.swap(language, **options)(Origin("block_norm", text=f"{text}\n// {salt}\n"))

    return {name: of_text(name) for name in _TEXTS} | {"tvmscript": _tvmscript, "python": _python, "triton": _triton}


def _row(name: str, swap: Callable[[int], Any], call: Callable[[], Any]) -> dict[str, Any]:
    salts = itertools.count(time.time_ns())
    empty = {"first_s": None, "again_s": None, "call_us": None, "own_us": None}
    try:
        first = _seconds(lambda: (swap(next(salts)), call()))
        again = [_seconds(lambda: (swap(next(salts)), call())) for _ in range(_ROUNDS)]
        used = swap(next(salts))
        for _ in range(used.schedule.first):
            call()
        used.schedule = type(used.schedule).of("never")
        used.disable()

        def swapped() -> None:
            used.enable()
            for _ in range(_CALLS):
                call()
            used.disable()

        took = interleaved({"own": lambda: [call() for _ in range(_CALLS)], "swapped": swapped}, 1.0)
    except (KernelError, OpError, ImportError) as error:
        return {"language": name} | empty | {"ran": str(error).splitlines()[0][:60]}
    finally:
        ops.restore()
    return {
        "language": name,
        "first_s": first,
        "again_s": statistics.median(again),
        "call_us": took["swapped"] / _CALLS * 1e6,
        "own_us": took["own"] / _CALLS * 1e6,
        "ran": "emulated" if used.kernel.emulated else "here",
    }


def _seconds(run: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def _python(salt: int) -> Any:
    def block_norm(x: Any, weight: Any, *, eps: float, plus_one: bool = False) -> Any:
        wide = x.astype("float32")
        return wide / np.sqrt(np.mean(wide * wide, axis=-1, keepdims=True) + np.float32(eps)) * (weight + plus_one)

    return ops.rms_norm.swap("python")(block_norm)


def _tvmscript(salt: int) -> Any:
    from tvm.script import tirx as T

    @T.prim_func(s_tir=True)
    def block_norm(x_: T.handle, weight_: T.handle, out_: T.handle):
        n = T.int64()
        X = T.match_buffer(x_, (n, _WIDTH), "float32", align=4)
        W = T.match_buffer(weight_, (_WIDTH,), "float32", align=4)
        Y = T.match_buffer(out_, (n, _WIDTH), "float32", align=4)
        total = T.alloc_buffer((n,), "float32")
        for i in range(n):
            for k in range(_WIDTH):
                with T.sblock("sum"):
                    vi, vk = T.axis.remap("SR", [i, k])
                    with T.init():
                        total[vi] = T.float32(0)
                    total[vi] = total[vi] + X[vi, vk] * X[vi, vk]
            for k in range(_WIDTH):
                with T.sblock("scale"):
                    vi, vk = T.axis.remap("SS", [i, k])
                    Y[vi, vk] = X[vi, vk] / T.sqrt(total[vi] / T.float32(_WIDTH) + T.float32(1e-5)) * W[vk]

    return ops.rms_norm.swap("tvmscript")(block_norm)


def _triton(salt: int) -> Any:
    import triton.language as tl

    def block_norm(x_ptr, weight_ptr, out_ptr, width, eps, plus_one, BLOCK: tl.constexpr):
        columns = tl.arange(0, BLOCK)
        start = tl.program_id(0) * width
        x = tl.load(x_ptr + start + columns, mask=columns < width, other=0.0)
        weight = tl.load(weight_ptr + columns, mask=columns < width, other=0.0)
        scale = tl.rsqrt(tl.sum(x * x, axis=0) / width + eps)
        tl.store(out_ptr + start + columns, x * scale * (weight + plus_one), mask=columns < width)

    block_norm.__globals__["tl"] = tl
    dims = {"BLOCK": lambda x, *_: 1 << (x.shape[-1] - 1).bit_length()}
    return ops.rms_norm.swap("triton", grid=_GRID["grid"], dims=dims)(block_norm)
