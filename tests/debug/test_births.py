"""nan_hunt: the call, the element, the operands and the reason; no alarm where nothing was born."""

import gc

import numpy as np
import pytest

import ops
from debug.births import nan_hunt
from debug.poison import poison
from tests.llm import small
from tests.ops.toys import toy_add_to, toy_unbuilt


@pytest.fixture(autouse=True)
def _counted_from_zero():
    """Calls outside of a module are numbered from 0 in each test."""
    token = ops.scope.current.set(ops.scope.Scope("", 0))
    yield
    ops.scope.current.reset(token)


def tensor(values, dtype="float32"):
    return ops.tensor(np.asarray(values, "float32"), dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_right_model_gives_no_alarm(rng, dtype):
    llm = small.model(rng, dtype)
    gc.collect()
    ops.memory.clear()  # what other tests left would be used before
    poison(*6 * [ops.Spec((64, 2, llm.config.head_dim), dtype)])  # rows of the caches that are never written hold NaN
    with nan_hunt() as h:
        cache = llm.new_cache()
        llm(rng.integers(0, 256, 20).tolist(), cache)
        llm([1], cache)
    assert np.isnan(cache[0].keys.numpy()[30:].astype("float32")).any(), "there was something to be alarmed at"
    assert h.birth is None and repr(h) == f"no NaN and no infinity was born in {h.hits} calls"


def test_steps_of_attention_mask_without_alarm(rng):
    llm = small.model(rng)
    with nan_hunt() as h, ops.attention.steps():
        llm(list(range(9)))
    assert h.birth is None


def test_overflow_of_a_dot_product_in_float16(rng):
    x, weight = rng.standard_normal((4, 48)) * 0.1, rng.standard_normal((32, 48)) * 0.1
    x[2, 7], weight[5, 7] = 300, 250
    with nan_hunt() as h:
        y = ops.linear(tensor(x, "float16"), tensor(weight, "float16"))
        ops.sub(y, y)  # inf - inf: a NaN, but not the first
    birth = h.birth
    assert birth is not None and birth.index == (2, 5) and birth.value == np.inf and birth.count == 1
    assert birth.address.startswith("/linear[0]@") and birth.exact == pytest.approx(75000, rel=1e-3)
    assert birth.reason == f"overflow: {birth.exact:.6g} is beyond float16's largest number, 65504"
    assert birth.operands[0].name == "x[2, 7] * weight[5, 7] = 300 * 250" and birth.operands[0].value == 75000


def test_overflow_in_a_layer_of_a_model(rng):
    llm = small.model(rng, "float16")
    llm.layers[1].mlp.up_proj.weight.numpy()[9] = 6e4
    with nan_hunt() as h:
        llm(list(range(10)))
    birth = h.birth
    assert birth is not None
    assert birth.address.startswith("layers.1.mlp.up_proj/linear[0]@") and birth.index[1] == 9
    assert birth.source.startswith("llm/models/llama.py:") and birth.reason.startswith("overflow")
    assert f"output{[*birth.index]} = " in repr(h) and "layers.1.mlp.up_proj/linear[0]" in repr(h)


@pytest.mark.parametrize("x, y, reason", [(0, 0, "0/0"), (3, 0, "division by zero"), (-3, 0, "division by zero")])
def test_divisions(rng, x, y, reason):
    above, below = rng.uniform(1, 2, (3, 5)), rng.uniform(1, 2, (3, 5))
    above[1, 4], below[1, 4] = x, y
    with nan_hunt() as h:
        ops.div(tensor(above), tensor(below))
    assert h.birth is not None and h.birth.index == (1, 4) and h.birth.reason == f"{reason}: div of these operands"
    assert [(each.name, each.value) for each in h.birth.operands] == [("x[1, 4]", x), ("y[1, 4]", y)]


def test_a_masked_row(rng):
    mask = np.where(rng.random((4, 6)) < 0.5, 0, -np.inf)
    mask[:, 0], mask[2] = 0, -np.inf
    x = tensor(rng.standard_normal((4, 6)))
    with nan_hunt() as h:
        masked = ops.scale(ops.add(x, tensor(mask)), 2.0)
        ops.softmax(masked)
    assert h.birth is not None and h.birth.address.startswith("/softmax[0]@") and h.birth.index == (2, 0)
    assert h.birth.reason.startswith("a masked row: x is -inf all along; x by /scale[0]@") and h.birth.count == 6


def test_infinities_on_purpose_that_meet(rng):
    x = np.zeros((2, 3))
    x[1, 2] = -np.inf
    with nan_hunt() as h:
        y = ops.scale(tensor(x), 2.0)
        ops.sub(y, y)
    assert h.birth is not None and h.birth.address.startswith("/sub[0]@") and h.birth.index == (1, 2)
    assert "the infinities are on purpose, x by /scale[0]@" in h.birth.reason


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["layers.1.mlp.down_proj.weight", "layers.2.input_layernorm.weight", "lm_head.weight"])
def test_a_weight_that_is_itself_not_finite(rng, name, value):
    llm = small.model(rng)
    weight = dict(llm.parameters())[name].numpy()
    place = tuple(int(rng.integers(size)) for size in weight.shape)
    weight[place] = value
    with nan_hunt() as h:
        llm([3, 4, 5])
    assert h.birth is not None and h.birth.parameter == name
    assert h.birth.address.startswith(name.removesuffix(".weight") + "/")
    assert h.birth.reason.startswith(f"{name}{[*place]} is itself {'NaN' if np.isnan(value) else 'an infinity'}")
    assert h.birth.index[1] == place[0]


def test_a_row_of_an_embedding_that_is_used(rng):
    llm = small.model(rng)
    llm.embed_tokens.weight.numpy()[7, 5] = np.nan
    with nan_hunt() as h:
        llm([1, 2, 3])
    assert h.birth is None, "token 7 was not read"
    with nan_hunt() as h:
        llm([1, 7, 3])
    assert h.birth is not None and h.birth.index == (1, 5)
    assert h.birth.reason == "embed_tokens.weight[7, 5] is itself NaN"


def test_a_row_of_the_cache_that_was_never_written(rng):
    q, k, v = (rng.standard_normal((n, 2, 8)).astype("float32") for n in (3, 10, 10))
    k[5:], v[5:] = np.nan, np.nan
    with nan_hunt() as h:
        ops.attention(*map(ops.tensor, (q, k, v, np.array([2, 3, 4], "int32"))), scale=1.0)
    assert h.birth is None
    with nan_hunt() as h:
        ops.attention(*map(ops.tensor, (q[2:], k, v, np.array([5], "int32"))), scale=1.0)
    assert h.birth is not None and h.birth.index == (0, 0, 0) and h.birth.parameter is None
    assert h.birth.reason.startswith("k[5, 0, ") and h.birth.reason.endswith("and no call made it so")


def test_overflow_into_a_cache_of_float16(rng):
    for garbage in (0, np.nan, np.inf):
        cache = ops.tensor(np.full((8, 2, 4), garbage, "float16"))
        x = rng.standard_normal((2, 2, 4)).astype("float32")
        with nan_hunt() as h:
            ops.cache_write(cache, ops.tensor(x), ops.tensor(np.array([3, 4], "int32")))
        assert h.birth is None
        x[1, 0, 2] = 1e5
        with nan_hunt() as h:
            ops.cache_write(cache, ops.tensor(x), ops.tensor(np.array([3, 4], "int32")))
        assert h.birth is not None and h.birth.result == "cache" and h.birth.index == (4, 0, 2), garbage
        assert h.birth.reason.startswith("overflow: 100000 is beyond float16's largest number")


def test_a_written_sum_that_overflows():
    total = ops.tensor(np.full((2, 4), 3e38, "float32"))
    with nan_hunt() as h:
        toy_add_to(total, ops.tensor(np.array([0, 0, 1e38, 0], "float32")), 1)
    assert h.birth is not None and h.birth.index == (1, 2) and h.birth.reason.startswith("overflow: 4e+38")


def test_a_wrong_kernel_and_one_that_overflows_on_the_way(rng):
    x = rng.standard_normal((3, 8)).astype("float32")

    def wrong(x, y):
        result = x + y
        result[1, 6] = np.nan
        return result

    with ops.add.use(wrong), nan_hunt() as h:
        ops.add(ops.tensor(x), ops.tensor(x))
    assert h.birth is not None and h.birth.index == (1, 6) and h.birth.kernel == "wrong"
    assert h.birth.reason == f"the kernel is wrong: its reference gives {2 * x[1, 6]:.6g} for the same operands"
    long, weight = np.full((1, 4), 1e20, "float32"), np.array([[1e20, -1e20, 1, 1]], "float32")
    with nan_hunt() as h:
        ops.linear(ops.tensor(long), ops.tensor(weight))
    assert h.birth is not None and h.birth.exact == pytest.approx(2e20)
    assert h.birth.reason.startswith("overflow on the way to 2e+20")


def test_an_op_without_a_reference(rng):
    x = ops.tensor(rng.standard_normal((2, 4)).astype("float32"))
    with toy_unbuilt.use(lambda x: np.where(x == x[1, 2], np.nan, x)), nan_hunt() as h:
        toy_unbuilt(x)
    assert h.birth is not None and h.birth.index == (1, 2)
    assert h.birth.reason == "toy_unbuilt has no reference that could tell why"
    x.numpy()[0, 1] = np.inf
    with toy_unbuilt.use(lambda x: x), nan_hunt() as h:
        toy_unbuilt(x)
    assert h.birth is not None and h.birth.reason == "x[0, 1] is itself an infinity"


def test_packed_weights(rng):
    x, weight = rng.standard_normal((3, 64)).astype("float32"), rng.standard_normal((8, 64)).astype("float32")
    x[1, 40] = np.inf
    with nan_hunt() as h:
        ops.linear(ops.tensor(x), ops.tensor(weight, "q4"))
    assert h.birth is not None and h.birth.index == (1, 0)
    assert h.birth.reason == "x[1, 40] is itself an infinity, and no call made it so"


def test_nothing_is_looked_at_after_a_birth_and_elsewhere(rng):
    x = tensor(np.zeros((2, 2)))
    with nan_hunt("/add") as h:
        y = ops.div(x, x)  # not meant
        ops.add(y, y)
        ops.add(x, y)
    assert h.birth is not None and h.birth.address.startswith("/add[0]@")
    with pytest.raises(ops.SelectorError, match="nan_hunt: 'layers' meant none"), nan_hunt("layers"):
        ops.div(x, x)
