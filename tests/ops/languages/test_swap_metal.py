"""Swaps in Metal, emulated, in the embedded model: the story stays, mistakes are named in the user's own line."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

import llm
import ops
from ops import SwapRefused
from ops.languages.base import SourceError

NORM = r"""
#include <metal_stdlib>
using namespace metal;
kernel void block_norm(device const float* x [[buffer(0)]], device const float* weight [[buffer(1)]],
                       device float* out [[buffer(2)]], constant uint& width [[buffer(3)]],
                       constant float& eps [[buffer(4)]], constant bool& plus_one [[buffer(5)]],
                       uint row [[threadgroup_position_in_grid]], uint tid [[thread_position_in_threadgroup]],
                       uint threads [[threads_per_threadgroup]], uint lane [[thread_index_in_simdgroup]],
                       uint simdgroup [[simdgroup_index_in_threadgroup]]) {
  threadgroup float part[32];
  float sum = 0;
  for (uint i = tid; i < width; i += threads) sum += x[row * width + i] * x[row * width + i];
  sum = simd_sum(sum);
  if (lane == 0) part[simdgroup] = sum;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  sum = 0;
  for (uint i = 0; i < (threads + 31) / 32; ++i) sum += part[i];
  const float scale = rsqrt(sum / width + eps);
  for (uint i = tid; i < width; i += threads)
    out[row * width + i] = x[row * width + i] * scale * (weight[i] + (plus_one ? 1.0 : 0.0));
}
"""


@pytest.fixture(scope="module")
def model():
    return llm.load("tiny", dtype="float32")


@pytest.fixture(autouse=True)
def restored():
    yield
    ops.restore()


def rows(x, *_):
    return int(np.prod(x.shape[:-1]))


def norm(text: str, **options):
    def block_norm():
        return text

    return ops.rms_norm.swap("metal", **{"grid": rows, "block": 96, **options})(block_norm)


def test_the_story_stays_the_same(model):
    wanted = model.generate("Once upon a time", max_tokens=30, temperature=0)
    swap = norm(NORM)
    assert model.generate("Once upon a time", max_tokens=30, temperature=0) == wanted
    assert swap.hits and swap.state == "in use" and swap.checked >= 8
    assert "metal emulated" in str(ops.rms_norm.swaps)


def test_a_body_alone_in_every_dtype(model):
    wanted = model.generate("Mia", max_tokens=10, temperature=0)

    @ops.silu_mul.swap("metal", grid=rows, block=64, check="always")
    def body():
        """
        for (int i = thread_position_in_threadgroup.x; i < width; i += threads_per_threadgroup.x) {
          const int at = threadgroup_position_in_grid.x * width + i;
          const float g = gate[at];
          out[at] = g / (1 + exp(-g)) * float(up[at]);
        }
        """

    assert model.generate("Mia", max_tokens=10, temperature=0) == wanted
    for dtype in ("float16", "bfloat16"):
        gate, up = (ops.tensor(np.random.default_rng().standard_normal((3, 50)).astype("float32"), dtype) for _ in "ab")
        before = body.checked
        ops.silu_mul(gate, up)
        assert body.checked == before + 1 and not body.trial.quarantined


@pytest.mark.parametrize(
    ("right", "wrong", "said"),
    [
        ("  threadgroup_barrier(mem_flags::mem_threadgroup);\n", "",
         r"race on threadgroup memory part\[0\] between .*; a threadgroup_barrier\(\) is missing between them"),
        ("i < width; i += threads)\n", "i <= width; i += threads)\n", r"x\[1\] read out of bounds: x has 1 element"),
        ("sum / width", "sum", r"block_norm is wrong on an edge case: output of rms_norm\(x=float32"),
        ("part[simdgroup] = sum;", "part[simdgroup + 30] = sum;", r"index 32 out of bounds of an array of type"),
    ],
)  # fmt: skip
def test_mistakes_are_refused(right: str, wrong: str, said: str):
    assert right in NORM
    with pytest.raises(SwapRefused, match=said) as caught:
        norm(NORM.replace(right, wrong))
    assert "edge case" in str(caught.value)
    assert not len(ops.rms_norm.swaps.rows)


def test_types_are_compared_with_the_op(model):
    with pytest.raises(SwapRefused, match=r"half\* x|constant|is float32"):
        norm(NORM.replace("const float* x", "const half* x"), edge_cases=False)
        model.generate("Once", max_tokens=1)
    with pytest.raises(SwapRefused, match=r"weigth"):
        norm(NORM.replace("device const float* weight [[buffer(1)]]", "device const float* weigth [[buffer(1)]]"))
    with pytest.raises(SwapRefused, match=r"block_norm: metal asks for grid="):
        norm(NORM, grid=None)


def test_a_compile_error_names_the_line_of_this_file():
    with pytest.raises(SourceError) as caught:

        @ops.silu_mul.swap("metal", grid=rows, block=64)
        def wrong():
            """
            kernel void wrong(device const float* gate, device const float* up, device float* out) {
              out[0] = gat[0];
            }
            """

    line = next(
        i for i, each in enumerate(Path(__file__).read_text().split("\n"), 1) if each.strip() == "out[0] = gat[0];"
    )
    assert re.match(rf".*test_swap_metal\.py:{line}: error: .gat. was not declared", str(caught.value))
