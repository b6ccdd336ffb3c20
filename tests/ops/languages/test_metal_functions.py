"""Metal's types and functions as the emulator has them: vectors, numbers, simdgroups, atomics."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ops.languages.base import Launch, LaunchError
from ops.spec import DTYPES

from .emulation import run
from .test_metal import compiled

_SPELLED = {"float32": "float", "float16": "half", "bfloat16": "bfloat", "int32": "int", "uint8": "uchar"}


def threads(body: str, count: int = 32, out: str = "float32", each: int = 1, **arrays: np.ndarray) -> np.ndarray:
    """What each thread's `out[i]`, or `out[each * i]` and the next, is after `body`; `i` is the thread's number."""
    given = "".join(f"device {_SPELLED[array.dtype.name]}* {name}, " for name, array in arrays.items())
    text = f"""using namespace metal;
    kernel void k({given}device {_SPELLED[out]}* out, uint i [[thread_position_in_grid]]) {{
      {body}
    }}"""
    program, results = compiled(text, "k"), []
    for one in (program, program.watched()):
        result = np.zeros(count * each, DTYPES[out])
        values: dict[str, Any] = {name: array.copy() for name, array in arrays.items()}
        run(one, {**values, "out": result}, Launch((1, 1, 1), (count, 1, 1)))
        results.append(result)
    assert (results[0].view("uint8") == results[1].view("uint8")).all()
    return results[0]


def numbers(body: str, each: int = 1, out: str = "float32", **arrays: np.ndarray) -> list:
    """What one thread writes."""
    return threads(body, 1, out, each, **arrays).tolist()


def test_vectors_have_components_by_letters():
    body = """
      float4 a(1, 2, 3, 4);
      a.xy = a.yx;  a.wz += a.xy;  a.w *= 10;
      float3 b = a.zyx; b.yz -= 1; b[0] = 7;
      float2 c = {b.x, a.wzyx.operator float4().y};
      float2 d = c.yx + a.rg; d.x = float4(a.zyx, d.y).w;
      out[0] = a.x; out[1] = a.y; out[2] = a.z; out[3] = a.w;
      out[4] = b.x; out[5] = b.y; out[6] = b.z; out[7] = c.x; out[8] = c.y; out[9] = d.x; out[10] = d.y;
    """
    # a = 2 1 3 4, then w += 2 and z += 1: 2 1 4 60; b = 4 1 2 - 0 1 1
    assert numbers(body, 11) == [2, 1, 4, 60, 7, 0, 1, 7, 4, 8, 8]


def test_vectors_are_made_of_parts():
    body = """
      float3 a(float2(1, 2), 3); float4 b(a.x, a.yz, 4), c(5.0), d = 6, e = float4(half4(b)) + float4(int4(b) / 2);
      packed_float3 p = a; p += 1.0; p.x = 9; half2 h = half2(b.zw) * 2; uchar4 u(300); bool2 t(true, false);
      out[0] = b.w; out[1] = c.y + d.z; out[2] = e.w; out[3] = p[0] + p.y; out[4] = h.y; out[5] = u.x;
      out[6] = t.x + t.y;
      out[7] = sizeof(float3); out[8] = sizeof(packed_float3); out[9] = alignof(half4); out[10] = sizeof(packed_half3);
    """
    assert numbers(body, 11) == [4, 11, 6, 12, 8, 44, 1, 16, 12, 8, 6]


def test_arithmetic_and_comparison_of_vectors():
    body = """
      int4 a(7, -7, 8, 9), b = a % 4 + (a << 1) - 2 * a, c = -a & 3, d = ~a;
      float4 f = 1 / float4(1, 2, 4, 8), g = select(f, float4(-1), f < 0.25f), h = -f * f.w + f / f;
      out[0] = b.x; out[1] = b.y; out[2] = c.z; out[3] = d.w; out[4] = f.w; out[5] = g.z; out[6] = g.w; out[7] = h.x;
      out[8] = any(a == 8); out[9] = all(a > 0); out[10] = all((a != 0) && !(a == 5));
    """
    assert numbers(body, 11) == [3, -3, 0, -10, 0.125, 0.25, -1, 0.875, 1, 0, 1]


def test_geometry():
    body = """
      float3 a(1, 2, 2), b(0, 3, 4);
      out[0] = dot(a, b); out[1] = length(a); out[2] = normalize(b).z; out[3] = distance(a, b.xyz);
      float3 c = cross(a, b); out[4] = c.x; out[5] = c.y; out[6] = c.z; out[7] = length_squared(half2(3, 4));
    """
    expected = [14, 3, 0.8, np.sqrt(6), 2, -4, 3, 25]
    np.testing.assert_allclose(numbers(body, 8), expected, rtol=1e-6)


def test_memory_through_pointers_to_vectors():
    x = np.arange(64).astype("float16")
    body = """
      device const half4* four = (device const half4*)x;
      device const packed_half3* three = reinterpret_cast<device const packed_half3*>(x + 1);
      thread float4 local = float4(four[i]); thread const float4* at = &local;
      out[i] = dot(*at, float4(1)) + float3(three[i]).z;
    """
    assert threads(body, 16, x=x).tolist() == [16 * i + 6 + 3 * i + 3 for i in range(16)]


FUNCTIONS = {
    "exp": np.exp, "exp2": np.exp2, "log": np.log, "log2": np.log2, "log10": np.log10, "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x), "sin": np.sin, "cos": np.cos, "tan": np.tan, "tanh": np.tanh, "sinh": np.sinh,
    "cosh": np.cosh, "atan": np.arctan, "asinh": np.arcsinh, "floor": np.floor, "ceil": np.ceil, "trunc": np.trunc,
    "rint": np.rint, "fabs": np.abs, "abs": np.abs, "sign": np.sign, "fract": lambda x: x - np.floor(x),
    "saturate": lambda x: np.clip(x, 0, 1), "sinpi": lambda x: np.sin(np.pi * x), "exp10": lambda x: 10**x,
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_functions_of_numbers_and_vectors(dtype: str):
    x = np.random.default_rng().uniform(0.1, 4, 32).astype(DTYPES[dtype])
    body = "\n".join(
        f"out[{2 * i} * 32 + i] = {'fast::' * (i % 2)}{name}(x[i]); "
        f"out[{2 * i + 1} * 32 + i] = precise::{name}({_SPELLED[dtype]}2(x[i])).y;"
        for i, name in enumerate(FUNCTIONS)
    )
    found = threads(body, 32, dtype, 2 * len(FUNCTIONS), x=x).reshape(-1, 2, 32)
    for name, (one, vector) in zip(FUNCTIONS, found, strict=True):
        wide = x.astype("float64")
        expected = FUNCTIONS[name](wide)
        step = {"float32": 2**-22, "float16": 2**-11, "bfloat16": 2**-8}[dtype]
        np.testing.assert_allclose(one.astype("float64"), expected, rtol=step, atol=step, err_msg=name)
        assert (one == vector).all(), name


def test_functions_of_several():
    body = """
      float4 x(-2, 0.25, 0.75, 3);
      float4 c = clamp(x, 0.0, 1.0), m = mix(float4(0), float4(10), x), s = step(0.5f, x);
      float4 t = smoothstep(0.0f, 1.0f, x);
      out[0] = c.x + c.y; out[1] = m.z; out[2] = s.y + s.z; out[3] = t.y; out[4] = fma(2.0f, 3.0f, 4.0f);
      out[5] = max3(1, 3, 2) + min3(1, 3, 2) + median3(1, 3, 2); out[6] = pow(2.0, 10.0); out[7] = fmod(7.5f, 2.0f);
      float w; out[8] = modf(-2.75f, w); out[9] = w; int e; out[10] = frexp(12.0f, e); out[11] = e;
      float k; out[12] = sincos(0.0f, k); out[13] = k; out[14] = ldexp(1.5f, 3); out[15] = copysign(2.0f, -0.0f);
      out[16] = select(1.0f, 2.0f, true); out[17] = max(float2(1, 5), float2(4, 2)).x; out[18] = fmax(NAN, 3.0f);
      out[19] = isnan(NAN) + isinf(-INFINITY) + isfinite(1.0f) + signbit(-1.0f);
    """
    expected = [0.25, 7.5, 1, 0.15625, 10, 6, 1024, 1.5, -0.75, -2, 0.75, 4, 0, 1, 12, -2, 2, 4, 3, 4]
    assert numbers(body, 20) == expected


def test_functions_of_whole_numbers():
    body = """
      uint big = 0x80000001u; uchar small = 0xF0;
      out[0] = popcount(big); out[1] = clz(small); out[2] = ctz(small); out[3] = clz(0); out[4] = rotate(big, 1u);
      out[5] = mulhi(0x40000000, 8); out[6] = mad24(3, 4, 5); out[7] = reverse_bits(1u) == 0x80000000u;
      out[8] = extract_bits(-1, 3, 4); out[9] = extract_bits(big, 31u, 1u); out[10] = absdiff(3, -4); out[11] = abs(-3);
      out[12] = min(3, -4) + max(7l, 8l) + clamp(9, 1, 5); out[13] = as_type<int>(1.0f) == 0x3f800000;
      out[14] = as_type<float>(0x40490fdbu) * 100; out[15] = as_type<half2>(0x40003c00).y; out[16] = (char)200;
      out[17] = numeric_limits<short>::max() + numeric_limits<uchar>::min();
      out[18] = INT_MIN == numeric_limits<int>::min();
    """
    expected = [2, 0, 4, 32, 3, 2, 17, 1, -1, 1, 7, 3, 9, 1, 314, 2, -56, 32767, 1]
    assert numbers(body, 19, "int32") == expected


def test_half_is_rounded_at_each_step():
    rng = np.random.default_rng()
    a, b = (rng.standard_normal(256).astype("float16") for _ in range(2))
    body = """
      half2 v = half2(a[i], b[i]) * half2(b[i], 3) + 1.0h;
      half sum = a[i]; sum += b[i] * 2; sum = sum / 3 - a[i];
      out[4 * i] = v.x; out[4 * i + 1] = v.y; out[4 * i + 2] = sum; out[4 * i + 3] = fma(a[i], b[i], a[i]);
    """
    found = threads(body, 256, "float16", 4, a=a, b=b).reshape(256, 4)
    one, two, three = (np.float16(n) for n in (1, 2, 3))
    fused = (a.astype("float64") * b + a).astype("float16")
    expected = np.stack([a * b + one, b * three + one, (a + b * two) / three - a, fused], 1)
    assert (found == expected).all()


def test_constants_are_floats():
    x = np.float32(1.1)
    body = "out[0] = x[0] * 1.1; out[1] = 2.0 * sizeof(0.1); out[2] = 0x1p-3h; out[3] = bfloat(1.00390625bf);"
    assert numbers(body, 4, x=np.array([x])) == [x * np.float32(1.1), 8, 0.125, 1]


LANES = np.arange(32)


def test_shuffles():
    x = np.random.default_rng().standard_normal(32).astype("float32")
    expected = {
        "simd_shuffle(v, (i * 7) % 32)": x[LANES * 7 % 32],
        "simd_broadcast(v, 5)": np.full(32, x[5]),
        "simd_broadcast_first(v)": np.full(32, x[0]),
        "simd_shuffle_xor(v, 9)": x[LANES ^ 9],
        "simd_shuffle_down(v, 3)": np.where(LANES < 29, x[np.minimum(LANES + 3, 31)], x),
        "simd_shuffle_up(v, 3)": np.where(LANES >= 3, x[LANES - 3], x),
        "simd_shuffle_rotate_down(v, 30)": x[(LANES + 30) % 32],
        "simd_shuffle_rotate_up(v, 2)": x[(LANES - 2) % 32],
        "quad_shuffle(v, 3 - i % 4)": x[LANES // 4 * 4 + 3 - LANES % 4],
        "quad_broadcast(v, 1)": x[LANES // 4 * 4 + 1],
        "quad_shuffle_xor(v, 2)": x[LANES ^ 2],
        "quad_shuffle_down(v, 1)": np.where(LANES % 4 < 3, x[np.minimum(LANES + 1, 31)], x),
        "simd_shuffle_xor(float3(v, 0, 2 * v), 1).z": 2 * x[LANES ^ 1],
    }
    body = "float v = x[i];\n" + "\n".join(f"out[{n} * 32 + i] = {each};" for n, each in enumerate(expected))
    found = threads(body, 32, each=len(expected), x=x).reshape(-1, 32)
    for each, value in zip(expected, found, strict=True):
        assert (value == expected[each]).all(), each


def test_reductions_of_a_simdgroup():
    n = np.random.default_rng().integers(1, 4, 32).astype("int32")
    sums = np.cumsum(n)
    quads = n.reshape(8, 4)
    expected = {
        "simd_sum(v)": np.full(32, n.sum()),
        "simd_max(v)": np.full(32, n.max()),
        "simd_min(v)": np.full(32, n.min()),
        "simd_product(v % 2 + 1) % 1000": np.full(32, int(np.prod((n % 2 + 1).astype(object))) % 1000),
        "simd_and(v)": np.full(32, np.bitwise_and.reduce(n)),
        "simd_or(v)": np.full(32, np.bitwise_or.reduce(n)),
        "simd_xor(v)": np.full(32, np.bitwise_xor.reduce(n)),
        "simd_prefix_inclusive_sum(v)": sums,
        "simd_prefix_exclusive_sum(v)": sums - n,
        "simd_prefix_exclusive_product(v > 2 ? 2 : 1)": np.cumprod(np.where(n > 2, 2, 1)) // np.where(n > 2, 2, 1),
        "quad_sum(v)": quads.sum(1).repeat(4),
        "quad_max(v)": quads.max(1).repeat(4),
        "quad_prefix_inclusive_sum(v)": np.cumsum(quads, 1).ravel(),
        "simd_sum(int2(v, 1)).y": np.full(32, 32),
        "simd_any(v == 3)": np.full(32, (n == 3).any()),
        "simd_all(v > 0)": np.full(32, True),
        "(int)(ulong)simd_ballot(v == 1)": np.full(32, sum(1 << i for i in range(32) if n[i] == 1), "uint32").view(
            "int32"
        ),
        "(ulong)simd_active_threads_mask() == ~0u": np.full(32, True),
        "simd_is_first()": LANES == 0,
    }
    body = "int v = x[i];\n" + "\n".join(f"out[{k} * 32 + i] = {each};" for k, each in enumerate(expected))
    found = threads(body, 32, "int32", each=len(expected), x=n).reshape(-1, 32)
    for each, value in zip(expected, found, strict=True):
        assert (value == expected[each]).all(), each


def test_a_lane_that_is_not_there_gives_no_number():
    x = np.arange(20).astype("float32")
    found = threads("out[i] = simd_shuffle_down(x[i], 4);", 20, x=x)
    assert found[:16].tolist() == [*range(4, 20)] and np.isnan(found[16:]).all()
    assert threads("out[i] = simd_sum(x[i]);", 20, x=x).tolist() == [190.0] * 20


ATOMICS = """
kernel void k(device atomic_int* count, device atomic_float* sum, device int* order, device int* most,
              uint i [[thread_position_in_grid]]) {
  order[atomic_fetch_add_explicit(count, 1, memory_order_relaxed)] = i;
  atomic_fetch_add_explicit(sum, 0.5, memory_order_relaxed);
  device atomic_int* top = (device atomic_int*)most;
  atomic_fetch_max_explicit(top, (int)i, memory_order_relaxed);
  int old = atomic_load_explicit(top + 1, memory_order_relaxed);
  while (!atomic_compare_exchange_weak_explicit(top + 1, &old, old + 2, memory_order_relaxed, memory_order_relaxed)) {}
}"""


def test_atomics():
    program = compiled("using namespace metal;" + ATOMICS, "k")
    for each in (program, program.watched()):
        values = {
            "count": np.zeros(1, "int32"), "sum": np.zeros(1, "float32"), "order": np.full(80, -1, "int32"),
            "most": np.zeros(2, "int32"),
        }  # fmt: skip
        run(each, values, Launch((2, 1, 1), (40, 1, 1)))
        assert sorted(values["order"]) == [*range(80)]
        assert values["count"] == 80 and values["sum"] == 40 and values["most"].tolist() == [79, 160]


def test_atomics_of_a_threadgroup_and_a_plain_write_beside_them():
    text = """using namespace metal;
kernel void k(device int* out, uint i [[thread_index_in_threadgroup]]) {
  threadgroup atomic_uint count;
  if (i == 0) atomic_store_explicit(&count, 0u, memory_order_relaxed);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  atomic_fetch_add_explicit(&count, i, memory_order_relaxed);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (i == 0) out[0] = atomic_load_explicit(&count, memory_order_relaxed);
}"""
    out = np.zeros(1, "int32")
    run(compiled(text, "k").watched(), {"out": out}, Launch((1, 1, 1), (50, 1, 1)))
    assert out[0] == 49 * 25
    wrong = text.replace("  threadgroup_barrier(mem_flags::mem_threadgroup);\n  atomic_fetch", "  atomic_fetch")
    wrong = wrong.replace("atomic_store_explicit(&count, 0u, memory_order_relaxed)", "*(threadgroup uint*)&count = 0")
    with pytest.raises(LaunchError, match=r"race on threadgroup memory count\[0\].*kernels\.py:103.*kernels\.py:104"):
        run(compiled(wrong, "k").watched(), {"out": out}, Launch((1, 1, 1), (50, 1, 1)))


def test_simdgroup_barriers_order_a_simdgroup_and_no_other():
    text = """using namespace metal;
kernel void k(device int* out, uint i [[thread_index_in_threadgroup]]) {
  threadgroup int part[64];
  part[i] = i;
  simdgroup_barrier(mem_flags::mem_threadgroup);
  out[i] = part[i ^ MASK];
}"""
    out = np.zeros(64, "int32")
    run(compiled(text.replace("MASK", "31"), "k").watched(), {"out": out}, Launch((1, 1, 1), (64, 1, 1)))
    assert (out == np.arange(64) ^ 31).all()
    with pytest.raises(
        LaunchError, match=r"threadgroup memory part\[32\] is read before|race on threadgroup memory part"
    ):
        run(compiled(text.replace("MASK", "32"), "k").watched(), {"out": out}, Launch((1, 1, 1), (64, 1, 1)))


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("float4 v = 1.0; int k = i;\n v[3] = 2; out[i] = v[k - 1];",
         r"index -1 out of bounds of a vector of 4; threadgroup \(0,0,0\), thread \(0,0,0\), kernels\.py:103"),
        ("packed_float3 p = 2;\n out[i] = p[i];", r"index 3 out of bounds of a vector of 3; .* kernels\.py:103"),
        ("float a[4]; for (uint j = 0; j <= 4; ++j) a[j] = j;\n out[i] = a[i % 4];",
         r"index 4 out of bounds of an array"),
        ("threadgroup float big[9000];\n big[i] = 0; out[i] = big[i];",
         r"k declares 36000 bytes of threadgroup memory; a threadgroup may declare 32768"),
        ("\n((device float4*)(out + 1))[0] = 3;", r"misaligned address: a 'struct float4' must .*, kernels\.py:103"),
        ("while (true) out[i] += 1;", r"no end: "),
    ],
)  # fmt: skip
def test_what_goes_wrong_is_named(body: str, said: str):
    text = f"""using namespace metal;
    kernel void k(device float* out, uint i [[thread_position_in_grid]]) {{
      {body}
    }}"""
    with pytest.raises(LaunchError, match=said):
        run(compiled(text, "k").watched(), {"out": np.zeros(32, "float32")}, Launch((1, 1, 1), (32, 1, 1)))


def test_threadgroup_memory_ends_at_32_kb():
    text = """using namespace metal;
kernel void k(device float* out, threadgroup float* part [[threadgroup(0)]], uint i [[thread_position_in_grid]]) {
  threadgroup float more[1024];
  part[i] = i; more[i] = 1;
  out[i] = part[i] + more[i];
}"""
    program, out = compiled(text, "k"), np.zeros(8, "float32")
    run(program, {"out": out}, Launch((1, 1, 1), (8, 1, 1), 28 << 10))
    assert out.tolist() == [*range(1, 9)]
    said = "28673 bytes of part and 4096 declared are more than the 32768 that a threadgroup may have"
    with pytest.raises(LaunchError, match=said):
        run(program, {"out": out}, Launch((1, 1, 1), (8, 1, 1), (28 << 10) + 1))
