import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ops
from ops import target
from ops.spec import DTYPES
from tests.ops.harness import DTYPE_NAMES, check, random

TOKENS = (1, 2, 3, 5, 16, 17, 33, 70)


def operands(rng, n, k, out, x_dtype="float32", weight_dtype=None, bias_dtype=None):
    """x, weight and, where it has a dtype, bias."""
    weight = random(rng, (out, k), weight_dtype or x_dtype)
    bias = (random(rng, (out,), bias_dtype),) if bias_dtype else ()
    return random(rng, (n, k), x_dtype), weight, *bias


@pytest.mark.parametrize("x_dtype", DTYPE_NAMES)
@pytest.mark.parametrize("weight_dtype", DTYPE_NAMES)
def test_every_pair_of_dtypes(rng, x_dtype, weight_dtype):
    for n in TOKENS:
        check(ops.linear, *operands(rng, n, 100, 33, x_dtype, weight_dtype, weight_dtype))


@pytest.mark.parametrize("k, out", [(1, 1), (7, 257), (33, 7), (257, 100), (1024, 33), (1057, 7), (4100, 5)])
def test_odd_sizes(rng, k, out):
    for n in TOKENS:
        check(ops.linear, *operands(rng, n, k, out, "float32", "bfloat16", "float32"))


@pytest.mark.parametrize("n", [1, 4, 70])
def test_sizes_that_run_on_all_threads(rng, n):
    check(ops.linear, *operands(rng, n, 517, 1031, "float32", "float16", "float32"))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 300), st.sampled_from([(64, 48), (45, 19)]), st.integers(0, 2**32 - 1))
def test_any_number_of_tokens(n, sizes, seed):
    check(ops.linear, *operands(np.random.default_rng(seed), n, *sizes, bias_dtype="float32"))


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
@pytest.mark.parametrize("k, out", [(2048, 19), (1061, 70)])
def test_numbers_of_tokens_around_every_edge(rng, dtype, k, out):
    x, weight, bias = operands(rng, 513, k, out, dtype, dtype, "float32")
    for n in (*range(1, 18), *range(63, 66), *range(511, 514)):
        check(ops.linear, x[:n].copy(), weight, bias)


@pytest.mark.parametrize("k", [1, 2, 31, 33, 63, 65, 1023, 1025, 1087])
def test_pairs_of_bfloat16_that_k_does_not_fill(rng, k):
    for n in (1, 3, 18):
        check(ops.linear, *operands(rng, n, k, 9, "bfloat16"))


def runnable(name: str) -> target.Machine:
    """A machine whose code this one can run; "no pairs" is this one without its dot product of bfloat16."""
    if name == "no pairs":
        return dataclasses.replace(target.machine(), name=name, bf16=False)
    machine = target.MACHINES[name]
    if missing := machine.needs - target.features():
        pytest.skip(f"this processor has no {', '.join(sorted(missing))}")
    return machine


@pytest.mark.parametrize("name", ["no pairs", "portable", "avx2", "avx512", "avx512-bf16"])
@pytest.mark.parametrize("dtype", DTYPE_NAMES)
def test_other_machines(rng, name, dtype):
    with target.building_for(runnable(name)) as machine:
        whole = None
        x, weight, bias = operands(rng, 70, 1061, 37, dtype, dtype, "float32")
        for n in (70, 1, 5):
            arrays = x[:n].copy(), weight, bias
            template = ops.linear._request(tuple(ops.tensor(each) for each in arrays), {}).scheduled()
            assert ("bfloat16_pairs" in str(template)) == (dtype == "bfloat16" and machine.bf16)
            with ops.linear.use(template) as use:
                result = check(ops.linear, *arrays).numpy()
            assert use.hits == 1
            whole = result if whole is None else whole
            assert np.array_equal(result, whole[:n])


def test_it_compiles_for_neon():
    with target.building_for("neon"):
        for n in (1, 5, 70):
            assert "fmla" in ops.linear.source("asm", ops.Spec((n, 69), "float16"), ops.Spec((9, 69), "bfloat16"))


def test_this_machines_bfloat16(rng):
    tensors = tuple(ops.tensor(each) for each in operands(rng, 20, 64, 32, "bfloat16"))
    assert ("vdpbf16ps" in ops.linear.source("asm", *tensors)) == target.machine().bf16


@pytest.mark.parametrize("x_dtype, weight_dtype", [("float32", "bfloat16"), ("float16", "float16"), ("bfloat16",) * 2])
@pytest.mark.parametrize("k, out", [(2048, 96), (2500, 37), (13, 5)])
def test_a_tokens_result_does_not_depend_on_the_others(rng, x_dtype, weight_dtype, k, out):
    x, weight = operands(rng, 150, k, out, x_dtype, weight_dtype)
    weight = ops.tensor(weight)
    whole = ops.linear(ops.tensor(x), weight).numpy()
    for n in (1, 2, 7, 16, 17, 40):
        part = ops.linear(ops.tensor(x[n : 2 * n].copy()), weight).numpy()
        assert np.array_equal(part, whole[n : 2 * n]), f"{n} tokens differ from the same tokens among 150"


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
@pytest.mark.parametrize("n", [1, 5, 20])
def test_operands_at_any_element_offset(rng, dtype, n):
    x, weight, bias = operands(rng, n, 96, 40, dtype, dtype, dtype)
    shifted = [unaligned(each, offset) for each, offset in zip((x, weight, bias), (1, 3, 5), strict=True)]
    assert all(each.ctypes.data % 64 for each in shifted)
    check(ops.linear, *shifted)


def unaligned(array: np.ndarray, elements: int) -> np.ndarray:
    """The array at an address that is that many elements past a multiple of 64."""
    room = np.empty(array.nbytes + 128 + elements * array.itemsize, "uint8")
    start = -room.ctypes.data % 64 + elements * array.itemsize
    view = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    view[...] = array
    return view


def test_a_read_only_mapped_weight(rng, tmp_path):
    x, weight = operands(rng, 3, 31, 9)
    path = tmp_path / "weights"
    path.write_bytes(b"\0" * 4 + weight.tobytes())
    check(ops.linear, x, np.memmap(path, "float32", "r", offset=4, shape=weight.shape))


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
@pytest.mark.parametrize("biased", [False, True])
def test_the_block_definition(rng, dtype, biased):
    for n in (1, 5, 20):
        arrays = operands(rng, n, 33, 7, dtype, "bfloat16", dtype if biased else None)
        blocks = ops.linear._request(tuple(ops.tensor(each) for each in arrays), {}).blocks()
        with ops.linear.use(blocks) as use:
            check(ops.linear, *arrays)
        assert use.hits == 1


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
def test_infinities_and_nan_stay_in_their_row(rng, dtype):
    x, weight = operands(rng, 20, 69, 9, dtype)
    weight[weight == 0] = 1
    x[3, 5], x[11, 68] = np.inf, np.nan
    result = ops.linear(ops.tensor(x), ops.tensor(weight)).numpy().astype("float32")
    assert np.array_equal(np.sign(result[3]), np.sign(weight[:, 5].astype("float32"))) and np.isinf(result[3]).all()
    assert sorted(set(np.where(~np.isfinite(result))[0])) == [3, 11]
    assert np.isnan(result[11]).all()


def test_no_tokens_and_no_rows(rng):
    for n, out in ((0, 4), (3, 0)):
        assert ops.linear(*map(ops.tensor, operands(rng, n, 5, out))).shape == (n, out)


def zeros(*shape, dtype="float32"):
    return ops.tensor(np.zeros(shape, DTYPES[dtype]))


@pytest.mark.parametrize(
    "args, error, message",
    [
        ((zeros(2, 8), zeros(3, 9)), ops.ShapeError, r"linear: weight is float32\[3, 9\], expected \[out, 8\]"),
        ((zeros(2, 8), zeros(8)), ops.ShapeError, r"linear: weight is float32\[8\], expected 2 dimensions"),
        ((zeros(8), zeros(3, 8)), ops.ShapeError, r"linear: x is float32\[8\], expected 2 dimensions"),
        ((zeros(2, 0), zeros(3, 0)), ops.ShapeError, r"linear: x is float32\[2, 0\], expected .* k > 0"),
        ((zeros(2, 8), zeros(3, 8), zeros(8)), ops.ShapeError, r"linear: bias is float32\[8\], expected \[3\]"),
        ((zeros(2, 8), zeros(3, 8), zeros(1, 3)), ops.ShapeError, r"linear: bias is .*, expected 1 dimensions"),
        ((zeros(2, 8), zeros(3, 8, dtype="int8")), ops.DTypeError, r"linear: weight is int8\[3, 8\], expected one of"),
        ((zeros(2, 8, dtype="int64"), zeros(3, 8)), ops.DTypeError, r"linear: x is int64\[2, 8\], expected one of"),
        ((zeros(2, 8), zeros(3, 8), zeros(3, dtype="int32")), ops.DTypeError, r"linear: bias is int32\[3\]"),
        ((zeros(2, 8), np.zeros((3, 8))), ops.OpError, r"linear: weight is numpy.ndarray, expected .*ops.tensor"),
    ],
)
def test_wrong_arguments_are_named(args, error, message):
    with pytest.raises(error, match=message):
        ops.linear(*args)
