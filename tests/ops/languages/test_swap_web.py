"""Swaps in WGSL, OpenCL C and Triton, in the embedded model: the story stays the same; what is refused."""

import numpy as np
import pytest

import llm
import ops
from ops import SwapRefused
from ops.languages.base import SourceError

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
    if language == "triton":
        pytest.importorskip("triton", reason="Triton kernels need triton: pip install -e '.[triton]'")
        return
    package, program = {"wgsl": ("wgpu", "wgpu_program"), "opencl": ("pyopencl", "opencl_program")}[language]
    pytest.importorskip(package, reason=f"{language} kernels need {package}: pip install -e '.[{language}]'")
    module = __import__(f"ops.languages.{program}", fromlist=["device"])
    try:
        module.device()
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
    assert not block_norm.kernel.emulated
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


def test_triton(model):
    needs("triton")
    triton = pytest.importorskip("triton")
    tl = triton.language
    wanted = model.generate(PROMPT, max_tokens=3)

    @ops.rms_norm.swap("triton", grid=rows, dims={"BLOCK": lambda x, *_: triton.next_power_of_2(x.shape[1])})
    @triton.jit
    def block_norm(x_ptr, weight_ptr, out_ptr, width, eps, plus_one, BLOCK: tl.constexpr):
        columns = tl.arange(0, BLOCK)
        start = tl.program_id(0) * width
        x = tl.load(x_ptr + start + columns, mask=columns < width, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + columns, mask=columns < width).to(tl.float32) + plus_one.to(tl.float32)
        normal = x * tl.rsqrt(tl.sum(x * x, axis=0) / width + eps) * weight
        tl.store(out_ptr + start + columns, normal.to(out_ptr.dtype.element_ty), mask=columns < width)

    assert model.generate(PROMPT, max_tokens=3) == wanted
    assert block_norm.kernel.emulated and "triton emulated" in str(ops.rms_norm.swaps)
    assert {"triton", "ptx"} <= block_norm.kernel.sources().keys()


def test_a_triton_kernel_that_is_wrong(rng):
    needs("triton")
    tl = pytest.importorskip("triton").language

    def copy(x, out, BLOCK: tl.constexpr):
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(out + at, tl.load(x + at))

    def writes_its_input(x, out):
        tl.store(x, 0.0)

    def no_output(x):
        tl.load(x)

    cases = {
        "triton asks for grid=": (copy, {"grid": None}),
        r"silu has no BLOCK; .*dims=\{'BLOCK': ...\} gives it a meaning": (copy, {}),
        "has no parameter out": (no_output, {}),
        r"reads x\[": (copy, {"dims": {"BLOCK": 4096}}),
        "writes x, which is read only": (writes_its_input, {}),
        "copy is wrong on an edge case": (copy, {"dims": {"BLOCK": 1}, "grid": lambda x: x.size}),
    }
    for message, (function, options) in cases.items():
        with pytest.raises(SwapRefused, match=message):
            ops.silu.swap("triton", **{"grid": 1, **options})(function)


def test_a_dtype_that_is_lacking_is_named(rng):
    needs("wgsl")

    @ops.silu.swap("wgsl", grid=lambda x: x.size, where="dtype=bfloat16", edge_cases=False)
    def kept():
        return "out[group_id.x] = x[group_id.x];"

    with pytest.raises(SourceError, match="wgsl has no bfloat16; it has float32, float16, int32"):
        check(ops.silu, random(rng, (3, 7), "bfloat16"))
    assert kept.hits and np.isfinite(kept.seconds)
