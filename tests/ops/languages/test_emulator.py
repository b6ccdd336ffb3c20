"""What a GPU's threads do together, emulated: warps, barriers, shared memory, atomics; and what is wrong to do."""

from __future__ import annotations

import numpy as np
import pytest

from ops.languages.base import Launch, LaunchError
from ops.spec import DTYPES

from .emulation import compiled, kernel, run, threads

LANE = np.arange(32)


def fails(body: str, count: int = 64, blocks: int = 1, shared: int = 0, before: str = "", **arrays: np.ndarray) -> str:
    """What the checked library says of a body that is wrong; `out` is int32, one for each thread."""
    arrays = {**arrays, "out": np.zeros(count * blocks, "int32")}
    program = kernel(body, arrays, before)
    with pytest.raises(LaunchError) as raised:
        run(program.watched(), arrays, Launch((blocks, 1, 1), (count, 1, 1), shared))
    return str(raised.value)


def test_indices_in_three_dimensions():
    text = """__global__ void k(int* out) {
      int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
      int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
      dim3 size = blockDim; uint3 at = threadIdx;
      out[block * size.x * size.y * size.z + thread] = 100 * at.x + 10 * at.y + at.z + 1000 * blockIdx.z
        + 5000 * warpSize;
    }"""
    out = np.zeros((3, 2, 2, 4, 3, 5), "int32")  # grid z y x, block z y x
    run(compiled(text, "k"), {"out": out}, Launch((2, 2, 3), (5, 3, 4)))
    grid_z, _, _, z, y, x = np.indices(out.shape)
    assert (out == 100 * x + 10 * y + z + 1000 * grid_z + 5000 * 32).all()


@pytest.mark.parametrize("width", [32, 16, 4, 1])
def test_shuffles(width: int):
    group, within = LANE // width * width, LANE % width
    expected = {
        "__shfl_sync(~0u, v, 5, {w})": group + 5 % width,
        "__shfl_sync(~0u, v, i + 3, {w})": group + (LANE + 3) % width,
        "__shfl_up_sync(~0u, v, 3, {w})": np.where(within >= 3, LANE - 3, LANE),
        "__shfl_down_sync(~0u, v, 3, {w})": np.where(within + 3 < width, LANE + 3, LANE),
        "__shfl_xor_sync(~0u, v, 3, {w})": np.where((LANE ^ 3) // width <= LANE // width, LANE ^ 3, LANE),
    }
    body = "\n".join(f"out[32 * {n} + i] = {each.format(w=width)};" for n, each in enumerate(expected))
    arrays = {"out": np.zeros((len(expected), 32), "int32")}
    run(kernel(f"int v = 7 * i; {body}", arrays), arrays, Launch(block=(32, 1, 1)))
    for row, (what, lanes) in zip(arrays["out"], expected.items(), strict=True):
        assert (row == 7 * lanes).all(), what


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int64"])
def test_shuffles_of_every_type(dtype: str):
    x = (np.random.default_rng().standard_normal(32) * 1000).astype(DTYPES[dtype])
    assert (threads("out[i] = __shfl_xor_sync(0xffffffff, x[i], 1);", 32, dtype, x=x) == x[LANE ^ 1]).all()


def test_shuffles_of_some_lanes():
    body = "out[i] = -1; if (i % 4 == 1) out[i] = __shfl_sync(0x22222222u, i, 5); else if (i < 8) out[i] = 100;"
    assert (threads(body, 32) == np.where(LANE % 4 == 1, 5, np.where(LANE < 8, 100, -1))).all()


def test_votes_and_reductions():
    x = np.random.default_rng().integers(-1000, 1000, 32).astype("int32")
    mask = int(sum(1 << int(i) for i in LANE[x > 0]))
    unsigned = x.astype("uint32")
    expected = {
        "(int)__ballot_sync(~0u, x[i] > 0)": np.uint32(mask).astype("int32"),
        "__any_sync(~0u, x[i] == x[3])": 1,
        "__all_sync(~0u, x[i] == x[3])": 0,
        "__all_sync(~0u, x[i] > -2000)": 1,
        "__reduce_add_sync(~0u, x[i])": x.sum(),
        "__reduce_min_sync(~0u, x[i])": x.min(),
        "__reduce_max_sync(~0u, x[i])": x.max(),
        "(int)__reduce_max_sync(~0u, (unsigned)x[i])": unsigned.max().astype("int32"),
        "(int)__reduce_or_sync(~0u, (unsigned)x[i])": np.bitwise_or.reduce(unsigned).astype("int32"),
        "(int)__reduce_xor_sync(~0u, (unsigned)x[i])": np.bitwise_xor.reduce(unsigned).astype("int32"),
        "__popc(__match_any_sync(~0u, i % 3))": np.array([11, 11, 10])[LANE % 3],
    }
    body = "\n".join(f"out[32 * {n} + i] = {each};" for n, each in enumerate(expected))
    arrays = {"x": x, "out": np.zeros((len(expected), 32), "int32")}
    run(kernel(body, arrays), arrays, Launch(block=(32, 1, 1)))
    for row, (what, value) in zip(arrays["out"], expected.items(), strict=True):
        assert (row == value).all(), what


def test_barriers_that_count():
    body = """
      int n = __syncthreads_count(i % 3 == 0), any = __syncthreads_or(i == 70), all = __syncthreads_and(i < 70);
      out[i] = 100 * n + 10 * any + all;
    """
    assert (threads(body, 100) == 100 * 34 + 10).all()


def test_atomics():
    body = """
      __shared__ int bins[8];
      __shared__ float total;
      if (i < 8) bins[i] = 0;
      if (i == 0) total = 0.0f;
      __syncthreads();
      atomicAdd(&bins[i % 8], i);
      atomicAdd(&total, 0.5f);
      int old = atomicMax(extremes, i); (void)old;
      atomicMin(extremes + 1, -i);
      atomicCAS(extremes + 2, 0, 77);
      __syncthreads();
      out[i] = bins[i % 8] + (int)total;
    """
    arrays = {"extremes": np.zeros(3, "int32"), "out": np.zeros(100, "int32")}
    program = kernel(body, arrays)
    for each in (program, program.watched()):
        arrays["extremes"][:] = 0
        run(each, arrays, Launch(block=(100, 1, 1)))
        i = np.arange(100)
        assert (arrays["out"] == np.array([i[i % 8 == n].sum() for n in range(8)])[i % 8] + 50).all()
        assert arrays["extremes"].tolist() == [99, -99, 77]


def test_dynamic_shared_memory():
    body = "extern __shared__ __align__(16) int line[]; line[i] = i; __syncthreads(); out[i] = line[63 - i];"
    assert (threads(body, 64, shared=256) == 63 - np.arange(64)).all()
    assert "dynamic shared memory[32] written out of bounds: dynamic shared memory has 32 elements" in fails(
        body, shared=128
    )


def test_each_block_starts_with_unwritten_shared_memory():
    body = "__shared__ float kept[64];\nfloat before = kept[threadIdx.x];\nkept[threadIdx.x] = 1; out[i] = before == 1;"
    arrays = {"out": np.zeros(128, "int32")}
    program = kernel(body, arrays)
    run(program, arrays, Launch((2, 1, 1), (64, 1, 1)))
    assert not arrays["out"].any()  # it is NaN, in the other block too
    with pytest.raises(
        LaunchError, match=r"kept\[0\] is read before .*block \(0,0,0\), thread \(0,0,0\), kernels.py:101"
    ):
        run(program.watched(), arrays, Launch((2, 1, 1), (64, 1, 1)))


# Numbers


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_number_of_16_bits(dtype: str):
    every = np.arange(2**16, dtype="uint16").view(DTYPES[dtype])
    text = f"""__global__ void k(const {"half" if dtype == "float16" else "nv_bfloat16"}* x, float* wide, int n) {{
      int i = blockIdx.x * blockDim.x + threadIdx.x;
      if (i < n) wide[i] = x[i];
    }}"""
    wide = np.zeros(2**16, "float32")
    run(compiled(text, "k"), {"x": every, "wide": wide, "n": 2**16}, Launch((64, 1, 1), (1024, 1, 1)))
    assert np.array_equal(wide, every.astype("float32"), equal_nan=True)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_arithmetic_of_16_bits_is_rounded_once(dtype: str):
    spelled = {"float16": "half", "bfloat16": "nv_bfloat16"}[dtype]
    rng = np.random.default_rng()
    bits = rng.integers(0, 2**16, (3, 2**15), "uint16")
    a, b, c = (row.view(DTYPES[dtype]) for row in bits)
    wide = np.concatenate(
        [rng.integers(0, 2**32, 2**14, "uint32").view("float32"), rng.standard_normal(2**14, "float32")]
    )
    text = """__global__ void k(const T* a, const T* b, const T* c, const float* wide, T* out, int n) {
      int i = blockIdx.x * blockDim.x + threadIdx.x;
      out[i] = a[i] + b[i]; out[n + i] = a[i] - b[i]; out[2 * n + i] = a[i] * b[i]; out[3 * n + i] = a[i] / b[i];
      out[4 * n + i] = T(wide[i]); out[5 * n + i] = __hfma(a[i], b[i], c[i]); out[6 * n + i] = hsqrt(__habs(a[i]));
    }""".replace("T*", f"{spelled}*").replace("T(", f"{spelled}(")
    out = np.zeros((7, len(a)), DTYPES[dtype])
    values = {"a": a, "b": b, "c": c, "wide": wide, "out": out, "n": len(a)}
    run(compiled(text, "k"), values, Launch((len(a) // 256, 1, 1), (256, 1, 1)))
    with np.errstate(all="ignore"):
        x, y, z = (each.astype("float64") for each in (a, b, c))
        exact = [x + y, x - y, x * y, x / y, wide.astype("float64"), x * y + z, np.sqrt(np.abs(x))]
        for row, (got, value) in enumerate(zip(out, exact, strict=True)):
            expected = value.astype("float32").astype(DTYPES[dtype]) if row < 5 else _rounded(value, dtype)
            same = (got == expected) | (np.isnan(got) & np.isnan(expected))
            assert same.all(), (row, a[~same][:3], b[~same][:3], c[~same][:3], got[~same][:3], expected[~same][:3])


def _rounded(value: np.ndarray, dtype: str) -> np.ndarray:
    """To 16 bits at once, ties to even: the nearer of the two neighbours of a first guess."""
    guess = value.astype("float32").astype(DTYPES[dtype])
    bits = guess.view("int16").astype("int32")
    best = guess.copy()
    for step in (-1, 1):
        other = (bits + step).astype("int16").view(DTYPES[dtype])
        old, new = np.abs(best.astype("float64") - value), np.abs(other.astype("float64") - value)
        better = (new < old) | ((new == old) & ((bits + step) % 2 == 0))
        best = np.where(better & np.isfinite(other) & np.isfinite(guess), other, best)
    return best


def test_pairs_of_halves_and_vectors():
    x = np.random.default_rng().standard_normal(64).astype("float16")
    body = """
      half2 pair = reinterpret_cast<half2*>(x)[i], twice = __hadd2(pair, pair) * __float2half2_rn(0.5f);
      float2 wide = __half22float2(twice);
      float4 four = make_float4(wide.x, wide.y, 0.0f, 1.0f);
      reinterpret_cast<half2*>(out)[i] = __floats2half2_rn(four.x + four.w, four.y - four.z);
    """
    given = {"x": x, "out": np.zeros(64, "float16")}
    program = kernel(body, given)
    run(program.watched(), given, Launch(block=(32, 1, 1)))
    expected = x.astype("float32") + np.tile([1, 0], 32)
    assert (given["out"] == expected.astype("float16")).all()


def test_integers():
    body = """
      unsigned u = 0x9e3779b9u * (i + 1); int s = (int)u;
      unsigned sum = __popc(u) + __clz(s) * 7 + __ffs(s) * 11 + __brev(u) + __umulhi(u, u) + __byte_perm(u, s, 0x3214);
      out[i] = (int)sum + __dp4a(s, s, 3) + __float2int_rn(2.5f) + __float2int_rz(-2.7f) + min(i, 5) + max(i, 5);
    """
    u = (0x9E3779B9 * np.arange(1, 33, dtype="uint64")) % 2**32
    s = u.astype("uint32").view("int32").astype("int64")
    bits = [f"{int(each):032b}" for each in u]
    total = [
        b.count("1") + (len(b) - len(b.lstrip("0"))) * 7 + (len(b) - len(b.rstrip("0")) + 1) * 11 + int(b[::-1], 2)
        for b in bits
    ]
    bytes_ = s.astype("int32").view("int8").reshape(-1, 4).astype("int64")
    selector = [0x4, 0x1, 0x2, 0x3]  # bytes of the result from the lowest: of b its lowest, then of a
    parts = [(u >> (8 * (n % 4)) & 255) << (8 * place) for place, n in enumerate(selector)]
    permuted = parts[0] | parts[1] | parts[2] | parts[3]
    expected = np.array(total, "uint64") + (u * u >> 32) + permuted
    expected = expected.astype("int64") + (bytes_**2).sum(1) + 3 + 2 - 2 + np.minimum(LANE, 5) + np.maximum(LANE, 5)
    assert (threads(body, 32) == expected.astype("uint32").view("int32")).all()


# What is wrong


def test_waits_that_never_end():
    said = fails("if (i < 40) __syncthreads();\nelse __shfl_sync(~0u, i, 0);")
    assert (
        "divergent barrier: thread (0,0,0) waits at __syncthreads(), kernels.py:100, where thread (40,0,0) never"
        in said
    )
    assert "it waits at __shfl_sync(), kernels.py:101" in said
    said = fails("if (i % 2) __syncthreads();\nelse __syncwarp();", 32)
    assert "a warp that never meets: thread (0,0,0) waits at __syncwarp(), kernels.py:101, where thread (1,0,0)" in said
    assert said.endswith("never comes: it waits at __syncthreads(), kernels.py:100; block (0,0,0)")
    said = fails("__shared__ volatile int flag;\nif (i == 0) flag = 0;\n__syncthreads();\nwhile (flag == 0) {}", 32)
    assert said.startswith(
        "no end: after 67108864 accesses to memory no thread of the block has ended, or come to a barrier"
    )
    assert "kernels.py:103" in said


def test_a_thread_that_waits_for_another_gets_what_it_waits_for():
    body = """
      __shared__ int flag;
      if (i == 0) flag = 0;
      __syncthreads();
      if (i == 40) atomicExch(&flag, 1);
      while (atomicAdd(&flag, 0) == 0) {}
      out[i] = atomicAdd(&flag, 0);
    """
    arrays = {"out": np.zeros(64, "int32")}
    run(kernel(body, arrays).watched(), arrays, Launch(block=(64, 1, 1)))
    assert (arrays["out"] == 1).all()


def test_races_within_a_warp():
    body = "__shared__ int t[32];\nt[i] = i;\n{sync}out[i] = t[31 - i];"
    assert (threads(body.replace("{sync}", "__syncwarp();\n"), 32) == 31 - LANE).all()
    said = fails(body.replace("{sync}", ""), 32)
    assert "race on shared memory t[" in said
    assert "write kernels.py:101, read kernels.py:102" in said or "read kernels.py:102, write kernels.py:101" in said
    two = "__shared__ int t[64];\nt[i] = i;\n__syncwarp();\nout[i] = t[63 - i];"  # a warp's barrier, two warps
    assert "race on shared memory t[" in fails(two, 64)


def test_one_value_written_by_all_is_no_race():
    assert (threads("__shared__ int t; t = 5; __syncthreads(); out[i] = t;", 64) == 5).all()
    assert (threads("__shared__ int t; t = 5; out[i] = t;", 64) == 5).all()
    assert "race on shared memory t[0] between threads (0,0,0) and (1,0,0)" in fails(
        "__shared__ int t; t = i; __syncthreads(); out[i] = t;"
    )


def test_atomics_beside_plain_accesses():
    said = fails("atomicAdd(out, 1);\nif (i == 40) out[0] = 3;")
    assert said.startswith("race on global memory out[0] between threads ")
    assert "atomic kernels.py:100" in said
    assert "write kernels.py:101" in said


def test_blocks_that_wait_for_each_other_by_a_fence():
    body = """
      __shared__ int last;
      out[i] = i;
      __threadfence();
      __syncthreads();
      if (threadIdx.x == 0) last = atomicAdd(done, 1) == gridDim.x - 1;
      __syncthreads();
      if (last && threadIdx.x == 0) for (int j = 1; j < gridDim.x * blockDim.x; ++j) out[0] += out[j];
    """
    assert threads(body, 32, blocks=3, done=np.zeros(1, "int32"))[0] == 96 * 95 // 2
    said = fails(body.replace("__threadfence();", ""), 32, 3, done=np.zeros(1, "int32"))
    assert "race on global memory out[" in said
    assert "blocks run in no order" in said


def test_addresses_in_no_array():
    said = fails("out[i] = *reinterpret_cast<int*>(64ll + 4 * i);")
    assert (
        said == "4 bytes at address 0x40 are read, which is in no array; block (0,0,0), thread (0,0,0), kernels.py:100"
    )
    said = fails("__shared__ int* of_first;\nint own = i; int* p = &own; if (i == 0) of_first = p;\n__syncthreads();\n"
                 "out[i] = *of_first + *p;")  # fmt: skip
    assert (
        "the local memory of thread (0,0,0) is read by another; block (0,0,0), thread (1,0,0), kernels.py:103" in said
    )


def test_misaligned_vectors():
    x = np.zeros(64, "float32")
    said = fails("out[i] = (int)reinterpret_cast<float4*>(x + 4 * (i % 8) + 1)->x;", x=x)
    assert "misaligned address" in said
    assert "float4" in said
    assert "block (0,0,0), thread (0,0,0), kernels.py:100" in said


def test_lanes_that_are_not_there():
    said = fails("out[i] = __shfl_down_sync(~0u, i, 16);", 40)
    assert said == (
        "__shfl_down_sync(): thread (32,0,0) reads lane 16, which does not exist or has ended; kernels.py:100; "
        "block (0,0,0)"
    )
    assert "is lane 1, which its own mask 0x1 does not name; kernels.py:100" in fails("out[i] = __shfl_sync(1u, i, 0);")


def test_assertions():
    assert "assertion failed: i < 40: thread (40,0,0), kernels.py:100; block (0,0,0)" in fails("assert(i < 40);")


@pytest.mark.parametrize(
    ("launch", "said"),
    [
        (Launch(block=(2048, 1, 1)), r"blocks of \(2048, 1, 1\) threads: a block has 1 to 1024 threads"),
        (Launch(block=(0, 1, 1)), r"a block has 1 to 1024 threads"),
        (Launch(grid=(0, 1, 1)), r"a grid at least one block"),
        (Launch(shared=1 << 20), r"1048576 bytes of dynamic shared memory and \d+ declared are more than the 232448"),
    ],
)
def test_launches_that_are_refused(launch: Launch, said: str):
    arrays = {"out": np.zeros(4, "int32")}
    with pytest.raises(LaunchError, match=said):
        run(kernel("out[i] = i;", arrays), arrays, launch)


def test_local_memory_has_a_limit():
    with pytest.raises(Exception, match=r"frame size of .* bytes is larger than"):
        kernel("volatile int own[100000]; own[i] = i; out[i] = own[i];", {"out": np.zeros(4, "int32")})
