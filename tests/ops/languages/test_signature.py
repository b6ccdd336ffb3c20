"""Signatures: what is understood, as C writes it, and what is refused, with the user's own file and line."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ops.languages.base import Source, SourceError
from ops.languages.c import DIALECT, C
from ops.languages.signature import Dialect, functions, parse

CUDA = Dialect("CUDA", {"float": "float32", "half": "float16", "int": "int32"}, kernel="__global__")
OPENCL = Dialect(
    "OpenCL",
    {"float": "float32", "int": "int32"},
    qualifiers=frozenset(("__global", "global", "restrict")),
    constant=frozenset(("const", "__constant", "constant")),
    kernel="__kernel",
)


def source(text: str, entry: str = "f") -> Source:
    return Source(text, entry, "kernels.py", 10)


def parsed(parameters: str, dialect: Dialect = DIALECT) -> list[str]:
    found = parse(source(f"void f({parameters}) {{ }}"), dialect)
    assert found is not None
    return [str(parameter) for parameter in found]


def test_all_at_once():
    text = """
    /* void f(int wrong) { } */
    #include <math.h>
    #define LOOP(n) for (int i = 0; i < n; i++) {
    static inline __attribute__((always_inline)) float square(float x) { return x * x; }
    static const float table[] = {1, 2, 3};
    struct pair { float a, b; };
    extern "C" void block_norm(const float* x, // the activations: rows, then (width)
                    float const *restrict weight /* , int none */,
                    float out[],
                    int rows, int width, float eps) {
        if (rows) { const char *text = "} void f("; }
    }
    """
    found = parse(source(text, "block_norm"), DIALECT)
    assert found is not None
    assert [str(p) for p in found] == [
        *("const float* x", "const float* weight", "float* out", "int rows", "int width", "float eps")
    ]
    assert [p.dtype for p in found] == ["float32"] * 3 + ["int32"] * 2 + ["float32"]
    assert [each.name for each in functions(source(text))] == ["square", "block_norm"]


@pytest.mark.parametrize(
    ("written", "understood"),
    [
        ("", []),
        ("void", []),
        ("float *x", ["float* x"]),
        ("const float x[]", ["const float* x"]),
        ("float x[static 4]", ["float* x"]),
        ("float* const x", ["float* x"]),
        ("volatile float* __restrict__ x", ["float* x"]),
        ("unsigned char* x, signed char *y", ["unsigned char* x", "signed char* y"]),
        ("uint8_t* x, int8_t* y", ["uint8_t* x", "int8_t* y"]),
        ("long n, long int m, long long k, int long l", ["long n", "long m", "long long k", "long l"]),
        ("unsigned n, const unsigned int m", ["unsigned int n", "unsigned int m"]),
        ("std::int64_t n, size_t m", ["int64_t n", "size_t m"]),
        ("double eps, bool on", ["double eps", "bool on"]),
        ("int n = 3, float e = max(1, 2)", ["int n", "float e"]),
        ("_Float16 *x, half* y, __bf16* z, bfloat16* w", ["_Float16* x", "half* y", "__bf16* z", "bfloat16* w"]),
    ],
)
def test_parameters(written, understood):
    assert parsed(written) == understood


@pytest.mark.parametrize(
    ("written", "complaint"),
    [
        ("foo x", "'foo x': foo is not a type that is passed; C has float, half, bfloat16, int, int64_t"),
        ("struct pair p", "'struct pair p': pair is not a type"),
        ("char* x", "char is not a type"),
        ("short* x", "short is not a type"),
        ("void* x", "'void* x' says nothing of what it points to; arrays are of float"),
        ("const void *x", "says nothing of what it points to"),
        ("double* x", "no tensor is of double"),
        ("size_t* x", "no tensor is of size_t"),
        ("float** x", "'float** x' is a pointer to pointers"),
        ("float x[2][3]", "is a pointer to pointers"),
        ("const float& x", "'const float& x' is not understood"),
        ("float (*g)(int)", "is not understood"),
        ("std::vector<float> x", "is not understood"),
        ("float*", "'float*' has no name"),
        ("unsigned int", "'unsigned int' has no name"),
        ("n", "'n' has no type"),
        ("int n, , int m", "'' has no name"),
    ],
)
def test_refused_parameters(written, complaint):
    with pytest.raises(SourceError) as error:
        parse(source(f"\n\nvoid f(int first,\n {written}) {{ }}"), DIALECT)
    assert complaint in str(error.value)
    assert str(error.value).startswith("kernels.py:13: error: ")


def test_the_line_and_a_caret_are_shown():
    with pytest.raises(SourceError) as error:
        parse(source("void f(int n,\n\tfoo x) {}"), DIALECT)
    assert str(error.value).split("\n")[1:] == ["    \tfoo x) {}", "    \t^"]


def test_a_body_has_no_function():
    text = """
    #pragma omp parallel for
    for (int r = 0; r < rows; r++) {
        if (r) { out[r] = 1; } else { while (0) {} }
        switch (r) { case 1: break; }
        float table[] = {1, 2};
        do { } while (0);
        auto g = [&](float x) { return x; };
    }
    LOOP(3) { }
    """
    assert parse(source(text), DIALECT) is None
    assert C().parse(source("out[0] = x[0];")) is None


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("void g(int n) {}\nvoid h(int n) {}", "there is no function f, by which the kernel is called; there is g, h"),
        ("float f(int n) { return 1; }", "f gives a result"),
        ("void* f(int n) { return 0; }", "f gives a result"),
        ("template <int N> void f(float* x) { }", "f is a template"),
        ("void f(float* x) {\n  if (x) {\n }", "this brace is never closed"),
        ("namespace a { void f(int n) {} }\nvoid g(int n) {}", "there is g"),
    ],
)
def test_refused_functions(text, complaint):
    with pytest.raises(SourceError, match=r"^kernels.py:1[01]: error: ") as error:
        parse(source(text), DIALECT)
    assert complaint in str(error.value)


@pytest.mark.parametrize("before", ['extern "C" {', "namespace {", 'extern "C" { namespace {'])
def test_braces_that_change_no_name_are_looked_through(before):
    found = parse(source(f"{before} void f(int n) {{}} {'}' * before.count('{')}"), DIALECT)
    assert found is not None
    assert [p.name for p in found] == ["n"]


def test_cuda():
    text = """
    __device__ float square(float x) { return x * x; }
    extern "C" __global__ void __launch_bounds__(256, 2) f(const half* __restrict__ x, float* out, int n) { }
    """
    found = parse(source(text), CUDA)
    assert found is not None
    assert [str(p) for p in found] == ["const half* x", "float* out", "int n"]
    with pytest.raises(SourceError, match="square is no kernel: write __global__ before it"):
        parse(source(text, "square"), CUDA)


def test_opencl():
    text = "__attribute__((reqd_work_group_size(64, 1, 1))) __kernel void f(__global const float* x, \
        __constant float* w, __global float* restrict out, int n) { }"
    found = parse(source(text), OPENCL)
    assert found is not None
    assert [str(p) for p in found] == ["const float* x", "const float* w", "float* out", "int n"]


PIECES = [
    *("void", "f", "const", "float", "unsigned", "x", "*", "&", "[", "]", "[[", "(", ")", "{", "}", "<", ">", ",", ";"),
    *(" ", "\n", '"', "'", "//", "/*", "*/", "\\", "#", "=", "__attribute__((", 'extern "C" {', "namespace", "1"),
]


@settings(deadline=None, max_examples=300)
@given(st.lists(st.sampled_from(PIECES), max_size=40).map(" ".join))
def test_any_text_is_understood_or_refused(text):
    try:
        found = parse(source(text), DIALECT)
    except SourceError as error:
        assert str(error).startswith("kernels.py:")
    else:
        assert found is None or all(parameter.name for parameter in found)
