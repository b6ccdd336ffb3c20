"""Packed weights as tensors, and the ops that take them."""

import copy
import pickle

import numpy as np
import pytest

import ops
from ops import quantize, target
from ops.quantize import FORMATS
from tests.ops.harness import DTYPE_NAMES, check, random


def packed(rng, rows, k, form):
    return ops.tensor(random(rng, (rows, k), "float32"), form)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("k, out", [(1, 1), (7, 257), (32, 16), (33, 7), (100, 33), (1024, 40), (2500, 19)])
def test_linear(rng, form, k, out):
    weight = packed(rng, out, k, form)
    for n in (1, 2, 3, 8, 9, 15, 16, 17, 33, 70):
        check(ops.linear, random(rng, (n, k), "float32"), weight)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", DTYPE_NAMES)
def test_linear_of_every_dtype_with_bias(rng, form, dtype):
    for n in (1, 5, 40):
        bias = random(rng, (33,), dtype)
        result = check(ops.linear, random(rng, (n, 96), dtype), packed(rng, 33, 96, form), bias)
        assert result.dtype == dtype


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("n", [1, 6, 64])
def test_linear_on_all_threads(rng, form, n):
    check(ops.linear, random(rng, (n, 544), "float32"), packed(rng, 1031, 544, form))


@pytest.mark.parametrize("form", FORMATS)
def test_numbers_of_tokens_around_every_edge(rng, form):
    x, weight = random(rng, (513, 1061), "float32"), packed(rng, 70, 1061, form)
    whole = ops.linear(ops.tensor(x), weight).numpy()
    for n in (*range(1, 18), *range(63, 66), *range(511, 514)):
        result = check(ops.linear, x[:n].copy(), weight).numpy()
        assert np.array_equal(result, whole[:n]), "a token's result depends on the others"


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("biased", [False, True])
def test_the_block_definition_of_linear(rng, form, biased):
    for n in (1, 5, 20):
        x, weight = ops.tensor(random(rng, (n, 100), "float32")), packed(rng, 33, 100, form)
        arguments = (x, weight, ops.tensor(random(rng, (33,), "float32"))) if biased else (x, weight)
        with ops.linear.use(ops.linear._request(arguments, {}).blocks()) as use:
            check(ops.linear, *arguments)
        assert use.hits == 1


@pytest.mark.parametrize("form", FORMATS)
def test_linear_is_near_the_float_product(rng, form):
    """Of normal values, the error is that of rounding them evenly: of weights, and of activations to 8 bits."""
    x, weight = random(rng, (20, 2048), "float32"), random(rng, (200, 2048), "float32")
    exact = x.astype("float64") @ weight.astype("float64").T
    result = ops.linear(ops.tensor(x), ops.tensor(weight, form)).numpy()
    error = np.sqrt(np.mean((result - exact) ** 2) / np.mean(exact**2))
    # A group's largest of 32 normal values is below 5 all but surely; steps are a 2**(bits - 1)th of it.
    step = 5 / 2 ** (FORMATS[form].bits - 1)
    assert error < (step + 5 / 127) / np.sqrt(12) * 1.2


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("n", [1, 5, 20])
def test_a_packed_weight_at_any_address(rng, form, n):
    spec = ops.Spec((40, 96), form)
    room = np.empty(spec.nbytes + 64, "uint8")
    for offset in (1, 3):
        data = room[offset : offset + spec.nbytes]
        quantize.pack(random(rng, (40, 96), "float32"), form, data)
        check(ops.linear, random(rng, (n, 96), "float32"), ops.tensor_from_packed(data, spec))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_token_that_is_not_finite_is_nan(rng, bad):
    weight, x = packed(rng, 20, 64, "q8"), random(rng, (20, 64), "float32")
    clean = ops.linear(ops.tensor(x.copy()), weight).numpy()
    x[3, 40] = bad
    result = check(ops.linear, x, weight).numpy()
    assert np.isnan(result[3]).all()
    assert np.array_equal(np.delete(result, 3, 0), np.delete(clean, 3, 0))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", [None, *DTYPE_NAMES])
@pytest.mark.parametrize("n", [1, 4, 33])
def test_embedding(rng, form, dtype, n):
    ids = rng.integers(0, 50, n).astype("int32")
    result = check(ops.embedding, ids, packed(rng, 50, 70, form), tolerance=0.0, dtype=dtype)
    assert result.dtype == (dtype or "float32")


def test_embedding_refuses_ids_outside_the_vocabulary(rng):
    for wrong in (-1, 50):
        with pytest.raises(ops.KernelError, match=r"ids hold a value outside \[0, 50\)"):
            ops.embedding(ops.tensor(np.array([3, wrong], "int32")), packed(rng, 50, 32, "q4"))


@pytest.mark.parametrize("form", FORMATS)
def test_a_packed_tensor(rng, form):
    values = random(rng, (30, 40), "float32")
    x = ops.tensor(values, form)
    assert (x.shape, x.dtype, x.ndim, x.size) == ((30, 40), form, 2, 1200)
    assert x.nbytes == FORMATS[form].nbytes((30, 40)) and x.spec.format is FORMATS[form]
    values = x.numpy()
    assert isinstance(values, quantize.Values) and values.dtype == "float32" and values.format is FORMATS[form]
    assert np.array_equal(np.asarray(x, "float64"), x.numpy())
    assert np.array_equal(ops.tensor(x, "float32").numpy(), x.numpy())
    assert np.array_equal(ops.tensor(x.numpy(), form).numpy(), x.numpy()), "what is packed is packed without loss"
    for twin in (copy.copy(x), copy.deepcopy(x), pickle.loads(pickle.dumps(x))):
        assert twin.dtype == form and np.array_equal(twin.numpy(), x.numpy())
    assert np.array_equal(ops.zeros((30, 40), form).numpy(), np.zeros((30, 40)))
    assert repr(x).startswith(f"{form}[30, 40] on cpu\nmin ") and "map of the values" in x._repr_html_()


@pytest.mark.parametrize("form", FORMATS)
def test_a_huge_packed_tensor_is_shown_by_a_sample(rng, form):
    block = random(rng, (1003, 1100), "float32")
    x = ops.tensor(np.tile(block, (8, 1)), form)
    shown = repr(x)
    assert "sampled values" in shown
    assert f"{x.numpy()[-1, 0].item() + 0.0:.4g}" in shown.splitlines()[-1]
    assert "map of the values" in x._repr_html_()


def test_what_a_packed_tensor_has_not():
    x = ops.zeros((30, 40), "q8")
    with pytest.raises(ops.ShapeError, match="has no views"):
        x[0]
    with pytest.raises(ops.ShapeError, match="no other shape"):
        x.reshape(1200)
    with pytest.raises(ValueError, match="are a copy"):
        np.asarray(x, copy=False)
    with pytest.raises(ops.OpError, match="no other library reads"):
        np.from_dlpack(x)
    with pytest.raises(ops.DTypeError, match=r"add: x is q8\[30, 40\]"):
        x + x
    with pytest.raises(ops.ShapeError, match=r"a packed weight is \[rows, inputs\]"):
        ops.Spec((3,), "q4")
    with pytest.raises(ops.ShapeError, match=r"takes 1088 bytes; given uint8 \[7\]"):
        ops.tensor_from_packed(np.zeros(7, "uint8"), ops.Spec((32, 32), "q8"))
    with pytest.raises(ops.DTypeError, match=r"unknown dtype .q5.; known are .*q4, q8"):
        ops.tensor(np.zeros((3, 3), "float32"), "q5")


def test_a_pickle_of_another_machine_is_refused():
    other = target.MACHINES["avx2" if target.lanes() != 8 else "avx512"]
    with target.building_for(other):
        saved = pickle.dumps(ops.zeros((30, 40), "q4"))
    with pytest.raises(ops.OpError, match=f"packed for vectors of {other.lanes} lanes"):
        pickle.loads(saved)
