"""Modules: where their calls are filed, where their weights are found, how they print, after every kind of edit."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

import llm
import ops
from llm.nn import ModuleList, RotaryEmbedding, load_parameters
from llm.rope import Rope, RopeScaling

from .small import addresses, model


class Twice(llm.Module):
    def forward(self, x: ops.Tensor) -> ops.Tensor:
        return x + x


class Stack(llm.Module):
    def __init__(self, *layers: Any):
        self.layers = list(layers)

    def forward(self, x: ops.Tensor) -> ops.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Outer(llm.Module):
    def __init__(self, inner: Any):
        self.inner = inner

    def forward(self, x: ops.Tensor) -> ops.Tensor:
        return self.inner(x) + x


def run(module: llm.Module) -> tuple[float, list[str]]:
    x = ops.tensor([[1.0]])
    return float(module(x).item()), addresses(lambda: module(x))


def test_paths_of_attributes_and_lists():
    assert run(Outer(Twice())) == (3.0, ["inner/add[0]", "/add[0]"])
    assert run(Stack(Twice(), Outer(Twice()))) == (
        6.0,
        ["layers.0/add[0]", "layers.1.inner/add[0]", "layers.1/add[0]"],
    )


def test_paths_follow_every_edit():
    stack = Stack(Twice(), Twice())
    stack.layers.insert(1, Outer(Twice()))
    assert run(stack) == (12.0, ["layers.0/add[0]", "layers.1.inner/add[0]", "layers.1/add[0]", "layers.2/add[0]"])
    del stack.layers[0]
    assert run(stack) == (6.0, ["layers.0.inner/add[0]", "layers.0/add[0]", "layers.1/add[0]"])
    stack.layers[-1] = Outer(stack.layers[-1])  # wrapped in its place
    assert run(stack) == (9.0, ["layers.0.inner/add[0]", "layers.0/add[0]", "layers.1.inner/add[0]", "layers.1/add[0]"])
    stack.layers.append(Twice())
    stack.layers = stack.layers[1:]
    assert run(stack) == (6.0, ["layers.0.inner/add[0]", "layers.0/add[0]", "layers.1/add[0]"])
    stack.layers.reverse()
    stack.layers += [Twice()]
    assert run(stack)[1][0] == "layers.0/add[0]"
    assert run(stack)[1][-1] == "layers.2/add[0]"


def test_the_same_layer_twice_runs_at_both_places():
    twice = Twice()
    stack = Stack(twice, twice, twice)
    assert run(stack) == (8.0, ["layers.0/add[0]", "layers.1/add[0]", "layers.2/add[0]"])
    x = ops.tensor([[1.0]])
    assert addresses(lambda: stack.layers[-1](x)) == ["/add[0]"]  # called by itself, a module is the outermost


def test_a_function_is_a_layer():
    stack = Stack(Twice(), Twice())
    stack.layers[0] = lambda x: ops.scale(x, 5.0)
    assert run(stack) == (10.0, ["/scale[0]", "layers.1/add[0]"])
    assert [path for path, _ in stack.modules()] == ["", "layers.1"]
    assert "layers.0: <function" in repr(stack)


def test_a_list_becomes_a_module_list():
    stack = Stack()
    assert isinstance(stack.layers, ModuleList)
    stack.layers.append(Twice())  # to a list that was empty
    assert run(stack) == (2.0, ["layers.0/add[0]"])
    stack.__setattr__("sizes", [1, 2])  # a list of something else stays what it is
    assert type(vars(stack)["sizes"]) is list
    assert repr(stack) == "Stack  0 B\n  layers.0: Twice  0 B"


def test_slices_are_lists_whose_members_know_their_place():
    stack = Stack(*(Twice() for _ in range(4)))

    class Half(Stack):
        def forward(self, x: ops.Tensor) -> ops.Tensor:
            for layer in self.layers[1:3]:
                x = layer(x)
            return self.layers[3:][0](x)

    half = Half(*stack.layers)
    assert run(half) == (8.0, ["layers.1/add[0]", "layers.2/add[0]", "layers.3/add[0]"])
    stack.layers[1:3] = []
    assert [path for path, _ in stack.modules()] == ["", "layers.0", "layers.1"]
    assert type(stack.layers[:1]) is list
    assert stack.layers[5:] == []


def test_a_module_without_forward_says_so():
    with pytest.raises(TypeError, match="Module has no forward"):
        llm.Module()(1)


def test_parameters_in_the_order_of_declaration(rng):
    small = model(rng)
    names = [name for name, _ in small.parameters()]
    assert names[:3] == ["embed_tokens.weight", "layers.0.self_attn.q_proj.weight", "layers.0.self_attn.k_proj.weight"]
    assert names[-2:] == ["norm.weight", "lm_head.weight"]
    assert len(names) == 1 + 3 * 9 + 2
    assert small.nbytes == sum(4 * weight.size for _, weight in small.parameters())
    assert dict(small.modules())["layers.2.mlp"] is small.layers[2].mlp


def test_set_parameter(rng):
    small = model(rng)
    value = ops.zeros((32,))
    small.set_parameter("layers.1.input_layernorm.weight", value)
    assert small.layers[1].input_layernorm.weight is value
    assert dict(small.parameters())["layers.1.input_layernorm.weight"] is value
    for wrong in ("layers.1.input_layernorm.wieght", "layers.7.mlp", "layers.x.mlp", "nothing.at.all"):
        with pytest.raises(KeyError, match=f"Llama has no weight '{wrong}'"):
            small.set_parameter(wrong, value)


def test_a_changed_weight_changes_what_is_computed(rng):
    small, ids = model(rng), [1, 2, 3]
    before = small(ids).numpy().copy()
    small.norm.weight.numpy()[...] *= 2  # the tensor is a view of the memory that the kernels read
    np.testing.assert_allclose(small(ids).numpy(), before * 2, rtol=1e-5)


def test_a_deep_copy_is_independent(rng):
    small, ids = model(rng), [1, 2, 3]
    twin, before = copy.deepcopy(small), small(ids).numpy().copy()
    twin.layers[0].mlp.down_proj.weight.numpy()[...] = 0
    assert np.array_equal(small(ids).numpy(), before)
    assert not np.array_equal(twin(ids).numpy(), before)


def test_repr_folds_equal_layers(rng):
    small = model(rng)
    text = repr(small)
    assert text.startswith("Llama  ")
    assert "  embed_tokens: Embedding  float32[258, 32]  33 kB\n" in text
    assert "  layers.0-2: 3 x Block  " in text
    assert "    self_attn: Attention  " in text
    assert "      q_proj: Linear  float32[32, 32]  4.1 kB\n" in text
    assert text.count("q_proj") == 1
    small.layers[1] = Outer(small.layers[1])
    small.layers[2].norm = llm.RMSNorm(32, 1e-5)
    text = repr(small)
    for line in ("  layers.0: Block  ", "  layers.1: Outer  ", "    inner: Block  ", "  layers.2: Block  "):
        assert line in text
    assert "norm: RMSNorm  float32[32]  128 B  not loaded" in text
    assert text.count("q_proj") == 3


def test_an_unloaded_model_prints_and_does_not_run():
    from llm.load import build

    from .small import CONFIG

    bare = build(CONFIG)
    assert repr(bare).count("not loaded") >= 9
    with pytest.raises(ops.OpError, match=r"weight is ops\.spec\.Spec, expected Tensor"):
        bare([1])


def test_load_parameters_lists_everything_and_changes_nothing(rng):
    small = model(rng)
    before = dict(small.parameters())
    arrays = {f"model.{name}": weight.numpy() for name, weight in before.items()}
    arrays["model.extra"] = np.zeros(3, "float32")
    arrays["model.norm.weight"] = np.zeros(7, "float32")
    del arrays["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(llm.UserError) as caught:
        load_parameters(small, arrays, "model.")
    assert str(caught.value) == (
        "the checkpoint does not fit Llama: missing: layers.1.mlp.up_proj.weight; left over: extra; "
        "wrong shape: norm.weight is [7], expected [32]"
    )
    assert all(small_weight is before[name] for name, small_weight in small.parameters())


def test_rotary_frequencies_are_made_once_where_they_do_not_change():
    plain = RotaryEmbedding(Rope(10000.0, 8, 64))
    positions = ops.tensor(np.arange(2, dtype="int32"))
    assert plain.at(positions, 2).frequencies is plain.at(positions, 60).frequencies
    dynamic = RotaryEmbedding(Rope(10000.0, 8, 64, RopeScaling("dynamic", factor=2.0)))
    assert dynamic.at(positions, 64).frequencies is dynamic.at(positions, 2).frequencies
    assert dynamic.at(positions, 65).frequencies is not dynamic.at(positions, 64).frequencies
