"""Swaps in C, in the embedded model: what is refused, what the sandbox catches, how fast it is."""

import re
import time
import warnings
from typing import Any

import numpy as np
import pytest

import llm
import ops
from ops import SwapRefused
from ops.languages.base import SourceError

TEXT = r"""
void block_norm(const float* x, const float* weight, float* out, int rows, int width, float eps, bool plus_one) {
  for (int r = 0; r < rows; r++) {
    float s = 0;
    for (int i = 0; i < width; i++) s += x[r*width+i] * x[r*width+i];
    s = 1 / sqrtf(s / width + eps);
    for (int i = 0; i < width; i++) out[r*width+i] = x[r*width+i] * s * (weight[i] + (plus_one ? 1 : 0));
  }
}"""


@pytest.fixture(scope="module")
def model():
    return llm.load("tiny", dtype="float32")


@pytest.fixture(autouse=True)
def restored():
    yield
    ops.restore()


def swapped(text, op: Any = ops.rms_norm, name="block_norm", language="c", **options):
    def kernel():
        return text

    kernel.__name__ = name
    return op.swap(language, **options)(kernel)


def test_what_was_made_of_it(model):
    swap = swapped(TEXT, where="layers.0.input_layernorm")
    model.generate("Once", max_tokens=2)
    assert swap.source() == TEXT and swap.source().language == "c"
    assert "block_norm:" in swap.source("asm") and "<span" in swap.source("asm")._repr_html_()
    with pytest.raises(ops.OpError, match="block_norm has no source in 'ptx', it has 'c', 'asm'"):
        swap.source("ptx")
    python = ops.silu.swap("python", where="layers.77")(silu)
    assert python.source().startswith("def silu(x):")


def silu(x):
    return ops.silu.reference(x)


@pytest.mark.parametrize("language", ["c", "c++"])
def test_the_story_stays_the_same(model, language):
    prompt = "Once upon a time"
    wanted = model.generate(prompt, max_tokens=30)
    swap = swapped(TEXT, where="layers.0-3.*", language=language)
    assert model.generate(prompt, max_tokens=30) == wanted
    assert swap.hits == 8 * 30 and swap.state == "in use" and swap.checked >= 8 + 3


def test_a_docstring_and_a_body_alone(model):
    wanted = model.generate("Mia", max_tokens=10)

    @ops.silu_mul.swap("c")
    def body():
        """
        for (int i = 0; i < rows * {width}; i++) out[i] = gate[i] / (1 + expf(-gate[i])) * up[i];
        """

    assert model.generate("Mia", max_tokens=10) == wanted and body.hits
    with pytest.raises(SourceError, match=r"test_swap_c\.py:\d+: error: .*gat.*undeclared(?s:.*)out\[0\] = gat\[0\]"):

        @ops.silu_mul.swap("c")
        def wrong():
            """
            out[0] = gat[0];
            """


def test_other_dtypes_for_a_body():
    swap = swapped("for (int i = 0; i < rows * width; i++) out[i] = x[i];", ops.copy, "same", edge_cases=False)
    for dtype in ("float32", "float16", "bfloat16", "int32", "int8"):
        x = ops.tensor(np.arange(12).reshape(3, 4).astype("float32"), dtype) if "float" in dtype else ops.tensor(
            np.arange(12, dtype=dtype).reshape(3, 4)
        )  # fmt: skip
        np.testing.assert_array_equal(ops.copy(x).numpy(), x.numpy())
    assert swap.hits == 5


SIGNATURES = {
    "const half* x, const float* weight, float* out": r"takes float\* out, but out of rms_norm is float16",
    "const float* x, const float* weigth, float* out": r"rms_norm has no weigth; it has x, .* did you mean weight\?",
    "const float* x, const float* weight": "no parameter out, which is where rms_norm puts its result",
    "const float* x, const float* out": r"takes const float\* out, which it cannot write; drop the const",
    "const float* x, float* out, int eps": "takes int eps, but eps of rms_norm is 1e-05, float",
    "const float* x, float* out, float weight": "takes float weight, but weight is a tensor of rms_norm",
    "const int* x, float* out": "block_norm: rms_norm: x is int32 and weight is float32; expected floats",
    "const float* x, float* out, struct params p": "params is not a type that is passed",
}


@pytest.mark.parametrize("signature", SIGNATURES)
def test_signatures_that_do_not_fit(signature):
    with pytest.raises((SwapRefused, SourceError), match=SIGNATURES[signature]):
        swapped(f"void block_norm({signature}) {{}}")
    assert not ops.rms_norm._uses


def test_dims():
    text = (
        "void halved(const float* x, float* out, int n, float by) { for (int i = 0; i < n; i++) out[i] = x[i] * by; }"
    )
    swap = swapped(
        text,
        ops.scale,
        "halved",
        edge_cases=False,
        dims={"n": lambda x, factor: x.size, "by": lambda x, factor: factor},
    )
    x = ops.tensor(np.arange(6, dtype="float32").reshape(2, 3))
    np.testing.assert_array_equal(ops.scale(x, 0.5).numpy(), x.numpy() / 2)
    np.testing.assert_array_equal(ops.scale(x, 3.0).numpy(), x.numpy() * 3)
    assert swap.hits == 2


HARMFUL = {
    "*(volatile int*)16 = 1;": "SIGSEGV|segmentation",
    "for (volatile int i = 0;; i = i) ;": "end",
    "out[rows * width] = 1;": r"out\[\d+\], past its end",
    "((float*)x)[0] = 2;": "x",
    "exit(3);": r"exit",
    "abort();": "abort",
}


@pytest.mark.parametrize("harm", HARMFUL)
def test_what_harms_is_caught_and_named(model, harm, monkeypatch):
    monkeypatch.setattr("ops.sandbox.SECONDS", 1.0)
    text = TEXT.replace("  for (int r = 0;", f"  {harm}\n  for (int r = 0;", 1)
    said = rf": .*({HARMFUL[harm]})"
    with pytest.raises(SwapRefused, match=r"(?s)block_norm on an edge case, rms_norm\(x=float32.*" + said):
        swapped(text)
    swap = swapped(text, edge_cases=False, where="layers.1.*")
    where = r"rms_norm\(x=float32\[\d+, 128\], .* in layers\.1\.input_layernorm/rms_norm\[0\]@\d+"
    with pytest.raises(
        SwapRefused, match=rf"(?s)block_norm is wrong at its first call, and was removed: {where}{said}"
    ):
        model.generate("Once", max_tokens=2)
    assert swap.state == "refused" and model.generate("Once", max_tokens=2)


def test_what_is_wrong_later_is_put_in_quarantine(model, monkeypatch):
    text = TEXT.replace("  for (int r = 0;", "  static int calls = 0;\n  calls += rows == 1;\n  for (int r = 0;", 1)
    text = text.replace("eps);", "eps) * (calls > 8 ? 2 : 1);")
    wanted = model.generate("Once upon a time", max_tokens=12)
    swap = swapped(text, edge_cases=False, where="layers.0.input_layernorm", check="first 2, then 1/1", sandbox=False)
    with pytest.warns(
        ops.SwapWarning, match=r"own kernel computes such calls again: output of rms_norm\(x=float32\[1, 128\]"
    ):
        assert model.generate("Once upon a time", max_tokens=12) == wanted
    assert "quarantined for (float32[1, 128], float32[128])" in swap.state


def test_a_reload_takes_less_than_a_second(tmp_path):
    file = tmp_path / "norm.c"
    file.write_text(TEXT)
    x, weight = ops.tensor(np.ones((3, 64), "float32")), ops.tensor(np.ones(64, "float32"))

    @ops.rms_norm.swap("c", file=file)
    def block_norm():
        pass

    ops.rms_norm(x, weight, eps=1e-5)
    before = block_norm.kernel
    file.write_text(TEXT.replace("float s = 0;", f"float s = 0; /* {time.time()} */"))
    begin = time.perf_counter()
    assert block_norm.reload() and block_norm.kernel is not before
    ops.rms_norm(x, weight, eps=1e-5)
    assert time.perf_counter() - begin < 5, "0.4 s on a quiet machine"
    file.write_text(TEXT.replace("width + eps", "width"))
    with pytest.raises(SwapRefused, match="block_norm is wrong on an edge case"):
        block_norm.reload()
    ops.rms_norm(x, weight, eps=1e-5)
    file.write_text(TEXT.replace("float s = 0;", "flaot s = 0;"))
    with pytest.raises(SourceError, match=rf"{re.escape(str(file))}:4: error: .*flaot"):
        block_norm.reload()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ops.rms_norm(x, weight, eps=1e-5)
    file.unlink()
    with pytest.raises(SourceError, match=r"norm\.c, which holds block_norm: .*No such file"):
        block_norm.reload()
    ops.rms_norm(x, weight, eps=1e-5)
