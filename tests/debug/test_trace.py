"""What a trace remembers of calls, keeps of tensors, prints, finds again, and writes to disk."""

import inspect
import json

import numpy as np
import pytest

import llm
import ops
from debug.record import from_bytes, to_bytes
from debug.trace import Recording, trace
from llm.models import llama
from tests.llm import small

IDS = list(range(9))


@pytest.fixture
def model(rng):
    return small.model(rng)


def test_what_is_recorded_of_a_call(model):
    with trace("layers.1.*") as t:
        model(IDS)
    assert len(t) == 15
    record = t["layers.1.self_attn/rope[1]"]
    assert (record.path, record.op_name, record.ordinal, record.kernel) == ("layers.1.self_attn", "rope", 1, "tvm")
    assert record.op is ops.rope
    assert record.inputs["x"] == ops.Spec((9, 2, 8), "float32") and record.constants["interleaved"] is False
    assert record.outputs == (ops.Spec((9, 2, 8), "float32"),)
    assert record.source.startswith("llm/models/llama.py:") and 0 < record.seconds < 10
    with pytest.raises(KeyError, match="was not kept"):
        _ = record.output
    lines = inspect.getsource(llama).splitlines()
    line = 1 + next(i for i, text in enumerate(lines) if "q, k = rotate(q), rotate(k)" in text)
    assert record.source == f"llm/models/llama.py:{line}"
    assert t["layers.1.self_attn.q_proj/linear[0]"].source == f"llm/models/llama.py:{line - 3}"


def test_statistics_are_those_of_the_values(model):
    with trace(keep="outputs") as t:
        model(IDS)
    for record in t:
        for found, kept in zip(record.statistics, record.kept_outputs, strict=True):
            values = kept.numpy().astype("float64")
            assert found is not None and (found.seen, found.nan, found.inf) == (values.size, 0, 0)
            given = np.array([found.least, found.most, found.mean, found.deviation], "float64")
            np.testing.assert_allclose(given, (values.min(), values.max(), values.mean(), values.std()), 1e-5, 1e-6)


@pytest.mark.parametrize("dtype", ops.spec.FLOATS)
@pytest.mark.parametrize("n", [1, 7, 8, 9, 1000])
def test_statistics_of_what_is_not_finite(rng, dtype, n):
    from debug.statistics import taken

    values = (rng.standard_normal(n) * 3).astype(ops.spec.DTYPES[dtype])
    bad = rng.random(n) < 0.3
    values[bad] = rng.choice([np.nan, np.inf, -np.inf], bad.sum()).astype(values.dtype)
    moments, wide = taken(ops.tensor(values)), values.astype("float64")
    assert moments is not None
    found, finite = moments.read(), wide[np.isfinite(wide)]
    assert (found.nan, found.inf) == (np.isnan(wide).sum(), np.isinf(wide).sum())
    if finite.size:
        given = np.array([found.least, found.most, found.mean], "float64")
        np.testing.assert_allclose(given, [finite.min(), finite.max(), finite.mean()], 1e-5, 1e-6)
    else:
        assert found.least is None and found.mean is None
    assert taken(ops.tensor(np.zeros(3, "int32"))) is None and taken(ops.zeros((0,))) is None


def test_kept_tensors_are_those_of_the_run(model):
    wanted = model(IDS).numpy().copy()
    with trace(keep=True) as t:
        logits = model(IDS)
    assert np.array_equal(logits.numpy(), wanted)
    last = t[-1]
    assert last.output.buffer is logits.buffer, "kept without a copy"
    add, norm = t["layers.0/add[0]"], t["layers.0.post_attention_layernorm/rms_norm[0]"]
    assert np.array_equal(norm.input("x").numpy(), add.output.numpy())
    assert norm.input("weight") is model.layers[0].post_attention_layernorm.weight
    assert np.array_equal(t["layers.0"].output.numpy(), t["layers.0/add[1]"].output.numpy())
    assert np.array_equal(t["layers.1"].inputs[0].numpy(), t["layers.0"].output.numpy())


def test_a_written_tensor_is_kept_as_it_was(model):
    cache = model.new_cache()
    with trace("layers.0.self_attn", keep=True) as t:
        model(IDS, cache)
        model([3], cache)
    first, second = (t[f"layers.0.self_attn/cache_write[0]@{number}"] for number in {each.number: 0 for each in t})
    rows = len(IDS)
    assert np.array_equal(first.written("cache").numpy()[:rows], second.input("cache").numpy()[:rows])
    changed = second.written("cache").numpy()
    assert np.array_equal(changed[:rows], first.written("cache").numpy()[:rows])
    assert np.array_equal(changed[rows], second.input("x").numpy()[0])
    assert not np.array_equal(second.input("cache").numpy()[rows], changed[rows])


def test_past_the_limit_tensors_go_to_a_file(model):
    with trace(keep=True) as whole:
        model(IDS)
    with trace(keep=True, limit=2000) as t:
        model(IDS)
    assert t.keeper.bytes <= 2000 < t.keeper.spilled
    for record, other in zip(t, whole, strict=True):
        for kept, wanted in zip(record.kept_outputs, other.kept_outputs, strict=True):
            assert np.array_equal(kept.numpy(), wanted.numpy())


def test_a_call_that_fails_is_recorded(model):
    def breaks(*args, **constants):
        raise ValueError("broken")

    with pytest.raises(ops.KernelError, match="broken"), ops.rope.use(breaks), trace() as t:
        model(IDS)
    assert t[-1].op_name == "rope" and t[-1].seconds is None and t[-1].kernel == "breaks"
    assert "did not return" in repr(t[-1])


def test_indexing(model):
    with trace() as t:
        model(IDS)
        model(IDS)
    first, second = dict.fromkeys(each.number for each in t)
    with pytest.raises(KeyError, match=rf"in the passes {first}, {second}: add one"):
        t["layers.0/add[0]"]
    assert t[f"layers.0/add[0]@{second}"].number == second
    with pytest.raises(KeyError, match=r"nearest: layers\.0\.self_attn/rope\[1\]"):
        t["layers.0.self_atn/rope[1]"]
    assert isinstance(t[2:5], Recording) and len(t[2:5]) == 3 and t[2:5][0] is t[2]
    adds = t.filter("layers.0-1/add")
    assert [each.address for each in adds[:4]] == [f"layers.{i}/add[{j}]" for i in range(2) for j in range(2)]
    assert len(t.filter("/linear rows=9 dtype=float32")) == 2 * 22
    assert len(t.filter(lambda record: record.op_name == "softmax")) == 0


def test_a_selector_that_means_nothing_names_what_is_near(model):
    message = r"'layers\.1\.self_atn' meant none .* there were layers\.1\.self_attn"
    with pytest.raises(ops.SelectorError, match=message), trace("layers.1.self_atn"):
        model(IDS)
    with pytest.raises(ops.SelectorError, match="no op was called"), trace():
        pass
    with pytest.raises(ZeroDivisionError), trace("nothing"):  # the exception is what there is to say
        raise ZeroDivisionError


def test_traces_nest_and_undo_themselves(model):
    with trace("layers.0") as outer, trace("layers.0/add") as inner:
        model(IDS)
        with pytest.raises(ops.OpError, match="on already"), outer:
            pass
    count = len(outer), len(inner)
    assert count == (17, 2)
    model(IDS)
    assert (len(outer), len(inner)) == count


def test_it_prints_as_a_table(model):
    with trace() as t:
        model(IDS)
    lines = repr(t).splitlines()
    assert lines[0].split() == ["call", "inputs", "output", "values", "us", "line"]
    assert lines[-1] == f"{len(t)} calls"
    assert any("layers.0.self_attn/rope[0]@" in line and "llm/models/llama.py:" in line for line in lines)


@pytest.mark.parametrize("weights", [None, "q4"])
def test_saved_and_loaded_again(tmp_path, weights):
    model = llm.load("tiny", weights=weights)
    with trace("layers.0", keep=True) as t:
        model(IDS)
    folder = t.save(tmp_path / "trace")
    again = Recording.load(folder)
    assert repr(again) == repr(t) and len(again) == len(t)
    for record, other in zip(again, t, strict=True):
        assert record.held.keys() == other.held.keys()
        for name, held in record.held.items():
            assert np.array_equal(to_bytes(held.tensor), to_bytes(other.held[name].tensor)), (record, name)
    assert again.filter("/linear")[0].constants == {}
    with pytest.raises(ops.OpError, match="is there already"):
        t.save(folder)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["trace"]


def test_what_is_no_recording_is_refused(model, tmp_path):
    with trace("layers.0", keep=True) as t:
        model(IDS)
    folder = t.save(tmp_path / "trace")
    tensors = (folder / "tensors.safetensors").read_bytes()
    text = json.loads((folder / "records.json").read_text())
    for file, content in (
        ("tensors.safetensors", tensors[:100]),
        ("tensors.safetensors", tensors[:-100]),
        ("records.json", b"{"),
        ("records.json", json.dumps(text | {"format": 9}).encode()),
        ("records.json", json.dumps(text | {"records": [{"path": 3}]}).encode()),
    ):
        kept = (folder / file).read_bytes()
        (folder / file).write_bytes(content)
        with pytest.raises(ops.OpError):
            Recording.load(folder)
        (folder / file).write_bytes(kept)
    with pytest.raises(ops.OpError, match="no recording"):
        Recording.load(tmp_path / "nowhere")


@pytest.mark.parametrize("form", ["float32", "bfloat16", "q4"])
def test_bytes_and_back(rng, form):
    x = ops.tensor(rng.standard_normal((40, 64)).astype("float32"), form)
    assert np.array_equal(from_bytes(to_bytes(x).copy(), x.spec).numpy(), x.numpy())


def test_the_line_is_found_past_a_tools_own_frames(model):
    class Passes(ops.Interceptor):
        def scope(self, scope, run):
            return run(*scope.args, **scope.constants)

    with ops.intercepted(Passes()), trace("/rms_norm") as t:
        model(IDS)
    assert all(each.source.startswith("llm/models/llama.py:") for each in t)
