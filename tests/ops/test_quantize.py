"""Packed weights: their layout, the NumPy inverse, and the integer kernel against its exact reference."""

import numpy as np
import pytest
import tvm
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from ops import DTypeError, ShapeError, quantize, target
from ops.quantize import FORMATS, Format
from ops.schedule import quantized
from ops.schedule.vector import i64
from ops.tolerance import KERNEL, relative_error

FORMS = {
    **FORMATS,
    "q2": Format("q2", bits=2, group=16, minimum=True, scale="float32"),
    "q4m": Format("q4m", bits=4, minimum=True),
    "q6_k": Format("q6_k", bits=8, group=16, offset=128, scale="float32"),  # GGUF's, as its values are held
    "mxfp4": Format("mxfp4", bits=4, levels=(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12), scale="float32"),
    "table": Format("table", bits=4, levels=(-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)),
}
RUNS_HERE = ["native", *(name for name, each in target.MACHINES.items() if each.needs <= target.features())]


def machine(name):
    return target.machine() if name == "native" else target.MACHINES[name]


def primfunc(rows, k, form, low, high, dtype="float32"):
    """The kernel for `low` to `high` tokens."""
    n = i64(1) if high == 1 else tirx.Var("n", "int64")
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("linear")
        x = T.arg("x", T.buffer((n, i64(k)), dtype, align=np.dtype(dtype).itemsize))
        weight = T.arg("weight", T.buffer((i64(form.nbytes((rows, k))),), "uint8", align=1))
        y = T.arg("y", T.buffer((n, i64(rows)), "float32", align=4))
        quantized.emit(quantized.Product(x, weight, y, n, low, high, rows, form, lambda token, row, value: value))
    return builder.get()


def compiled(*args):
    return tvm.compile(primfunc(*args), target=target.host())["linear"]


def reference(x, weight, form):
    return quantize.round_activations(x, form) @ np.asarray(weight, "float64").T


@pytest.mark.parametrize("name", RUNS_HERE)
@pytest.mark.parametrize("form", FORMS)
def test_kernel_equals_its_integer_reference(rng, name, form):
    form = FORMS[form]
    with target.building_for(machine(name)):
        rows, k = int(rng.integers(16, 90)), int(rng.integers(1, 200))
        weight = rng.standard_normal((rows, k)).astype("float32")
        packed = quantize.pack(weight, form)
        values = quantize.unpack(packed, weight.shape, form)
        tokens, whole = rng.standard_normal((300, k)).astype("float32"), None
        for n, low, high in ((300, 17, None), (5, 2, 16), (1, 1, 1)):
            x = tokens[:n].copy()
            y = np.full((n, rows), np.nan, "float32")
            compiled(rows, k, form, low, high)(x, packed, y)
            assert relative_error(y, reference(x, values, form)) <= KERNEL["float32"]
            whole = y if whole is None else whole
            assert np.array_equal(y, whole[:n])  # a token's result does not depend on the others, to the bit


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(1, 1), (16, 32), (17, 33), (40, 100)])
def test_packing_and_its_inverse(rng, form, shape):
    form = FORMS[form]
    weight = (rng.uniform(0.1, 1, shape) * rng.choice([-1, 1], shape)).astype("float32")
    packed = quantize.pack(weight, form)
    assert packed.nbytes == form.nbytes(shape)
    values = quantize.unpack(packed, shape, form)
    assert values.format == form
    spread = np.abs(weight).max() * (2 if form.minimum else 1)
    levels = form.values
    step = np.diff(np.sort(levels)).max() / (np.abs(levels).max() if not form.minimum else np.ptp(levels))
    assert np.abs(values - weight).max() <= spread * step * 1.01
    # What is packed already is packed without loss.
    codes, scales, minima = quantize.take_apart(packed, shape, form)
    exact = form.values[codes] * scales.astype("float64")[..., None]
    exact = exact if minima is None else exact + minima.astype("float64")[..., None]
    assert np.allclose(values, exact.reshape(shape[0], -1)[:, : shape[1]], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_token_that_is_not_finite_is_nan_and_harms_no_other(rng, bad):
    form = FORMATS["q4"]
    weight = rng.standard_normal((20, 64)).astype("float32")
    packed = quantize.pack(weight, form)
    x = rng.standard_normal((20, 64)).astype("float32")
    clean = np.empty((20, 20), "float32")
    run = compiled(20, 64, form, 17, None)
    run(x, packed, clean)
    x[3, 40] = bad
    y = np.empty((20, 20), "float32")
    run(x, packed, y)
    assert np.isnan(y[3]).all()
    assert np.array_equal(np.delete(y, 3, 0), np.delete(clean, 3, 0))


def test_tiny_and_huge_activations(rng):
    form = FORMATS["q8"]
    weight = rng.standard_normal((16, 32)).astype("float32")
    packed = quantize.pack(weight, form)
    values = quantize.unpack(packed, weight.shape, form)
    run = compiled(16, 32, form, 1, 1)
    for scale in (0.0, 1e-38, 1e-30, 1e30):
        x = (rng.standard_normal((1, 32)) * scale).astype("float32")
        y = np.full((1, 16), np.nan, "float32")
        run(x, packed, y)
        assert relative_error(y, reference(x, values, form)) <= KERNEL["float32"]


def test_what_cannot_be_packed_is_refused():
    with pytest.raises(DTypeError, match="does not fit the float16 scales of q4"):
        quantize.pack(np.full((1, 32), 1e30, "float32"), "q4")
    with pytest.raises(ShapeError, match=r"rows, inputs"):
        quantize.pack(np.zeros(32, "float32"), "q4")
    with pytest.raises(DTypeError, match="expected 2, 4 or 8 bits"):
        Format("q3", bits=3)
    for bits in (4, 8):
        with pytest.raises(DTypeError, match="expected one a code, of 2 or 4 bits"):
            Format("levels", bits=bits, levels=(0,) * (2 if bits == 4 else 256))
    for bits, offset, levels in ((8, 0, None), (8, 256, None), (2, 0, (0, 1, 2, 300))):
        with pytest.raises(DTypeError, match="expected -128 to 127"):
            Format("wide", bits=bits, offset=offset, levels=levels)
