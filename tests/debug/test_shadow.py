"""check: one wrong kernel is one culprit; what follows from it is inherited; right models are right."""

import io

import numpy as np
import pytest

import ops
from debug.shadow import CheckError, check
from llm.load import build
from ops.quantize import FORMATS
from tests.llm import small
from tests.ops.toys import toy_add_to, toy_split, toy_unbuilt

FORMS = ("float32", "bfloat16", "float16", "q4", "q8")


def model(rng, form="float32", **changes):
    """A small random model; with packed matrices where `form` is a weight format."""
    if form not in FORMATS:
        return small.model(rng, form, **changes)
    made = build(small.CONFIG | changes, "float32", form)
    for name, spec in list(made.parameters()):
        values = rng.standard_normal(spec.shape) * 0.4 + (1.0 if name.endswith("norm.weight") else 0.0)
        made.set_parameter(name, ops.tensor(values.astype("float32"), spec.dtype))
    return made


def wrong(op, spoil):
    """The op's reference, its result spoilt by `spoil(result, *arguments)` in place."""

    def kernel(*args, **constants):
        result = np.array(op.reference(*args, **constants))
        spoil(result, *args)
        return result

    return kernel


@pytest.mark.parametrize("form", FORMS)
def test_a_right_model_is_right(rng, form):
    llm = model(rng, form)
    ids = rng.integers(0, 256, 40).tolist()
    with check() as c:
        cache = llm.new_cache()
        llm(ids, cache)
        for token in (1, 2, 3):
            llm([token], cache)
    assert c.culprit is None and not c.culprits
    assert c.checked == 4 * len(c.records) == 4 * len(small.addresses(lambda: llm([1])))
    assert all(each.count == 4 for each in c)
    totals = [each.total for each in c if each.total is not None]
    assert len(totals) == len(c) and max(totals) < (1e-4 if form == "float32" else 1.0)


@pytest.mark.parametrize("form", FORMS)
def test_one_element_of_one_head_of_one_layer(rng, form):
    llm = model(rng, form)

    def spoil(result, *_):
        result[7, 3, 5] += np.abs(result).max() * 0.2

    where = "layers.1.self_attn/attention[0] rows=20"
    with ops.attention.use(wrong(ops.attention, spoil), where=where), check() as c:
        llm(list(range(20)))
    assert c.culprit is not None and c.culprits == [c.culprit] == c.worst(1)
    assert c.culprit.address.startswith("layers.1.self_attn/attention[0]@")
    assert c.culprit.result == "output" and c.culprit.introduced.index == (7, 3, 5)
    assert c.culprit.source.startswith("llm/models/llama.py:") and c.culprit.kernel == "kernel"
    assert f"{c.culprit.introduced.actual:.6g} instead of {c.culprit.introduced.expected:.6g} at [7, 3, 5]" in repr(c)
    by_address = {each.address.partition("@")[0]: each for each in c}
    before, after = by_address["layers.0.mlp.down_proj/linear[0]"], by_address["layers.2.mlp.down_proj/linear[0]"]
    assert not after.wrong
    if form == "float32":  # of the others even a right model inherits rounding errors of that size
        assert (after.inherited or 0) > 10 * (before.inherited or 0)
    assert c.culprit.total == pytest.approx(c.culprit.introduced.error, rel=0.3)


def test_only_at_one_length_in_the_cache_in_a_decode_step(rng):
    llm = model(rng)
    cache = llm.new_cache()
    llm(list(range(30)), cache)

    def spoil(result, q, k, v, positions):
        if positions[0] == 32:
            result[0, 0, 0] *= -1
            result[0, 0, 0] += 1

    passes = []

    class Passes(ops.Interceptor):
        def scope(self, scope, run):
            passes.append(scope.number)
            return run(*scope.args, **scope.constants)

    with ops.attention.use(wrong(ops.attention, spoil), where="layers.2"), check("/attention") as c:
        for token in range(4):  # at positions 30 to 33
            with ops.intercepted(Passes()):
                llm([token], cache)
    assert c.culprit is not None and len(c.culprits) == 1 and c.hits == c.checked == 12
    third = [*dict.fromkeys(passes)][2]
    assert c.culprit.address == f"layers.2.self_attn/attention[0]@{third}" and c.culprit.introduced.index == (0, 0, 0)


@pytest.mark.parametrize("kind", ["misplaced", "left out", "one element"])
def test_a_wrong_cache_write_beside_garbage(rng, kind):
    """What lies in the rows that nothing was written to is no measure, however large."""
    cache, x = np.full((40, 2, 4), 1e30, "float32"), rng.standard_normal((3, 2, 4)).astype("float32")
    cache[20:] = np.nan
    positions = np.array([5, 6, 7], "int32")

    def write(cache, x, positions):
        result = cache.copy()
        at = positions + (kind == "misplaced")
        result[at] = x
        if kind == "left out":
            result[6] = cache[6]
        if kind == "one element":
            result[6, 1, 2] += 1e-3
        return result

    def run():
        ops.cache_write(*map(ops.tensor, (cache.copy(), x, positions)))

    with check() as c:
        run()
    assert c.culprit is None
    with ops.cache_write.use(write), check() as c:
        run()
    assert c.culprit is not None and c.culprit.result == "cache"
    assert c.culprit.introduced.index[0] in {"misplaced": (5, 8), "left out": (6,), "one element": (6,)}[kind]


def test_inherited_follows_views_and_caches_that_grow(rng):
    llm = model(rng)

    def spoil(result, *_):
        result += 0.01 * np.abs(result).max()

    only_first = "layers.0.self_attn.v_proj/linear[0] rows=60"
    with ops.linear.use(wrong(ops.linear, spoil), where=only_first), check("/attention rows=1") as c:
        cache = llm.new_cache()
        llm(list(range(60)), cache)
        for token in range(20):  # past 64 tokens the buffers are copied to larger ones
            llm([token], cache)
    records = {each.address.partition("@")[0]: each for each in c}
    first = records["layers.0.self_attn/attention[0]"]
    assert c.culprit is None and first.count == 20
    assert all((each.inherited or 0) > 1e-4 for each in c), "the values of the first 60 tokens are still off"
    with check("/attention rows=1") as c:
        llm([1], cache)
    now, then = c.records[0].inherited, first.inherited
    assert now is not None and then is not None and now < 1e-5 < then, "a clean run begins with what is there"


def test_total_is_introduced_and_inherited(rng):
    x = ops.tensor(rng.standard_normal((4, 8)).astype("float32"))

    def half(a, b):
        return 0.5 * (a + b)

    with ops.add.use(half), check() as c:
        y = x + x  # total: half
        z = y[1:3].reshape(4, 4) * 3.0  # inherits it through two views
        ops.copy(ops.tensor(z.numpy()))  # and through another tensor over the same memory
    add, scale, copy = c.records
    assert add.total == pytest.approx(0.5) and add.inherited == 0 and add.wrong
    assert scale.inherited == pytest.approx(0.5) and scale.total == pytest.approx(0.5) and not scale.wrong
    assert copy.inherited == pytest.approx(0.5)


def test_several_results_none_and_empty_ones(rng):
    x = ops.tensor(rng.standard_normal(6).astype("float32"))
    with check() as c:
        toy_split(x, ops.tensor(np.ones(1, "float32")), 2.0, sign=-1)
        toy_add_to(ops.zeros((2, 6)), x, 1)
        ops.copy(ops.empty((0, 4)))
        ops.top_k(ops.tensor(rng.standard_normal((3, 9)).astype("float32")), k=4)
        ops.argmax(ops.tensor(rng.standard_normal((3, 9)).astype("float32")))
    assert len(c) == 5 and c.culprit is None

    def swapped(x, *, k):
        values, indices = ops.top_k.reference(x, k=k)
        return values, indices[:, ::-1]

    with ops.top_k.use(swapped), check() as c:
        ops.top_k(ops.tensor(rng.standard_normal((3, 9)).astype("float32")), k=4)
    assert c.culprit is not None and c.culprit.result == "output 1" and c.culprit.bound == 0


def test_what_the_dtype_cannot_hold_is_no_error():
    x = ops.tensor(np.full((1, 4), 300, "float16"))
    with check() as c:
        y = ops.mul(x, x)
    assert np.isinf(y.numpy()).all() and c.culprit is None
    with ops.mul.use(lambda x, y: np.full(x.shape, -np.inf)), check() as c:
        ops.mul(x, x)
    assert c.culprit is not None and c.culprit.introduced.error == np.inf


def test_stop_raises_in_the_model(rng):
    llm = model(rng)
    after = []

    class Last(ops.Interceptor):
        def call(self, call, launch):
            after.append(call.address)
            return launch(call)

    spoiled = wrong(ops.rms_norm, lambda result, *_: result.__setitem__((0, 0), 99))
    with (
        ops.rms_norm.use(spoiled, where="layers.1.input_layernorm"),
        pytest.raises(
            CheckError, match=r"layers.1.input_layernorm/rms_norm\[0\]@\d+  llm/models/llama.py:\d+"
        ) as raised,
        check(stop=True) as c,
        ops.intercepted(Last()),
    ):
        llm([1, 2])
    assert raised.value.culprit is c.culprit is not None and after[-1] == "layers.1.input_layernorm/rms_norm[0]"


def test_sampling_is_deterministic_and_looks_at_every_call_in_turn(rng):
    llm = model(rng)
    calls = len(small.addresses(lambda: llm([1])))
    seen = []
    for _ in range(2):
        with check(every=5, inherited=False) as c:
            for _ in range(5):
                llm([1])
        assert c.checked == calls and c.hits == 5 * calls
        assert [each.count for each in c] == [1] * calls, "five passes check each call once"
        seen.append([each.introduced.error for each in c])
    assert seen[0] == seen[1]


def test_against_float64_and_a_tolerance_of_ones_own(rng):
    x = ops.tensor(rng.standard_normal((5, 64)).astype("bfloat16"))
    weight = ops.tensor(np.ones(64, "float32"))
    for against in ("reference", "float64"):
        with check(against=against) as c:
            ops.rms_norm(x, weight, eps=1e-5)
        assert c.culprit is None and 0 < c.records[0].introduced.error < 1.6e-2
    with check(tolerance=1e-7) as c:
        ops.rms_norm(x, weight, eps=1e-5)
    assert c.culprit is not None and c.culprit.bound == 1e-7
    with pytest.raises(ops.OpError, match="against is 'torch', expected one of 'reference', 'float64'"):
        check(against="torch")
    with pytest.raises(ops.OpError, match="every is 0, expected an int, 1 or more"):
        check(every=0)


def test_what_cannot_be_checked_is_said(rng):
    x = ops.zeros((2, 4))
    with toy_unbuilt.use(lambda x: x), check() as c:
        toy_unbuilt(x)
        ops.copy(x)
    assert c.without_reference == {"toy_unbuilt": 1} and "not checked, without a reference: toy_unbuilt (1)" in repr(c)
    ids, weight = ops.tensor(np.array([7], "int32")), ops.zeros((4, 8))
    with (
        ops.embedding.use(ops.Kernel("lax", "test", lambda call, outputs: None)),
        pytest.raises(CheckError, match="the kernel takes what its reference refuses: IndexError: ids hold a value"),
        check(),
    ):
        ops.embedding(ids, weight)
    with pytest.raises(ops.KernelError, match="ids hold a value outside"), check():
        ops.embedding(ids, weight)  # both refuse: the op's own error
    with pytest.raises(ops.SelectorError, match=r"'layers.9' meant none of the calls"), check("layers.9"):
        model(rng)([1])


def test_it_prints(rng):
    from rich.console import Console

    llm = model(rng)
    with check("layers.0-1") as c:
        llm([1, 2, 3])
    assert repr(c).startswith(f"{c.checked} calls checked, none wrong\n")
    assert "layers.1.mlp.up_proj/linear[0]@" in repr(c) and "inherited" in repr(c) and "layers.2" not in repr(c)
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(c)
    assert "layers.1.mlp.up_proj/linear[0]@" in console.export_text()
