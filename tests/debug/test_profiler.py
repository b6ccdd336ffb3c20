import json
import threading
import time
from typing import Any

import numpy as np
import pytest

import ops
from debug.profiler import Profile, layer, profile
from ops import ceilings, costs
from ops.scope import current
from tests.llm import small


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """A machine of round numbers."""
    monkeypatch.setattr(ceilings, "read_bandwidth", lambda: 1e10)
    monkeypatch.setattr(ceilings, "fma_peak", lambda: 1e11)


@pytest.fixture(scope="module")
def model():
    return small.model(np.random.default_rng(0))


@pytest.fixture(scope="module")
def profiled(model):
    """A prompt of 5 tokens and two steps."""
    cache = model.new_cache()
    with profile() as p:
        model([1, 2, 3, 4, 5], cache)
        model([6], cache)
        model([7], cache)
    return p


class Costs(ops.Interceptor):
    """What each call costs; without a launch, so that nothing is compiled."""

    def __init__(self):
        self.seen: list[costs.Cost] = []

    def call(self, call, launch):
        self.seen.append(costs.cost(call))
        outputs = tuple(ops.zeros(spec.shape, spec.dtype) for spec in call.outputs)
        return outputs[0] if len(outputs) == 1 else outputs or None


def cost_of(run) -> costs.Cost:
    found = Costs()
    with ops.intercepted(found):
        run()
    (cost,) = found.seen
    return cost


def floats(*shape, dtype="float32"):
    return ops.tensor(np.zeros(shape, "float32"), dtype)


def ints(*values):
    return ops.tensor(np.array(values, "int32"))


@pytest.mark.parametrize(
    ("run", "nbytes", "flops"),
    [
        (lambda: ops.add(floats(3, 8), floats(3, 8)), 3 * 3 * 8 * 4, 3 * 8),
        (lambda: ops.silu_mul(floats(2, 8), floats(2, 8)), 3 * 2 * 8 * 4, 5 * 16),
        (lambda: ops.gelu(floats(2, 8), approximate="tanh"), 2 * 2 * 8 * 4, 9 * 16),
        (lambda: ops.rms_norm(floats(2, 8), floats(8), eps=1e-5), (2 * 16 + 8) * 4, 4 * 16),
        (lambda: ops.layer_norm(floats(2, 8), floats(8), floats(8), eps=1e-5), (2 * 16 + 16) * 4, 7 * 16),
        (lambda: ops.linear(floats(3, 8), floats(5, 8)), (3 * 8 + 5 * 8 + 3 * 5) * 4, 2 * 3 * 5 * 8),
        (lambda: ops.linear(floats(3, 8), floats(5, 8), floats(5)), (24 + 40 + 5 + 15) * 4, 3 * 5 * (2 * 8 + 1)),
        (lambda: ops.linear(floats(3, 8), floats(5, 8, dtype="bfloat16")), (24 + 15) * 4 + 40 * 2, 2 * 3 * 5 * 8),
        (lambda: ops.experts_linear(floats(2, 8), floats(6 * 5, 8), ops.tensor(np.array([[1, 4], [4, 0]], "int32")),
                                    floats(6 * 5), experts=6),
         (2 * 8 + 4 + 3 * 5 * (8 + 1) + 4 * 5) * 4, 4 * 5 * (2 * 8 + 1)),
        (lambda: ops.embedding(ints(3, 0), floats(9, 8)), 2 * 4 + 2 * 2 * 8 * 4, 0),
        (lambda: ops.rope(floats(2, 3, 8), ints(0, 1), floats(3)), (2 * 48 + 3) * 4 + 8, 3 * 2 * 3 * 6),
        (lambda: ops.cache_write(floats(64, 2, 4, dtype="float16"), floats(3, 2, 4), ints(0, 1, 2)),
         24 * 4 + 3 * 4 + 24 * 2, 0),
        (lambda: ops.softmax(floats(2, 8)), 2 * 16 * 4, 5 * 16),
        (lambda: ops.argmax(floats(2, 8)), 16 * 4 + 2 * 4, 16),
        (lambda: ops.cast(floats(2, 8), dtype="float16"), 16 * 4 + 16 * 2, 0),
        (lambda: ops.softplus(floats(2, 8)), 2 * 16 * 4, 3 * 16),
        (lambda: ops.causal_conv(floats(2, 8), floats(3, 8), floats(8, 4), floats(8)), (2 * 16 + 24 + 32 + 8) * 4,
         16 * (2 * 4)),
        (lambda: ops.selective_scan(floats(2, 4, 8), floats(2, 4), floats(4), floats(2, 1, 16), floats(2, 1, 16),
                                    floats(4), floats(4, 8, 16)),
         (2 * 64 + 8 + 2 * 4 + 2 * 32 + 2 * 512) * 4, 2 * 5 * 512 + 3 * 64 + 2 * 8),
    ],
)  # fmt: skip
def test_bytes_and_flops(run, nbytes, flops):
    assert cost_of(run) == (nbytes, flops)


@pytest.mark.parametrize(("rows", "inputs", "form"), [(64, 64, "q4"), (70, 96, "q8")])
def test_a_packed_weight_counts_as_it_lies_in_memory(rows, inputs, form):
    weight = ops.tensor(np.ones((rows, inputs), "float32"), form)
    assert cost_of(lambda: ops.linear(floats(1, inputs), weight)) == (
        weight.nbytes + (inputs + rows) * 4,
        2 * rows * inputs,
    )
    assert weight.nbytes < rows * inputs * 4 / 2


@pytest.mark.parametrize(
    ("positions", "window", "rows", "pairs"),
    [
        ((0,), None, 1, 1),
        ((9,), None, 10, 10),
        ((9,), 4, 4, 4),
        ((2,), 4, 3, 3),
        ((0, 1, 2, 3), None, 4, 1 + 2 + 3 + 4),
        ((5, 6, 7), 2, 4, 6),
        ((7, 1), 2, 4, 4),  # rows 6, 7 and 0, 1
        ((3, 3), None, 4, 8),
    ],
)
def test_attention_counts_the_keys_that_are_seen(positions, window, rows, pairs):
    n, q, k = len(positions), floats(len(positions), 4, 8), floats(100, 2, 8, dtype="float16")
    cost = cost_of(lambda: ops.attention(q, k, k, ints(*positions), scale=1.0, window=window))
    assert cost.bytes == 2 * n * 4 * 8 * 4 + n * 4 + rows * 2 * (8 + 8) * 2
    assert cost.flops == 2 * pairs * 4 * (8 + 8)


def test_steps_of_attention_count_the_same_products():
    q, k, positions = floats(2, 4, 8), floats(100, 2, 8), ints(4, 5)
    with profile() as p, ops.attention.steps():
        ops.attention(q, k, k, positions, scale=1.0)
    scores, softmax, mix, whole = (call.cost for call in p.calls)
    seen = p.calls[1].outputs[0].shape[-1]  # rows that the steps are given
    assert scores.flops + mix.flops == cost_of(lambda: ops.attention(q, k, k, positions, scale=1.0)).flops
    logits, out = 2 * 4 * seen * 4, 2 * 4 * 8 * 4
    assert scores.bytes == q.nbytes + 8 + 6 * 2 * 8 * 4 + logits
    assert softmax.bytes == 2 * logits
    assert mix.bytes == logits + 6 * 2 * 8 * 4 + out
    assert whole == (0, 0) and p.calls[-1].kernel == 0  # its steps have it all


def test_positions_out_of_range_are_the_kernels_error():
    with profile() as p, pytest.raises(ops.KernelError, match="position"):
        ops.attention(floats(1, 2, 4), floats(8, 2, 4), floats(8, 2, 4), ints(8), scale=1.0)
    assert not p.calls


def test_a_rule_for_an_own_op():
    x = floats(4, 4)
    before = costs.rule("neg")(lambda call: costs.Cost(7, 9))
    try:
        assert before is not None and cost_of(lambda: ops.neg(x)) == (7, 9)
    finally:
        costs.rule("neg")(costs.generic)


@pytest.mark.parametrize(
    ("path", "name"),
    [("layers.3.mlp.up_proj", "layers.3"), ("model.layers.12", "model.layers.12"), ("norm", "norm"), ("", "model"),
     ("embed_tokens.inner", "embed_tokens"), ("h2o.layers.0.x", "h2o.layers.0")],
)  # fmt: skip
def test_layers(path, name):
    assert layer(path) == name


def test_rows_add_up(model, profiled):
    with profile() as p:
        addresses = small.addresses(lambda: model([1, 2, 3]))
    assert [call.address for call in p.calls] == addresses
    by_op, by_layer, by_call = (profiled.rows(by) for by in ("op", "layer", "call"))
    assert len(by_call) == len(addresses) and all(row.calls == 3 for row in by_call)
    for rows in (by_op, by_layer, by_call):
        assert sum(row.calls for row in rows) == len(profiled.calls) == 3 * len(addresses)
        assert sum(row.seconds for row in rows) == pytest.approx(profiled.kernel_seconds)
        assert sum(row.bytes for row in rows) == sum(call.cost.bytes for call in profiled.calls)
        assert [row.seconds for row in rows] == sorted((row.seconds for row in rows), reverse=True)
    assert {row.name for row in by_layer} == {"layers.0", "layers.1", "layers.2", "embed_tokens", "norm", "lm_head"}
    assert {call.number for call in profiled.calls} == {each.number for each in profiled.forwards}
    matrices = sum(w.size for name, w in model.parameters() if w.ndim == 2 and "embed" not in name)
    assert next(row.flops for row in by_op if row.name == "linear") == 2 * matrices * (5 + 1 + 1)


def test_percentages_and_roofs():
    rows = {row.name: row for row in _rows(linear=(2_000_000, 100_000_000), add=(5_000_000, 1000))}
    assert rows["linear"].percent_of_bandwidth == pytest.approx(100 * 2e6 / 1e-3 / 1e10)
    assert rows["linear"].percent_of_peak == pytest.approx(100 * 1e8 / 1e-3 / 1e11)
    assert (rows["linear"].bound, rows["add"].bound) == ("compute", "memory")


def _rows(**ops_costs):
    from debug.profiler import Row

    return [Row(name, 1, 1e-3, *cost) for name, cost in ops_costs.items()]


def _slow(call, outputs):
    time.sleep(0.02)


def test_kernels_apart_from_python(rng):
    x = floats(1, 64)
    ops.neg(x)

    def run():
        time.sleep(0.02)
        return ops.neg(x)

    module = small.model(rng)
    module.forward = run  # type: ignore[method-assign]
    with profile() as p:
        module()
    assert p.kernel_seconds < 0.01 and 0.02 <= p.python_seconds < 0.2
    slow = ops.Kernel("slow", "python", _slow)
    with ops.neg.use(slow), profile() as p:
        module()
    assert p.kernel_seconds >= 0.02 and p.calls[0].kernel_name == "slow"
    assert p.python_seconds < p.forwards[0].duration / 1e9 - p.kernel_seconds + 1e-9


def test_overhead_is_measured_with_no_tool_on(rng):
    model = small.model(rng)
    with profile() as p:
        model([1])
    found = p.overhead(lambda: model([1]), repeat=5)
    assert 0 < found.kernel_seconds < found.seconds
    assert found.python_seconds < p.python_seconds  # what the seam does for a tool is not in it
    assert "a run with no tool on" in p.summary()


def test_kernels_are_timed_only_while_a_profile_is_on(rng):
    x = floats(2, 16)
    plan = ops.neg.plan((x,), {})
    ops.neg(x)
    bare = plan.run
    with profile() as outer:
        with profile() as inner:
            ops.neg(x)
        ops.neg(x)
        assert plan.run is not bare
    assert plan.run is bare
    assert (len(outer.calls), len(inner.calls)) == (2, 1)
    with pytest.raises(ZeroDivisionError), profile():
        ops.neg(x)
        raise ZeroDivisionError
    assert plan.run is bare


def test_threads_do_not_get_into_each_others_clocks():
    x, big = floats(2, 16), floats(512, 4096)
    for each in (x, big):
        ops.neg(each)
    stop = threading.Event()

    def work():
        with profile():
            while not stop.is_set():
                ops.neg(big)

    other = threading.Thread(target=work)
    other.start()
    try:
        with profile() as p:
            for _ in range(50):
                ops.neg(x)
    finally:
        stop.set()
        other.join()
    assert {call.thread for call in p.calls} == {threading.get_ident()} and len(p.calls) == 50
    assert all(call.begin <= call.kernel_begin for call in p.calls)
    assert all(call.kernel_begin + call.kernel <= call.begin + call.duration for call in p.calls)


def test_a_selector_narrows_and_must_mean_something(model):
    with profile("layers.1/linear, /rope") as p:
        model([1, 2])
    assert {row.name for row in p.rows("op")} == {"linear", "rope"}
    assert p.python_seconds < p.forwards[0].duration / 1e9  # the other kernels are no Python
    with pytest.raises(ops.SelectorError, match=r"layers\.0"), profile("layer.0"):
        model([1])
    with pytest.raises(ops.OpError, match="by is 'size', expected 'op', 'layer', 'call'"):
        p.rows("size")


def test_a_profile_changes_nothing(model):
    before = model([3, 1, 2]).numpy().copy()
    number = current.get().number
    with profile():
        inside = model([3, 1, 2]).numpy().copy()
    np.testing.assert_array_equal(inside, before)
    assert current.get().number == number


def test_the_trace_file_keeps_to_the_format(tmp_path, profiled):
    file = json.loads(profiled.save_trace(tmp_path / "deep" / "trace.json").read_text())
    events = file["traceEvents"]
    assert file["displayTimeUnit"] in ("ms", "ns")
    for event in events:
        assert {"name", "ph", "pid", "tid"} <= event.keys() and event["ph"] in "XM"
        assert isinstance(event["pid"], int) and isinstance(event["tid"], int) and isinstance(event["name"], str)
        if event["ph"] == "X":
            assert event["ts"] >= 0 and event["dur"] >= 0 and isinstance(event["cat"], str)
    slices = [event for event in events if event["ph"] == "X"]
    assert min(event["ts"] for event in slices) == 0
    parents = _parents(slices)
    kinds = {event["cat"] for event in slices}
    assert kinds == {"module", "op", "kernel"}
    for event, parent in zip(slices, parents, strict=True):
        if event["cat"] == "module" and not event["args"]["path"]:
            assert parent is None
            continue
        assert parent is not None
        if event["cat"] == "kernel":
            assert parent["cat"] == "op" and parent["args"]["address"] == event["args"]["address"]
        elif event["cat"] == "op":
            assert parent["args"]["path"] == event["args"]["address"].partition("/")[0]
            assert parent["args"]["pass"] == event["args"]["pass"]
        else:
            assert parent["args"]["path"] == event["args"]["path"].rpartition(".")[0].removesuffix("layers").rstrip(".")
    op = next(e for e in slices if e["cat"] == "op" and e["args"]["address"] == "layers.0.self_attn/attention[0]")
    assert op["args"]["inputs"]["q"] == "float32[5, 4, 8]" and op["args"]["outputs"] == ["float32[5, 4, 8]"]
    assert [e["args"]["pass"] for e in slices if e["cat"] == "module" and not e["args"]["path"]] == [
        each.number for each in profiled.forwards
    ]


def _parents(slices):
    """The innermost slice around each one; fails where two overlap without one being in the other."""
    order = sorted(range(len(slices)), key=lambda i: (slices[i]["ts"], -slices[i]["dur"]))
    parents: list[Any] = [None] * len(slices)
    open_: list[Any] = []
    for i in order:
        begin, end = slices[i]["ts"], slices[i]["ts"] + slices[i]["dur"]
        while open_ and open_[-1]["ts"] + open_[-1]["dur"] <= begin + 1e-6:
            open_.pop()
        if open_:
            assert end <= open_[-1]["ts"] + open_[-1]["dur"] + 1e-6
            parents[i] = open_[-1]
        open_.append(slices[i])
    return parents


def test_the_difference_of_two_profiles(model, profiled):
    with profile() as longer:
        for _ in range(4):
            model([1, 2, 3])
    table = Profile.diff(profiled, longer).by("op")
    row = dict(zip(table.columns, table.rows[table.column("op").index("linear")], strict=True))
    before, after = (next(r for r in p.rows("op") if r.name == "linear") for p in (profiled, longer))
    assert (row["calls before"], row["calls after"]) == (before.calls, after.calls) == (66, 88)
    assert row["change us"] == pytest.approx((after.seconds - before.seconds) * 1e6)
    assert row["a call %"] == pytest.approx(100 * (after.seconds / 88 / (before.seconds / 66) - 1))
    changes = [abs(change) for change in table.column("change us")]
    assert changes == sorted(changes, reverse=True)
    with profile("/rope") as only:
        model([1])
    missing = Profile.diff(only, longer).by("op")
    assert missing.column("calls before").count(0) == len(longer.rows("op")) - 1
    assert "python after" in profiled.diff(longer).by("layer").columns[-1]
    assert "linear" in repr(profiled.diff(longer)) and "kernels" in profiled.diff(longer).summary()


def test_text(profiled):
    text = repr(profiled)
    assert "3 forwards" in text and "10 GB/s, 100 GFLOP/s" in text
    assert "by op" in text and "by layer" in text and "layers.2" in text and "memory" in text
    with profile() as p:
        ops.neg(floats(1, 4))
    assert p.summary().startswith("1 calls: kernels") and "Python" not in p.summary()
