"""Swaps in WGSL and OpenCL C, in the embedded model: the story stays the same; what is refused."""

import importlib

import pytest

import llm
import ops
from ops import SwapRefused, sandbox
from ops.languages.base import SourceError
from ops.languages.kernel import SourceKernel

from ..harness import check, random
from .test_opencl import norm
from .test_wgsl import NORM

PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def model():
    return llm.load("tiny", dtype="float32")


@pytest.fixture(autouse=True)
def restored():
    yield
    ops.restore()


def needs(language: str) -> None:
    package, program = {"wgsl": ("wgpu", "wgpu_program"), "opencl": ("pyopencl", "opencl_program")}[language]
    pytest.importorskip(package, reason=f"{language} kernels need {package}: pip install -e '.[{language}]'")
    try:
        importlib.import_module(f"ops.languages.{program}").device()
    except SourceError as error:
        pytest.skip(str(error))


def rows(x, *_):
    return x.shape[0]


TEXTS = {
    "wgsl": NORM.replace("TYPE", "f32").replace("eps: f32", "eps: f32, plus_one: u32").replace(
        "f32(weight[i])", "(weight[i] + f32(numbers.plus_one))"
    ),
    "opencl": norm("float32").replace("float eps", "float eps, int plus_one").replace(
        "GET(weight, i)", "(weight[i] + plus_one)"
    ),
}  # fmt: skip


@pytest.mark.parametrize("language", TEXTS)
def test_the_story_stays_the_same(model, language):
    needs(language)
    wanted = model.generate(PROMPT, max_tokens=20)

    @ops.rms_norm.swap(language, grid=rows, block=64, where="layers.0-3.* dtype=float32")
    def block_norm():
        return TEXTS[language]

    assert block_norm.checked >= 3
    assert model.generate(PROMPT, max_tokens=20) == wanted
    assert block_norm.hits == 8 * 20 and block_norm.state == "in use"
    assert isinstance(block_norm.kernel, SourceKernel) and not block_norm.kernel.emulated
    assert block_norm.kernel.sources()[language] == TEXTS[language]


@pytest.mark.parametrize("language", TEXTS)
def test_a_body_alone(model, language):
    needs(language)
    wanted = model.generate(PROMPT, max_tokens=8)
    index = "let i = global_id.x" if language == "wgsl" else "int i = get_global_id(0)"

    @ops.silu_mul.swap(language, grid=lambda x, *_: -(-x.size // 64), block=64, where="dtype=float32")
    def body():
        return f"{index}; if (i < rows * width) {{ out[i] = gate[i] / (1 + exp(-gate[i])) * up[i]; }}"

    assert model.generate(PROMPT, max_tokens=8) == wanted
    assert body.hits and body.state in ("in use", "checking")


def test_a_dtype_that_is_lacking_is_named(rng):
    needs("wgsl")

    @ops.silu.swap("wgsl", grid=lambda x: x.size, where="dtype=bfloat16", edge_cases=False)
    def kept():
        return "out[group_id.x] = x[group_id.x];"

    with pytest.raises(SwapRefused, match=r"silu\(x=bfloat16\[3, 7\]\): wgsl has no bfloat16; it has float32, float16"):
        check(ops.silu, random(rng, (3, 7), "bfloat16"))
    assert kept.hits and kept.state == "refused"


def test_a_kernel_that_never_ends(monkeypatch):
    """It is stopped in its own process, and the next kernel is none the worse."""
    needs("opencl")
    monkeypatch.setattr(sandbox, "SECONDS", 3.0)
    with pytest.raises(SwapRefused, match="the kernel did not end within 3 s, and was stopped"):

        @ops.silu.swap("opencl", grid=1, where="dtype=float32")
        def endless():
            return "volatile int i = 0; while (i < 10) { i = i & 7; } out[0] = i;"

    @ops.silu.swap("opencl", grid=lambda x: x.size, where="dtype=float32")
    def right():
        return "int i = get_global_id(0); out[i] = x[i] / (1 + exp(-x[i]));"

    assert right.checked


def test_a_kernel_that_crashes():
    needs("opencl")
    with pytest.raises(SwapRefused, match="the kernel ended its process by SIG"):

        @ops.silu.swap("opencl", grid=1, where="dtype=float32")
        def far():
            return "out[1000000000] = 1;"


def test_a_kernel_that_writes_what_it_may_only_read():
    needs("opencl")
    with pytest.raises(SwapRefused, match="the kernel writes x, which is read only"):

        @ops.silu.swap("opencl", grid=1, where="dtype=float32")
        def changes():
            return "__kernel void changes(__global float* x, __global float* out) { out[0] = 1; x[0] = 2; }"
