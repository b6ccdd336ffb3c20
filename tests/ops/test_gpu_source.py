"""Kernels for GPUs, of every op, without a GPU: generated in each language and dtype, compiled where a compiler is,
and run by PoCL on the CPU against the reference. An op without examples fails here, so that none is forgotten."""

from __future__ import annotations

import numpy as np
import pytest
import tvm

import ops
from ops import KernelError, cross, target
from ops.languages import cuda, hosted, metal, nvrtc
from ops.languages.base import Options
from ops.op import registry
from ops.spec import FLOATS

from . import harness, pocl

pytestmark = pytest.mark.gpu
OPS = sorted(name for name, each in registry.items() if each.__module__.startswith("ops."))
# All element-wise ops widen their arguments and round their results alike: in 16 bits these stand for the others.
_ELEMENT_WISE = {"add", "cast", "copy", "scale", "add_row"}
_WIDE = [(name, "float32") for name in OPS]
_NARROW = [name for name in OPS if registry[name].__module__ != "ops.pointwise" or name in _ELEMENT_WISE]
_BROKEN_ONCE = ["argmax", "attention", "cast", "experts_linear", "linear"]  # as CUDA in 16 bits, in the emulator


def requests(name, dtype):
    """An op's examples, one for each kernel that they ask for."""
    found = {}
    for args, constants in ops.examples.of(registry[name], dtype):
        request = registry[name]._request(args, constants)
        found.setdefault(request.arguments, request)
    assert len(found) >= 2, f"{name} has no examples: give it some in ops/examples.py"
    return [*found.values()]


def generated(name, dtype, language):
    """The text of each kernel; None for those that hold a dtype which the language lacks."""
    with target.building_for_gpu(language) as gpu:
        for request in requests(name, dtype)[::3]:  # the other tests take all
            held = {*[spec.dtype for spec in (*request.specs, *request.outputs) if isinstance(spec, ops.Spec)]}
            if lacking := sorted(held & gpu.lacks.keys()):
                with pytest.raises(KernelError, match=rf"{name}\(.*{language} has no ({'|'.join(lacking)}): "):
                    cross.lowered(request)
                yield None
            else:
                yield cross.lowered(request).text


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize(("language", "sign"), [("metal", "kernel void"), ("opencl", "__kernel"), ("wgsl", "@compute")])
def test_every_op_is_generated_in_every_language(name, dtype, language, sign):
    texts = [*generated(name, dtype, language)]
    assert any(texts) or (language, dtype) == ("wgsl", "bfloat16")
    assert all(sign in text for text in texts if text)


@pytest.mark.parametrize(("dtype", "arch"), [*zip(FLOATS, nvrtc.ARCHITECTURES[::-1], strict=True)])
def test_cuda_of_every_op_compiles(dtype, arch):
    """All kernels in one text: NVRTC takes a second for the headers."""
    pytest.importorskip("cuda.bindings.nvrtc", reason="needs NVIDIA's wheels: pip install -e '.[cuda]'")
    functions = {}
    with target.building_for_gpu("cuda", arch) as gpu:
        for name in OPS:
            for i, request in enumerate(requests(name, dtype)):
                primfunc = request.scheduled().with_attr("global_symbol", f"{name}_{i}")
                functions |= {each.name_hint: f for each, f in cross.lower(primfunc, gpu).device.functions.items()}
        text = cross.text_of(tvm.IRModule(functions), gpu.target)
    ptx, cubin, _ = nvrtc.compile(text, arch)
    assert len(functions) > 2 * len(OPS) and all(f".entry {name}(" in ptx for name in functions)
    assert cubin.startswith(b"\x7fELF")


@pytest.mark.parametrize(("name", "dtype"), [*_WIDE, *((name, "bfloat16") for name in _NARROW)])
def test_every_op_runs_on_pocl_and_agrees_with_its_reference(name, dtype):
    pytest.importorskip("pyopencl", reason="needs pyopencl and pocl-binary-distribution: pip install -e '.[opencl]'")
    op, kernels = registry[name], {}
    with target.building_for_gpu("opencl", without=["float16"]):
        for args, constants in ops.examples.of(op, dtype)[:: 1 if dtype == "float32" else 2]:
            request = op._request(args, constants)
            if any(
                spec.dtype == "float16" for spec in (*request.specs, *request.outputs) if isinstance(spec, ops.Spec)
            ):
                with pytest.raises(KernelError, match="opencl has no float16: the device has no such arithmetic"):
                    cross.lowered(request)
                continue
            if request.arguments not in kernels:
                kernels[request.arguments] = hosted.of(op, args, constants, pocl.launcher)
            run(op, kernels[request.arguments], args, constants)
    assert kernels


@pytest.mark.parametrize(
    ("name", "dtype"), [*_WIDE, *((name, dtype) for name in _BROKEN_ONCE for dtype in ("float16", "bfloat16"))]
)
def test_some_kernels_of_every_op_run_in_the_emulator_as_cuda(name, dtype):
    """For sm_75, as tensor cores are not emulated."""
    op, kernels, compiled = registry[name], {}, cuda.Cuda(Options("emulate")).compile
    with target.building_for_gpu("cuda", "sm_75"):
        for args, constants in ops.examples.of(op, dtype)[1::4][:2]:
            request = op._request(args, constants)
            if request.arguments not in kernels:
                kernels[request.arguments] = hosted.of(op, args, constants, hosted.programs(compiled))
            run(op, kernels[request.arguments], args, constants)


@pytest.mark.parametrize(
    ("name", "dtype"), [*_WIDE, *((name, ("float16", "bfloat16")[i % 2]) for i, name in enumerate(_NARROW))]
)
def test_some_kernels_of_every_op_run_in_the_emulator_as_metal(name, dtype):
    op, kernels, compiled = registry[name], {}, metal.Metal(Options("emulate")).compile
    with target.building_for_gpu("metal"):
        for args, constants in ops.examples.of(op, dtype)[1::4][: 2 if dtype == "float32" else 1]:
            request = op._request(args, constants)
            if request.arguments not in kernels:
                kernels[request.arguments] = hosted.of(op, args, constants, hosted.programs(compiled))
            run(op, kernels[request.arguments], args, constants)


def run(op, kernel, args, constants):
    """Launch on outputs full of NaN, and compare with the reference."""
    expected = ops.call.as_tuple(op.reference(*args, **constants))
    made = [ops.empty(each.shape, each.dtype) for each in ops.call.as_tuple(op.spec(*args, **constants))]
    for each in made:
        each.numpy()[...] = np.nan if each.dtype in FLOATS else 77
    kernel(*ops.call.raw(args), *[each.buffer.data for each in made])
    made += [args[op.parameters.index(each)] for each in op.writes]
    for actual, reference in zip(made, expected, strict=True):
        error = harness.relative_error(actual.numpy().astype("float64"), reference.astype("float64"), actual.dtype)
        assert error <= harness.KERNEL.get(actual.dtype, 0.0), f"{op.name} {[a.spec for a in made]}: {error:.3g}"
