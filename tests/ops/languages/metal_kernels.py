"""Kernels in Metal for tests, with the values and references of the same kernels in CUDA, and twins with one mistake.

`T` in a text stands for the dtype's type. Lines are counted from the text's first.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import numpy as np

import ops
from ops.languages.base import Launch
from ops.spec import DTYPES

from . import cuda_kernels as cuda
from .cuda_kernels import Case, Twin, normal


@dataclass(frozen=True)
class MetalCase(Case):
    """A kernel in Metal."""

    def in_dtype(self, dtype: str) -> str:
        spelled = {"float32": "float", "float16": "half", "bfloat16": "bfloat"}[dtype]
        return re.sub(r"\bT(4?)\b", rf"{spelled}\1", self.text)


def _metal(case: Case, text: str, *twins: Twin) -> MetalCase:
    return MetalCase(case.name, text, case.shapes, case.values, case.launch, case.expected, twins)


_AT = r"threadgroup \(0,0,0\), thread \(0,0,0\), kernels\.py"

RMS_NORM = _metal(
    cuda.RMS_NORM,
    r"""
#include <metal_stdlib>
using namespace metal;

kernel void rms_norm(device const T* x [[buffer(0)]], device const T* weight [[ buffer(1) ]],
                     device T* out [[buffer(2)]], constant int& width [[buffer(3)]],
                     constant float& eps [[buffer(4)]],
                     uint row [[threadgroup_position_in_grid]], uint tid [[thread_position_in_threadgroup]],
                     uint threads [[threads_per_threadgroup]], uint lane [[thread_index_in_simdgroup]],
                     uint simdgroup [[simdgroup_index_in_threadgroup]]) {
  threadgroup float part[4];
  device const T* from = x + row * (long)width;
  float sum = 0;
  for (int i = tid; i < width; i += threads) { float v = from[i]; sum += v * v; }
  sum = simd_sum(sum);
  if (lane == 0) part[simdgroup] = sum;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float total = part[0] + part[1] + part[2] + part[3];
  float scale = rsqrt(total / width + eps);
  for (int i = tid; i < width; i += threads)
    out[row * (long)width + i] = T(float(from[i]) * scale * float(weight[i]));
}
""",
    Twin(
        "missing barrier",
        "  threadgroup_barrier(mem_flags::mem_threadgroup);\n",
        "\n",
        r"race on threadgroup memory part\[0\] between threads \(0,0,0\) and \(1,0,0\) of threadgroup \(0,0,0\): "
        r"write kernels\.py:115, read kernels\.py:117; a threadgroup_barrier\(\) is missing between them",
    ),
    Twin(
        "off by one",
        "i < width; i += threads) {",
        "i <= width; i += threads) {",
        r"x\[514\] read out of bounds: x has 514 elements; threadgroup \(1,0,0\), thread \(1,0,0\), kernels\.py:113",
    ),
    Twin(
        "out of bounds",
        "out[row * (long)width + i]",
        "out[(row + 1) * (long)width + i]",
        r"out\[514\] written out of bounds: out has 514 elements; threadgroup \(1,0,0\), thread \(0,0,0\), "
        r"kernels\.py:120",
    ),
    Twin(
        "array too short",
        "part[4]",
        "part[3]",
        r"index 3 out of bounds of an array of type 'float \[3\]'; threadgroup \(0,0,0\), thread \(96,0,0\), "
        r"kernels\.py:115",
    ),
    Twin(
        "a simdgroup writes nothing",
        "if (lane == 0)",
        "if (tid % 64 == 0)",
        rf"threadgroup memory part\[1\] is read before anything is written to it; {_AT}:117",
    ),
    Twin(
        "threads that end early",
        "  float sum = 0;",
        "  float sum = 0; if (tid >= 96) return;",
        r"divergent barrier: thread \(0,0,0\) waits at threadgroup_barrier\(\), kernels\.py:116, where thread "
        r"\(96,0,0\) never comes: it has ended; threadgroup \(0,0,0\)",
    ),
    Twin(
        "lanes apart",
        "sum = simd_sum(sum);",
        "if (lane < 31) sum = simd_sum(sum);",
        r"a simdgroup that never meets: thread \(0,0,0\) waits at simd_sum\(\), kernels\.py:114, where thread "
        r"\(31,0,0\) never comes: it waits at threadgroup_barrier\(\), kernels\.py:116",
    ),
)

VECTORS = MetalCase(  # four elements at a time
    "rms_norm_4",
    r"""
using namespace metal;
kernel void rms_norm_4(const device T4* x, const device T4* weight, device T4* out, constant uint& width,
                       constant float& eps, uint3 group [[threadgroup_position_in_grid]],
                       ushort lane [[thread_index_in_simdgroup]]) {
  const uint many = width / 4;
  float sum = 0.0;
  for (uint i = lane; i < many; i += 32) {
    float4 v = float4(x[group.x * many + i]);
    sum += dot(v.xy, v.xy) + dot(v.zw, v.zw);
  }
  float scale = precise::rsqrt(simd_sum(sum) / width + eps);
  for (uint i = lane; i < many; i += 32) {
    float4 v = float4(x[group.x * many + i]) * scale;
    v.xyz *= float3(weight[i].xyz);
    v.w *= weight[i].w;
    out[group.x * many + i] = T4(v);
  }
}
""",
    ((1, 4), (3, 132), (2, 260)),
    lambda rng, shape, dtype: {
        "x": normal(rng, shape, dtype),
        "weight": normal(rng, shape[1:], dtype),
        "out": np.full(shape, np.nan, DTYPES[dtype]),
        "width": shape[1],
        "eps": 1e-5,
    },
    lambda shape: Launch((shape[0], 1, 1), (32, 1, 1)),
    lambda v: ops.rms_norm.reference(v["x"], v["weight"], eps=1e-5),
    (
        Twin(
            "off by one",
            "i < many; i += 32) {\n    float4 v = float4(x[group.x * many + i]);",
            "i <= many; i += 32) {\n    float4 v = float4(x[group.x * many + i]);",
            r"x\[520\] read out of bounds: x has 520 elements; threadgroup \(1,0,0\), thread \(1,0,0\), "
            r"kernels\.py:108",
        ),
        Twin(
            "all write one",
            "out[group.x * many + i]",
            "out[group.x * many]",
            r"race on device memory out\[0\] between threads \(0,0,0\) and \(1,0,0\) of threadgroup \(0,0,0\): "
            r"write kernels\.py:116, write kernels\.py:116; a threadgroup_barrier\(\) is missing between them",
        ),
    ),
)

SILU_MUL = _metal(
    cuda.SILU_MUL,
    r"""
kernel void silu_mul(constant T* gate, constant T* up, device T* out, constant long& count,
                     uint i [[thread_position_in_grid]]) {
  if (i < count) {
    float g = gate[i];
    out[i] = T(g / (1.0 + metal::fast::exp(-g)) * float(up[i]));
  }
}
""",
    Twin(
        "no test of the end",
        "if (i < count) {",
        "{",
        r"gate\[903\] read out of bounds: gate has 903 elements; threadgroup \(14,0,0\), thread \(7,0,0\), "
        r"kernels\.py:104",
    ),
    Twin(
        "all to one place",
        "out[i] =",
        "out[0] =",
        r"race on device memory out\[0\] between threads \(0,0,0\) and \(1,0,0\) of threadgroup \(0,0,0\): "
        r"write kernels\.py:105, write kernels\.py:105",
    ),
    Twin(
        "threadgroups to one place",
        "out[i] =",
        "out[i % 64] =",
        r"race on device memory out\[0\] between two threadgroups, of which the second is threadgroup \(1,0,0\), "
        r"thread \(0,0,0\): write kernels\.py:105, write kernels\.py:105; threadgroups run in no order",
    ),
)

ROPE = _metal(
    cuda.ROPE,
    r"""
using namespace metal;
kernel void rope(device const T* x, device const int* positions, constant float* frequencies, device T* out,
                 constant int& heads, constant int& dim, constant int& half_,
                 uint2 group [[threadgroup_position_in_grid]], ushort tid [[thread_index_in_threadgroup]],
                 uint3 threads [[threads_per_threadgroup]]) {
  const long at = ((long)group.x * heads + group.y) * dim;
  for (int j = tid; j < half_; j += threads.x) {
    float c, a = x[at + j], b = x[at + j + half_];
    float s = sincos(positions[group.x] * frequencies[j], c);
    out[at + j] = T(a * c - b * s);
    out[at + j + half_] = T(fma(b, c, a * s));
  }
  for (int j = 2 * half_ + tid; j < dim; j += threads.x) out[at + j] = x[at + j];
}
""",
    Twin(
        "out of bounds",
        "frequencies[j]",
        "frequencies[j + half_]",
        rf"frequencies\[33\] read out of bounds: frequencies has 33 elements; {_AT}:109",
    ),
    Twin(
        "before the beginning",
        "x[at + j + half_];",
        "x[at + j - 1];",
        rf"x\[-1\] read out of bounds: x has 1050 elements; {_AT}:108",
    ),
    Twin(
        "a pair too many",
        "j < half_; j +=",
        "j <= half_; j +=",
        r"race on device memory out\[33\] between threads|frequencies\[33\] read out of bounds",
    ),
)

LINEAR = _metal(
    cuda.LINEAR,
    r"""
#include <metal_stdlib>
using namespace metal;
constant constexpr int N = 16;
static float at(device const T* m, int row, int column, int rows, int columns) {
  return row < rows && column < columns ? float(m[(long)row * columns + column]) : 0.0f;
}
[[max_total_threads_per_threadgroup(256)]]
kernel void linear(device const T* x, device const T* weight, device T* out, constant int& rows,
                   constant int& inputs, constant int& outputs,
                   uint2 group [[threadgroup_position_in_grid]], uint2 tid [[thread_position_in_threadgroup]]) {
  threadgroup float a[N][N + 1], b[N][N + 1];
  const int row = group.y * N + tid.y, column = group.x * N + tid.x;
  float sum = 0;
  for (int k = 0; k < inputs; k += N) {
    a[tid.y][tid.x] = at(x, row, k + tid.x, rows, inputs);
    b[tid.y][tid.x] = at(weight, group.x * N + tid.y, k + tid.x, outputs, inputs);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    threadgroup const float* mine = a[tid.y];
    for (int i = 0; i < N; ++i) sum += mine[i] * b[tid.x][i];
    threadgroup_barrier(mem_flags::mem_threadgroup);  // all have read
  }
  if (row < rows && column < outputs) out[(long)row * outputs + column] = T(sum);
}
""",
    Twin(
        "missing barrier before the sums",
        "    threadgroup_barrier(mem_flags::mem_threadgroup);\n",
        "\n",
        r"race on threadgroup memory a\[1\] between threads \(0,0,0\) and \(1,0,0\) of threadgroup \(0,0,0\): "
        r"read kernels\.py:119, write kernels\.py:115; a threadgroup_barrier\(\) is missing between them",
    ),
    Twin(
        "missing barrier after the sums",
        "    threadgroup_barrier(mem_flags::mem_threadgroup);  // all have read\n",
        "\n",
        r"race on threadgroup memory a\[0\] between threads \(0,0,0\) and \(1,0,0\) of threadgroup \(0,0,0\): "
        r"write kernels\.py:115, read kernels\.py:119; a threadgroup_barrier\(\) is missing between them",
    ),
    Twin(
        "off by one",
        "row < rows && column < columns",
        "row <= rows && column < columns",
        r"weight\[1240\] read out of bounds: weight has 1240 elements; threadgroup \(1,0,0\), thread \(0,15,0\), "
        r"kernels\.py:105",
    ),
    Twin(
        "a barrier for each half",
        "    threadgroup_barrier(mem_flags::mem_threadgroup);\n",
        "    if (tid.x < 8) threadgroup_barrier(mem_flags::mem_none);\n"
        "    else threadgroup_barrier(mem_flags::mem_none);\n",
        r"divergent barriers: thread \(0,0,0\) waits at threadgroup_barrier\(\), kernels\.py:117, but thread "
        r"\(8,0,0\) at kernels\.py:118; threadgroup \(0,0,0\)",
    ),
)

SOFTMAX = replace(
    _metal(
        cuda.SOFTMAX,
        r"""
using namespace metal;
// Simdgroups share a row, and put what they have found together in the memory that the launch gives.
kernel void softmax(device const T* x [[buffer(0)]], device T* out [[buffer(1)]], constant int& width [[buffer(2)]],
                    threadgroup float* part [[threadgroup(0)]],
                    uint row [[threadgroup_position_in_grid]], uint tid [[thread_position_in_threadgroup]],
                    uint lane [[thread_index_in_simdgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]],
                    uint simdgroups [[simdgroups_per_threadgroup]], uint threads [[threads_per_threadgroup]]) {
  device const T* from = x + row * (long)width;
  float top = -INFINITY;
  for (int i = tid; i < width; i += threads) top = max(top, float(from[i]));
  top = simd_max(top);
  if (lane == 0) part[simdgroup] = top;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  top = simd_max(lane < simdgroups ? part[lane] : -INFINITY);
  float sum = 0;
  for (int i = tid; i < width; i += threads) sum += exp(float(from[i]) - top);
  sum = simd_sum(sum);
  threadgroup_barrier(mem_flags::mem_threadgroup);  // all have read
  if (lane == 0) part[simdgroup] = sum;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  sum = simd_sum(lane < simdgroups ? part[lane] : 0.0f);
  for (int i = tid; i < width; i += threads) out[row * (long)width + i] = T(exp(float(from[i]) - top) / sum);
}
""",
        Twin(
            "missing barrier",
            "  threadgroup_barrier(mem_flags::mem_threadgroup);  // all have read\n",
            "\n",
            r"race on threadgroup memory part\[0\] between threads",
        ),
        Twin(
            "off by one",
            "i < width; i += threads) top",
            "i <= width; i += threads) top",
            r"x\[600\] read out of bounds: x has 600 elements; threadgroup \(2,0,0\), thread \(8,0,0\), "
            r"kernels\.py:110",
        ),
        Twin(
            "part out of bounds",
            "lane < simdgroups ? part[lane] : 0.0f",
            "part[lane]",
            r"part\[3\] read out of bounds: part has 3 "
            r"elements; threadgroup \(0,0,0\), thread \(3,0,0\), kernels\.py:121",
        ),
    ),
    launch=lambda shape: Launch((shape[0], 1, 1), (96, 1, 1), 3 * 4),
)

CASES = (RMS_NORM, VECTORS, SILU_MUL, ROPE, LINEAR, SOFTMAX)
