"""CUDA kernels on the CPU: right ones agree with the references, wrong ones are named with their line."""

from __future__ import annotations

import numpy as np
import pytest

from ops.languages import cuda_driver, nvrtc
from ops.languages.base import Launch, LaunchError, Options, SourceError
from ops.languages.cuda import Cuda
from ops.spec import DTYPES, FLOATS
from ops.tolerance import KERNEL, relative_error

from .cuda_kernels import CASES, RMS_NORM, SILU_MUL, Case, Twin
from .emulation import compiled, parsed, run, source

needs_nvrtc = pytest.mark.skipif(not nvrtc.available(), reason="NVRTC is not installed: pip install -e '.[cuda]'")


@pytest.fixture
def without_nvrtc(monkeypatch):
    def missing(*_, **__):
        raise nvrtc.missing("the package cuda-bindings")

    monkeypatch.setattr(nvrtc, "compile", missing)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kernels_agree_with_the_reference(case: Case, dtype: str):
    program = compiled(case.in_dtype(dtype), case.name)
    rng = np.random.default_rng()
    for shape in case.shapes:
        values = case.values(rng, shape, dtype)
        expected = case.expected(values)
        for each in (program, program.watched()):
            values["out"][...] = np.nan
            run(each, values, case.launch(shape))
            assert relative_error(values["out"], expected, dtype) <= KERNEL[dtype], shape


@pytest.mark.parametrize(
    ("case", "twin"),
    [pytest.param(case, twin, id=f"{case.name}-{twin.name}") for case in CASES for twin in case.twins],
)
def test_mistakes_are_named(case: Case, twin: Twin):
    text = case.in_dtype("float32")
    assert twin.right in text
    program = compiled(text.replace(twin.right, twin.wrong, 1), case.name)
    values = case.values(np.random.default_rng(), case.shapes[-1], "float32")
    with pytest.raises(LaunchError, match=twin.said):
        run(program.watched(), values, case.launch(case.shapes[-1]))
    assert np.isnan(values["out"]).all()  # a failed launch of the checked build writes nothing


def test_another_dtype_is_refused_before_the_launch():
    program = compiled(RMS_NORM.in_dtype("float16"), "rms_norm")
    values = RMS_NORM.values(np.random.default_rng(), (3, 33), "float32")
    with pytest.raises(LaunchError, match=r"const half\* x was given an array of float32, expected .* float16"):
        run(program, values, RMS_NORM.launch((3, 33)))
    values = RMS_NORM.values(np.random.default_rng(), (3, 33), "float16") | {"width": np.ones(3, "float32")}
    with pytest.raises(LaunchError, match="int width was given an array of float32, expected a number"):
        run(program, values, RMS_NORM.launch((3, 33)))


# Signatures


def test_parameters():
    text = """
    // __global__ void other(int a) {}
    extern "C" __global__ void
    __launch_bounds__(256, 2) kernel(const float *__restrict__ a, half* b, __half const* c, const __nv_bfloat16* d,
        int64_t* e, unsigned char f[], const float4* g, long long h, unsigned int i, const bool j, size_t k) {}
    """
    found = parsed(text, "kernel")
    assert [(p.name, p.type, p.dtype, p.pointer, p.const) for p in found] == [
        ("a", "float", "float32", True, True),
        ("b", "half", "float16", True, False),
        ("c", "__half", "float16", True, True),
        ("d", "__nv_bfloat16", "bfloat16", True, True),
        ("e", "int64_t", "int64", True, False),
        ("f", "unsigned char", "uint8", True, False),
        ("g", "float4", "float32", True, True),
        ("h", "long long", "int64", False, False),
        ("i", "unsigned int", None, False, False),
        ("j", "bool", None, False, False),
        ("k", "size_t", None, False, False),
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("template <class T> __global__ void k(T* x) {}", "kernels.py:100: error: k is a template"),
        ("void k(float* x) {}", "kernels.py:100: error: k is no kernel: write __global__ before it"),
        ("\n__global__ void other(float* x) {}", "kernels.py:101: error: there is no function k.*there is other"),
        ("__global__ int k(float* x) { return 0; }", "k gives a result; a kernel is void"),
        ("__global__ void k(float** x) {}", "pointer to pointers"),
        ("__global__ void k(const float& x) {}", "not understood"),
        ("__global__ void k(int n,\n  float4 x) {}", "kernels.py:101: error: float4 x: a number has one element"),
        ("__global__ void k(Matrix* x) {}", "Matrix is not a type that is passed; CUDA has float, half"),
        ("__global__ void k(double* x) {}", "no tensor is of double"),
    ],
)
def test_signatures_that_are_refused(text: str, said: str):
    with pytest.raises(SourceError, match=f"(?s){said}"):
        parsed(text, "k")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_body_gets_its_signature(dtype: str):
    parameters = parsed("__global__ void k(const float* x, float* out, int n) {}", "k")
    language = Cuda()
    spelled = language.spelling(dtype)
    whole = parsed(f"__global__ void k(const {spelled}* x, {spelled}* out, int n) {{}}", "k")
    body = source("\n  if (threadIdx.x < n) out[threadIdx.x] = x[threadIdx.x];\n", "k")
    assert language.parse(body) is None
    written = language.with_signature(body, whole)
    assert language.parse(written) == whole
    assert len(parameters) == len(whole)
    program = compiled(written.text, "k")
    x = np.arange(5).astype(DTYPES[dtype])
    out = np.zeros_like(x)
    run(program.watched(), {"x": x, "out": out, "n": 5}, SILU_MUL.launch((1, 5)))
    assert (x == out).all()


# Compilers


WRONG = """
extern "C" __global__ void k(const float* x, float* out) {
  __shared__ float tile[4];
  out[0] = x[0] * weight[0];
}
"""


@needs_nvrtc
def test_errors_of_nvrtc_are_on_the_users_line():
    with pytest.raises(SourceError) as raised:
        compiled(WRONG, "k")
    lines = str(raised.value).split("\n")
    assert lines[0] == '/some/where/kernels.py:103: error: identifier "weight" is undefined'
    assert lines[1].strip() == "out[0] = x[0] * weight[0];"
    assert lines[1][lines[2].index("^")] == "w"
    assert "never referenced" not in str(raised.value)  # a warning


@needs_nvrtc
def test_errors_of_the_assembler_name_the_kernel():
    text = WRONG.replace("tile[4]", "tile[20000]").replace("weight[0]", "tile[(int)x[0]]; tile[(int)x[1]] = 1")
    with pytest.raises(SourceError, match=r"kernels\.py:100: error: ptxas error : .*too much shared data"):
        compiled(text, "k")


def test_errors_without_nvrtc_are_on_the_users_line(without_nvrtc):
    with pytest.raises(SourceError) as raised:
        compiled(WRONG, "k")
    lines = str(raised.value).split("\n")
    assert lines[0].startswith("/some/where/kernels.py:103: error: ")
    assert "weight" in lines[0]
    assert lines[1].strip() == "out[0] = x[0] * weight[0];"
    assert lines[1][lines[2].index("^")] == "w"


def test_without_nvrtc_the_program_says_so(without_nvrtc):
    program = compiled(SILU_MUL.in_dtype("float32"), "silu_mul")
    assert "no CUDA compiler has seen it" in program.note
    assert "limpid[cuda]" in program.note
    assert program.sources() == {}


@needs_nvrtc
@pytest.mark.parametrize(("arch", "dtype"), [*zip(nvrtc.ARCHITECTURES, FLOATS, strict=True)])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_nvrtc_compiles_for_real_architectures(case: Case, arch: str, dtype: str):
    program = compiled(case.in_dtype(dtype), case.name, flags=(f"--gpu-architecture={arch}",))
    assert arch in program.note
    listings = program.sources()
    assert f".target {arch}" in listings["ptx"]
    assert f".entry {case.name}(" in listings["ptx"]  # also where the text says no extern "C"
    assert "EXIT" in listings.get("sass", "EXIT")


@needs_nvrtc
@pytest.mark.parametrize(
    "before", ['extern "C" __global__ void', "__global__ void", "static int f() { return 1; }\n__global__ void"]
)
def test_names_in_machine_code(before: str):
    text = f"__global__ void kernel(int* x);\n{before} __launch_bounds__(32) kernel(int* x) {{ x[0] = 1; }}"
    if "extern" in before:
        text = text.split("\n", 1)[1]
    assert ".entry kernel(" in compiled(text, "kernel").sources()["ptx"]


@needs_nvrtc
def test_an_unknown_architecture():
    with pytest.raises(Exception, match="NVRTC does not compile for 'sm_12'"):
        compiled(SILU_MUL.in_dtype("float32"), "silu_mul", flags=("-arch=sm_12",))


def test_macros_of_flags():
    program = compiled("__global__ void k(int* x) { x[0] = VALUE; }", "k", flags=("-DVALUE=42",))
    x = np.zeros(1, "int32")
    run(program, {"x": x}, Launch())
    assert x[0] == 42


def test_a_gpu_that_is_not_there():
    if cuda_driver.device() is not None:
        pytest.skip("there is a GPU")
    text = SILU_MUL.in_dtype("float32")
    with pytest.raises(SourceError, match=r"device='cuda': .*; \"emulate\" runs on the CPU"):
        Cuda(Options("cuda")).compile(source(text, "silu_mul"), parsed(text, "silu_mul"))
    assert Cuda().compile(source(text, "silu_mul"), parsed(text, "silu_mul")).emulated


def test_headers_that_only_a_gpu_has(without_nvrtc):
    text = '#include <cooperative_groups.h>\nextern "C" __global__ void k(float* x) { x[0] = 1; }'
    with pytest.raises(SourceError, match=r"the emulator has no cooperative_groups\.h: its kernels run on a GPU only"):
        compiled(text, "k")


def test_assembly_that_only_a_gpu_runs():
    text = '\n__global__ void k(int* x) {\n  asm("mov.u32 %0, %%laneid;" : "=r"(x[0]));\n}'
    with pytest.raises(SourceError) as raised:
        compiled(text, "k")
    said = "this compiles for a GPU, but the emulator cannot run it:\n" * nvrtc.available()
    assert str(raised.value).startswith(f"{said}/some/where/kernels.py:102: error: PTX runs on a GPU only")


def test_a_compiler_writes_into_no_bytes_of_pythons():
    """NVRTC fills the memory that it is given; an empty log is one byte long, and Python has but one object of each."""
    pytest.importorskip("cuda.bindings.nvrtc", reason="needs NVIDIA's wheels: pip install -e '.[cuda]'")
    made = nvrtc.compile('extern "C" __global__ void f(float* x) { x[0] = 1; }', "sm_90")
    assert made.log == "" and [bytes([i])[0] for i in range(256)] == [*range(256)]
