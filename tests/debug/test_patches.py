"""Patches: what they change, what they leave, what they refuse, and that no other tool sees a call more."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import llm
import ops
from debug.patches import ablate, noise, patch, scale
from debug.trace import trace
from ops import DTypeError, OpError, SelectorError, ShapeError
from tests.llm.small import addresses, model

IDS = [3, 1, 4, 1, 5, 9]


@pytest.fixture
def net(rng) -> Any:
    return model(rng)


def kept(net: Any, *patches: Any) -> Any:
    """A recording of a run with the patches on; they are inside the trace, which sees what they make."""
    with trace(keep=True) as t:
        if patches:
            with patches[0] as one, patches[1] if len(patches) > 1 else trace():
                net(IDS)
                assert one.hits
        else:
            net(IDS)
    return t


def values(recording: Any, address: str) -> np.ndarray:
    return recording[address].output.numpy()


def test_module_output_only_that_module(net):
    plain, t = kept(net), kept(net, patch("layers.1.mlp", output=ablate()))
    assert not values(t, "layers.1.mlp").any()
    assert values(plain, "layers.1.mlp").any()
    assert np.array_equal(values(t, "layers.1.mlp.down_proj"), values(plain, "layers.1.mlp.down_proj"))
    assert np.array_equal(values(t, "layers.1"), values(t, "layers.1/add[0]")), "the residual stream alone is left"
    assert not np.array_equal(values(t, "layers.2"), values(plain, "layers.2"))


def test_paths_ranges_globs_and_the_module_itself(net):
    def ablated(where: Any) -> list[str]:
        t = kept(net, patch(where, output=ablate()))
        return [each.path for each in t.modules if not each.output.numpy().any()]

    assert ablated("layers.0-1.mlp") == ["layers.0.mlp", "layers.1.mlp"]
    assert ablated("layers.*.mlp, layers.0.self_attn") == ["layers.0.self_attn", *(f"layers.{i}.mlp" for i in range(3))]
    assert ablated(net.layers[2].self_attn) == ["layers.2.self_attn"]
    assert ablated("layers.2.self_attn rows=6 dtype=float32") == ["layers.2.self_attn"]
    assert ablated(net) == [""]


def test_call_output_and_function(net):
    plain = kept(net)

    def clipped(x: np.ndarray) -> np.ndarray:
        return np.clip(x, -0.1, 0.1)

    t = kept(net, patch("layers.1/add[0]", output=clipped))
    assert np.array_equal(values(t, "layers.1/add[0]"), np.clip(values(plain, "layers.1/add[0]"), -0.1, 0.1))

    def in_place(x: np.ndarray) -> None:
        x[2] = 7.0

    t = kept(net, patch("layers.1/add[0]", output=in_place))
    assert (values(t, "layers.1/add[0]")[2] == 7.0).all()
    assert np.array_equal(values(t, "layers.1/add[0]")[:2], values(plain, "layers.1/add[0]")[:2])


def test_input_of_calls_by_name(net, rng):
    weights = rng.standard_normal((32, 32)).astype("float32")
    t = kept(net, patch("layers.0.self_attn.q_proj/linear", input={"weight": weights}))
    x = t["layers.0.self_attn.q_proj/linear[0]"].input("x").numpy()
    np.testing.assert_allclose(values(t, "layers.0.self_attn.q_proj"), x @ weights.T, rtol=1e-4, atol=1e-4)
    assert not np.array_equal(net.layers[0].self_attn.q_proj.weight.numpy(), weights), "the model's own is untouched"


def test_halved_keys_change_scores_alone(net):
    """The cache holds the keys as they were: only what attention reads is patched."""
    plain, t = kept(net), kept(net, patch("layers.1.self_attn/attention", input={"k": scale(0.5)}))
    assert np.array_equal(values(t, "layers.1.self_attn.v_proj"), values(plain, "layers.1.self_attn.v_proj"))
    q, k, v = (t["layers.1.self_attn/attention[0]"].input(name) for name in "qkv")
    expected = ops.attention.reference(q, k.numpy() * 0.5, v, ops.tensor(np.arange(6, dtype="int32")), scale=8**-0.5)
    np.testing.assert_allclose(values(t, "layers.1.self_attn/attention[0]"), expected, rtol=1e-4, atol=1e-5)


def test_input_of_a_module_by_name(net):
    plain = kept(net)
    t = kept(net, patch("layers.1", input={"x": 0.0}))
    assert not t["layers.1.input_layernorm"].inputs[0].numpy().any()
    assert np.array_equal(values(t, "layers.0"), values(plain, "layers.0")), "the tensor before it is not written to"


def test_rows_and_index(net):
    plain = values(kept(net), "layers.1.self_attn/attention[0]")
    for rows, index in ((2, None), (slice(1, 3), 2), ([0, -1], np.s_[1:3, :4]), (None, [0, 3]), (-1, np.s_[..., 0])):
        t = kept(net, patch("layers.1.self_attn/attention[0]", output=ablate(), rows=rows, index=index))
        expected = plain.copy()
        for i in np.arange(len(IDS))[slice(None) if rows is None else rows].reshape(-1):
            expected[i][... if index is None else index] = 0
        assert np.array_equal(values(t, "layers.1.self_attn/attention[0]"), expected)


def test_replacements_by_shape(net, rng):
    plain = values(kept(net), "layers.0")
    whole, row, two = (rng.standard_normal(shape).astype("float32") for shape in ((6, 32), (32,), (2, 32)))

    def given(value: Any, rows: Any = None) -> np.ndarray:
        return values(kept(net, patch("layers.0", output=value, rows=rows)), "layers.0")

    assert np.array_equal(given(ops.tensor(whole)), whole)
    assert np.array_equal(given(whole.astype("float64")), whole)
    assert np.array_equal(given(row), np.tile(row, (6, 1)))
    assert (given(3) == 3).all()
    changed = given(ops.tensor(whole), [4])
    assert np.array_equal(changed[4], whole[4])
    assert np.array_equal(np.delete(changed, 4, 0), np.delete(plain, 4, 0))
    assert np.array_equal(given(two, [5, 1])[[5, 1]], two)


def test_mean_is_over_all_rows_and_noise_is_seeded(net):
    plain = values(kept(net), "layers.0")
    t = kept(net, patch("layers.0", output=ablate("mean"), rows=[2]))
    np.testing.assert_allclose(values(t, "layers.0")[2], plain.mean(0), rtol=1e-5)
    noisy = [values(kept(net, patch("layers.0", output=noise(0.5, seed))), "layers.0") - plain for seed in (1, 1, 2)]
    assert np.array_equal(noisy[0], noisy[1]) and not np.array_equal(noisy[0], noisy[2])
    assert 0.3 < noisy[0].std() < 0.7
    again = patch("layers.0-1", output=noise(0.5))
    runs = [kept(net, again) for _ in range(2)]
    assert np.array_equal(values(runs[0], "layers.1"), values(runs[1], "layers.1")), "a patch makes what it made before"
    assert not np.array_equal(values(runs[0], "layers.0") - plain, values(runs[0], "layers.1") - plain)


def test_nothing_aliases(net):
    """Neither the value that is put in nor the tensors of the model are those that flow on."""
    value, ones = ops.tensor(np.ones((6, 32), "float32")), np.ones((6, 32), "float32")
    with patch("layers.0", output=value), trace(keep="outputs") as t:
        net(IDS)
    t["layers.0"].output.numpy()[...] = -1.0
    assert np.array_equal(value.numpy(), ones)

    def scribble(x: np.ndarray) -> np.ndarray:
        x[...] = np.nan
        return ones

    with trace(keep="outputs") as t, patch("layers.1", output=scribble), trace(keep="outputs") as inside:
        net(IDS)
    assert np.isfinite(values(inside, "layers.1")).all(), "a function scribbles in a copy"
    values(t, "layers.1")[...] = -1.0
    assert np.array_equal(ones, np.ones((6, 32), "float32"))


def test_half_floats_are_changed_in_float32(rng):
    x = ops.tensor(rng.standard_normal((3, 8)).astype("float32"), "bfloat16")
    plain, seen = ops.neg(x).numpy(), []
    with patch("/neg", output=lambda values: seen.append(values.dtype) or values * 1.01, rows=[1]):
        changed = ops.neg(x).numpy()
    assert seen == [np.dtype("float32")]
    assert changed.dtype == plain.dtype
    assert np.array_equal(changed[1], (plain[1].astype("float32") * np.float32(1.01)).astype(plain.dtype))
    assert changed[[0, 2]].tobytes() == plain[[0, 2]].tobytes()


def test_overflow_is_a_value(rng):
    x = ops.tensor(1 + rng.random((3, 8), "float32"), "float16")
    with patch("/neg", output=scale(1e9)):
        assert (ops.neg(x).numpy() == -np.inf).all()
    with patch("/neg", input={"x": np.nan}), patch("/neg", output=ablate()):
        assert not ops.neg(x).numpy().any(), "zero, not zero times NaN"


def test_patches_nest_and_undo_themselves(net):
    plain = net(IDS).numpy().copy()
    both = values(kept(net, patch("layers.0", output=scale(2)), patch("layers.0", output=lambda x: x + 1)), "layers.0")
    expected = (values(kept(net), "layers.0") + 1) * 2  # the inner one is nearer to the module
    np.testing.assert_allclose(both, expected, rtol=1e-6)
    with pytest.raises(RuntimeError, match="stop"), patch("layers.0", output=0.0):
        raise RuntimeError("stop")
    assert np.array_equal(net(IDS).numpy(), plain)


def test_other_tools_see_no_call_more(net):
    def run() -> None:
        noisy = patch("layers.0-2.mlp, /attention", output=noise(0.1), rows=[0])
        with noisy, patch("/linear", input={"x": scale(2.0)}):
            net(IDS)

    assert addresses(run) == addresses(lambda: net(IDS))


@pytest.mark.parametrize(
    ("where", "change", "error", "says"),
    [
        ("layers.0", {"output": np.zeros((5, 32))}, ShapeError, r"layers.0@\d+, output is .*\[6, 32\].* \[5, 32\]"),
        ("layers.0", {"output": np.zeros((2, 32)), "rows": [1]}, ShapeError, r"the 1 chosen rows \[1, 32\]"),
        ("layers.0", {"output": lambda x: x[:2]}, ShapeError, r"function gave the shape \[2, 32\], expected \[6, 32\]"),
        ("layers.0", {"output": 0, "rows": [6]}, ShapeError, r"rows=\[6\]"),
        ("layers.0", {"output": 0, "rows": slice(6, 9)}, ShapeError, "narrow the selector"),
        ("layers.0", {"output": 0, "index": 32}, ShapeError, "index=32"),
        ("layers.0", {"output": ops.zeros((6, 32), "float16")}, DTypeError, "float16.*ops.cast"),
        ("layers.0", {"output": np.zeros((6, 32), bool)}, DTypeError, "gave bool"),
        ("/rope", {"input": {"positions": scale(0.5)}}, DTypeError, r"positions is int32\[6\].* gave float"),
        ("/rope", {"input": {"angle": 0}}, OpError, r"self_attn/rope\[0\]@\d+ has no input 'angle'; it has x, pos"),
        ("/cache_write", {"input": {"cache": 0}}, OpError, "cache is written by the call"),
        ("/cache_write", {"output": 0}, OpError, "gave NoneType"),
        ("layers.0", {"input": {"cache": 0}}, OpError, "a patch changes tensors"),
        ("layers.0", {"input": {"hidden": 0}}, OpError, "no input 'hidden'; it has x, rotate, cache"),
    ],
)  # fmt: skip
def test_what_does_not_fit_says_so(net, where, change, error, says):
    with pytest.raises(error, match=says), patch(where, **change):
        net(IDS)


def test_what_means_nothing_says_so(net):
    says = r"patch: 'layers.7.mlp' meant none .* layers\.2\.mlp"
    with pytest.raises(SelectorError, match=says), patch("layers.7.mlp", output=0):
        net(IDS)
    with pytest.raises(SelectorError, match="meant none"), patch("mlp", output=0):
        net(IDS)
    with pytest.raises(OpError, match="give output="):
        patch("layers.0")
    with pytest.raises(OpError, match="ablate by 'median'"):
        ablate("median")


def test_packed_weights_are_refused(rng):
    weight = ops.tensor(rng.standard_normal((32, 64)).astype("float32"), "q8")
    x = ops.tensor(rng.standard_normal((1, 64)).astype("float32"))
    with pytest.raises(DTypeError, match="is packed"), patch("/linear", input={"weight": scale(2.0)}):
        ops.linear(x, weight)


def test_the_first_of_several_outputs(rng):
    x = ops.tensor(rng.standard_normal((2, 9)).astype("float32"))
    values, indices = ops.top_k(x, k=3)
    with patch("/top_k", output=0):
        changed = ops.top_k(x, k=3)
    assert not changed[0].numpy().any() and values.numpy().any()
    assert np.array_equal(changed[1].numpy(), indices.numpy())


def test_in_generation_one_pass_can_be_meant(rng):
    """A row that only the prefill has: the selector says so by the number of rows."""
    net = llm.load("tiny")
    prompt = net.tokenizer.encode("Mia gave the red ball to Tom. The ball now belongs to")
    with patch(f"layers.0 rows={len(prompt)}", output=ablate(), rows=[7]) as p:
        net.generate(prompt, max_tokens=3)
    assert p.hits == 1
