import copy
import gc
import pickle

import ml_dtypes
import numpy as np
import pytest
import tvm_ffi

import ops
from ops.spec import DTYPES, Dim, Spec

from .harness import random


@pytest.mark.parametrize("dtype", [name for name in DTYPES if name != "bfloat16"])
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (2, 3, 4)])
def test_numpy_both_ways_without_copying(rng, dtype, shape):
    array = np.asarray(rng.integers(0, 50, shape)).astype(dtype)
    x = ops.tensor(array)
    assert (x.shape, x.dtype, x.device, x.ndim, x.size, x.nbytes) == (
        shape, dtype, "cpu", len(shape), array.size, array.nbytes,
    )  # fmt: skip
    assert np.shares_memory(x.numpy(), array) and np.shares_memory(np.asarray(x), array)
    array[...] = 7
    assert (x.numpy() == 7).all()
    x.numpy()[...] = 9
    assert (array == 9).all()


def test_bfloat16_without_copying(rng):
    array = random(rng, (4, 3), "bfloat16")
    x = ops.tensor(array)
    assert x.dtype == "bfloat16" and np.shares_memory(x.numpy(), array)
    assert x.numpy().dtype == ml_dtypes.bfloat16
    x.numpy()[1, 1] = 2.5
    assert array[1, 1] == 2.5
    assert ops.tensor(np.ones(3, "float32"), "bfloat16").numpy().tolist() == [1, 1, 1]


def test_the_array_lives_as_long_as_the_tensor():
    x = ops.tensor(np.arange(1000, dtype="int64"))
    gc.collect()
    assert x.numpy().sum() == 499500
    array = ops.tensor(np.arange(1000, dtype="int64")).numpy()
    gc.collect()
    assert array.sum() == 499500


def test_a_read_only_array_is_copied():
    array = np.arange(4, dtype="float32")
    array.flags.writeable = False
    x = ops.tensor(array)
    assert not np.shares_memory(x.numpy(), array)
    x.numpy()[0] = 5
    assert array[0] == 0


def test_an_unaligned_array_is_copied():
    array = np.zeros(17, "uint8")[1:].view("float32")
    assert not array.flags.aligned
    x = ops.tensor(array)
    assert not np.shares_memory(x.numpy(), array) and x.numpy().flags.aligned


def test_what_is_refused_says_what_to_do():
    with pytest.raises(ops.ShapeError, match=r"shape \(3, 2\) is not contiguous; pass np.ascontiguousarray"):
        ops.tensor(np.zeros((2, 3), "float32").T)
    with pytest.raises(ops.ShapeError, match="not contiguous"):
        ops.tensor(np.zeros((4, 4), "float32")[:, ::2])
    with pytest.raises(ops.DTypeError, match=r"no op takes float64; convert with array.astype"):
        ops.tensor(np.zeros(3))
    with pytest.raises(ops.DTypeError, match="no op takes >f4"):
        ops.tensor(np.zeros(3, ">f4"))
    with pytest.raises(ops.DTypeError, match="no op takes bool"):
        ops.tensor([True, False])
    with pytest.raises(ops.DTypeError, match="unknown dtype 'float33'; known are float32"):
        ops.tensor([1.0], "float33")
    with pytest.raises(ops.OpError, match="no device 'tpu'; there are cpu, cuda, emulate"):
        ops.tensor([1.0], device="tpu")
    with pytest.raises(ops.OpError, match=r"use ops.tensor\(array\)"):
        ops.Tensor([1.0])
    with pytest.raises(ops.ShapeError, match="symbolic sizes"):
        ops.empty((Dim("n"), 3))
    with pytest.raises(ops.ShapeError, match=r"size -1; sizes are ints >= 0"):
        ops.empty((-1, 3))
    with pytest.raises(ops.ShapeError, match=r"size 2.5; sizes are ints"):
        ops.empty((2.5,))


def test_lists_and_numbers():
    assert (ops.tensor([1.5, 2]).dtype, ops.tensor([1, 2]).dtype, ops.tensor(3).dtype) == ("float32", "int64", "int64")
    assert ops.tensor([[1, 2], [3, 4]], "int32").numpy().tolist() == [[1, 2], [3, 4]]
    assert ops.tensor([]).shape == (0,)
    assert ops.tensor(np.float32(2.5)).item() == 2.5
    x = ops.tensor([1.0])
    assert ops.tensor(x) is x and ops.tensor(x, "float16").dtype == "float16"


@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0, 2)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32"])
def test_without_elements(shape, dtype):
    x = ops.tensor(np.zeros(shape, DTYPES[dtype]))
    assert x.shape == shape and x.size == x.nbytes == 0 and x.numpy().shape == shape
    assert x.reshape(-1).shape == (0,)
    assert ops.zeros(shape, dtype).numpy().shape == shape


def test_shapes_of_numpy_integers_are_plain():
    x = ops.empty((np.int64(13), np.int32(7)))
    assert x.shape == (13, 7) and all(type(size) is int for size in x.shape)
    assert x.spec is Spec((13, 7), "float32")
    assert type(ops.empty((True, 113)).shape[0]) is int
    assert x.reshape(np.int64(7), 13).shape == (7, 13)


def test_dlpack_with_numpy(rng):
    x = ops.tensor(random(rng, (3, 4), "float32"))
    array = np.from_dlpack(x)
    assert np.shares_memory(array, x.numpy())
    del x
    other = ops.empty((3, 4))
    other.numpy()[...] = np.nan
    assert np.isfinite(array).all()


def test_dlpack_copies_when_asked(rng):
    x = ops.tensor(random(rng, (3, 4), "float32"))
    values = x.numpy().copy()
    twin, shared = np.from_dlpack(x, copy=True), np.from_dlpack(x, copy=False)
    assert np.shares_memory(shared, x.numpy()) and not np.shares_memory(twin, x.numpy())
    half = ops.tensor(values, "bfloat16")
    bits = ops.tensor(tvm_ffi.from_dlpack(DLPackCopy(half)))
    x.numpy()[...] = np.nan
    half.numpy()[...] = np.nan
    del x, half
    gc.collect()
    for _ in range(20):
        ops.empty((3, 4)).numpy()[...] = 7
        ops.empty((3, 4), "bfloat16").numpy()[...] = 7
    np.testing.assert_array_equal(twin, values)
    assert (bits.dtype, bits.numpy().tolist()) == ("bfloat16", values.astype(DTYPES["bfloat16"]).tolist())


class DLPackCopy:
    """A tensor as a library sees it that asks for a copy."""

    def __init__(self, tensor):
        self.tensor = tensor

    def __dlpack__(self, **options):
        return self.tensor.__dlpack__(copy=True, **options)

    def __dlpack_device__(self):
        return self.tensor.__dlpack_device__()


def test_dlpack_with_torch(rng):
    torch = pytest.importorskip("torch", reason="torch is not installed (it is in the extra `parity`)")
    given = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    x = ops.tensor(given)
    given[0, 0] = 100
    assert x.shape == (3, 4) and x.numpy()[0, 0] == 100
    back = torch.from_dlpack(x)
    back[0, 1] = 50
    assert given[0, 1] == 50
    half = ops.tensor(torch.ones(5, dtype=torch.bfloat16))
    assert half.dtype == "bfloat16" and half.numpy().tolist() == [1] * 5
    assert torch.from_dlpack(half).dtype == torch.bfloat16
    with pytest.raises(ops.ShapeError, match="not contiguous"):
        ops.tensor(given.T)


class Exporter:
    """An array of another library: it speaks DLPack and nothing else."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


def test_dlpack_from_anything():
    array = np.arange(6, dtype="float32").reshape(2, 3)
    x = ops.tensor(Exporter(array))
    assert np.shares_memory(x.numpy(), array)
    assert ops.tensor(Exporter(array), "float16").dtype == "float16"
    with pytest.raises(ops.DTypeError, match="no op takes float64"):
        ops.tensor(Exporter(np.zeros(3)))
    with pytest.raises(ops.ShapeError, match="not contiguous"):
        ops.tensor(Exporter(array.T))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_views_along_leading_dimensions(rng, dtype):
    array = rng.integers(0, 100, (4, 5, 6)).astype(DTYPES[dtype])
    x = ops.tensor(array)
    slices = [slice(1, 3), slice(-2, None), slice(3, 1)]
    for index in [0, -1, np.int64(2), *slices, (1, 2), (0, 1, 5), (2, slice(1, 4)), ()]:
        view = x[index]
        np.testing.assert_array_equal(view.numpy(), array[index])
        assert view.size == 0 or np.shares_memory(view.numpy(), array)
    x[1].numpy()[...] = 3
    assert (array[1] == 3).all()
    np.testing.assert_array_equal(x[1:][1][2:].numpy(), array[2, 2:])
    np.testing.assert_array_equal(x[2].reshape(3, -1).numpy(), array[2].reshape(3, -1))


def test_views_that_cannot_be():
    x = ops.zeros((4, 5))
    with pytest.raises(ops.ShapeError, match="not contiguous: a view takes ints, then one slice"):
        x[::2]
    with pytest.raises(ops.ShapeError, match="not contiguous"):
        x[:, 1]
    with pytest.raises(IndexError, match=r"index 4 is out of range for axis 0 of float32\[4, 5\]"):
        x[4]
    with pytest.raises(IndexError, match="index -6 is out of range for axis 1"):
        x[0, -6]
    with pytest.raises(ops.ShapeError, match=r"3 indices for float32\[4, 5\]"):
        x[0, 0, 0]
    with pytest.raises(ops.ShapeError, match=r"takes ints and slices, not \[0\]; for more use x.numpy\(\)"):
        x[[0]]


def test_an_integer():
    for value in (0, 7, -1, 2**31 - 1, -(2**31)):
        x = ops.integer(value)
        assert (x.dtype, x.shape, x.item()) == ("int32", (1,), value)


def test_reshape():
    x = ops.tensor(np.arange(12, dtype="int32"))
    assert x.reshape(3, 4).shape == x.reshape((3, 4)).shape == x.reshape([3, -1]).shape == (3, 4)
    x.reshape(3, 4).numpy()[2, 3] = 99
    assert x.numpy()[11] == 99
    assert ops.tensor([5.0]).reshape(()).item() == 5
    for wrong in [(5,), (5, -1), (-1, -1), (0, -1), (-3, 4), (2.0, 6)]:
        with pytest.raises(ops.ShapeError):
            x.reshape(wrong)
    with pytest.raises(ops.ShapeError, match=r"cannot reshape int32\[12\] \(12 elements\) to \(5, 2\) \(10 elements\)"):
        x.reshape(5, 2)


def test_iteration_item_bool_len():
    x = ops.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert [row.numpy().tolist() for row in x] == [[1, 2], [3, 4]] and len(x) == 2
    assert [each.item() for each in x[1]] == [3, 4]
    assert isinstance(ops.tensor([3]).item(), int) and ops.tensor([[2.5]], "bfloat16").item() == 2.5
    assert ops.tensor(1.0) and not ops.tensor([0])
    with pytest.raises(ops.ShapeError, match=r"item\(\) needs one element; this is float32\[2, 2\]"):
        x.item()
    with pytest.raises(ops.ShapeError, match="ambiguous"):
        bool(x)
    with pytest.raises(ops.ShapeError, match="no length"):
        len(ops.tensor(1.0))


def test_array_protocol_copies_only_when_asked():
    x = ops.tensor([1.0, 2.0])
    assert np.shares_memory(np.asarray(x), x.numpy())
    assert np.shares_memory(np.asarray(x, dtype="float32"), x.numpy())
    assert not np.shares_memory(np.array(x), x.numpy())
    assert np.shares_memory(np.array(x, copy=False), x.numpy())
    assert np.asarray(x, dtype="float64").dtype == np.float64
    with pytest.raises(ValueError, match="needs a copy, and copy=False forbids it"):
        np.array(x, dtype="float64", copy=False)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_copies_and_pickles(dtype):
    x = ops.tensor(np.arange(6).reshape(2, 3), dtype)
    shallow, deep, pickled = copy.copy(x), copy.deepcopy(x), pickle.loads(pickle.dumps(x))
    for each in (shallow, deep, pickled):
        assert each.spec is x.spec and each.numpy().tolist() == x.numpy().tolist()
    assert np.shares_memory(shallow.numpy(), x.numpy())
    assert not np.shares_memory(deep.numpy(), x.numpy()) and not np.shares_memory(pickled.numpy(), x.numpy())


def test_a_shallow_copy_of_pool_memory_keeps_it():
    x = ops.zeros((37, 3))
    shallow = copy.copy(x)
    del x
    fresh = ops.empty((37, 3))
    assert not np.shares_memory(shallow.numpy(), fresh.numpy())


def test_specs_are_one_object_however_they_are_made():
    spec = Spec((2, 3), "float16")
    assert pickle.loads(pickle.dumps(spec)) is spec and copy.deepcopy(spec) is spec
    assert spec.like((3, 2)).like((2, 3)) is spec
    assert repr(Spec((Dim("n", 2, 16), 3), "int8")) == "int8[n:2-16, 3]"
    with pytest.raises(ops.ShapeError, match="no fixed size"):
        Spec((Dim("n"), 3), "int8").nbytes  # noqa: B018
