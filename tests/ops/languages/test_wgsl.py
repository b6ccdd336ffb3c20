"""WGSL: kernels on lavapipe, or on a GPU, against the references; what is read of a text; errors on the user's line."""

import re
import sys

import numpy as np
import pytest

import ops
from ops.languages.base import LaunchError, Options, Parameter, SourceError
from ops.languages.wgsl import Wgsl, declared

from ..harness import random
from .running import FILE, LINE, alone, compiled, completed, empty, judge, run, source

SHAPES = [(1, 1), (3, 7), (5, 48), (17, 131), (2, 1023)]
FLOATS = {"float32": "f32", "float16": "f16"}
LANGUAGE = Wgsl()

NORM = """
struct Numbers { width: u32, eps: f32 }
@group(0) @binding(0) var<storage, read> x: array<TYPE>;
@group(0) @binding(1) var<storage, read> weight: array<TYPE>;
@group(0) @binding(2) var<storage, read_write> out: array<TYPE>;
@group(0) @binding(3) var<uniform> numbers: Numbers;
var<workgroup> part: array<f32, 64>;  // @compute fn other() in a comment is none

@compute @workgroup_size(64)
fn block_norm(@builtin(workgroup_id) row: vec3<u32>, @builtin(local_invocation_id) lane: vec3<u32>) {
    let start = row.x * numbers.width;
    var sum = 0.0;
    for (var i = lane.x; i < numbers.width; i += 64u) { sum += f32(x[start + i]) * f32(x[start + i]); }
    part[lane.x] = sum;
    workgroupBarrier();
    for (var half = 32u; half > 0u; half /= 2u) {
        if (lane.x < half) { part[lane.x] += part[lane.x + half]; }
        workgroupBarrier();
    }
    let scale = inverseSqrt(part[0] / f32(numbers.width) + numbers.eps);
    for (var i = lane.x; i < numbers.width; i += 64u) {
        out[start + i] = TYPE(f32(x[start + i]) * scale * f32(weight[i]));
    }
}"""


@pytest.fixture(scope="module", autouse=True)
def _device():
    pytest.importorskip("wgpu", reason="WGSL kernels need wgpu: pip install -e '.[wgsl]'")
    from ops.languages import wgpu_program

    try:
        wgpu_program.device()
    except SourceError as error:
        pytest.skip(str(error))


def typed(text: str, dtype: str) -> str:
    return ("enable f16;" if dtype == "float16" else "") + text.replace("TYPE", FLOATS[dtype])


def array(name: str, dtype: str, const: bool = True) -> Parameter:
    return Parameter(name, LANGUAGE.spelling(dtype), dtype, True, const)


@pytest.mark.parametrize("dtype", FLOATS)
def test_rms_norm(rng, dtype):
    program = compiled(LANGUAGE, typed(NORM, dtype), "block_norm")
    assert not program.emulated and program.device
    for shape in SHAPES:
        x, weight, out = random(rng, shape, dtype), random(rng, shape[1:], dtype), empty(shape, dtype)
        run(program, x, weight, out, shape[1], 1e-5, grid=shape[:1])
        judge(out, ops.rms_norm.reference(x, weight, eps=1e-5), dtype)


@pytest.mark.parametrize("dtype", FLOATS)
def test_silu_mul_from_a_body(rng, dtype):
    body = """
        let i = global_id.x + global_id.y * group_count.x * block.x;
        if (i < size) {
            let gate = f32(x[i]);
            out[i] = TYPE(gate / (1 + exp(-gate)) * f32(y[i]));
        }"""
    size = Parameter("size", "i32", "int32", False, True)
    arguments = array("x", dtype), array("y", dtype), size, array("out", dtype, const=False)
    program = completed(LANGUAGE, body.replace("TYPE", FLOATS[dtype]), *arguments)
    for shape in SHAPES:
        x, y, out = random(rng, shape, dtype), random(rng, shape, dtype), empty(shape, dtype)
        for block in ((32,), (8, 4)):
            run(program, x, y, x.size, out, grid=(-(-x.size // 8),), block=block)
            judge(out, ops.silu_mul.reference(x, y), dtype)


@pytest.mark.parametrize("dtype", FLOATS)
def test_embedding(rng, dtype):
    text = """
        @group(0) @binding(0) var<storage, read> ids: array<i32>;
        @group(0) @binding(1) var<storage, read> weight: array<TYPE>;
        @group(0) @binding(2) var<storage, read_write> out: array<TYPE>;
        @group(0) @binding(3) var<uniform> width: u32;
        @compute @workgroup_size(1) fn work(@builtin(workgroup_id) at: vec3<u32>) {
            out[at.y * width + at.x] = weight[u32(ids[at.y]) * width + at.x];
        }"""
    program = compiled(LANGUAGE, typed(text, dtype))
    for rows, width in SHAPES:
        ids, weight = rng.integers(0, 11, rows, "int32"), random(rng, (11, width), dtype)
        out = empty((rows, width), dtype)
        run(program, ids, weight, out, width, grid=(width, rows))
        judge(out, ops.embedding.reference(ids, weight), dtype)


def test_argmax(rng):
    body = """
        var best = 0;
        for (var i = 1; i < width; i++) { if (x[group_id.x * width + i] > x[group_id.x * width + best]) { best = i; } }
        out[group_id.x] = best;"""
    width = Parameter("width", "i32", "int32", False, True)
    program = completed(LANGUAGE, body, array("x", "float32"), array("out", "int32", const=False), width)
    for shape in SHAPES:
        x, out = random(rng, shape, "float32"), empty(shape[:1], "int32")
        run(program, x, out, shape[1], grid=shape[:1])
        assert (out == ops.argmax.reference(x)).all()


def test_numbers_stand_where_wgsl_puts_them():
    text = """
        alias Real = f32;
        struct Some { a: f16, b: u32, @align(16) c: i32, @size(8) d: Real, e: f16, f: f16 }
        @group(0) @binding(5) var<uniform> some: Some;
        @group(1) @binding(1) var<storage> more: Other;
        struct Other { g: i32, h: f32, }
        @group(1) @binding(0) var<uniform> alone: f32;
        @group(1) @binding(3) var<storage, read_write> out: array<f32, LENGTH>;
        const LENGTH = 9;
        @compute @workgroup_size(1) fn work() {
            out[0] = f32(some.a); out[1] = f32(some.b); out[2] = f32(some.c); out[3] = some.d; out[4] = f32(some.e);
            out[5] = f32(some.f); out[6] = f32(more.g); out[7] = more.h; out[8] = alone;
        }"""
    program = compiled(LANGUAGE, "enable f16;" + text)
    out = empty((9,), "float32")
    numbers = [0.5, 2**32 - 1, -7, 1.25, -2.5, 3.0, -(2**31), 0.125, 9.5]
    run(program, *numbers, out)
    assert (out == np.array(numbers, "float32")).all()
    with pytest.raises(LaunchError, match="out has 9 elements in the text, got 8"):
        run(program, *numbers, out[:8])


def test_vectors_and_atomics(rng):
    text = """
        @group(0) @binding(0) var<storage, read> x: array<vec4f>;
        @group(0) @binding(1) var<storage, read_write> out: array<vec4<f32>>;
        @group(0) @binding(2) var<storage, read_write> count: array<atomic<i32>>;
        @compute @workgroup_size(1) fn work(@builtin(global_invocation_id) at: vec3<u32>) {
            out[at.x] = 2 * x[at.x];
            atomicAdd(&count[0], 1i);
        }"""
    program = compiled(LANGUAGE, text)
    x, out, count = random(rng, (3, 4), "float32"), empty((3, 4), "float32"), np.array([5], "int32")
    run(program, x, out, count, grid=(3,))
    assert (out == 2 * x).all() and count == 8
    with pytest.raises(LaunchError, match="x takes vectors of 4, got 6 numbers"):
        run(program, x[0, :1].repeat(6), out, count)


def test_subgroups(rng):
    from ops.languages import wgpu_program

    if "subgroup" not in wgpu_program.device().handle.features:
        pytest.skip("the device has no subgroups")
    text = """
        enable subgroups;
        @group(0) @binding(0) var<storage, read> x: array<i32>;
        @group(0) @binding(1) var<storage, read_write> out: array<i32>;
        @group(0) @binding(2) var<storage, read_write> size: array<i32>;
        @compute @workgroup_size(64) fn work(@builtin(local_invocation_id) at: vec3u, @builtin(subgroup_size) n: u32) {
            out[at.x] = subgroupAdd(x[at.x]);
            size[0] = i32(n);
        }"""
    x, out, size = rng.integers(-99, 99, 64, "int32"), empty((64,), "int32"), empty((1,), "int32")
    run(compiled(LANGUAGE, text), x, out, size)
    assert (out == x.reshape(-1, size[0]).sum(1, "int32").repeat(size[0])).all()


def test_options_that_wgsl_has_not():
    with pytest.raises(SourceError, match="the compiler of WGSL takes none"):
        compiled(Wgsl(Options(flags=("-O3",))), NORM.replace("TYPE", "f32"), "block_norm")
    assert compiled(Wgsl(Options(device="emulate")), NORM.replace("TYPE", "f32"), "block_norm").device


def test_nothing_of_an_earlier_run_is_taken_for_a_result(rng):
    """What the kernel does not write stays what it was in the array; an odd float16 has no neighbour written."""
    body = "if (i32(arrayLength(&x)) > 0 && flag != 0) { out[group_id.x] = x[group_id.x]; }"
    flag = Parameter("flag", "int64_t", "int64", False, True)
    program = completed(LANGUAGE, body, array("x", "float16"), array("out", "float16", const=False), flag)
    for size in (7, 301, 7):
        x, around = random(rng, (size,), "float16"), np.full(size + 2, 5, "float16")
        out = around[1:-1]
        run(program, x, out, 1, grid=(size,))
        assert (out == x).all() and (around[[0, -1]] == 5).all()
        out[:] = 3
        run(program, x, out, 0, grid=(size,))
        assert (out == 3).all()
    with pytest.raises(LaunchError, match="flag holds -2147483648 to 2147483647, got 4294967296"):
        run(program, x, out, 2**32)


def test_empty_arrays_and_grids():
    program = completed(LANGUAGE, "out[0] = 1;", array("out", "float32", const=False))
    out = np.zeros(4, "float32")
    run(program, out, grid=(0,))
    run(program, out[:0])
    assert (out == 0).all()
    with pytest.raises(LaunchError, match=r"block \(100000, 1, 1\): .* takes"):
        run(program, out, block=(100000,))


def test_out_of_bounds_harms_nothing():
    program = completed(LANGUAGE, "out[1000000 * group_id.x + 4] = 7.0;", array("out", "float32", const=False))
    around = np.zeros(64, "float32")
    run(program, around[8:12], grid=(3,))
    assert (around[:8] == 0).all() and (around[12:] == 0).all()


def test_a_body_that_uses_few_of_its_names():
    parameters = [
        array("x", "float16"),
        array("out", "float32", False),
        Parameter("eps", "f32", "float32", False, True),
    ]
    program = completed(LANGUAGE, "out[0] = eps;", *parameters)
    out = empty((1,), "float32")
    run(program, np.zeros(3, "float16"), out, 0.5)
    assert out == 0.5
    assert "fn work" in program.sources()["wgsl"]


BINDING = "@group(0) @binding(0) var<storage, read_write> out: array<f32>;"
WRONG = {
    "no_bfloat16": (f"{BINDING.replace('f32', 'bf16')}\nENTRY {{}}", 0, "wgsl has no bfloat16; it has float32"),
    "no_int64": (f"\n{BINDING.replace('f32', 'i64')}\nENTRY {{}}", 1, "wgsl has no int64; it has float32"),
    "vec3": (f"\n{BINDING.replace('f32', 'vec3<f32>')}\nENTRY {{}}", 1, "a vec3 takes the room of a vec4"),
    "no place": ("\n\nvar<storage> x: array<f32>;\nENTRY {}", 2, "x needs @group(0) @binding(number)"),
    "uniform array": (f"{BINDING.replace('storage, read_write', 'uniform')}\nENTRY {{}}", 0, "out is an array"),
    "unknown type": (f"{BINDING.replace('array<f32>', 'Strange')}\nENTRY {{}}", 0, "out is written and no array"),
    "two of a name": (f"{BINDING}\n@group(0) @binding(1) var<uniform> out: f32;\nENTRY {{}}", 0, "two"),
    "size": (f"{BINDING}\n@compute @workgroup_size(n)\nfn work() {{}}", 1, "@workgroup_size(n): expected a number"),
    "no size": (f"{BINDING}\n@compute fn work() {{}}", 1, "a kernel needs @workgroup_size"),
    "another entry": (f"{BINDING}\n@compute fn other() {{}}", 0, "no @compute fn work in the text: it has other"),
    "no entry": (BINDING, 0, "it has no @compute function"),
    "unknown name": (f"{BINDING}\nENTRY {{\n    out[0] = eps;\n}}", 2, "no definition in scope for identifier: `eps`"),
    "wrong type": (f"{BINDING}\nENTRY {{\n\n    out[0] = 1i + 1.5;\n}}", 3, "1i"),
    "no f16": (f"{BINDING.replace('f32', 'f16')}\nENTRY {{ out[0] = 1h; }}", 1, "enable f16"),
    "syntax": (f"{BINDING}\nENTRY {{\n    out[0] = ;\n}}", 2, "expected expression"),
    "read only": (f"{BINDING.replace(', read_write', '')}\nENTRY {{\n    out[0] = 1.0;\n}}", 2, "writing to this"),
    "too many threads": (f"{BINDING}\n@compute @workgroup_size(100000) fn work() {{}}", 0, "orkgroup size"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_errors_name_the_users_line(name):
    text, line, message = WRONG[name]
    text = text.replace("ENTRY", "@compute @workgroup_size(1) fn work()")
    with pytest.raises(SourceError, match=re.escape(message)) as caught:
        compiled(LANGUAGE, text)
    assert str(caught.value).startswith(f"{FILE}:{LINE + line}: error: ")
    if line:
        assert str(caught.value).splitlines()[-1] == f"    {text.splitlines()[line].strip()}"


def test_an_error_in_a_body_shows_the_body_alone():
    with pytest.raises(SourceError) as caught:
        completed(LANGUAGE, "out[0] = nothing;", array("out", "float32", False))
    assert str(caught.value).splitlines()[0].startswith(f"{FILE}:{LINE}: error: ")
    assert str(caught.value).splitlines()[1] == "    out[0] = nothing;"


@pytest.mark.parametrize("dtype", ["bfloat16", "int64", "int8", "uint8"])
def test_dtypes_that_wgsl_lacks(dtype):
    with pytest.raises(SourceError, match=f"wgsl has no {dtype}; it has float32, float16, int32"):
        LANGUAGE.spelling(dtype)
    with pytest.raises(SourceError, match=f"wgsl has no {dtype}"):
        LANGUAGE.with_signature(source("out[0] = 1;"), [Parameter("out", "", dtype, True, False)])


def test_what_a_launch_must_be(rng):
    program = compiled(LANGUAGE, NORM.replace("TYPE", "f32"), "block_norm")
    x, weight, out = random(rng, (2, 8), "float32"), random(rng, (8,), "float32"), empty((2, 8), "float32")
    run(program, x, weight, out, 8, 1e-5, grid=(2,), block=(64,))
    wrong = {
        r"block \(32, 1, 1\) is not the @workgroup_size of block_norm, \(64, 1, 1\)": {"block": (32,)},
        r"grid \(100000, 1, 1\) has more than": {"grid": (100000,)},
    }
    for message, launch in wrong.items():
        with pytest.raises(LaunchError, match=message):
            run(program, x, weight, out, 8, 1e-5, **launch)
    read_only = out.copy()
    read_only.flags.writeable = False
    values = {
        "const f32\\* x takes an array of float32, got float16": (x.astype("float16"), weight, out, 8, 1e-5),
        "const u32 width takes a whole number, got 8.5": (x, weight, out, 8.5, 1e-5),
        "const u32 width holds 0 to 4294967295, got -1": (x, weight, out, -1, 1e-5),
        "const u32 width takes a number, got ndarray": (x, weight, out, x, 1e-5),
        "f32\\* out may be written, and its array is read only": (x, weight, read_only, 8, 1e-5),
        "takes a contiguous array": (np.zeros((8, 2), "float32").T, weight, out, 8, 1e-5),
        "4 values for 5 parameters": (x, weight, out, 8),
    }
    for message, given in values.items():
        with pytest.raises(LaunchError, match=message):
            run(program, *given, grid=(2,))


def test_parameters_are_the_bindings_in_any_order():
    parameters = LANGUAGE.parse(source(NORM.replace("TYPE", "f32"), "block_norm"))
    assert parameters is not None
    text = source(NORM.replace("TYPE", "f32"), "block_norm")
    x, weight, out = np.ones((1, 2), "float32"), np.array([3, 5], "float32"), empty((1, 2), "float32")
    run(LANGUAGE.compile(text, parameters[::-1]), 0.0, 2, out, weight, x)
    assert out.tolist() == [[3, 5]]
    with pytest.raises(SourceError, match="nothing is given for eps, width"):
        LANGUAGE.compile(text, parameters[:3])
    with pytest.raises(SourceError, match=r"the text binds no const f32\* y"):
        LANGUAGE.compile(text, (*parameters, array("y", "float32")))


def test_bindings_are_told_as_parameters():
    parameters = LANGUAGE.parse(source(NORM.replace("TYPE", "f32"), "block_norm"))
    assert parameters is not None
    shown = [str(each) for each in parameters]
    assert shown == ["const f32* x", "const f32* weight", "f32* out", "const u32 width", "const f32 eps"]
    found = declared(source(NORM.replace("TYPE", "f32"), "block_norm"))
    assert found is not None and found.block == (64, 1, 1)


def test_devices_by_name(monkeypatch):
    from ops.languages import wgpu_program

    with pytest.raises(SourceError, match="no device 'toaster'; there are "):
        wgpu_program.device("toaster")
    name = wgpu_program.device().name
    assert wgpu_program.device(name[:5].lower()).name == name
    wgpu = pytest.importorskip("wgpu")
    monkeypatch.setattr(wgpu.gpu, "enumerate_adapters_sync", list)
    with pytest.raises(SourceError, match="mesa-vulkan-drivers"):
        wgpu_program.device("never asked for")


def test_a_missing_package_is_named(monkeypatch):
    from ops.languages import wgpu_program

    monkeypatch.setitem(sys.modules, "wgpu", None)
    with pytest.raises(SourceError, match=r"wgsl kernels need wgpu: pip install 'limpid\[wgsl\]'"):
        wgpu_program.device("never asked for before")


def test_a_process_ends_without_a_warning():
    done = alone(
        "import numpy as np\n"
        "from tests.ops.languages.test_wgsl import LANGUAGE, array, completed, run\n"
        "out = np.zeros(2, 'float32')\n"
        "run(completed(LANGUAGE, 'out[1] = 3;', array('out', 'float32', const=False)), out)\n"
        "print(out)"
    )
    assert done.returncode == 0 and done.stdout == "[0. 3.]\n", done.stderr
    assert "Warning" not in done.stderr
