"""Bugs in weights: the code is right, what was loaded is not."""

from __future__ import annotations

from typing import Any

import numpy as np

import ops
from ops.quantize import lay_out, take_apart

from .bug import Bugs
from .planting import changed, weight, weights

WEIGHTS = Bugs()
_SQUARE: dict[str, Any] = {
    "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 112,
}  # fmt: skip


@WEIGHTS.add(
    "gate and up swapped as weights", "layers.1.mlp.gate_proj/linear[0]", parameters=("layers.1.mlp.gate_proj.weight",)
)
def _(model):
    """gate_proj and up_proj of layer 1 hold each other's weights."""
    gate, up = "layers.1.mlp.gate_proj.weight", "layers.1.mlp.up_proj.weight"
    with weights(model, {gate: weight(model, up), up: weight(model, gate)}):
        yield


@WEIGHTS.add(
    "q and k swapped",
    "layers.2.self_attn.q_proj/linear[0]",
    parameters=("layers.2.self_attn.q_proj.weight",),
    **_SQUARE,
)
def _(model):
    """q_proj and k_proj of layer 2 hold each other's weights."""
    q, k = "layers.2.self_attn.q_proj.weight", "layers.2.self_attn.k_proj.weight"
    with weights(model, {q: weight(model, k), k: weight(model, q)}):
        yield


@WEIGHTS.add(
    "transposed", "layers.1.self_attn.o_proj/linear[0]", reference="weights",
    parameters=("layers.1.self_attn.o_proj.weight",), **_SQUARE,
)  # fmt: skip
def _(model):
    """o_proj of layer 1, a square, is transposed."""
    name = "layers.1.self_attn.o_proj.weight"
    with weights(model, {name: np.ascontiguousarray(weight(model, name).T)}):
        yield


@WEIGHTS.add(
    "one sign", "layers.2.mlp.up_proj/linear[0]", parameters=("layers.2.mlp.up_proj.weight",), num_hidden_layers=4
)
def _(model):
    """One value in row 17 of up_proj in layer 2 has the wrong sign."""
    name = "layers.2.mlp.up_proj.weight"
    values = weight(model, name)
    values[17, np.abs(values[17]).argmax()] *= -1
    with weights(model, {name: values}):
        yield


@WEIGHTS.add(
    "perturbed by 1e-2", "layers.5.mlp.gate_proj/linear[0]", parameters=("layers.5.mlp.gate_proj.weight",),
    num_hidden_layers=8,
)  # fmt: skip
def _(model):
    """gate_proj in layer 5 is off by 1e-2 of its size, at random."""
    name = "layers.5.mlp.gate_proj.weight"
    values = weight(model, name)
    noise = np.random.default_rng(0).standard_normal(values.shape).astype("float32")
    with weights(model, {name: values * (1 + np.float32(1e-2) * noise)}):
        yield


@WEIGHTS.add(
    "one value by 5e-2", "layers.3.self_attn.v_proj/linear[0]", parameters=("layers.3.self_attn.v_proj.weight",),
    num_hidden_layers=5,
)  # fmt: skip
def _(model):
    """The largest value of v_proj in layer 3 is off by 5e-2 of itself."""
    name = "layers.3.self_attn.v_proj.weight"
    values = weight(model, name)
    values[np.unravel_index(np.abs(values).argmax(), values.shape)] *= 1.05
    with weights(model, {name: values}):
        yield


@WEIGHTS.add(
    "rows in the interleaved order", "layers.0.self_attn.q_proj/linear[0]",
    parameters=("layers.0.self_attn.q_proj.weight",),
)  # fmt: skip
def _(model):
    """q_proj and k_proj in all layers keep the order of Meta's checkpoints, pairs of a head side by side."""

    def converted(name: str) -> np.ndarray:
        heads = weight(model, name).reshape(-1, 2, model.config.head_dim // 2, model.config.hidden_size)
        return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(-1, model.config.hidden_size)

    names = [f"layers.{i}.self_attn.{each}_proj.weight" for i in range(len(model.layers)) for each in "qk"]
    with weights(model, {name: converted(name) for name in names}):
        yield


@WEIGHTS.add("tokens swapped", "embed_tokens/embedding[0]", parameters=("embed_tokens.weight",), vocab_size=262)
def _(model):
    """Rows 200 to 259 of the embedding are swapped in pairs, as of a tokenizer with other special tokens."""
    values = weight(model, "embed_tokens.weight")
    values[200:260] = values[200:260].reshape(30, 2, -1)[:, ::-1].reshape(60, -1)
    with weights(model, {"embed_tokens.weight": values}):
        yield


@WEIGHTS.add("head tied", "lm_head/linear[0]", reference="weights", parameters=("lm_head.weight",))
def _(model):
    """The output head is the embedding, though the config says that they are two."""
    with weights(model, {"lm_head.weight": model.embed_tokens.weight}):
        yield


@WEIGHTS.add(
    "layers swapped", "layers.1.input_layernorm/rms_norm[0]", reference="weights",
    parameters=("layers.1.input_layernorm.weight",),
)  # fmt: skip
def _(model):
    """Layers 1 and 2 stand in each other's place."""
    first, second = model.layers[1], model.layers[2]
    model.layers[1], model.layers[2] = second, first
    try:
        yield
    finally:
        model.layers[1], model.layers[2] = first, second


@WEIGHTS.add(
    "norm never loaded", "layers.2.post_attention_layernorm/rms_norm[0]",
    parameters=("layers.2.post_attention_layernorm.weight",),
)  # fmt: skip
def _(model):
    """post_attention_layernorm of layer 2 holds ones."""
    name = "layers.2.post_attention_layernorm.weight"
    with weights(model, {name: np.ones_like(weight(model, name))}):
        yield


@WEIGHTS.add(
    "a NaN in a weight", "layers.1.self_attn.k_proj/linear[0]", parameters=("layers.1.self_attn.k_proj.weight",)
)
def _(model):
    """One value of k_proj in layer 1 is NaN."""
    name = "layers.1.self_attn.k_proj.weight"
    values = weight(model, name)
    values[7, 11] = np.nan
    with weights(model, {name: values}):
        yield


def _scaled(model, name: str, row: int, group: int, factor: float):
    """A packed weight with one scale multiplied by `factor`."""
    packed = dict(model.parameters())[name]
    data = np.from_dlpack(packed.buffer.data).copy()
    form = packed.spec.format
    codes, scales, minima = take_apart(data, packed.shape, form)
    scales[row, group] *= factor
    lanes = ops.target.lanes()
    blocks = form.records(packed.shape, lanes)[0]
    filled = np.zeros((blocks * lanes, *codes.shape[1:]), "uint8")
    filled[: len(codes)] = codes
    wide = np.zeros((blocks * lanes, codes.shape[1]), form.scale)
    wide[: len(scales)] = scales
    lay_out(form, filled, wide, minima, data.reshape(blocks, codes.shape[1], -1))
    return ops.tensor_from_packed(data, packed.spec)


@WEIGHTS.add(
    "one scale of q4", "layers.1.mlp.down_proj/linear[0]", reference="weights", held="q4",
    parameters=("layers.1.mlp.down_proj.weight",),
)  # fmt: skip
def _(model):
    """The scale of one group of down_proj in layer 1, packed as q4, is off by one in its exponent: doubled."""
    name = "layers.1.mlp.down_proj.weight"
    with weights(model, {name: _scaled(model, name, 5, 1, 2.0)}):
        yield


@WEIGHTS.add(
    "one scale of q8", "layers.2.self_attn.o_proj/linear[0]", reference="weights", held="q8",
    parameters=("layers.2.self_attn.o_proj.weight",),
)  # fmt: skip
def _(model):
    """The scale of one group of o_proj in layer 2, packed as q8, is 10 % too large."""
    name = "layers.2.self_attn.o_proj.weight"
    with weights(model, {name: _scaled(model, name, 40, 0, 1.1)}):
        yield


@WEIGHTS.add(
    "bias left behind", "layers.1.self_attn.o_proj/linear[0]", parameters=("layers.1.self_attn.o_proj.bias",),
    attention_bias=True,
)  # fmt: skip
def _(model):
    """o_proj of layer 1 has no bias: it was not taken from the checkpoint."""
    with changed(model.layers[1].self_attn.o_proj, bias=None):
        yield
