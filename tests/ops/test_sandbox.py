"""The sandbox: what kernels do wrong is told in one sentence, and this process goes on; children end with it."""

import re
import time

import numpy as np
import pytest

import ops
from ops import sandbox
from ops.errors import ShapeError
from ops.languages import native
from ops.languages.base import Launch, LaunchError, Parameter, Program
from ops.languages.c import CPlusPlus
from ops.spec import DTYPES, FLOATS
from ops.tolerance import KERNEL, relative_error
from tests.ops.harness import random
from tests.ops.languages.test_c import LANGUAGES, RMS_NORM, SHAPES, compiled, typed


@pytest.fixture
def unwatched(monkeypatch):
    """Children without a sanitizer, as on a machine whose compiler has none."""
    sandbox.stop()
    monkeypatch.setattr(native, "sanitizer", lambda language: None)
    yield
    sandbox.stop()


def kernel(body, before="", parameters="float* out, const float* x, int n", language=LANGUAGES[0]):
    """A kernel whose body stands in line 12 of kernels.py, and below."""
    return compiled(f"{before}\nvoid f({parameters}) {{\n{body}\n}}", language)


def run(program, seconds=20.0, **kept):
    """Run on out[8] and x[5], which are 0 .. 4; gives out."""
    out, x = np.full(8, 7, "float32"), np.arange(5, dtype="float32")
    sandbox.run(program, [out, x, 8], Launch(), seconds, **kept)
    return out


def fault(program, seconds=20.0, **kept):
    """What the LaunchError says; the arrays have to be as they were, and the next run must be right."""
    out, x = np.full(8, 7, "float32"), np.arange(5, dtype="float32")
    with pytest.raises(LaunchError) as error:
        sandbox.run(program, [out, x, 8], Launch(), seconds, **kept)
    assert (out == 7).all()
    assert (x == np.arange(5)).all()
    assert run(kernel("for (int i = 0; i < n; i++) out[i] = x[i % 5];")).tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    return str(error.value)


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [*SHAPES, (0, 5)])
def test_it_computes_what_the_reference_does(language, dtype, shape, rng):
    program = compiled(typed(RMS_NORM, dtype), language, "rms_norm")
    x, weight = random(rng, shape, dtype), random(rng, shape[1:], dtype)
    out = np.zeros_like(x)
    sandbox.run(program, [x, weight, out, *shape, 1e-5], Launch())
    expected = np.asarray(ops.rms_norm.reference(x, weight, eps=1e-5), "float64")
    assert relative_error(out.astype("float64"), expected, dtype) <= KERNEL[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_arrays_and_numbers_of_every_dtype(dtype, rng):
    kind = LANGUAGES[0]().spelling(dtype)
    program = compiled(f"void f(const {kind}* x, {kind} value, {kind}* out) {{ out[0] = x[1]; out[1] = value; }}")
    x = rng.integers(0, 100, 3).astype(DTYPES[dtype])
    out = np.zeros(2, DTYPES[dtype])
    sandbox.run(program, [x, 77, out], Launch())
    assert out.tolist() == [x[1], 77]


def test_sizes_and_launch_arrive():
    """By a library of another language's making: the ABI, spoken by hand."""
    text = """
    #include <stdint.h>
    char limpid_error[4096];
    int limpid_launch(const uint32_t launch[7], void* const* values, const uint64_t* sizes) {
      int64_t* out = values[1];
      for (int i = 0; i < 7; i++) out[i] = launch[i];
      for (int i = 0; i < 3; i++) out[7 + i] = sizes[i];
      out[10] = *(int32_t*)values[2];
      if (out[10] == 3) { __builtin_strcpy(limpid_error, "a race at \\xc3\\xa9"); return 1; }
      return 0;
    }
    """
    parameters = [
        Parameter("x", "float", "float32", True, True),
        Parameter("out", "int64_t", "int64", True, False),
        Parameter("n", "int", "int32", False, False),
    ]
    program = native.NativeProgram(parameters, native.build(text, "c"), None, emulated=True)
    out, x = np.zeros(11, "int64"), np.zeros((3, 4), "float32")
    sandbox.run(program, [x, out, 5], Launch((1, 2, 3), (4, 5, 6), 7))
    assert out.tolist() == [1, 2, 3, 4, 5, 6, 7, 48, 88, 0, 5]
    with pytest.raises(LaunchError, match=r"^a race at é$"):
        sandbox.run(program, [x, out, 3], Launch())


WRONG = [
    ("past the end", "for (int i = 0; i <= n; i++)\nout[i] = 1;", r"wrote out\[8\], past its end \(8 elements\)", 13),
    ("before the beginning", "out[-1] = 1;", r"wrote out\[-1\], before its beginning", 12),
    ("a row further", "out[n + 100] = 1;", r"wrote out\[108\], past its end", 12),
    ("far", "out[1000000000] = 1;", r"wrote memory that is not there, at 0x[0-9a-f]+ \(SIGSEGV\)", 12),
    ("read past the end", "out[0] = x[5];", r"read x\[5\], past its end \(5 elements\)", 12),
    ("read before", "out[0] = x[-1];", r"read x\[-1\], before its beginning", 12),
    ("const", "((float*)x)[3] = 1;", r"wrote x\[3\], which is const", 12),
    ("memcpy", "memcpy(out, x, n * 4);", r"read x\[5\], past its end", 12),
    ("threads", "#pragma omp parallel for\nfor (int i = 0; i < 9; i++)\nout[i] = i;", r"wrote out\[8\], past", 14),
    ("null", "*(volatile float*)0 = 1;", r"wrote through a null pointer \(SIGSEGV\)", 12),
    ("a local array", "float t[4]; for (int i = 0; i <= n / 2; i++) t[i] = i; out[0] = t[n % 3];",
     r"wrote past the end of the local array t", 12),
    ("the heap", "float* t = malloc(8); t[n - 6] = 1; out[0] = t[n % 2];", "wrote past the end of 8 bytes", 12),
    ("freed", "volatile float* t = malloc(8); free((void*)t); t[n % 2] = 1;", "wrote memory that was freed", 12),
    ("freed twice", "float* volatile t = malloc(8); free(t); free(t);", "freed memory twice", 12),
    ("freed an argument", "free(out);", "freed memory that was not allocated", 12),
    ("abort", "abort();", r"called abort\(\)", 12),
    ("assert", "assert(n == 3);", r"called abort\(\): Assertion `n == 3' failed", 12),
    ("division", "volatile int z = 0; out[0] = n / z;", r"divided an integer by zero \(SIGFPE\)", 12),
    ("trap", "__builtin_trap();", r"ran into an instruction .* \(SIGILL\)", 12),
    ("huge malloc", "volatile char* p = malloc(1ul << 43); p[0] = 1;", "asked for 8796093022208 bytes of memory", 12),
    ("endless malloc", "for (;;) { char* volatile p = malloc(1 << 28); p[n] = 1; }", "asked for 268435456 bytes", 12),
]  # fmt: skip


@pytest.mark.parametrize(("body", "what", "line"), [case[1:] for case in WRONG], ids=[case[0] for case in WRONG])
def test_what_is_wrong_is_named_with_its_line(body, what, line):
    said = fault(kernel(body, "#include <assert.h>"))
    assert re.fullmatch(rf"the kernel {what}.*, at \S*kernels.py:{line} in f", said), said


def test_recursion_without_an_end():
    before = (
        "static __attribute__((noinline)) float g(int n) { volatile float t[99]; t[n] = n; return t[n] + g(n) * t[0]; }"
    )
    assert "overflowed the stack" in fault(kernel("out[0] = g(n);", before))


@pytest.mark.parametrize(
    ("body", "what"),
    [("exit(3);", r"called exit(3)"), ("_exit(0);", r"called exit(0)"), ("raise(SIGKILL);", "was ended by SIGKILL")],
)
def test_an_early_end(body, what):
    assert f"the kernel {what}" in fault(kernel(body, "#include <unistd.h>\n#include <signal.h>"))


def test_no_end():
    before = time.monotonic()
    program = kernel("volatile int i = 0;\nfor (;;)\ni++;")
    assert re.fullmatch(
        r"the kernel did not end within 0.3 s, and was stopped, at \S*kernels.py:1[34] in f", fault(program, 0.3)
    )
    assert time.monotonic() - before < 60


def test_no_end_that_hears_no_signal():
    block = "sigset_t all; sigfillset(&all); sigprocmask(SIG_BLOCK, &all, 0);"
    program = kernel(f"{block} for (;;) pause();", "#include <signal.h>\n#include <unistd.h>")
    assert fault(program, 0.3) == "the kernel did not end within 0.3 s"


def test_printing(capsys):
    run(kernel('printf("%d elements\\n", n); out[0] = 1;'))
    assert capsys.readouterr().out == "8 elements\n"
    fault(kernel('printf("before the crash\\n"); abort();'))
    assert capsys.readouterr().out == "before the crash\n"


def test_the_sanitizers_remarks_are_not_shown(capsys):
    before = (
        "#include <ucontext.h>\nstatic ucontext_t here, there;\nstatic float* at;\nstatic void g(void) { at[0] = 1; }"
    )
    start = "getcontext(&there); there.uc_stack.ss_sp = malloc(1 << 17); there.uc_stack.ss_size = 1 << 17;"
    program = kernel(
        f"{start} there.uc_link = &here; at = out; makecontext(&there, g, 0); swapcontext(&here, &there);", before
    )
    assert run(program)[0] == 1
    assert capsys.readouterr().out == ""


def test_printing_without_an_end(capsys):
    assert fault(kernel('for (;;) printf("again\\n");')) == "the kernel printed more than 1024 KiB, and was stopped"
    assert capsys.readouterr().out.startswith("again\nagain\n")


def test_an_exception():
    assert fault(kernel("throw 1;", language=CPlusPlus)) == "f threw an exception"


def test_inputs_outputs_and_what_is_both():
    program = kernel("out[0] = out[1]; x[0] += 1;", parameters="float* out, float* x, int n")
    out, x = np.full(8, 7, "float32"), np.arange(5, dtype="float32")
    sandbox.run(program, [out, x, 8], Launch())
    assert np.isnan(out).all()
    assert x[0] == 1
    sandbox.run(program, [out, x, 8], Launch(), outputs=())
    assert x[0] == 2
    assert "wrote x[0], which is an input" in fault(program, inputs=("x",))
    program = compiled("void f(int* out) { out[0] = out[1]; }")
    whole = np.zeros(2, "int32")
    sandbox.run(program, [whole], Launch())
    assert whole.tolist() == [-1, -1]


def test_arrays_lie_as_they_do_in_the_parent():
    program = compiled(
        "void f(const int8_t* x, int64_t* out) { out[0] = (uintptr_t)x % 64; out[1] = (uintptr_t)out % 64; }"
    )
    whole = np.zeros(1000, "int8")
    for start in (0, 1, 3, 8, 61):
        x, out = whole[start : start + 5], np.zeros(7, "int64")[start % 5 :]
        sandbox.run(program, [x, out], Launch())
        assert out[:2].tolist() == [x.ctypes.data % 64, out.ctypes.data % 64]


@pytest.mark.parametrize("start", range(9))
@pytest.mark.parametrize("count", [1, 7, 8])
@pytest.mark.parametrize("index", ["-1", "n"])
def test_one_byte_beside_any_array(start, count, index):
    program = compiled(f"void f(int8_t* out, int n) {{ out[{index}] ^= 85; }}")
    out = np.zeros(100, "int8")[start : start + count]
    with pytest.raises(LaunchError, match=rf"out\[{count if index == 'n' else -1}\], (before|past) its"):
        sandbox.run(program, [out, count], Launch())


def test_empty_arrays():
    sandbox.run(kernel(""), [np.zeros(0, "float32"), np.zeros((0, 3), "float32"), 0], Launch())
    with pytest.raises(LaunchError, match=r"wrote out\[0\], past its end \(0 elements\)"):
        sandbox.run(kernel("out[0] = 1;"), [np.zeros(0, "float32"), np.zeros((0, 3), "float32"), 0], Launch())


def test_large_arrays(rng):
    """Larger than the memory that is shared at first."""
    program = kernel("for (int i = 0; i < n; i++) out[i] = x[i] + 1;")
    x = rng.integers(0, 1000, 12 << 20).astype("float32")
    out = np.empty_like(x)
    sandbox.run(program, [out, x, len(x)], Launch())
    assert (out == x + 1).all()
    assert run(kernel("out[7] = 2;"))[7] == 2
    with pytest.raises(LaunchError, match=rf"read x\[{len(x)}\], past its end"):
        sandbox.run(program, [np.empty(len(x) + 1, "float32"), x, len(x) + 1], Launch())


def test_what_is_no_array():
    program = kernel("out[0] = 1;")
    x = np.zeros(8, "float32")
    with pytest.raises(ShapeError, match=r"float\* out needs a C-contiguous array; given was float"):
        sandbox.run(program, [1.0, x, 8], Launch())
    with pytest.raises(ShapeError, match="C-contiguous"):
        sandbox.run(program, [np.zeros((4, 4), "float32").T[1:], x, 8], Launch())
    with pytest.raises(ShapeError, match="int n needs a number"):
        sandbox.run(program, [x, x, x], Launch())
    frozen = np.zeros(8, "float32")
    frozen.flags.writeable = False
    with pytest.raises(ShapeError, match="may be written, and the array may not"):
        sandbox.run(program, [frozen, x, 8], Launch())
    sandbox.run(program, [x, frozen, 8], Launch())


def test_what_cannot_be_loaded(tmp_path):
    (tmp_path / "broken.so").write_text("no library")
    with pytest.raises(LaunchError, match=r"the kernel cannot be loaded: .*broken.so"):
        sandbox.run(native.NativeProgram([], tmp_path / "broken.so"), [], Launch())
    with pytest.raises(LaunchError, match="has no library"):
        sandbox.run(Program(), [], Launch())


UNWATCHED = [
    ("past the end", "out[n] = 1;", r"wrote out\[8\], past its end \(8 elements\)", ""),
    ("before the beginning", "out[-1] = 1;", r"wrote out\[-1\], before its beginning", ""),
    ("further", "out[n + 10000] = 1;", r"touched out\[10008\], past its end", ", at kernels.py:12 in f"),
    ("const", "((float*)x)[3] = 1;", r"wrote x\[3\], which is const", ", at kernels.py:12 in f"),
    ("null", "*(volatile float*)(uintptr_t)(n - 8) = 1;", "went through a null pointer", ", at kernels.py:12 in f"),
    ("abort", "\nabort();", r"called abort\(\)", ", at kernels.py:13 in f"),
    ("division", "volatile int z = 0;\nout[0] = n / z;", r"divided an integer by zero", ", at kernels.py:13 in f"),
    ("no end", "for (volatile int i = 0;;)\ni++;", "did not end within 1 s", ", at kernels.py:1[23] in f"),
    ("recursion", "out[0] = g(n);", "overflowed the stack", ", at kernels.py:10 in g"),
]


@pytest.mark.parametrize("offset", range(0, 64, 16))
def test_where_an_array_begins_does_not_matter(offset):
    """Memory of a process begins anywhere, also where a page does."""
    memory = np.zeros(256, "uint8")
    start = -memory.ctypes.data % 64 + offset
    out, x = memory[start : start + 32].view("float32"), np.zeros(5, "float32")
    for body, what in (("free(out);", "freed memory that was not allocated"), ("out[-1] = 1;", r"wrote out\[-1\]")):
        with pytest.raises(LaunchError, match=what):
            sandbox.run(kernel(body), [out, x, 8], Launch(), 20.0)


def test_without_a_sanitizer(unwatched):
    before = (
        "static __attribute__((noinline)) float g(int n) { volatile float t[99]; t[n] = n; return t[n] + g(n) * t[0]; }"
    )
    for name, body, what, where in UNWATCHED:
        program = kernel(body, before)
        assert program.checked is None
        said = fault(program, 1.0)
        assert re.match(rf"the kernel {what}.*{where}$", said), (name, said)
