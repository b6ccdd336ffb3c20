"""Kernels built for GPUs that are not here: what they are kept by, what runs in front of them, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import ops
from ops import KernelError, cross, store, target
from ops.languages import hosted, nvrtc


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LIMPID_CACHE", str(tmp_path))


def request_of(width=24):
    return ops.neg._request((ops.zeros((3, width)),), {})


def numpy_neg(lowered):
    """In a GPU's place: negates by NumPy, and remembers the launches."""

    def launch(name, args, grid, block, text):
        launches.append((name, grid, block))
        out, x, *_ = args
        out[:] = -x

    launches: list[tuple] = []
    launcher: Any = launch
    launcher.launches = launches
    return launcher


def test_a_kernel_is_kept_for_its_device_by_the_target(cache):
    pytest.importorskip("cuda.bindings.nvrtc", reason="needs NVIDIA's wheels: pip install -e '.[cuda]'")
    keys = {request_of().key}
    for arch in ("sm_80", "sm_90"):
        with target.building_for_gpu("cuda", arch):
            keys.add(request_of().key)
            made = cross.built(request_of())
            path, _ = store.kernels.find(request_of().key)
            assert path is not None and cross.Built.load(path) == made == cross.built(request_of())
        assert made.arch == arch and f".target {arch}" in made.ptx and made.cubin.startswith(b"\x7fELF")
        assert made.functions["neg_kernel"].launch == ("blockIdx.x", "threadIdx.x")
        assert made.functions["neg_kernel"].parameters == ("float32*", "float32*", "int32")
        assert "define" in made.host and "neg_kernel" in made.text
    with target.building_for_gpu("metal"):
        keys.add(request_of().key)
    assert len(keys) == 4


def test_one_kernel_serves_all_sizes_of_a_range_and_the_host_code_computes_its_launches():
    launch = numpy_neg(None)
    with target.building_for_gpu("opencl"):
        kernel = hosted.of(ops.neg, (ops.zeros((3, 24)),), {}, lambda lowered: launch)
    for n in (2, 3, 16):
        x, out = np.random.default_rng(n).standard_normal((n, 24)).astype("float32"), np.zeros((n, 24), "float32")
        kernel(x, out)
        assert np.array_equal(out, -x)
    blocks = [-(-n * 24 // 4 // 256) for n in (2, 3, 16)]  # four elements a thread
    assert launch.launches == [("neg_kernel", (count, 1, 1), (256, 1, 1)) for count in blocks]
    with pytest.raises(Exception, match=r"out.shape\[0\]"):
        kernel(x, out[:5])


def test_an_argument_at_an_odd_address_is_refused():
    with target.building_for_gpu("opencl"):
        kernel = hosted.of(ops.neg, (ops.zeros((3, 24)),), {}, numpy_neg)
    memory = np.zeros(3 * 24 + 5, "float32")
    offset = 1 if memory.ctypes.data % 16 == 0 else 0
    odd = memory[offset : offset + 72].reshape(3, 24)
    with pytest.raises(KernelError, match=r"shape \[3, 24\] begins at an address that is no multiple of 16 bytes"):
        kernel(odd, np.zeros((3, 24), "float32"))


def never(lowered):
    def launch(*_):
        raise AssertionError("a kernel was launched on what does not pass the check")

    return launch


@pytest.mark.parametrize("ids", [[-1, 0, 1], [0, 10, 1]])
def test_what_a_gpu_cannot_raise_is_checked_in_front(ids):
    args = (ops.tensor(np.array(ids, "int32")), ops.zeros((10, 4)))
    with target.building_for_gpu("opencl"):
        kernel = hosted.of(ops.embedding, args, {}, never)
    with pytest.raises(Exception, match=r"ids hold a value outside \[0, 10\)"):
        kernel(*ops.call.raw(args), np.zeros((3, 4), "float32"))


@pytest.mark.parametrize("position", [-1, 5])
def test_positions_are_checked_in_front_of_attention_and_of_a_cache(position):
    positions = ops.tensor(np.array([position], "int32"))
    q, k = ops.zeros((1, 2, 4)), ops.zeros((5, 2, 4))
    with target.building_for_gpu("opencl"):
        attention = hosted.of(ops.attention, (q, k, k, positions), {"scale": 1.0}, never)
        write = hosted.of(ops.cache_write, (k, q, positions), {}, never)
    with pytest.raises(Exception, match="a position lies outside the cache"):
        attention(*ops.call.raw((q, k, k, positions, q)))
    with pytest.raises(Exception, match="positions hold a value outside the cache"):
        write(*ops.call.raw((k, q, positions)))


def test_source_in_every_language_and_for_another_architecture():
    x = ops.zeros((3, 24))
    signs = {"cuda": "__global__", "metal": "kernel void", "opencl": "__kernel", "wgsl": "@compute", "c": "int32_t"}
    for language, sign in signs.items():
        text = ops.softmax.source(language, x)
        assert sign in text and repr(text) == text
    with target.building_for_gpu("cuda", "sm_90"):
        assert "__global__" in ops.softmax.source("cuda", x)
        assert "@compute" in ops.softmax.source("wgsl", x)


def test_ptx_and_sass_are_nvrtcs(cache):
    pytest.importorskip("cuda.bindings.nvrtc", reason="needs NVIDIA's wheels: pip install -e '.[cuda]'")
    x = ops.zeros((3, 24))
    assert ".target sm_80" in ops.neg.source("ptx", x)
    with target.building_for_gpu("cuda", "sm_90"):
        assert ".target sm_90" in ops.neg.source("ptx", x)
    assert "EXIT" in ops.neg.source("sass", x)


def test_tensor_cores_multiply_many_tokens_of_16_bits(cache):
    pytest.importorskip("cuda.bindings.nvrtc", reason="needs NVIDIA's wheels: pip install -e '.[cuda]'")
    for dtype in ("float16", "bfloat16"):
        x, weight = ops.zeros((17, 33), dtype), ops.zeros((20, 33), dtype)
        assert "HMMA" in nvrtc.sass(cross_built(x, weight).cubin)
        assert "HMMA" not in nvrtc.sass(cross_built(x[:1], weight).cubin)
    assert "HMMA" not in nvrtc.sass(cross_built(ops.zeros((17, 33)), ops.zeros((20, 33))).cubin)


def cross_built(*args):
    with target.building_for_gpu("cuda", "sm_90"):
        return cross.built(ops.linear._request(args, {}))


def test_errors_say_what_to_do():
    x = ops.zeros((3, 4), "bfloat16")
    with pytest.raises(KernelError, match=r"neg\(x=bfloat16.*wgsl has no bfloat16: convert it to float16 or float32"):
        ops.neg.source("wgsl", x)
    with pytest.raises(KernelError, match=r"no source in 'rust'; known are 'llvm', 'asm', 'c', 'cuda', 'ptx', 'sass'"):
        ops.neg.source("rust", x)
    with pytest.raises(KernelError, match="no GPU kernels in 'vulkan'; known are cuda, metal, opencl, wgsl"):
        target.building_for_gpu("vulkan").__enter__()
    with pytest.raises(KernelError, match="metal has no architectures; arch is 'm1'"):
        target.building_for_gpu("metal", "m1").__enter__()
    with pytest.raises(KernelError, match=r"no GPU is chosen: do this inside of target.building_for_gpu"):
        cross.built(request_of())


def test_a_device_may_lack_what_its_language_has():
    half = ops.zeros((3, 4), "float16")
    with (
        target.building_for_gpu("opencl", without=["float16"]),
        pytest.raises(KernelError, match="opencl has no float16: the device has no such arithmetic; give float32"),
    ):
        cross.lowered(ops.neg._request((half,), {}))


def test_a_call_does_not_run_a_kernel_for_another_device():
    with (
        target.building_for_gpu("cuda"),
        pytest.raises(KernelError, match=r"neg: kernels for cuda are built by ops\.cross, and not run here"),
    ):
        ops.neg(ops.zeros((3, 1237)))
