"""NVRTC: CUDA text to PTX, machine code and listing on a machine without a GPU; errors speak of the user's own line."""

from __future__ import annotations

import pytest

from ops import KernelError
from ops.languages import nvrtc
from ops.languages.base import SourceError

pytest.importorskip("cuda.bindings.nvrtc", reason="needs cuda-bindings and nvidia-cuda-nvrtc: pip install -e '.[cuda]'")

DOUBLE = """
#include <cuda_fp16.h>
#include <cuda_bf16.h>
#include <mma.h>
extern "C" __global__ void twice(__half* x, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) x[i] = __float2half(2.0f * __half2float(x[i]));
}
"""


@pytest.mark.parametrize("arch", nvrtc.ARCHITECTURES)
def test_a_kernel_compiles_with_the_wheels_own_headers(arch):
    ptx, cubin, log = nvrtc.compile(DOUBLE, arch)
    assert ".entry twice" in ptx and f".target {arch}" in ptx and log == ""
    assert cubin.startswith(b"\x7fELF")
    assert "twice" in nvrtc.sass(cubin) and "EXIT" in nvrtc.sass(cubin)


def test_there_is_no_fast_math_unless_it_is_asked_for():
    text = 'extern "C" __global__ void f(float* x) { x[0] = expf(x[0]) / x[1]; }'
    assert "div.rn.f32" in nvrtc.compile(text).ptx
    assert "div.rn.f32" not in nvrtc.compile(text, options=["--use_fast_math"]).ptx


def test_an_error_names_the_users_file_and_line():
    text = '#line 41 "mine.py"\nextern "C" __global__ void f(float* x) {\n  x[0] = y;\n}'
    with pytest.raises(SourceError, match=r'mine.py\(42\): error: identifier "y" is undefined'):
        nvrtc.compile(text)


def test_an_architecture_that_it_does_not_know_is_an_error_that_lists_the_others():
    with pytest.raises(KernelError, match=r"does not compile for 'sm_12'; it knows .*sm_80, .*sm_90, .*sm_100"):
        nvrtc.compile(DOUBLE, "sm_12")


def test_a_missing_wheel_is_named(monkeypatch):
    monkeypatch.setattr(nvrtc, "_folders", lambda: ())
    with pytest.raises(KernelError, match=r"nvidia-cuda-nvdisasm is missing: pip install 'limpid\[cuda\]'"):
        nvrtc.sass(b"")
