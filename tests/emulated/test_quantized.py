"""The kernels for packed weights on every machine: equal to the same integer reference as on this one."""

import numpy as np
import pytest

import ops
from ops import quantize, target
from ops.quantize import FORMATS, KNOWN
from ops.spec import FLOATS
from ops.tensor import tensor_from_packed
from tests.ops.harness import check, random
from tests.ops.test_quantize import FORMS

pytestmark = [pytest.mark.emulated, pytest.mark.usefixtures("emulator")]


@pytest.fixture(autouse=True)
def forms(monkeypatch):
    """The formats of the tests are weight formats like q4 and q8: kernels are made from their description."""
    for name, form in FORMS.items():
        for known in (FORMATS, KNOWN):  # what can be made of floats, and what can be held
            monkeypatch.setitem(known, name, form)


def weight(rng, rows, k, form):
    return ops.tensor(random(rng, (rows, k), "float32"), form)


@pytest.mark.parametrize(
    "rows, k, form", [*[(37, 100, form) for form in FORMS], *[(*s, f) for s in ((3, 31), (300, 517)) for f in FORMATS]]
)
def test_any_number_of_tokens(rng, rows, k, form):
    w, tokens = weight(rng, rows, k, form), random(rng, (70, k), "float32")
    whole = check(ops.linear, tokens, w).numpy()
    for n in (1, 2, int(rng.integers(3, 16)), 16, 17, 33):
        # A token's result does not depend on the others, to the bit.
        assert np.array_equal(check(ops.linear, tokens[:n].copy(), w).numpy(), whole[:n])


@pytest.mark.parametrize("dtype", FLOATS)
def test_activations_of_every_dtype_with_bias(rng, dtype):
    for n in (1, 5, 20):
        check(ops.linear, random(rng, (n, 70), dtype), weight(rng, 20, 70, "q4"), random(rng, (20,), dtype))


@pytest.mark.parametrize("form", FORMS)
def test_the_largest_products_do_not_overflow(form):
    """A group of the least or the greatest codes by one of the greatest activations, of either sign."""
    described, lanes = FORMS[form], target.lanes()
    for code in (np.argmin(described.values), np.argmax(described.values)):
        codes = np.full((lanes, 2, described.group), code, "uint8")
        scales = np.ones((lanes, 2), described.scale)
        data = np.empty((1, 2, described.record(lanes)), "uint8")
        quantize.lay_out(described, codes, scales, scales if described.minimum else None, data)
        w = tensor_from_packed(data.reshape(-1), ops.Spec((lanes, 2 * described.group), form))
        for n in (1, 17):
            x = np.ones((n, 2 * described.group), "float32")
            x[1::2] = -1
            check(ops.linear, x, w)
            check(ops.linear, -x, w)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_token_that_is_not_finite_is_nan_and_harms_no_other(rng, bad):
    w = weight(rng, 20, 64, "q8")
    for n in (1, 5, 20):
        x = random(rng, (n, 64), "float32")
        x[-1, 40] = bad
        assert np.isnan(check(ops.linear, x, w).numpy()[-1]).all()


def test_tiny_and_huge_activations(rng):
    w = weight(rng, 16, 32, "q8")
    for scale in (0.0, 1e-38, 1e-30, 1e30):
        check(ops.linear, random(rng, (1, 32), "float32", scale), w)


@pytest.mark.parametrize("form", FORMS)
def test_embedding(rng, form):
    for n in (1, 7):
        check(ops.embedding, rng.integers(0, 50, n), weight(rng, 50, 70, form))
