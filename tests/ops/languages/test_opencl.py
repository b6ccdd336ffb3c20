"""OpenCL C: kernels on PoCL, or on a GPU, against the references; what is read of a text; errors on the user's line."""

import re
import sys

import numpy as np
import pytest

import ops
from ops.languages.base import LaunchError, Parameter, SourceError
from ops.languages.opencl import OpenCL

from ..harness import random
from .running import FILE, LINE, alone, compiled, completed, empty, judge, run, source

SHAPES = [(1, 1), (3, 7), (5, 48), (17, 131), (2, 1023)]
FLOATS = {"float32": ("float", "x[i]", "out[i] = v"), "float16": ("half", "vload_half(i, x)", "vstore_half(v, i, out)")}
LANGUAGE = OpenCL()

NORM = """
#define GET(from, at) READ
__attribute__((unused)) static float squared(float v) { return v * v; }
// __kernel void other(float x) in a comment is none
__kernel __attribute__((reqd_work_group_size(64, 1, 1)))
void block_norm(__global const TYPE* restrict x, const __global TYPE *weight /* a comma, */,
                global TYPE out[], const int width, float eps)
{
    __local float part[64];
    const int lane = get_local_id(0), start = get_group_id(0) * width;
    float sum = 0;
    for (int i = lane; i < width; i += 64) sum += squared(GET(x, start + i));
    part[lane] = sum;
    for (int half_ = 32; half_ > 0; half_ /= 2) {
        barrier(CLK_LOCAL_MEM_FENCE);
        if (lane < half_) part[lane] += part[lane + half_];
    }
    barrier(CLK_LOCAL_MEM_FENCE);
    const float scale = rsqrt(part[0] / width + eps);
    for (int i = lane; i < width; i += 64) { const float v = GET(x, start + i) * scale * GET(weight, i); WRITE; }
}"""


@pytest.fixture(scope="module", autouse=True)
def _device():
    pytest.importorskip("pyopencl", reason="OpenCL kernels need pyopencl: pip install -e '.[opencl]'")
    from ops.languages import opencl_program

    try:
        opencl_program.device()
    except SourceError as error:
        pytest.skip(str(error))


def norm(dtype: str) -> str:
    half = dtype == "float16"
    text = NORM.replace("TYPE", FLOATS[dtype][0]).replace("READ", "vload_half(at, from)" if half else "from[at]")
    return text.replace("WRITE", "vstore_half(v, start + i, out)" if half else "out[start + i] = v")


def array(name: str, dtype: str, const: bool = True) -> Parameter:
    return Parameter(name, LANGUAGE.spelling(dtype), dtype, True, const)


def number(name: str, spelled: str = "int", dtype: str | None = "int32") -> Parameter:
    return Parameter(name, spelled, dtype, False, True)


def placed(values: np.ndarray, offset: int) -> np.ndarray:
    """The same values, that many bytes after a multiple of 128."""
    room = np.zeros(values.nbytes + 256, "uint8")
    start = -room.ctypes.data % 128 + offset
    found = room[start : start + values.nbytes].view(values.dtype).reshape(values.shape)
    found[...] = values
    return found


@pytest.mark.parametrize("dtype", FLOATS)
def test_rms_norm(rng, dtype):
    program = compiled(LANGUAGE, norm(dtype), "block_norm")
    assert not program.emulated and program.device
    for shape in SHAPES:
        x, weight = random(rng, shape, dtype), random(rng, shape[1:], dtype)
        for offset in (0, x.itemsize):  # in place, and by a copy; watched, and not
            x, weight, out = placed(x, offset), placed(weight, offset), placed(empty(shape, dtype), offset)
            for _ in range(2):
                run(program, x, weight, out, shape[1], 1e-5, grid=shape[:1], block=(64,))
                judge(out, ops.rms_norm.reference(x, weight, eps=1e-5), dtype)
                out.view("uint8")[...] = 0xFF


@pytest.mark.parametrize("dtype", FLOATS)
def test_silu_mul_from_a_body(rng, dtype):
    _, read, write = FLOATS[dtype]
    body = f"""
        const int i = get_global_id(0);
        if (i < size) {{
            const float gate = {read}, v = gate / (1 + exp(-gate)) * {read.replace("x", "y")};
            {write};
        }}"""
    program = completed(
        LANGUAGE, body, array("x", dtype), array("y", dtype), number("size"), array("out", dtype, const=False)
    )
    for shape in SHAPES:
        x, y, out = random(rng, shape, dtype), random(rng, shape, dtype), empty(shape, dtype)
        run(program, x, y, x.size, out, grid=(-(-x.size // 32),), block=(32,))
        judge(out, ops.silu_mul.reference(x, y), dtype)


@pytest.mark.parametrize("dtype", ["int32", "int64"])
def test_embedding(rng, dtype):
    text = """
        kernel void work(global const IDS* ids, global const float* weight, global float* out) {
            const size_t row = get_group_id(1), width = get_num_groups(0), i = get_group_id(0);
            out[row * width + i] = weight[ids[row] * width + i];
        }"""
    program = compiled(LANGUAGE, text.replace("IDS", LANGUAGE.spelling(dtype)), "work")
    for rows, width in SHAPES:
        ids, weight = rng.integers(0, 11, rows, dtype), random(rng, (11, width), "float32")
        out = empty((rows, width), "float32")
        run(program, ids, weight, out, grid=(width, rows))
        judge(out, ops.embedding.reference(ids, weight), "float32")


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "int64"])
def test_whole_numbers_of_every_width(rng, dtype):
    spelled = LANGUAGE.spelling(dtype)
    text = "__kernel void work(__global const TYPE* x, __global TYPE* out, TYPE least, TYPE most) {"
    text += "int i = get_global_id(0); out[i] = x[i] == least ? most : x[i] == most ? least : x[i]; }"
    program = compiled(LANGUAGE, text.replace("TYPE", spelled), "work")
    least, most = int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)
    x = np.array([least, most, 5], dtype)
    out = empty((3,), dtype)
    run(program, x, out, least, most, grid=(3,))
    assert out.tolist() == [most, least, 5]
    with pytest.raises(LaunchError, match=rf"{spelled} most holds {least} to {most}, got {most + 1}"):
        run(program, x, out, least, most + 1)


def test_numbers_and_vectors(rng):
    text = """
        __kernel void work(__global const float4* x, __constant float* scale, __global float4* out,
                             unsigned int a, ulong b, double c, uchar d) {
            out[get_global_id(0)] = x[get_global_id(0)] * scale[0] + (float)(a == 4294967295u && b == 5ul << 60)
                + (float)c + d;
        }"""
    program = compiled(LANGUAGE, text, "work")
    x, out, scale = random(rng, (3, 4), "float32"), empty((3, 4), "float32"), np.array([2], "float32")
    for _ in range(2):
        run(program, x, scale, out, 2**32 - 1, 5 << 60, 0.25, 200, grid=(3,))
        judge(out, 2 * x + 201.25, "float32")
    with pytest.raises(LaunchError, match="x takes vectors of 4, got 3 numbers"):
        run(program, x[0, :3].copy(), scale, out, 0, 0, 0.0, 0)


def test_argmax(rng):
    body = """
        int row = get_group_id(0), best = 0;
        for (int i = 1; i < width; i++) if (x[row * width + i] > x[row * width + best]) best = i;
        out[row] = best;"""
    program = completed(LANGUAGE, body, array("x", "float32"), array("out", "int32", const=False), number("width"))
    for shape in SHAPES:
        x, out = random(rng, shape, "float32"), empty(shape[:1], "int32")
        run(program, x, out, shape[1], grid=shape[:1])
        assert (out == ops.argmax.reference(x)).all()


def test_a_write_beside_an_array_is_told(rng):
    arguments = array("x", "int32"), array("out", "int32", const=False), number("at")
    program = completed(LANGUAGE, "out[at] = 1; out[0] = x[0];", *arguments)
    x, out = np.array([7], "int32"), np.zeros(5, "int32")
    for at in (5, 9, -1, -3):
        with pytest.raises(LaunchError, match=rf"{FILE}:{LINE}: work writes out\[{at}\], of 5 elements"):
            run(program, x, out, at)
        assert (out == 0).all()
    run(program, x, out, 4)
    assert out.tolist() == [7, 0, 0, 0, 1]


def test_a_read_beside_an_array_is_poisoned():
    program = completed(LANGUAGE, "out[0] = x[4];", array("x", "float32"), array("out", "float32", const=False))
    out = np.zeros(1, "float32")
    run(program, np.ones(4, "float32"), out)
    assert np.isnan(out[0])


def test_an_array_that_is_given_twice(rng):
    program = completed(
        LANGUAGE, "out[get_global_id(0)] = 2 * x[get_global_id(0)];", array("x", "int32"), array("out", "int32", False)
    )
    x = np.arange(5, dtype="int32")
    for _ in range(2):
        run(program, x, x, grid=(5,))
    assert x.tolist() == [0, 4, 8, 12, 16]


def test_arrays_that_are_read_only(rng):
    program = completed(LANGUAGE, "out[0] = x[0];", array("x", "float32"), array("out", "float32", const=False))
    x, out = placed(np.ones(1, "float32"), 0), np.zeros(1, "float32")
    x.flags.writeable = out.flags.writeable = False
    with pytest.raises(LaunchError, match=r"float\* out may be written, and its array is read only"):
        run(program, x, out)
    out = np.zeros(1, "float32")
    for value in (2, 3):
        out[0] = value
        run(program, x, out)
        assert out[0] == 1


def test_empty_arrays_and_grids():
    program = completed(LANGUAGE, "if (x == 0) out[0] = 1;", array("x", "int8"), array("out", "int8", const=False))
    out = np.zeros(1, "int8")
    run(program, out, out.copy(), grid=(0,))
    assert out == 0
    for _ in range(2):
        out[0] = 0
        run(program, out[:0], out)
        assert out == 1


KERNEL = "__kernel void work(__global float* out) {"
WRONG = {
    "no bfloat16": (f"\n{KERNEL.replace('float', 'bfloat16')} }}", 1, "opencl has no bfloat16; it has float32"),
    "local": (f"{KERNEL.replace(')', ',' + chr(10) + '__local float* s)')} }}", 1, "s is __local: declare shared"),
    "no space": (f"{KERNEL.replace('__global ', '')} }}", 0, "out is a pointer without address space; write __global"),
    "pointers": (f"{KERNEL.replace('float*', 'float**')} }}", 0, "out is a pointer to pointers"),
    "strange array": (f"{KERNEL.replace('float', 'image')} }}", 0, "out is image: no array of that; use float, half"),
    "strange number": (f"{KERNEL.replace(')', ', bool b)')} }}", 0, "b is bool: no number of that"),
    "no name": (f"{KERNEL.replace('__global float* out', 'float')} }}", 0, "'float' is not understood as a parameter"),
    "another entry": ("__kernel void other() {}", 0, "no __kernel void work in the text: it has other"),
    "no entry": ("__kernel int strange() {}", 0, "no kernel of it is understood"),
    "unknown name": (f"{KERNEL}\n\n    out[0] = weight;\n}}", 2, "use of undeclared identifier 'weight'"),
    "syntax": (f"{KERNEL}\n    out[0] = 1.0f\n}}", 1, "expected ';'"),
    "read only": (f"{KERNEL.replace('float', 'const float')}\n    out[0] = 1;\n}}", 1, "read-only"),
    "the name": ("__kernel void kernel(__global float* out) { }", 0, "no __kernel void work in the text"),
    "in a comment": (f"/* \n\n */ {KERNEL}\n    out[0] = zero;\n}}", 3, "use of undeclared identifier 'zero'"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_errors_name_the_users_line(name):
    text, line, message = WRONG[name]
    with pytest.raises(SourceError, match=re.escape(message)) as caught:
        compiled(LANGUAGE, text, "work")
    assert str(caught.value).startswith(f"{FILE}:{LINE + line}: error: ")
    if line:
        assert str(caught.value).splitlines()[-1] == f"    {text.splitlines()[line].strip()}"


def test_every_error_is_told_and_a_body_shown_alone():
    with pytest.raises(SourceError) as caught:
        completed(LANGUAGE, "out[0] = nothing;\nout[1] = no;", array("out", "float32", False))
    assert str(caught.value).splitlines() == [
        f"{FILE}:{LINE}: error: use of undeclared identifier 'nothing'",
        "    out[0] = nothing;",
        f"{FILE}:{LINE + 1}: error: use of undeclared identifier 'no'",
        "    out[1] = no;",
    ]


def test_a_name_that_is_a_word():
    with pytest.raises(SourceError, match="kernel is a word of OpenCL's; choose another name"):
        LANGUAGE.with_signature(source("out[0] = 1;", "kernel"), [array("out", "float32", const=False)])


def test_half_without_its_extension():
    from ops.languages import opencl_program

    if opencl_program.device().f16:
        pytest.skip("this device has cl_khr_fp16")
    with pytest.raises(SourceError, match=rf"{FILE}:{LINE}: .*\n.*\n.* has no cl_khr_fp16: read half with vload_half"):
        completed(LANGUAGE, "half v = x[0]; out[0] = v;", array("x", "float16"), array("out", "float16", False))


def test_bfloat16_is_no_type():
    with pytest.raises(SourceError, match="opencl has no bfloat16; it has float32, float16, int32, int64, int8, uint8"):
        LANGUAGE.spelling("bfloat16")


def test_what_a_launch_must_be(rng):
    program = compiled(LANGUAGE, norm("float32"), "block_norm")
    x, weight, out = random(rng, (2, 8), "float32"), random(rng, (8,), "float32"), empty((2, 8), "float32")
    with pytest.raises(LaunchError, match=r"block_norm, grid \(2, 1, 1\) of block \(32, 1, 1\), on .*WORK_GROUP_SIZE"):
        run(program, x, weight, out, 8, 1e-5, grid=(2,), block=(32,))
    values = {
        r"const float\* x takes an array of float32, got float16": (x.astype("float16"), weight, out, 8, 1e-5),
        "const int width takes a whole number, got 8.5": (x, weight, out, 8.5, 1e-5),
        "const int width takes a number, got ndarray": (x, weight, out, x, 1e-5),
        "takes an array, got 3": (3, weight, out, 8, 1e-5),
        "4 values for 5 parameters": (x, weight, out, 8),
    }
    for message, given in values.items():
        with pytest.raises(LaunchError, match=message):
            run(program, *given, grid=(2,), block=(64,))


def test_flags_reach_the_compiler():
    from ops.languages.base import Options

    program = completed(OpenCL(Options(flags=("-DVALUE=42",))), "out[0] = VALUE;", array("out", "int32", const=False))
    out = np.zeros(1, "int32")
    run(program, out)
    assert out == 42


def test_parameters_are_told():
    parameters = LANGUAGE.parse(source(norm("float32"), "block_norm"))
    assert parameters is not None
    shown = [str(each) for each in parameters]
    assert shown == ["const float* x", "const float* weight", "float* out", "const int width", "const float eps"]


def test_devices_by_name(monkeypatch):
    from ops.languages import opencl_program

    pyopencl = pytest.importorskip("pyopencl")
    with pytest.raises(SourceError, match="no device 'toaster'; there are "):
        opencl_program.device("toaster")
    monkeypatch.setattr(pyopencl, "get_platforms", list)
    with pytest.raises(SourceError, match=r"no OpenCL driver.*pip install 'limpid\[opencl\]'"):
        opencl_program.device("never asked for")


def test_a_missing_package_is_named(monkeypatch):
    from ops.languages import opencl_program

    monkeypatch.setitem(sys.modules, "pyopencl", None)
    with pytest.raises(SourceError, match=r"opencl kernels need pyopencl: pip install 'limpid\[opencl\]'"):
        opencl_program.device("never asked for before")


def test_a_process_ends_without_a_warning():
    done = alone(
        "import numpy as np\n"
        "from tests.ops.languages.test_opencl import LANGUAGE, array, completed, run\n"
        "out = np.zeros(2, 'float32')\n"
        "run(completed(LANGUAGE, 'int unused; out[1] = 3;', array('out', 'float32', const=False)), out)\n"
        "print(out)"
    )
    assert done.returncode == 0 and done.stdout == "[0. 3.]\n", done.stderr
    assert "Warning" not in done.stderr
