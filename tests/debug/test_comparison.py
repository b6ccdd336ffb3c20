"""Two runs beside each other: what differs is named, what follows from it is told apart, and all calls are aligned."""

from typing import Any

import numpy as np
import pytest

import ops
from debug.comparison import Run, compare
from llm.load import build
from llm.nn import Linear, Module
from ops import Tensor
from ops.difference import inputs_of, referred
from tests.llm import small

from .twins import twin

LAYERS = 7


@pytest.fixture
def ids(rng) -> list[int]:
    return rng.integers(0, 256, int(rng.integers(5, 40))).tolist()


def copy_of(model: Any, dtype: str = "float32", **changes: Any) -> Any:
    """A model of its own with the same weights."""
    copy = build(small.CONFIG | changes, dtype)
    for name, weight in model.parameters():
        copy.set_parameter(name, ops.tensor(weight.numpy().astype("float32"), dtype))
    return copy


def test_transformers_agrees_and_every_call_is_aligned(rng, ids):
    model = small.model(rng)
    found = compare(model, twin(model), ids)
    assert found.first is None and {row.status for row in found.rows} == {"agrees"}
    assert all(row.introduced is not None and row.total is not None for row in found.rows)
    assert "agree: no call introduces an error" in repr(found)


def test_a_perturbed_weight_against_transformers(rng, ids):
    model = small.model(rng, num_hidden_layers=LAYERS)
    theirs = twin(model)
    name = f"layers.5.{rng.choice(['self_attn.q_proj', 'self_attn.o_proj', 'mlp.up_proj', 'mlp.down_proj'])}"
    weight = dict(model.parameters())[f"{name}.weight"].numpy()
    weight *= 1 + 1e-2 * rng.standard_normal(weight.shape).astype("float32")
    found = compare(model, theirs, ids)
    assert found.first is not None and found.first.address == f"{name}/linear[0]"
    assert found.first.source.startswith("llm/models/llama.py:")
    assert [path for path, each in found.modules.items() if each.first is found.first][-1] == name
    at = found.rows.index(found.first)
    assert all(row.status == "agrees" for row in found.rows[:at])
    later = {row.address: row.status for row in found.rows[at + 1 :]}
    beside = [each for each in later if each.startswith("layers.5.") and later[each] == "agrees"]
    assert not [each for each in later if each not in beside and later[each] != "inherited"]
    taken = {"self_attn.k_proj", "self_attn.v_proj", "self_attn", "mlp.gate_proj", "mlp.up_proj"}
    assert {each.partition("/")[0].removeprefix("layers.5.") for each in beside} <= taken, "what the weight is not in"
    assert found.modules["layers.6"].status == "inherited" and found.modules["layers.4"].status == "agrees"
    names, errors = found.layers()
    clean, wrong = names.index("layers.4"), names.index("layers.5")
    assert errors.shape == (LAYERS + 3, len(ids)) and 10 * errors[clean].max() < errors[wrong].max()


def test_the_position_of_an_error(rng):
    """An embedding that differs for one token shows from its position on, not before."""
    model = small.model(rng)
    other = copy_of(model)
    ids = [*range(20)]
    other.embed_tokens.weight.numpy()[11] += 1.0
    names, errors = compare(other, model, ids).layers()
    assert names == ["embed_tokens", "layers.0", "layers.1", "layers.2", "norm", "lm_head"]
    assert errors[:, :11].max() < 1e-5 and errors[:, 11].min() > 1e-3
    assert errors[0, 12:].max() == 0 and errors[3, 12:].min() > 1e-5, "later tokens attend to it"


def test_a_dtype_against_float64(rng, ids):
    narrow = copy_of(small.model(rng), "bfloat16")
    found = compare(narrow, "float64", ids)
    assert found.first is None and found.b == "float64", found.summary()
    assert 1e-4 < max(row.introduced.error for row in found.rows if row.introduced) < 4e-2
    with ops.silu_mul.use(lambda gate, up: ops.silu_mul.reference(gate, up) * np.float32(1.1), where="layers.1"):
        wrong = compare(narrow, "float64", ids)
    assert wrong.first is not None and wrong.first.address == "layers.1.mlp/silu_mul[0]"
    assert max(row.total or 0.0 for row in found.rows) > 1e-3
    turned = compare("float64", narrow, ids)
    assert [row.total for row in turned.rows] == [row.total for row in found.rows], "the two change places"


def test_quantised_weights(rng, ids):
    model = small.model(rng)
    packed = copy_of(model)
    name = "layers.1.mlp.down_proj.weight"
    packed.set_parameter(name, ops.tensor(dict(model.parameters())[name].numpy(), "q4"))
    found = compare(packed, model, ids)
    assert [row.address for row in found.rows if row.status == "introduced"] == ["layers.1.mlp.down_proj/linear[0]"]


def test_a_kernel_that_is_switched_on(rng, ids):
    model = small.model(rng)

    def off(x, positions, frequencies, *, interleaved, scale):
        return ops.rope.reference(x, positions + 1, frequencies, interleaved=interleaved, scale=scale)

    on = Run(model, lambda: ops.rope.use(off, where="layers.1"), label="mine")
    found = compare(on, model, ids)
    assert found.a == "mine" and not ops.rope._uses
    assert [row.address for row in found.rows if row.status == "introduced"] == [
        "layers.1.self_attn/rope[0]",
        "layers.1.self_attn/rope[1]",
    ]


def test_runs_with_different_ops_align(rng, ids):
    model = small.model(rng)
    steps = Run(model, ops.attention.steps, label="in steps")
    found = compare(steps, model, ids)
    assert len(found.rows) == len(compare(model, model, ids).rows) + 2 * 3, "three ops in the place of one"
    assert found.first is None
    mixed = found["layers.0.self_attn.attention/mix[0]"]
    assert mixed.introduced is not None, "the last step is aligned with the whole op"
    assert found["layers.0.self_attn.attention/softmax[0]"].introduced is None
    back = compare(model, steps, ids)
    assert back.first is None and back["layers.2.self_attn/attention[0]"].introduced is not None


class JointAttention(Module):
    """Attention with one weight for queries, keys and values."""

    def __init__(self, parts: Any):
        self.head_dim, self.o_proj = parts.head_dim, parts.o_proj
        self.qkv_proj, self.ends = joined(parts.q_proj, parts.k_proj, parts.v_proj)

    def forward(self, x: Tensor, rotate: Any, cache: Any) -> Tensor:
        q, k, v = (each.reshape(len(x), -1, self.head_dim) for each in split(self.qkv_proj(x), self.ends))
        keys, values = cache.write(rotate(k), v, rotate.positions)
        mixed = ops.attention(rotate(q), keys, values, rotate.positions, scale=self.head_dim**-0.5)
        return self.o_proj(mixed.reshape(len(x), -1))


class JointMLP(Module):
    """An MLP with one weight for gate and up."""

    def __init__(self, parts: Any):
        self.down_proj = parts.down_proj
        self.gate_up_proj, self.ends = joined(parts.gate_proj, parts.up_proj)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(ops.silu_mul(*split(self.gate_up_proj(x), self.ends)))


def joined(*parts: Linear) -> tuple[Linear, list[int]]:
    weights = [each.weight.numpy() for each in parts]
    whole = np.concatenate(weights)
    joint = Linear(whole.shape[1], whole.shape[0])
    joint.weight = ops.tensor(whole)
    return joint, np.cumsum([len(each) for each in weights])[:-1].tolist()


def split(x: Tensor, ends: list[int]) -> list[Tensor]:
    return [ops.tensor(np.ascontiguousarray(each)) for each in np.split(x.numpy(), ends, axis=1)]


def joint_model(model: Any) -> Any:
    """The same model with fused weights."""
    model = copy_of(model)
    for layer in model.layers:
        layer.self_attn, layer.mlp = JointAttention(layer.self_attn), JointMLP(layer.mlp)
    return model


def test_fused_tensors_align_with_their_parts(rng, ids):
    model = small.model(rng)
    joint = joint_model(model)
    found = compare(joint, model, ids)
    assert found.first is None
    for address in ("layers.1.self_attn.qkv_proj/linear[0]", "layers.1.mlp.gate_up_proj/linear[0]"):
        assert found[address].introduced is not None and found[address].status == "agrees"
    weight = dict(joint.parameters())["layers.2.mlp.gate_up_proj.weight"].numpy()
    weight[-1] *= -1
    shown = "parts from the reference, Llama float32, at layers.2.mlp.gate_up_proj/linear[0] (tests/"
    assert shown in repr(compare(joint, model, ids))
    against = compare(model, joint, ids)
    wrong = [row.address for row in against.rows if row.status == "introduced"]
    assert wrong == ["layers.2.mlp.up_proj/linear[0]"], "the part that the fused weight has otherwise"
    assert against["layers.2.mlp.gate_proj/linear[0]"].status == "agrees"


def test_what_cannot_be_compared(rng, ids):
    model = small.model(rng)
    with pytest.raises(ops.OpError, match="takes a Limpid model"):
        compare("float64", "float64", ids)
    with pytest.raises(ops.OpError, match="'float32' is no reference"):
        compare(model, "float32", ids)
    with pytest.raises(KeyError, match=r"nearest: .*layers\.1\.self_attn/rope\[0\]"):
        compare(model, model, ids)["layers.1.self_attn/rope[7]"]


def test_the_page(rng, tmp_path):
    model = small.model(rng)
    other = copy_of(model)
    other.layers[1].mlp.up_proj.weight.numpy()[3] *= -1
    found = compare(Run(other, label="<b>mine</b>"), model, [1, 2, 3, 4])
    text = found.save_html(tmp_path / "page.html").read_text("utf-8")
    assert "&lt;b&gt;mine&lt;/b&gt;" in text and "<b>" not in text
    assert "layers.1.mlp.up_proj/linear[0]" in text and text.count("<rect") == 6 * 4 + 1
    assert "http" not in text and "<script" not in text, "it needs nothing else"


def test_memory_that_nobody_wrote_may_be_anything():
    """Also a signalling NaN, of whose conversion NumPy warns."""
    x = ops.tensor(np.array([0x7F800001, 0x3F800000], "uint32").view("float32"))
    seen = []

    class Looks(ops.Interceptor):
        def call(self, call, launch):
            seen.append(referred(call, inputs_of(call), wide=True))
            return launch(call)

    with ops.intercepted(Looks()):
        ops.add(x, x)
    [(wanted,)] = seen
    assert np.isnan(wanted[0]) and wanted[1] == 2
