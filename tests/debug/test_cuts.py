"""invariance: the op that depends on the cut is named, whatever comes after it; right models give no alarm."""

import numpy as np
import pytest

import ops
from debug.cuts import invariance, promises_bits
from tests.llm import small
from tests.ops.toys import toy_double

from .shaky import Model
from .test_shadow import model, wrong


def spoilt(op, spoil, where=None):
    return op.use(wrong(op, spoil), where=where)


@pytest.mark.parametrize("form", ["float32", "bfloat16", "q4"])
def test_a_right_model_does_not_change(rng, form):
    llm = model(rng, form)
    found = invariance(llm, rng.integers(0, 256, 37), threads=())
    assert found.culprit is None and not found.changes and not found.notes
    assert found.cuts == ["a row alone", "token by token", "chunks of 3", "chunks of 17", "again"]
    assert repr(found).startswith("no result changes with the cut\ncuts: a row alone, token by token")


def test_only_with_more_than_one_row(rng):
    llm = small.model(rng)

    def spoil(result, x, *_):
        if len(x) > 1:
            result[-1, 5] *= 1 + 1e-6  # a few bits: linear promises them all

    with spoilt(ops.linear, spoil, "layers.1.self_attn.k_proj"):
        found = invariance(llm, list(range(20)), threads=())
    culprit = found.culprit
    assert culprit is not None and culprit.layer == "layers.1.self_attn.k_proj" and culprit.bound == 0
    assert culprit.address == "layers.1.self_attn.k_proj/linear[0]" and culprit.source.startswith("llm/models/llama.py")
    assert culprit.index == (5,) and not culprit.note
    assert {each.address for each in found.changes} == {culprit.address}, "what follows is not blamed"
    assert {each.cut for each in found.changes} == {"a row alone", "token by token", "chunks of 3", "chunks of 17"}
    assert next(each for each in found.changes if each.cut == "a row alone").token == 19


def test_a_decode_kernel_that_is_wrong_at_one_length(rng):
    llm = small.model(rng)

    def spoil(result, q, k, v, positions):
        if len(q) == 1 and positions[0] == 23:
            result[0, 2, 3] += 0.1

    with spoilt(ops.attention, spoil, "layers.2"):
        found = invariance(llm, list(range(30)), rows=0, threads=())
    assert [(each.cut, each.address) for each in found.changes] == [
        ("token by token", "layers.2.self_attn/attention[0]")
    ]  # fmt: skip
    assert found.changes[0].token == 23 and found.changes[0].index == (2, 3)
    assert found.changes[0].actual - found.changes[0].expected == pytest.approx(0.1, rel=1e-3)
    assert "attention[0]  llm/models/llama.py" in repr(found) and "of token 23 at [2, 3]" in repr(found)


def test_a_mask_that_leaks_a_position(rng):
    llm = small.model(rng)

    def leaky(q, k, v, positions, **constants):
        ahead = np.minimum(positions + 1, max(positions[-1], 0)).astype("int32")  # the last token sees no more
        return ops.attention.reference(q, k, v, ahead, **constants)

    with ops.attention.use(leaky, where="layers.0"):
        found = invariance(llm, list(range(12)), threads=())
    assert found.culprit is not None and found.culprit.address == "layers.0.self_attn/attention[0]"
    assert {each.address for each in found.changes} == {"layers.0.self_attn/attention[0]"}


def test_a_cache_write_that_mixes_up_rows(rng):
    llm = small.model(rng)

    def write(cache, x, positions):
        result = cache.copy()
        result[positions] = x[::-1] if len(x) == 3 else x
        return result

    with ops.cache_write.use(write, where="layers.1.self_attn/cache_write[1]"):
        found = invariance(llm, list(range(12)), threads=())
    assert [(each.cut, each.address, each.result) for each in found.changes] == [
        ("chunks of 3", "layers.1.self_attn/cache_write[1]", "cache")
    ]  # fmt: skip


def test_run_to_run(rng):
    llm, count = small.model(rng), []

    def spoil(result, *_):
        count.append(0)
        if len(count) > 3:  # the layers of the first run are right
            result[4, 1] = np.nextafter(np.float32(result[4, 1]), np.float32(9))

    with spoilt(ops.silu_mul, spoil):
        found = invariance(llm, list(range(9)), chunks=(), rows=0, again=1, threads=())
    assert found.culprit is not None and found.culprit.cut == "again"
    assert found.culprit.address == "layers.0.mlp/silu_mul[0]" and (found.culprit.token, found.culprit.index) == (
        4,
        (1,),
    )


def test_a_buffer_that_is_read_before_it_is_written(rng):
    llm = small.model(rng)

    def stale(call, outputs):
        left = outputs[0].numpy().reshape(-1)[7]
        np.copyto(outputs[0].numpy(), ops.silu_mul.reference(*call.args))
        outputs[0].numpy().reshape(-1)[7] = left

    with ops.silu_mul.use(ops.Kernel("stale", "test", stale), where="layers.2"):
        found = invariance(llm, list(range(9)), chunks=(), rows=0, threads=())
    assert found.culprit is not None and found.culprit.layer == "layers.2.mlp" and np.isnan(found.culprit.actual)


def test_a_model_that_is_wrong_about_positions(rng):
    """Not an op's fault: its inputs differ as well, and that is said."""
    llm = small.model(rng)
    at = llm.rotary.at

    def off_by_one(positions, length):
        rotation = at(positions, length)
        return rotation if len(positions) > 1 else rotation._replace(positions=ops.tensor(positions.numpy() + 1))

    llm.rotary.at = off_by_one
    llm.config.max_position_embeddings = 64
    found = invariance(llm, list(range(10)), chunks=(1,), rows=0, threads=())
    assert found.culprit is not None and found.culprit.address == "layers.0.self_attn/rope[0]"
    assert found.culprit.note == "; its input positions differs too"


def test_calls_that_cannot_be_matched(rng):
    class Odd(Model):
        def forward(self, ids, cache):
            x = super().forward(ids, cache)
            toy_double(ops.zeros((3, 8)))  # no row of a token
            return toy_double(x) if len(ids) == 1 else ops.scale(x, 2.0)

    found = invariance(Odd(), list(range(10)), chunks=(1,), threads=())
    assert found.notes == [
        "not compared, as their results are no rows of tokens: /toy_double[0]",
        "token by token: not matched with a call of the whole run: /toy_double[1]",
    ]
    assert not found.changes


def test_the_promise_and_wrong_arguments(rng):
    assert promises_bits(ops.linear) and not promises_bits(ops.attention)
    with pytest.raises(ops.OpError, match="1 ids cannot be cut; give 2 or more"):
        invariance(Model(), [1])
    with pytest.raises(ops.OpError, match=r"threads is \(1, 2, 3\), expected two numbers"):
        invariance(Model(), [1, 2], threads=(1, 2, 3))
    broken = Model()
    broken.hook = lambda: 0  # type: ignore[attr-defined]
    with pytest.raises(ops.OpError, match=r"cannot be sent to a process .*pass threads=\(\) to leave them out"):
        invariance(broken, [1, 2])
