"""Races: kernels of one op on the same inputs, how fast, how far off, and who is alone."""

import numpy as np
import pytest

import ops

from .harness import random
from .test_swap import norm
from .toys import toy_add_to, toy_split


@pytest.fixture(autouse=True)
def restored():
    yield
    ops.restore()


def unnormed(x, weight, *, eps, plus_one=False):
    return x * weight


def failing(x, weight, *, eps, plus_one=False):
    raise ops.OpError("no kernel today")


def test_all_kernels_of_an_op(rng):
    x, weight = ops.tensor(random(rng, (3, 65), "float32")), ops.tensor(random(rng, (65,), "float32"))
    ops.rms_norm.swap("python")(norm)
    ops.rms_norm.swap("python", edge_cases=False, where="layers.7")(failing)
    ops.rms_norm.swap("python", edge_cases=False, where="/rms_norm rows=7")(unnormed)
    race = ops.rms_norm.race(x, weight, eps=1e-6)
    found = {each.name: each for each in race.contenders}
    assert {"own", "norm", "reference", "failing"} <= found.keys() and "unnormed" not in found, "not for these rows"
    assert found["own"].right and found["norm"].right and found["reference"].right
    assert found["failing"].seconds is None and "no kernel today" in found["failing"].failed
    assert race.contenders[-1].name == "failing" and race.fastest.name != "failing"
    assert race.alone == [] and race.cost.bytes == 2 * x.nbytes + weight.nbytes
    assert "no kernel today" in repr(race) and "rms_norm(x=float32[3, 65]" in race._repr_html_()


def test_who_is_outvoted(rng):
    x, weight = ops.tensor(random(rng, (3, 65), "float32")), ops.tensor(random(rng, (65,), "float32"))
    ops.rms_norm.swap("python", edge_cases=False)(unnormed)
    race = ops.rms_norm.race(x, weight, eps=1e-6)
    assert race.alone == ["unnormed"] and "outvoted by the others: unnormed" in repr(race)
    wrong = next(each for each in race.contenders if each.name == "unnormed")
    assert not wrong.right and wrong.off is not None and wrong.off.error > 0.01 and "WRONG: error" in repr(race)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_torch_takes_part(rng, dtype):
    pytest.importorskip("torch", reason="the extra parity is not installed")
    for op, args, constants in [
        (ops.rms_norm, ((5, 64), (64,)), {"eps": 1e-5, "plus_one": True}),
        (ops.layer_norm, ((5, 64), (64,), (64,)), {"eps": 1e-5}),
        (ops.linear, ((5, 64), (7, 64)), {}),
        (ops.silu_mul, ((5, 64), (5, 64)), {}),
        (ops.gelu, ((5, 64),), {"approximate": "tanh"}),
        (ops.softmax, ((5, 64),), {}),
        (ops.argmax, ((5, 64),), {}),
    ]:
        tensors = [ops.tensor(random(rng, shape, dtype)) for shape in args]
        race = op.race(*tensors, **constants)
        assert {each.name for each in race.contenders if each.right} == {"own", "reference", "torch"}, race


def test_what_an_op_writes_stays_as_it_is(rng):
    total, x = ops.tensor(random(rng, (3, 8), "float32")), ops.tensor(random(rng, (8,), "float32"))
    before = total.numpy().copy()
    race = toy_add_to.race(total, x, 1)
    np.testing.assert_array_equal(total.numpy(), before)
    assert [each.name for each in race.contenders if each.right] == [each.name for each in race.contenders]
    race = toy_split.race(x, None, 2.0)
    assert all(each.right for each in race.contenders), "two outputs"
    with pytest.raises(ops.OpError, match="x is int, expected Tensor"):
        toy_split.race(3)
