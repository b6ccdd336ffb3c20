"""What Metal texts declare, what is refused with its line, and bodies alone."""

from __future__ import annotations

import re

import numpy as np
import pytest

import ops
from ops.languages.base import Launch, Parameter, Program, SourceError
from ops.languages.emulator import EmulatedProgram
from ops.languages.metal import Metal

from .emulation import run, source
from .metal_kernels import RMS_NORM
from .test_metal import compiled


def parsed(declared: str, before: str = "") -> tuple[Parameter, ...] | None:
    return Metal().parse(source(f"using namespace metal;\n{before}kernel void k({declared}) {{\n}}", "k"))


def error(text: str, entry: str = "k", **options) -> str:
    with pytest.raises(SourceError) as caught:
        compiled(text, entry, **options)
    return str(caught.value)


@pytest.mark.parametrize(
    ("declared", "expected"),
    [
        ("device const float* x", "const float* x: float32"),
        ("const device float *x [[buffer(3)]]", "const float* x: float32"),
        ("device float const* __restrict x [[ buffer(0) ]]", "const float* x: float32"),
        ("device half x[]", "half* x: float16"),
        ("constant bfloat* x", "const bfloat* x: bfloat16"),
        ("device const uchar* x, device char* y", "const uchar* x: uint8, char* y: int8"),
        ("device long* x, device int32_t* y", "long* x: int64, int32_t* y: int32"),
        ("device float4* x, const device packed_half3* y", "float4* x: float32, const packed_half3* y: float16"),
        ("device atomic_int* x", "atomic_int* x: int32"),
        ("constant float& eps, constant const int &n", "float eps: float32, int n: int32"),
        ("constant uint& n [[buffer(1)]], device const ulong& m", "unsigned int n: int32, unsigned long m: int64"),
        ("constant bool& causal", "bool causal: None"),
        ("uint i [[thread_position_in_grid]], device int* x", "int* x: int32"),
        ("device int* x [[buffer(1)]], uint3 g [[ threadgroup_position_in_grid ]], constant int& n [[buffer(0)]]",
         "int* x: int32, int n: int32"),
        ("threadgroup float4* tile [[threadgroup(0)]], device int* x, ushort l [[thread_index_in_simdgroup]]",
         "int* x: int32"),
        ("device int* x /* of [[buffer(9)]] */, // , y\n constant int& n", "int* x: int32, int n: int32"),
        ("", ""),
    ],
)  # fmt: skip
def test_parameters(declared: str, expected: str):
    found = parsed(declared)
    assert found is not None
    assert ", ".join(f"{p}: {p.dtype}" for p in found) == expected


def test_a_kernel_may_be_marked_by_an_attribute():
    text = "[[kernel]] void k(device int* x [[buffer(0)]], uint i [[thread_position_in_grid]]) { x[i] = i; }"
    x = np.zeros(70, "int32")
    run(compiled(text, "k"), {"x": x}, Launch((2, 1, 1), (35, 1, 1)))
    assert (x == np.arange(70)).all()


@pytest.mark.parametrize(
    ("declared", "said"),
    [
        ("float eps", r"a number is passed as constant float& eps \[\[buffer\(n\)\]\]"),
        ("device int* x, uint i", r"'uint i': no|a number is passed as constant uint& i"),
        ("float* x", r"'float\* x' is in no address space: write device before it"),
        ("device double* x", r"double is not a type that is passed; Metal has float, half"),
        ("device uint* x", r"no tensor is of uint; arrays are of float, half, bfloat, int"),
        ("device bool* x", r"no tensor is of bool"),
        ("device void* x", r"says nothing of what it points to"),
        ("device float** x", r"pointer to pointers"),
        ("device float& x", r"arrays are passed as device float\* x, numbers as constant float& x"),
        ("constant float4& x", r"arrays are passed as device float4\* x"),
        ("constant float (&x)[3]", r"is not understood"),
        ("device int* x [[buffer(1)]], device int* y [[buffer(1)]]", r"y has the same \[\[buffer\(1\)\]\] as x"),
        ("device int* x [[buffer(31)]]", r"x has \[\[buffer\(31\)\]\]; Metal has buffers 0 to 30"),
        ("device int* x [[buffer]]", r"x has \[\[buffer\(\)\]\]"),
        ("device int* x [[bufer(0)]]", r"\[\[bufer\]\] is not known here; known are buffer, threadgroup, thread_pos"),
        ("texture2d<float> t [[texture(0)]]", r"\[\[texture\]\] is not known here"),
        ("float i [[thread_position_in_grid]]", r"\[\[thread_position_in_grid\]\] is a uint, uint2 or uint3"),
        ("uint2 i [[thread_index_in_simdgroup]]", r"\[\[thread_index_in_simdgroup\]\] is a uint$"),
        ("threadgroup float* a [[threadgroup(1)]]", r"one \[\[threadgroup\(0\)\]\] is given, shared= bytes large"),
        ("threadgroup float& a", r"threadgroup memory is passed as a pointer"),
        ("device int*", r"has no name"),
    ],
)
def test_parameters_that_nothing_can_be_given_to(declared: str, said: str):
    with pytest.raises(SourceError, match=r"(?s)^/some/where/kernels\.py:101: error: ") as caught:
        parsed(declared)
    assert re.search(said, str(caught.value).split("\n")[0])


def test_a_struct_is_refused():
    with pytest.raises(
        SourceError, match=r"kernels\.py:102: error: a struct is not passed: pass each of its numbers as"
    ):
        parsed("device float* x, constant Sizes& sizes", "struct Sizes { int rows, width; };\n")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("void k(device int* x) { }", r"kernels\.py:100: error: k is no kernel: write kernel before it"),
        ("\n\nkernel void other(device int* x) { }", r":102: error: there is no function k, by which .* other"),
        ("template <class T> kernel void k(device T* x) { }", r"k is a template; a kernel is a plain function"),
        ("kernel int k(device int* x) { return 0; }", r"k gives a result; a kernel is void"),
        ("kernel void k(device int* x) { if (x[0]) { }", r"this brace is never closed"),
        ('#include "mine.h"\nkernel void k(device int* x) { }', r':100: error: "mine.h" cannot be included'),
        ("\nkernel void k(device float* x) {\n  simdgroup_float8x8 a;\n}", r":102: error: simdgroup_float8x8 is not"),
        ("kernel void k(device float* x) { metal::simdgroup_matrix<half, 8, 8> a; }", r"simdgroup_matrix is not there"),
        ("kernel void k(device float* x) { x[0] = simd_sum(x[0]); }", r"simd_sum. was not declared"),
        ("using namespace metal;\nkernel void k(device float* x) {\n\n  x[0] = max(x[0], 0);\n}",
         r"(?s):103: error: call of overloaded .max\(float&, int\). is ambiguous\n      x\[0\] = max\(x\[0\], 0\);\n"),
        ("kernel void k(constant float* x) {\n  x[0] = 1;\n}", r":101: error: assignment of read-only location"),
        ("kernel void k(device const float* x) {\n  x[0] = 1;\n}", r":101: error: assignment of read-only location"),
        ("kernel void k(constant int& n) {\n  n = 1;\n}", r":101: error: assignment of read-only reference"),
        ("kernel void k(device float4* x) {\n  x[0].xyzx.q = 1;\n}", r":101: error: .* has no member named .q"),
        ("kernel void k(device float* x) {\n  metal::float3 a = metal::float4(1); }", r":101: error: conversion from"),
        ("kernel void k(device float4* x) {\n\n  x[0] = x[0] % 2;\n}",
         r"(?s):102: error: invalid operands of types .const float.*x\[0\] % 2"),
        ("kernel void k(device float* x) {\n  x[0] = metal::as_type<float>(1l); }",
         r":101: error: no matching function for call to .as_type<float>\(long int\)."),
    ],
)  # fmt: skip
def test_errors_name_the_line(text: str, said: str):
    assert re.search(said, error(text))


def test_no_gpu_is_claimed():
    text = "kernel void k(device int* x) { }"
    assert error(text, device="metal") == (
        "device='metal': Metal on a GPU is not built here, as it was never tried on one; leave device= out, or say "
        '"emulate", to run it on the CPU'
    )
    assert compiled(text, "k", device="emulate").emulated


def _completed(body: str, parameters: tuple[Parameter, ...]) -> Program:
    language, written = Metal(), source(body, "norm")
    assert language.parse(written) is None
    whole = language.with_signature(written, parameters)
    assert language.parse(whole) == parameters
    return language.compile(whole, parameters)


X = Parameter("x", "half", "float16", True, True)
OUT = Parameter("out", "half", "float16", True, False)
WIDTH, EPS = Parameter("width", "int", "int32", False, False), Parameter("eps", "float", "float32", False, False)


def test_a_body_alone_sees_positions_by_their_names():
    body = """
      float sum = 0;
      const int first = threadgroup_position_in_grid.x * width;
      for (int i = thread_index_in_simdgroup; i < width; i += threads_per_simdgroup) {
        float v = x[first + i];
        sum += v * v;
      }
      sum = rsqrt(simd_sum(sum) / width + eps);
      for (int i = thread_position_in_threadgroup.x; i < width; i += threads_per_threadgroup.x)
        out[first + i] = half(x[first + i] * sum);
    """
    program = _completed(body, (X, OUT, WIDTH, EPS))
    x = np.random.default_rng().standard_normal((3, 77)).astype("float16")
    out = np.full_like(x, np.nan)
    program.run([x, out, 77, 1e-5], Launch((3, 1, 1), (32, 1, 1)))
    expected = ops.rms_norm.reference(x, np.ones(77, "float16"), eps=1e-5)
    assert np.abs(out.astype("float32") - expected).max() <= 2e-3 * np.abs(expected).max()


def test_an_error_in_a_body_names_its_line():
    with pytest.raises(
        SourceError, match=r"(?s)^/some/where/kernels\.py:102: error: .wdith. was not declared.*wdith;\n"
    ):
        _completed("\n  int i = 0;\n  out[i] = wdith;\n", (X, OUT, WIDTH, EPS))


def test_constants_in_the_text():
    written = source("threadgroup float part[{width}];\npart[0] = {eps};\nout[0] = part[0] + {width};", "norm")
    made = written.with_constants({"width": 3, "eps": 0.5})
    language = Metal()
    out = np.zeros(1, "float16")
    language.compile(language.with_signature(made, (OUT,)), (OUT,)).run([out], Launch())
    assert out[0] == 3.5


def test_positions():
    names = {
        "thread_position_in_grid": 3, "thread_position_in_threadgroup": 3, "threadgroup_position_in_grid": 3,
        "threads_per_grid": 3, "threads_per_threadgroup": 3, "threadgroups_per_grid": 3,
        "thread_index_in_threadgroup": 1, "thread_index_in_simdgroup": 1, "simdgroup_index_in_threadgroup": 1,
        "threads_per_simdgroup": 1, "simdgroups_per_threadgroup": 1, "thread_index_in_quadgroup": 1,
        "quadgroup_index_in_threadgroup": 1, "quadgroups_per_threadgroup": 1, "thread_execution_width": 1,
    }  # fmt: skip
    count = sum(names.values())
    given = ", ".join(f"{'uint' if size == 1 else 'uint3'} {name} [[{name}]]" for name, size in names.items())
    letters = {1: ("",), 3: (".x", ".y", ".z")}
    stores = " ".join(
        f"at[{i}] = {value};"
        for i, value in enumerate(name + letter for name, size in names.items() for letter in letters[size])
    )
    text = f"""kernel void k(device int* out, {given}) {{
      uint grid = threads_per_grid.x * (thread_position_in_grid.y + threads_per_grid.y * thread_position_in_grid.z);
      device int* at = out + {count} * (thread_position_in_grid.x + grid);
      {stores}
    }}"""
    grid, block = (2, 3, 2), (5, 4, 3)
    whole = tuple(g * b for g, b in zip(grid, block, strict=True))
    out = np.full((whole[2], whole[1], whole[0], count), -1, "int32")
    compiled(text, "k").watched().run([out], Launch(grid, block))
    z, y, x = np.indices(out.shape[:3])
    linear = x % 5 + 5 * (y % 4 + 4 * (z % 3))
    full = np.ones_like(x)
    expected = [x, y, z, x % 5, y % 4, z % 3, x // 5, y // 4, z // 3]
    expected += [each * full for each in (*whole, *block, *grid)]
    expected += [linear, linear % 32, linear // 32, 32 * full, 2 * full]
    expected += [linear % 4, linear // 4, 15 * full, 32 * full]
    assert (out == np.stack(expected, -1)).all()


def test_what_a_program_says_of_itself():
    program = compiled(RMS_NORM.in_dtype("float32"), "rms_norm")
    assert isinstance(program, EmulatedProgram)
    assert "limpid_launch" in program.sources()["asm"]
    assert program.note == "emulated on the CPU; no Metal compiler has seen it"
