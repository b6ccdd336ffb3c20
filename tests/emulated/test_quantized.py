"""The kernels for packed weights on every machine: equal to the same integer reference as on this one."""

import numpy as np
import pytest

from debug.tolerance import KERNEL, relative_error
from ops import quantize, target
from ops.spec import DTYPES
from tests.ops.test_quantize import FORMS, primfunc, reference

pytestmark = pytest.mark.emulated
RANGES = ((1, 1), (2, 16), (17, None))


class Weight:
    """A packed weight [rows, k] and its product with tokens, on an emulated machine."""

    def __init__(self, emulator, form, shape, packed):
        self.emulator, self.form, self.shape, self.packed = emulator, form, shape, packed
        self.values = quantize.unpack(packed, shape, form)

    @classmethod
    def random(cls, rng, emulator, form, shape):
        return cls(emulator, form, shape, quantize.pack(rng.standard_normal(shape).astype("float32"), form))

    def check(self, x):
        """The product, once it is seen to be right."""
        y = np.full((len(x), self.shape[0]), np.nan, "float32")
        limits = next((low, high) for low, high in RANGES if high is None or len(x) <= high)
        key = f"{self.form} {self.shape} {limits} {x.dtype}"
        self.emulator.run(key, lambda: primfunc(*self.shape, self.form, *limits, x.dtype.name), [x, self.packed, y])
        assert relative_error(y, reference(x, self.values, self.form)) <= KERNEL["float32"]
        return y


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(37, 100), (3, 31), (300, 517)], ids=str)
def test_any_number_of_tokens(rng, emulator, form, shape):
    weight = Weight.random(rng, emulator, FORMS[form], shape)
    tokens = rng.standard_normal((65, shape[1])).astype("float32")
    whole = weight.check(tokens)
    for n in (1, 2, int(rng.integers(3, 16)), 16, 17, 33):
        # A token's result does not depend on the others, to the bit.
        assert np.array_equal(weight.check(tokens[:n].copy()), whole[:n])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_activations(rng, emulator, dtype):
    weight = Weight.random(rng, emulator, FORMS["q4"], (20, 70))
    for n in (1, 5, 20):
        weight.check(rng.standard_normal((n, 70)).astype(DTYPES[dtype]))


@pytest.mark.parametrize("form", FORMS)
def test_the_largest_products_do_not_overflow(emulator, form):
    """A group of the least or the greatest codes by one of the greatest activations, of either sign."""
    form, lanes = FORMS[form], target.lanes()
    for code in (np.argmin(form.values), np.argmax(form.values)):
        codes = np.full((lanes, 2, form.group), code, "uint8")
        scales = np.ones((lanes, 2), form.scale)
        packed = np.empty((1, 2, form.record(lanes)), "uint8")
        quantize.lay_out(form, codes, scales, scales if form.minimum else None, packed)
        weight = Weight(emulator, form, (lanes, 2 * form.group), packed.reshape(-1))
        for n in (1, 17):
            x = np.ones((n, 2 * form.group), "float32")
            x[1::2] = -1
            weight.check(x)
            weight.check(-x)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_token_that_is_not_finite_is_nan_and_harms_no_other(rng, emulator, bad):
    weight = Weight.random(rng, emulator, FORMS["q8"], (20, 64))
    for n in (1, 5, 20):
        x = rng.standard_normal((n, 64)).astype("float32")
        x[-1, 40] = bad
        assert np.isnan(weight.check(x)[-1]).all()


def test_tiny_and_huge_activations(rng, emulator):
    weight = Weight.random(rng, emulator, FORMS["q8"], (16, 32))
    for scale in (0.0, 1e-38, 1e-30, 1e30):
        weight.check((rng.standard_normal((1, 32)) * scale).astype("float32"))
