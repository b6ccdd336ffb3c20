"""Triton: kernels by its interpreter against the references; each access watched; what its compiler makes of them."""

import sys

import numpy as np
import pytest

import llm
import ops
from ops import SwapRefused
from ops.languages.base import Launch, LaunchError, Options, Parameter, SourceError
from ops.languages.source import shown
from ops.languages.triton import Triton, TritonKernel, source_of

from ..harness import DTYPE_NAMES, random
from .running import FILE, LINE, alone, compiled, empty, judge, run, source

triton = pytest.importorskip("triton", reason="Triton kernels need triton: pip install -e '.[triton]'")
tl = triton.language

SHAPES = [(1, 1), (3, 7), (4, 48), (3, 131)]
LANGUAGE = Triton()
SCALE: tl.constexpr = tl.constexpr(2)


@triton.jit
def mean_square(row, width):
    return tl.sum(row * row, axis=0) / width


@triton.jit
def block_norm(x_ptr, weight_ptr, out_ptr, width, eps, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    start = tl.program_id(0) * width
    x = tl.load(x_ptr + start + columns, mask=columns < width, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=columns < width).to(tl.float32)
    normal = x * tl.rsqrt(mean_square(x, width) + eps) * weight
    tl.store(out_ptr + start + columns, normal.to(out_ptr.dtype.element_ty), mask=columns < width)


SILU = """
@triton.jit
def silu(gate):
    return gate * tl.sigmoid(gate)

@triton.jit
def silu_mul(x, y, out, size, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(x + at, mask=at < size).to(tl.float32)
    up = tl.load(y + at, mask=at < size).to(tl.float32)
    tl.store(out + at, silu(gate) * up, mask=at < size)
"""


def program_of(function):
    return LANGUAGE.compile_function(function, LANGUAGE.parse_function(function))


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
def test_rms_norm(rng, dtype):
    program = program_of(block_norm)
    assert program.emulated and program.device == "interpreted"
    for shape in SHAPES:
        x, weight, out = random(rng, shape, dtype), random(rng, shape[1:], dtype), empty(shape, dtype)
        run(program, x, weight, out, shape[1], 1e-5, triton.next_power_of_2(shape[1]), grid=shape[:1])
        judge(out, ops.rms_norm.reference(x, weight, eps=1e-5), dtype)


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
def test_silu_mul_from_a_text(rng, dtype):
    program = compiled(LANGUAGE, SILU, "silu_mul")
    for shape in SHAPES:
        x, y, out = random(rng, shape, dtype), random(rng, shape, dtype), empty(shape, dtype)
        run(program, x, y, out, x.size, 64, grid=(-(-x.size // 64),))
        judge(out, ops.silu_mul.reference(x, y), dtype)


@pytest.mark.parametrize("dtype", ["int32", "int64"])
def test_embedding(rng, dtype):
    def embed(ids, weight, out, width, BLOCK: tl.constexpr):
        columns = tl.arange(0, BLOCK)
        row = tl.load(ids + tl.program_id(0))
        value = tl.load(weight + row * width + columns, mask=columns < width)
        tl.store(out + tl.program_id(0) * width + columns, value, mask=columns < width)

    program = program_of(embed)
    for rows, width in SHAPES:
        ids, weight = rng.integers(0, 11, rows, dtype), random(rng, (11, width), "float32")
        out = empty((rows, width), "float32")
        run(program, ids, weight, out, np.int64(width), triton.next_power_of_2(width), grid=(rows,))
        judge(out, ops.embedding.reference(ids, weight), "float32")


def test_argmax(rng):
    def largest(x, out, width, BLOCK: tl.constexpr):
        columns = tl.arange(0, BLOCK)
        row = tl.load(x + tl.program_id(0) * width + columns, mask=columns < width, other=float("-inf"))
        tl.store(out + tl.program_id(0), tl.argmax(row, axis=0))

    program = program_of(largest)
    for shape in SHAPES:
        x, out = random(rng, shape, "float32"), empty(shape[:1], "int32")
        run(program, x, out, shape[1], triton.next_power_of_2(shape[1]), grid=shape[:1])
        assert (out == ops.argmax.reference(x)).all()


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "int64"])
def test_whole_numbers_a_closure_and_a_constant_of_the_module(dtype):
    more = tl.constexpr(3)

    def add(x, out, flag):
        tl.store(out + tl.program_id(0), tl.load(x + tl.program_id(0)) * SCALE + more + flag)

    x, out = np.array([1, 50], dtype), np.zeros(2, dtype)
    run(program_of(add), x, out, True, grid=(2,))
    assert out.tolist() == [6, 104]


def test_an_access_beyond_the_arrays_is_told():
    def copy(x_ptr, out_ptr, first, BLOCK: tl.constexpr):
        at = first + tl.arange(0, BLOCK)
        value = tl.load(x_ptr + at)
        tl.store(out_ptr + at, value)

    program, line = program_of(copy), copy.__code__.co_firstlineno
    x, out = np.ones(8, "float32"), np.zeros(4, "float32")
    cases = ((0, 16, x, out, 2, "reads x[8], of 8 elements"), (0, 8, x, out, 3, "writes out[4], of 4 elements"))
    for first, block, source_, target, offset, message in (*cases, (-1, 2, x, out, 2, "reads x[-1], of 8 elements")):
        with pytest.raises(LaunchError) as caught:
            run(program, source_, target, first, block)
        text = "value = tl.load(x_ptr + at)" if offset == 2 else "tl.store(out_ptr + at, value)"
        assert str(caught.value) == f"{shown(__file__)}:{line + offset}: error: {message}\n    {text}"
    assert (out == 0).all()
    out.flags.writeable = False
    with pytest.raises(LaunchError, match="writes out, which is read only"):
        run(program, x, out, 0, 4)


def test_atomics_are_watched_too():
    def count(out, at):
        tl.atomic_add(out + at, 1)

    program, out = program_of(count), np.zeros(2, "int32")
    run(program, out, 1, grid=(5,))
    assert out.tolist() == [0, 5]
    with pytest.raises(LaunchError, match=r"writes out\[2\], of 2 elements"):
        run(program, out, 2)


def test_what_the_compiler_makes(rng):
    program = program_of(block_norm)
    with pytest.raises(SourceError, match="run it once before"):
        program.sources()
    x, weight, out = random(rng, (2, 7), "bfloat16"), random(rng, (7,), "float32"), empty((2, 7), "bfloat16")
    run(program, x, weight, out, 7, 1e-5, 8, grid=(2,))
    made = program.sources()
    assert [*made] == ["ttir", "ttgir", "llir", "ptx"]
    assert ".target sm_90" in made["ptx"] and ".entry block_norm" in made["ptx"]
    run(
        program, x, weight, out, 7, 1e-5, 8, grid=(2,)
    )  # the interpreter left nothing in the language, nor the compiler
    judge(out, ops.rms_norm.reference(x, weight, eps=1e-5), "bfloat16")


WRONG = {
    "gate * tl.sigmoid(gate)": ("gate * nothing", 3, "nothing is not defined"),
    "tl.store(out": ("tl.stored(out", 10, "stored"),
}


@pytest.mark.parametrize("text", WRONG)
def test_errors_name_the_users_line(rng, text):
    instead, line, message = WRONG[text]
    program = compiled(LANGUAGE, SILU.replace(text, instead), "silu_mul")
    x, out = random(rng, (4,), "float32"), empty((4,), "float32")
    with pytest.raises(LaunchError) as caught:
        run(program, x, x, out, 4, 4)
    shown = SILU.replace(text, instead).splitlines()[line].strip()
    assert str(caught.value).startswith(f"{FILE}:{LINE + line}: error: ")
    assert instead.split("(")[0].split(" ")[-1].rpartition(".")[2] in str(caught.value).splitlines()[0]
    assert str(caught.value).splitlines()[1] == f"    {shown}"
    with pytest.raises(SourceError, match=message):
        program.sources()


def test_what_only_the_compiler_refuses(rng):
    text = SILU.replace("silu(gate) * up", "silu(gate) if size > 3 else up.to(tl.int32)")
    program = compiled(LANGUAGE, text, "silu_mul")
    x, out = random(rng, (4,), "float32"), empty((4,), "float32")
    run(program, x, x, out, 4, 4)
    with pytest.raises(SourceError) as caught:
        program.sources()
    assert str(caught.value).startswith(f"{FILE}:{LINE + 10}: error: ")


def test_texts_that_are_no_kernel():
    assert LANGUAGE.parse(source("tl.store(out, 1)")) is None
    with pytest.raises(SourceError, match=r"its body alone is none: write def work\(x, out\)"):
        LANGUAGE.with_signature(source("pass"), [Parameter(name, "", None, False, False) for name in ("x", "out")])
    with pytest.raises(SourceError, match=rf"{FILE}:{LINE + 2}: error: .*\n    def work\(:"):
        LANGUAGE.parse(source("\n\ndef work(:\n    pass"))
    with pytest.raises(SourceError, match=rf"{FILE}:{LINE}: error: the function is other, expected work"):
        LANGUAGE.parse(source("def other(x): pass"))
    with pytest.raises(SourceError, match=rf"{FILE}:{LINE + 1}: error: NameError.*\n    @nothing"):
        LANGUAGE.parse(source("\n@nothing\ndef work(x): pass"))
    with pytest.raises(SourceError, match=r"\*values takes any number of values"):
        LANGUAGE.parse(source("def work(*values): pass"))


def test_what_a_launch_must_be():
    program = compiled(LANGUAGE, SILU, "silu_mul")
    x = np.zeros(4, "float32")
    with pytest.raises(LaunchError, match=r"block \(32, 1, 1\): Triton has no threads"):
        run(program, x, x, x, 4, 4, block=(32,))
    with pytest.raises(LaunchError, match="shared=4"):
        program.run([x, x, x, 4, 4], Launch(shared=4))
    with pytest.raises(LaunchError, match="x is complex64; triton has float32"):
        run(program, x.astype("complex64"), x, x, 4, 4)
    with pytest.raises(LaunchError, match="4 values for 5 parameters"):
        run(program, x, x, x, 4)
    run(program, x, x, x, 4, 4, grid=(0,))


def test_options_that_triton_has_not():
    for options in (Options(device="gpu"), Options(flags=("-O3",))):
        with pytest.raises(SourceError, match="Triton is interpreted here"):
            compiled(Triton(options), SILU, "silu_mul")
    compiled(Triton(Options(device="emulate")), SILU, "silu_mul")


def test_the_users_names_stay_theirs():
    before = set(globals())
    assert [str(each) for each in LANGUAGE.parse_function(block_norm)] == [
        "x", "weight", "out", "width", "eps", "const tl.constexpr BLOCK",
    ]  # fmt: skip
    program_of(block_norm)
    assert set(globals()) == before
    found = source_of(block_norm)
    assert found.file == shown(__file__) and found.text.splitlines()[1].startswith("def block_norm")


@pytest.fixture
def restored():
    yield
    ops.restore()


def power_of_2(x, *_):
    return triton.next_power_of_2(x.shape[1])


@triton.jit
def gemma_norm(x_ptr, weight_ptr, out_ptr, width, eps, plus_one, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    start = tl.program_id(0) * width
    x = tl.load(x_ptr + start + columns, mask=columns < width, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=columns < width).to(tl.float32) + plus_one.to(tl.float32)
    normal = x * tl.rsqrt(mean_square(x, width) + eps) * weight
    tl.store(out_ptr + start + columns, normal.to(out_ptr.dtype.element_ty), mask=columns < width)


def test_a_swap_in_the_embedded_model(restored):
    model = llm.load("tiny", dtype="float32")
    wanted = model.generate("Once upon a time", max_tokens=3)

    swap = ops.rms_norm.swap("triton", grid=lambda x, *_: x.shape[0], dims={"BLOCK": power_of_2})(gemma_norm)
    assert model.generate("Once upon a time", max_tokens=3) == wanted
    assert isinstance(swap.kernel, TritonKernel) and "triton emulated" in str(ops.rms_norm.swaps)
    assert {"triton", "ptx"} <= swap.kernel.sources().keys()


def test_a_triton_kernel_that_is_wrong(restored):
    def copy(x, out, BLOCK: tl.constexpr):
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(out + at, tl.load(x + at))

    def writes_its_input(x, out):
        tl.store(x, 0.0)

    def no_output(x):
        tl.load(x)

    def only_interpreted(x, out):
        value = tl.load(x + tl.program_id(0))
        tl.store(out + tl.program_id(0), sum([value / (1 + tl.exp(-value))]))

    with pytest.raises(SourceError, match=r"error: NameError.*sum is not defined.*\n    tl.store"):
        ops.silu.swap("triton", grid=lambda x: x.size, where="dtype=float32")(only_interpreted)
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


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(SourceError, match=r"triton kernels need triton: pip install 'limpid\[triton\]'"):
        LANGUAGE.parse(source("def work(x): pass"))


def test_without_torch_and_without_a_warning():
    done = alone(
        "import sys\n"
        "import numpy as np\n"
        "from ops.languages.base import Launch, Source\n"
        "from ops.languages.triton import Triton\n"
        "source = Source('def one(out): tl.store(out + 1, 1.0)', 'one', 'there.py', 1)\n"
        "program = Triton().compile(source, Triton().parse(source))\n"
        "out = np.zeros(2, 'float32')\n"
        "program.run([out], Launch())\n"
        "print(out, 'st.global' in program.sources()['ptx'], 'torch' in sys.modules)"
    )
    assert done.returncode == 0 and done.stdout == "[0. 1.] True False\n", done.stderr
    assert not done.stderr
