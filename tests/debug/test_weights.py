"""Wrong weights are named, with the element, what they look like, and the first call that uses them."""

import re

import numpy as np
import pytest

import ops
from debug.diagnosis import doctor
from debug.values import Weights

from .patients import culprit, patient, some_layer


def flip(weights, name, rng):
    row = int(rng.integers(len(weights[name].numpy())))
    weights[name].numpy()[row] *= -1
    return rf"all in row {row}, .*with the opposite sign"


def one_element(weights, name, rng):
    values = weights[name].numpy()
    index = tuple(int(rng.integers(size)) for size in values.shape)
    values[index] *= 1.01
    return rf"\[{index[0]}, {index[1]}\] is .*no other element differs"


def transpose(weights, name, rng):
    weights[name].numpy()[...] = weights[name].numpy().T.copy()
    return "it is the transpose"


def double(weights, name, rng):
    weights[name].numpy()[...] *= 2
    return "by a factor of 2"


SQUARE = ("self_attn.q_proj", "self_attn.o_proj")  # what a transpose needs
HARMED = [(harm, name) for harm in (flip, one_element, transpose, double) for name in (*SQUARE, "mlp.gate_proj")]


@pytest.mark.parametrize(("harm", "name"), [each for each in HARMED if each[0] is not transpose or each[1] in SQUARE])
def test_a_wrong_weight(rng, harm, name):
    layer = some_layer(rng)
    model, pristine = patient(rng)
    name = f"layers.{layer}.{name}"
    told = harm(dict(model.parameters()), f"{name}.weight", rng)
    found = culprit(model, pristine)
    assert (found.kind, found.parameter, found.op, found.path) == ("weight", f"{name}.weight", "linear", name)
    assert found.address == f"{name}/linear[0]" and found.source.startswith("llm/models/llama.py:")
    assert re.search(told, found.message), found.message


def test_swapped_weights_are_both_named(rng):
    layer = some_layer(rng)
    model, pristine = patient(rng)
    mlp = model.layers[layer].mlp
    mlp.gate_proj.weight, mlp.up_proj.weight = mlp.up_proj.weight, mlp.gate_proj.weight
    found = doctor(model, pristine).findings
    names = [f"layers.{layer}.mlp.{part}.weight" for part in ("gate_proj", "up_proj")]
    assert [each.parameter for each in found] == names
    assert f"holds the values of layers.{layer}.mlp.up_proj.weight" in found[0].message


def test_a_weight_of_the_wrong_shape(rng):
    layer = some_layer(rng)
    model, pristine = patient(rng)
    module = model.layers[layer].mlp.down_proj
    module.weight = ops.tensor(np.ascontiguousarray(module.weight.numpy().T))
    found = culprit(model, pristine)
    assert found.parameter == f"layers.{layer}.mlp.down_proj.weight" and "its shape is [48, 32]" in found.message
    assert found.address == f"layers.{layer}.mlp.down_proj/linear[0]" and module.weight.shape == (48, 32)


@pytest.mark.parametrize("form", ["q4", "q8"])
def test_the_scale_of_one_group(rng, form):
    layer = some_layer(rng)
    model, pristine = patient(rng, packed=form)
    weight = model.layers[layer].mlp.gate_proj.weight
    size = weight.spec.format.group * weight.spec.format.bits // 8 * ops.target.lanes()
    record = np.from_dlpack(weight.buffer.data).reshape(-1, weight.spec.format.record(ops.target.lanes()))[0]
    row = int(rng.integers(ops.target.lanes()))
    record[size : size + 2 * ops.target.lanes()].view("float16")[row] *= 1.05
    found = culprit(model, pristine)
    assert found.parameter == f"layers.{layer}.mlp.gate_proj.weight" and f"all in row {row}" in found.message
    assert re.search(r"by a factor of 1\.0[45]", found.message), "as far as float16 tells"


def test_a_weight_that_is_not_finite_needs_no_reference(rng):
    layer = some_layer(rng)
    model, _ = patient(rng)
    model.layers[layer].input_layernorm.weight.numpy()[3] = np.nan
    found = culprit(model)
    assert (found.parameter, found.op) == (f"layers.{layer}.input_layernorm.weight", "rms_norm")


def test_weights_are_compared_as_the_coarser_dtype_tells(rng):
    model, pristine = patient(rng, "bfloat16")
    finer = {name: array.astype("float32") * (1 + 2**-10) for name, array in pristine.items()}
    assert doctor(model, {n: a.astype("float32") for n, a in pristine.items()}, seconds=0).ok
    assert not doctor(model, {n: a * 1.01 for n, a in finer.items()}, seconds=0).ok
    wide, _ = patient(rng)
    narrow = {name: weight.numpy().astype("float16") for name, weight in wide.named_tensors().items()}
    assert doctor(wide, narrow, seconds=0).ok


def test_weights_by_other_names(
    rng,
):
    named = {"model.a.qkv_proj.weight": np.arange(40.0).reshape(8, 5), "b.gate_proj.bias": np.ones(2)}
    found = Weights(named, "model.")
    queries, keys, values = (found.find(f"a.{part}_proj.weight", (n, 5)) for part, n in (("q", 4), ("k", 2), ("v", 2)))
    assert queries is not None and keys is not None and values is not None
    assert queries.tolist() == np.arange(20.0).reshape(4, 5).tolist()
    assert keys[0, 0] == 20 and values[0, 0] == 30
    assert found.find("b.up_proj.bias", (2,)) is None and found.find("b.gate_up_proj.bias", (4,)) is None
