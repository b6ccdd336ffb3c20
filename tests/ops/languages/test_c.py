"""C and C++: kernels against the references, bodies alone, errors in the user's own lines, flags."""

import ctypes
import os
import re
import threading

import numpy as np
import pytest

import ops
from ops.languages import native
from ops.languages.base import Launch, LaunchError, Options, Parameter, Source, SourceError
from ops.languages.c import C, CPlusPlus
from ops.spec import DTYPES, FLOATS
from ops.tolerance import KERNEL, relative_error
from tests.ops.harness import random

LANGUAGES = (C, CPlusPlus)
LOADS = {"float32": "({})", "float16": "half_to_float({})", "bfloat16": "bfloat16_to_float({})"}
STORES = {"float32": "({})", "float16": "float_to_half({})", "bfloat16": "float_to_bfloat16({})"}
SHAPES = [(1, 1), (3, 5), (7, 131), (64, 128)]

RMS_NORM = """
static inline float square(float x) { return x * x; }

void rms_norm(const T* restrict x, T const *restrict weight, T out[],
              int rows, int width, float eps) {
  for (int r = 0; r < rows; r++) {
    float total = 0;
    for (int i = 0; i < width; i++) total += square(LOAD(x[r * width + i]));
    const float scale = 1 / sqrtf(total / width + eps);
    for (int i = 0; i < width; i++)
      out[r * width + i] = STORE(LOAD(x[r * width + i]) * scale * LOAD(weight[i]));
  }
}
"""
SILU_MUL = """
#pragma omp parallel for
for (long i = 0; i < (long)rows * width; i++) {
  const float g = LOAD(gate[i]);
  out[i] = STORE(g / (1 + expf(-g)) * LOAD(up[i]));
}
"""
SOFTMAX = """
for (int64_t r = 0; r < rows; r++, x += width, out += width) {
  float top = -INFINITY, total = 0;
  for (int i = 0; i < width; i++) top = fmaxf(top, LOAD(x[i]));
  for (int i = 0; i < width; i++) total += expf(LOAD(x[i]) - top);
  for (int i = 0; i < width; i++) out[i] = STORE(expf(LOAD(x[i]) - top) / total);
}
"""


def source(text, entry="f", file="kernels.py", line=10):
    return Source(text, entry, file, line)


def typed(text, dtype):
    """The text for a dtype: T is its type, LOAD and STORE go to and from float."""
    for name, forms in (("LOAD", LOADS), ("STORE", STORES)):
        text = text.replace(f"{name}(", f"{name}_(")
        text = f"#define {name}_(value) {forms[dtype].format('value')}\n" + text
    return re.sub(r"\bT\b", C().spelling(dtype), text)


def compiled(text, language=C, entry="f", options=None):
    made = language(options or Options())
    whole = source(text, entry)
    parameters = made.parse(whole)
    assert parameters is not None
    return made.compile(whole, parameters)


def pointers(dtype, *names):
    return [Parameter(name, C().spelling(dtype), dtype, True, name != "out") for name in names]


NUMBERS = [Parameter("rows", "int64_t", "int64", False, False), Parameter("width", "int", "int32", False, False)]


def agree(actual, reference, dtype):
    assert relative_error(actual.astype("float64"), np.asarray(reference, "float64"), dtype) <= KERNEL[dtype]


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(language, dtype, shape, rng):
    program = compiled(typed(RMS_NORM, dtype), language, "rms_norm")
    x, weight = random(rng, shape, dtype), random(rng, shape[1:], dtype)
    out = np.full_like(x, np.nan)
    program.run([x, weight, out, *shape, 1e-5], Launch())
    agree(out, ops.rms_norm.reference(x, weight, eps=1e-5), dtype)


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_body_alone(language, dtype, shape, rng):
    """The signature is written around it; a pragma brings OpenMP."""
    x, up = random(rng, shape, dtype), random(rng, shape, dtype)
    for text, names, arrays, op in (
        (SILU_MUL, ("gate", "up", "out"), [x, up], ops.silu_mul),
        (SOFTMAX, ("x", "out"), [x], ops.softmax),
    ):
        made = language()
        body = source(typed(text, dtype))
        assert made.parse(body) is None
        parameters = [*pointers(dtype, *names), *NUMBERS]
        whole = made.with_signature(body, parameters)
        assert made.parse(whole) == tuple(parameters)
        out = np.full_like(x, np.nan)
        made.compile(whole, parameters).run([*arrays, out, *shape], Launch())
        agree(out, op.reference(*arrays), dtype)


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_arrays_and_numbers_of_every_dtype(language, dtype, rng):
    kind = language().spelling(dtype)
    program = compiled(
        f"void f(const {kind}* x, {kind} value, {kind}* out) {{ out[0] = x[1]; out[1] = value; }}", language
    )
    x = rng.integers(0, 100, 3).astype(DTYPES[dtype])
    out = np.zeros(2, DTYPES[dtype])
    program.run([x, 77, out], Launch())
    assert out.tolist() == [x[1], 77]


@pytest.mark.parametrize("language", LANGUAGES)
def test_numbers_that_no_tensor_has(language):
    body = "{ out[0] = d * 4, out[1] = b, out[2] = s, out[3] = u; }"
    text = f"void f(double d, bool b, size_t s, unsigned u, float* out) {body}"
    out = np.zeros(4, "float32")
    compiled(text, language).run([0.25, True, 2**20, 7, out], Launch())
    assert out.tolist() == [1, 1, 2**20, 7]


@pytest.mark.parametrize(("kind", "value"), [("int", 0.5), ("int", 2**31), ("unsigned", -1), ("int8_t", 128)])
def test_a_number_that_its_type_does_not_hold(kind, value):
    with pytest.raises(SourceError, match=f"n was given {value}, which {kind}.* does not hold"):
        compiled(f"void f({kind} n) {{ }}").run([value], Launch())


@pytest.mark.parametrize("language", LANGUAGES)
def test_bfloat16_is_rounded_to_nearest_even(language, rng):
    text = (
        "void f(const float* x, bfloat16* out, int n) { for (int i = 0; i < n; i++) out[i] = float_to_bfloat16(x[i]); }"
    )
    x = rng.integers(0, 2**32, 5000, np.uint32).view("float32")
    out = np.empty(len(x), DTYPES["bfloat16"])
    compiled(text, language).run([x, out, len(x)], Launch())
    with np.errstate(all="ignore"):
        expected = x.astype(DTYPES["bfloat16"])
    nan = np.isnan(x)
    assert np.isnan(out[nan].astype("float32")).all()
    assert (out[~nan].view("uint16") == expected[~nan].view("uint16")).all()


def test_in_c_no_arithmetic_is_done_on_the_bits_of_a_bfloat16():
    with pytest.raises(SourceError, match="invalid operands"):
        compiled("void f(const bfloat16* x, float* out) { out[0] = x[0] * 2; }")


def test_in_cpp_a_bfloat16_is_a_number():
    text = "void f(const bfloat16* x, bfloat16* out) { out[0] = x[0] * 2 + 1; }"
    out = np.zeros(1, DTYPES["bfloat16"])
    compiled(text, CPlusPlus).run([np.full(1, 3, out.dtype), out], Launch())
    assert out[0] == 7


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("file", ["kernels.py", 'a "quoted" \\ name.py', "In [3]", __file__])
def test_errors_show_the_users_file_line_and_caret(language, file):
    bad = source("\n\nvoid f(float* out) {\n\tout[0] = wieght * 2;\n}", file=file)
    with pytest.raises(SourceError) as error:
        language().compile(bad, pointers("float32", "out"))
    first, line, caret = str(error.value).split("\n")[:3]
    assert first.startswith(f"{file}:13: error: ")
    assert "wieght" in first
    assert line == "    \tout[0] = wieght * 2;"
    assert caret == "    \t         ^"


@pytest.mark.parametrize("language", LANGUAGES)
def test_errors_in_a_body_keep_their_lines(language):
    parameters = pointers("float32", "out")
    body = language().with_signature(source("\nint a = 1;\nout[0] = a + b;\n"), parameters)
    with pytest.raises(SourceError, match=r"^kernels.py:12: error: .*b.*\n    out\[0\] = a \+ b;\n"):
        language().compile(body, parameters)


def test_only_the_first_errors_are_shown():
    with pytest.raises(SourceError) as error:
        compiled("void f(int n) {\n" + "".join(f"a{i};\n" for i in range(20)) + "}")
    assert str(error.value).count("error:") == 3
    assert str(error.value).endswith("and more")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("out[0] = foo(out);", "implicit declaration of function .foo"),
        ("int* p = out; out[0] = *p;", "incompatible pointer type"),
        ("int n = out; out[0] = n;", "initialization of .int. from"),
    ],
)
def test_what_c_lets_pass_is_an_error(text, what):
    with pytest.raises(SourceError, match=what):
        compiled(f"void f(float* out) {{ {text} }}")


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("flags", [(), ("-ffast-math",)])
def test_a_function_that_is_nowhere(language, flags):
    with pytest.raises(SourceError) as error:
        compiled("float g(float x);\nvoid f(float* out) {\n out[0] = g(1); }", language, options=Options(flags=flags))
    assert re.fullmatch(
        r"kernels.py:12: error: undefined reference to `g.*'\n     out\[0\] = g\(1\); }", str(error.value)
    )


def test_an_error_in_a_function_left_open_is_told_by_the_compiler():
    with pytest.raises(SourceError, match=r"kernels.py:1\d: error"):
        C().compile(source("void f(float* out) { out[0] = 1"), pointers("float32", "out"))


def test_an_exception_of_cpp_is_a_launch_error():
    text = (
        '#include <stdexcept>\nvoid f(int n) { if (n) throw std::runtime_error("no " + std::to_string(n)); throw 1; }'
    )
    program = compiled("#include <string>\n" + text, CPlusPlus)
    with pytest.raises(LaunchError, match=r"^f threw an exception: no 3$"):
        program.run([3], Launch())
    with pytest.raises(LaunchError, match=r"^f threw an exception$"):
        program.run([0], Launch())


def test_flags_reach_the_compiler():
    text = "void f(float* out) { out[0] = VALUE; }"
    out = np.zeros(1, "float32")
    compiled(text, options=Options(flags=("-DVALUE=3",))).run([out], Launch())
    assert out[0] == 3
    with pytest.raises(SourceError, match="VALUE"):
        compiled(text)
    with pytest.raises(SourceError, match="no-such-flag"):
        compiled("void f(int n) { }", options=Options(flags=("-fno-such-flag-as-this",)))


@pytest.mark.parametrize("flag", ["-ffast-math", "-Ofast"])
def test_fast_math_stays_in_the_kernel(flag):
    """Linked in by GCC before 13, it has the whole process lose its subnormal numbers."""
    program = compiled("void f(float* out) { out[0] += 1; }", options=Options(flags=(flag,)))
    out = np.zeros(1, "float32")
    program.run([out], Launch())
    assert out[0] == 1
    assert np.float32(1e-39) * np.float32(0.5) != 0


def test_a_kernels_names_are_its_own():
    """Neither a function of the process nor of another kernel takes the place of one with the same name."""
    first = compiled("float twice(float x) { return 2 * x; } void f(float* out) { out[0] = twice(1); }")
    second = compiled("float twice(float x) { return 3 * x; } void f(float* out) { out[0] = twice(1); }")
    for program, expected in ((first, 2), (second, 3), (first, 2)):
        out = np.zeros(1, "float32")
        program.run([out], Launch())
        assert out[0] == expected
    assert not hasattr(ctypes.CDLL(str(first.library)), "twice")


def test_the_checked_twin_is_there_and_watched():
    program = compiled("void f(float* out) { out[0] = 1; }")
    assert program.checked is not None
    assert program.checked != program.library
    assert b"__asan_report_store" in program.checked.read_bytes()


def test_without_a_sanitizer_there_is_no_checked_twin(monkeypatch):
    monkeypatch.setattr(native, "sanitizer", lambda language: None)
    assert compiled("void f(float* out) { out[0] = 2; }").checked is None


def test_sources_hold_the_assembly():
    assert "limpid_launch" in compiled("void f(float* out) { out[0] = 1; }").sources()["asm"]


def test_no_compiler(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SourceError, match=r"no compiler for c\+\+: install gcc and g\+\+, or name one in CXX"):
        compiled("void f(float* out) { }", CPlusPlus)


def test_without_the_disk_cache(monkeypatch):
    monkeypatch.setenv("LIMPID_CACHE", "off")
    out = np.zeros(1, "float32")
    program = compiled("void f(float* out) { out[0] = 5; }")
    program.run([out], Launch())
    assert out[0] == 5
    assert program.checked is not None


def test_threads_compile_the_same_at_once():
    text = f"void f(float* out) {{ out[0] = {os.getpid()}; }}"
    found = []
    threads = [threading.Thread(target=lambda: found.append(compiled(text).library)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({*found}) == 1
    assert len(found) == 4
