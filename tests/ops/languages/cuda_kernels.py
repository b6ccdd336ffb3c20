"""Kernels in CUDA C++ for tests, each with what an op's reference says of it, and with twins that have one mistake.

`T` in a text stands for the dtype's type. Lines are counted from the text's first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

import ops
from ops.languages.base import Launch
from ops.spec import DTYPES

Arrays = dict[str, Any]


@dataclass(frozen=True)
class Twin:
    """A kernel with one mistake: `right` in its text made `wrong`, and what the checked build says of it."""

    name: str
    right: str
    wrong: str
    said: str  # a regular expression


@dataclass(frozen=True)
class Case:
    """A kernel, the values of its parameters for a shape and dtype, how it is launched, and what should come out."""

    name: str
    text: str
    shapes: tuple[tuple[int, ...], ...]
    values: Callable[[np.random.Generator, tuple[int, ...], str], Arrays]
    launch: Callable[[tuple[int, ...]], Launch]
    expected: Callable[[Arrays], np.ndarray]
    twins: tuple[Twin, ...]

    def in_dtype(self, dtype: str) -> str:
        spelled = {"float32": "float", "float16": "half", "bfloat16": "__nv_bfloat16"}[dtype]
        return (
            self.text.replace("const T*", f"const {spelled}*")
            .replace(" T*", f" {spelled}*")
            .replace("T(", f"{spelled}(")
        )


def normal(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    return rng.standard_normal(shape).astype(DTYPES[dtype])


RMS_NORM = Case(
    "rms_norm",
    r"""
extern "C" __global__ void __launch_bounds__(128) rms_norm(
    const T* __restrict__ x, const T* __restrict__ weight, T* __restrict__ out, int width, float eps) {
  __shared__ float part[4];
  const T* row = x + blockIdx.x * (long long)width;
  float sum = 0;
  for (int i = threadIdx.x; i < width; i += blockDim.x) { float v = row[i]; sum += v * v; }
  for (int o = 16; o > 0; o /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, o);
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = sum;
  __syncthreads();
  float total = part[0] + part[1] + part[2] + part[3];
  float scale = rsqrtf(total / width + eps);
  for (int i = threadIdx.x; i < width; i += blockDim.x)
    out[blockIdx.x * (long long)width + i] = T((float)row[i] * scale * (float)weight[i]);
}
""",
    ((1, 1), (3, 33), (5, 128), (2, 257)),
    lambda rng, shape, dtype: {
        "x": normal(rng, shape, dtype),
        "weight": normal(rng, shape[1:], dtype),
        "out": np.full(shape, np.nan, DTYPES[dtype]),
        "width": shape[1],
        "eps": 1e-5,
    },
    lambda shape: Launch((shape[0], 1, 1), (128, 1, 1)),
    lambda v: ops.rms_norm.reference(v["x"], v["weight"], eps=1e-5),
    (
        Twin(
            "missing barrier",
            "  __syncthreads();\n",
            "\n",
            r"race on shared memory part\[0\] between threads \(0,0,0\) and \(1,0,0\) of block \(0,0,0\): "
            r"write kernels\.py:108, read kernels\.py:110; a __syncthreads\(\) is missing between them",
        ),
        Twin(
            "off by one",
            "i < width; i += blockDim.x) {",
            "i <= width; i += blockDim.x) {",
            r"x\[514\] read out of bounds: x has 514 elements; block \(1,0,0\), thread \(1,0,0\), kernels\.py:106",
        ),
        Twin(
            "out of bounds",
            "blockIdx.x * (long long)width + i] =",
            "(blockIdx.x + 1) * (long long)width + i] =",
            r"out\[514\] written out of bounds: out has 514 elements; block \(1,0,0\), thread \(0,0,0\), "
            r"kernels\.py:113",
        ),
        Twin(
            "shared array too short",
            "part[4]",
            "part[3]",
            r"index 3 out of bounds of an array of type 'float \[3\]'; block \(0,0,0\), thread \(96,0,0\), "
            r"kernels\.py:108",
        ),
        Twin(
            "a warp writes nothing",
            "if (threadIdx.x % 32 == 0)",
            "if (threadIdx.x % 64 == 0)",
            r"shared memory part\[1\] is read before anything is written to it; block \(0,0,0\), thread \(0,0,0\), "
            r"kernels\.py:110",
        ),
        Twin(
            "threads that end early",
            "  __shared__ float part[4];",
            "  __shared__ float part[4]; if (threadIdx.x >= 96) return;",
            r"divergent barrier: thread \(0,0,0\) waits at __syncthreads\(\), kernels\.py:109, where thread "
            r"\(96,0,0\) never comes: it has ended; block \(0,0,0\)",
        ),
    ),
)

SILU_MUL = Case(
    "silu_mul",
    r"""
__global__ void silu_mul(const T* gate, const T* up, T* out, int64_t count) {
  int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) {
    float g = gate[i];
    out[i] = T(g / (1.0f + __expf(-g)) * (float)up[i]);
  }
}
""",
    ((1, 1), (3, 100), (7, 129)),
    lambda rng, shape, dtype: {
        "gate": normal(rng, shape, dtype),
        "up": normal(rng, shape, dtype),
        "out": np.full(shape, np.nan, DTYPES[dtype]),
        "count": shape[0] * shape[1],
    },
    lambda shape: Launch(((shape[0] * shape[1] + 63) // 64, 1, 1), (64, 1, 1)),
    lambda v: ops.silu_mul.reference(v["gate"], v["up"]),
    (
        Twin(
            "no test of the end",
            "if (i < count) {",
            "{",
            r"gate\[903\] read out of bounds: gate has 903 elements; block \(14,0,0\), thread \(7,0,0\), "
            r"kernels\.py:104",
        ),
        Twin(
            "off by one",
            "if (i < count) {",
            "if (i <= count) {",
            r"gate\[903\] read out of bounds: gate has 903 elements; block \(14,0,0\), thread \(7,0,0\), "
            r"kernels\.py:104",
        ),
        Twin(
            "all to one place",
            "out[i] =",
            "out[0] =",
            r"race on global memory out\[0\] between threads \(0,0,0\) and \(1,0,0\) of block \(0,0,0\): "
            r"write kernels\.py:105, write kernels\.py:105",
        ),
        Twin(
            "blocks to one place",
            "out[i] =",
            "out[threadIdx.x] =",
            r"race on global memory out\[0\] between two blocks, of which the second is block \(1,0,0\), thread "
            r"\(0,0,0\): write kernels\.py:105, write kernels\.py:105; blocks run in no order",
        ),
    ),
)

ROPE = Case(
    "rope",
    r"""
extern "C" __global__ void rope(const T* x, const int* positions, const float* frequencies, T* out,
                                int heads, int dim, int half_) {
  int row = blockIdx.x, head = blockIdx.y;
  const T* from = x + ((long long)row * heads + head) * dim;
  T* to = out + ((long long)row * heads + head) * dim;
  for (int j = threadIdx.x; j < half_; j += blockDim.x) {
    float s, c, a = from[j], b = from[j + half_];
    sincosf(positions[row] * frequencies[j], &s, &c);
    to[j] = T(a * c - b * s);
    to[j + half_] = T(b * c + a * s);
  }
  for (int j = 2 * half_ + threadIdx.x; j < dim; j += blockDim.x) to[j] = from[j];
}
""",
    ((1, 1, 2, 1), (3, 2, 8, 4), (5, 3, 70, 33)),
    lambda rng, shape, dtype: {
        "x": normal(rng, shape[:3], dtype),
        "positions": rng.integers(0, 100, shape[0], "int32"),
        "frequencies": (10000.0 ** -(np.arange(shape[3]) / shape[3])).astype("float32"),
        "out": np.full(shape[:3], np.nan, DTYPES[dtype]),
        "heads": shape[1],
        "dim": shape[2],
        "half_": shape[3],
    },
    lambda shape: Launch((shape[0], shape[1], 1), (32, 1, 1)),
    lambda v: ops.rope.reference(v["x"], v["positions"], v["frequencies"]),
    (
        Twin(
            "out of bounds",
            "frequencies[j]",
            "frequencies[j + half_]",
            r"frequencies\[33\] read out of bounds: frequencies has 33 elements; block \(0,0,0\), thread \(0,0,0\), "
            r"kernels\.py:108",
        ),
        Twin(
            "before the beginning",
            "from[j + half_];",
            "from[j - 1];",
            r"x\[-1\] read out of bounds: x has 1050 elements; block \(0,0,0\), thread \(0,0,0\), kernels\.py:107",
        ),
        Twin(
            "a pair too many",
            "j < half_; j +=",
            "j <= half_; j +=",
            r"race on global memory out\[33\] between threads|frequencies\[33\] read out of bounds",
        ),
    ),
)

LINEAR = Case(
    "linear",
    r"""
constexpr int N = 16;
__device__ __forceinline__ float at(const T* m, int row, int column, int rows, int columns) {
  return row < rows && column < columns ? (float)m[(long long)row * columns + column] : 0.0f;
}
extern "C" __global__ void linear(const T* x, const T* weight, T* out, int rows, int inputs, int outputs) {
  __shared__ float a[N][N + 1], b[N][N + 1];
  int tx = threadIdx.x, ty = threadIdx.y, row = blockIdx.y * N + ty, column = blockIdx.x * N + tx;
  float sum = 0;
  for (int k = 0; k < inputs; k += N) {
    a[ty][tx] = at(x, row, k + tx, rows, inputs);
    b[ty][tx] = at(weight, blockIdx.x * N + ty, k + tx, outputs, inputs);
    __syncthreads();
    for (int i = 0; i < N; ++i) sum += a[ty][i] * b[tx][i];
    __syncthreads();  // all have read
  }
  if (row < rows && column < outputs) out[(long long)row * outputs + column] = T(sum);
}
""",
    ((1, 1, 1), (5, 33, 17), (17, 40, 31)),
    lambda rng, shape, dtype: {
        "x": normal(rng, shape[:2], dtype),
        "weight": normal(rng, (shape[2], shape[1]), dtype),
        "out": np.full((shape[0], shape[2]), np.nan, DTYPES[dtype]),
        "rows": shape[0],
        "inputs": shape[1],
        "outputs": shape[2],
    },
    lambda shape: Launch(((shape[2] + 15) // 16, (shape[0] + 15) // 16, 1), (16, 16, 1)),
    lambda v: ops.linear.reference(v["x"], v["weight"]),
    (
        Twin(
            "missing barrier before the sums",
            "    __syncthreads();\n",
            "\n",
            r"race on shared memory a\[1\] between threads \(0,0,0\) and \(1,0,0\) of block \(0,0,0\): "
            r"read kernels\.py:113, write kernels\.py:110; a __syncthreads\(\) is missing between them",
        ),
        Twin(
            "missing barrier after the sums",
            "    __syncthreads();  // all have read\n",
            "\n",
            r"race on shared memory a\[0\] between threads \(0,0,0\) and \(1,0,0\) of block \(0,0,0\): "
            r"write kernels\.py:110, read kernels\.py:113; a __syncthreads\(\) is missing between them",
        ),
        Twin(
            "off by one",
            "row < rows && column < columns",
            "row <= rows && column < columns",
            r"weight\[1240\] read out of bounds: weight has 1240 elements; block \(1,0,0\), thread \(0,15,0\), "
            r"kernels\.py:103",
        ),
        Twin(
            "a tile too narrow",
            "a[N][N + 1], b",
            "a[N][N - 1], b",
            r"index 15 out of bounds of an array of type 'float \[15\]'; block \(0,0,0\), thread \(15,0,0\), "
            r"kernels\.py:110",
        ),
        Twin(
            "a barrier for each half",
            "    __syncthreads();\n",
            "    if (tx < 8) __syncthreads();\n    else __syncthreads();\n",
            r"divergent barriers: thread \(0,0,0\) waits at __syncthreads\(\), kernels\.py:112, but thread \(8,0,0\) "
            r"at kernels\.py:113; block \(0,0,0\)",
        ),
    ),
)

SOFTMAX = Case(
    "softmax",
    r"""
struct Part { float top, sum; };
__device__ Part join(Part a, Part b) {
  float top = fmaxf(a.top, b.top);
  return {top, a.sum * expf(a.top - top) + b.sum * expf(b.top - top)};
}
extern "C" __global__ void softmax(const T* x, T* out, int width) {  // one pass: a warp for a row
  const T* row = x + (long long)blockIdx.x * width;
  Part part = {-3.0e38f, 0.0f};
  for (int i = threadIdx.x; i < width; i += 32) part = join(part, Part{(float)row[i], 1.0f});
  for (int o = 16; o > 0; o /= 2) part = join(part, __shfl_xor_sync(0xffffffffu, part, o));
  for (int i = threadIdx.x; i < width; i += 32)
    out[(long long)blockIdx.x * width + i] = T(expf((float)row[i] - part.top) / part.sum);
}
""".replace("__shfl_xor_sync(0xffffffffu, part, o)", "Part{ALL(part.top, o), ALL(part.sum, o)}").replace(
        "struct Part", "#define ALL(v, o) __shfl_xor_sync(0xffffffffu, v, o)\nstruct Part"
    ),
    ((1, 1), (2, 31), (3, 200)),
    lambda rng, shape, dtype: {
        "x": (5 * normal(rng, shape, dtype)).astype(DTYPES[dtype]),
        "out": np.full(shape, np.nan, DTYPES[dtype]),
        "width": shape[1],
    },
    lambda shape: Launch((shape[0], 1, 1), (32, 1, 1)),
    lambda v: ops.softmax.reference(v["x"]),
    (
        Twin(
            "a lane that is not named",
            "0xffffffffu",
            "0x7fffffffu",
            r"__shfl_xor_sync\(\): thread \(15,0,0\) reads lane 31, which the mask does not name|"
            r"__shfl_xor_sync\(\): thread \(31,0,0\) is lane 31, which its own mask 0x7fffffff does not name",
        ),
        Twin(
            "lanes apart",
            "  for (int o = 16;",
            "  if (threadIdx.x < 31) for (int o = 16;",
            r"__shfl_xor_sync\(\): thread \(15,0,0\) reads lane 31, which does not exist or has ended; kernels\.py:111",
        ),
        Twin(
            "off by one",
            "i < width; i += 32) part",
            "i <= width; i += 32) part",
            r"x\[600\] read out of bounds: x has 600 elements; block \(2,0,0\), thread \(8,0,0\), kernels\.py:110",
        ),
    ),
)

CASES = (RMS_NORM, SILU_MUL, ROPE, LINEAR, SOFTMAX)
