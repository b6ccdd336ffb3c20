"""Bugs in kernels: right for most calls, wrong for some. The model's code and its weights are fine."""

from __future__ import annotations

import itertools
from typing import Any

import ml_dtypes
import numpy as np

import ops

from .bug import Bugs, Place, in_mistral
from .factory import CappedAttention
from .planting import Launch, compiled, used

KERNELS = Bugs()
_DEEP: dict[str, Any] = {
    "intermediate_size": 112,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}

_TAIL: dict[str, Any] = _DEEP | {"intermediate_size": 108}


def _lack(launch: Launch, inputs: slice, rows: slice = slice(None), columns: slice = slice(None)) -> None:
    """The output of `linear` without the products of some inputs."""
    x, weight = launch.inputs["x"].astype("float32"), np.asarray(launch.inputs["weight"], "float32")
    launch.output[rows, columns] -= x[rows, inputs] @ weight[columns, inputs].T


def _is_long(launch: Launch) -> bool:
    """More than 100 inputs, which in these models the down projection has and no other."""
    return launch.inputs["x"].shape[1] > 100


@KERNELS.add("length 129", "layers.0.self_attn.q_proj/linear[0]", reference="float64")
def _(model):
    """linear: at 129 rows, the one row after the block of 128 lacks the last 4 products."""

    def fault(launch, run):
        run()
        if len(launch.output) == 129:
            _lack(launch, slice(-4, None), slice(128, None))

    with compiled(ops.linear, fault):
        yield


@KERNELS.add("length 61", "layers.0.input_layernorm/rms_norm[0]", prompt=61)
def _(model):
    """rms_norm: at 61 rows, the last row is the one before. No tool can guess that length: the prompt is given."""

    def fault(launch, run):
        run()
        if len(launch.output) == 61:
            launch.output[60] = launch.output[59]

    with compiled(ops.rms_norm, fault):
        yield


@KERNELS.add("past a block", "layers.0.mlp.down_proj/linear[0]", reference="float64", **_DEEP)
def _(model):
    """linear: rows from 64 on lack the last 8 products where a row is longer than 100."""

    def fault(launch, run):
        run()
        if _is_long(launch):
            _lack(launch, slice(-8, None), slice(64, None))

    with compiled(ops.linear, fault):
        yield


@KERNELS.add(
    "short chunks lose the bias", "layers.0.self_attn.q_proj/linear[0]", reference="float64", attention_bias=True
)
def _(model):
    """linear: the kernel for 2 to 16 rows leaves the bias out."""

    def fault(launch, run):
        run()
        if launch.inputs.get("bias") is not None and 2 <= len(launch.output) <= 16:
            launch.output[...] -= launch.inputs["bias"]

    with compiled(ops.linear, fault):
        yield


@KERNELS.add("last column", "layers.0.mlp.gate_proj/linear[0]", **_TAIL)
def _(model):
    """linear: the last column lacks 2 products where the width is no multiple of 8."""

    def fault(launch, run):
        run()
        if launch.output.shape[1] % 8:
            _lack(launch, slice(-2, None), columns=slice(-1, None))

    with compiled(ops.linear, fault):
        yield


@KERNELS.add("sums in float16", "layers.0.mlp.down_proj/linear[0]", reference="float64", **_DEEP)
def _(model):
    """linear: rows longer than 100 are added up in float16 where float32 is promised."""

    def fault(launch, run):
        run()
        if _is_long(launch):
            x, weight = (np.asarray(launch.inputs[name], "float16") for name in ("x", "weight"))
            total = np.zeros(launch.output.shape, "float16")
            for i in range(x.shape[1]):
                total += x[:, i, None] * weight[:, i]
            launch.output[...] = total

    with compiled(ops.linear, fault):
        yield


@KERNELS.add("one projection races", "layers.2.mlp.down_proj/linear[0]", reference="float64")
def _(model):
    """linear in layer 2: every third launch reads before the last 8 activations of the last row are there."""
    launches = itertools.count(1)

    def fault(launch, run):
        run()
        if next(launches) % 3 == 0:
            _lack(launch, slice(-8, None), slice(-1, None))

    with used(ops.linear, fault, "layers.2.mlp.down_proj"):
        yield


@KERNELS.add("int8 range", "layers.0.self_attn.q_proj/linear[0]", reference="float64", held="q8")
def _(model):
    """linear, packed: the scale of the activations is their largest / 128, and the codes are for 127."""

    def fault(launch, run):
        run()
        if getattr(launch.inputs["weight"], "format", None) is not None:
            launch.output[...] *= np.float32(127 / 128)

    with compiled(ops.linear, fault):
        yield


@KERNELS.add("bfloat16 only", "layers.0.mlp/silu_mul[0]", reference="float64", held="bfloat16")
def _(model):
    """silu_mul: in bfloat16 the last column takes `up` of the column before."""

    def fault(launch, run):
        run()
        gate, up = (launch.inputs[name].astype("float32") for name in ("gate", "up"))
        if launch.output.dtype == ml_dtypes.bfloat16:
            launch.output[:, -1] = gate[:, -1] / (1 + np.exp(-gate[:, -1])) * up[:, -2]

    with compiled(ops.silu_mul, fault):
        yield


@KERNELS.add("stale element", "layers.0.mlp/silu_mul[0]", reference="float64")
def _(model):
    """silu_mul: of an odd number of rows the last element is not written: it holds what was in the buffer."""

    def fault(launch, run):
        stale = launch.output[-1, -1].copy()
        run()
        if len(launch.output) % 2:
            launch.output[-1, -1] = stale

    with compiled(ops.silu_mul, fault):
        yield


@KERNELS.add("works in place", "layers.2.input_layernorm/rms_norm[0]")
def _(model):
    """rms_norm in layer 2: a right output, but the input has been divided by its root mean square, in place."""

    def fault(launch, run):
        run()
        x = launch.inputs["x"]
        x /= np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + launch.constants["eps"])

    with used(ops.rms_norm, fault, "layers.2.input_layernorm"):
        yield


@KERNELS.add("ids wrap at 128", "embed_tokens/embedding[0]", vocab_size=262)
def _(model):
    """embedding: ids lose their bits from the eighth on."""

    def fault(launch, run):
        run()
        launch.output[...] = launch.inputs["weight"][launch.inputs["ids"] % 128]

    with compiled(ops.embedding, fault):
        yield


@KERNELS.add("angles in bfloat16", "layers.0.self_attn/rope[0]")
def _(model):
    """rope: position * frequency is rounded to bfloat16, as a model in bfloat16 throughout does it."""

    def fault(launch, run):
        angle = launch.inputs["positions"].astype("float32")[:, None] * launch.inputs["frequencies"]
        angle = angle.astype(ml_dtypes.bfloat16).astype("float64")[:, None]
        cos, sin = (launch.constants["scale"] * function(angle) for function in (np.cos, np.sin))
        x, half = launch.inputs["x"].astype("float64"), angle.shape[-1]
        a, b = x[..., :half], x[..., half : 2 * half]
        launch.output[...] = np.concatenate([a * cos - b * sin, b * cos + a * sin, x[..., 2 * half :]], -1)

    with compiled(ops.rope, fault):
        yield


# ---- attention: a fault says with what arguments, or in which rows and heads, the kernel computes


def _attention(launch: Launch, **other) -> np.ndarray:
    """What attention gives for the launch's inputs and constants, but for the `other` ones."""
    given = launch.inputs | launch.constants | other
    names = ("q", "k", "v", "positions")
    rest = {name: value for name, value in given.items() if name not in names}
    return ops.attention.reference(*[given[name] for name in names], **rest)


@KERNELS.add("one head", "layers.0.self_attn/attention[0]", reference="float64")
def _(model):
    """attention: the last head has its scores scaled twice by 0.9."""

    def fault(launch, run):
        run()
        launch.output[:, -1] = _attention(launch, scale=launch.constants["scale"] * 0.81)[:, -1]

    with compiled(ops.attention, fault):
        yield


@KERNELS.add("decode starts at key 1", "layers.0.self_attn/attention[0]")
def _(model):
    """attention: the kernel for one row leaves out the first key."""

    def fault(launch, run):
        run()
        k, v, positions = (launch.inputs[name] for name in ("k", "v", "positions"))
        if len(positions) == 1 and positions[0] > 0:
            launch.output[...] = _attention(launch, k=k[1:], v=v[1:], positions=positions - 1)

    with compiled(ops.attention, fault):
        yield


@KERNELS.add("heads interleaved", "layers.0.self_attn/attention[0]")
def _(model):
    """attention: head h reads key/value head h % kv_heads instead of h // group."""

    def fault(launch, run):
        k, v = launch.inputs["k"], launch.inputs["v"]
        heads = np.arange(launch.inputs["q"].shape[1]) % k.shape[1]
        launch.output[...] = _attention(launch, k=k[:, heads], v=v[:, heads])

    with compiled(ops.attention, fault):
        yield


@KERNELS.add("mask leaks at block ends", "layers.0.self_attn/attention[0]", reference="float64")
def _(model):
    """attention: the query at the end of each block of 16 sees one key of the next block, when it is there."""

    def fault(launch, run):
        run()
        positions = launch.inputs["positions"]
        leaking = (positions % 16 == 15) & (positions < positions.max())
        launch.output[leaking] = _attention(launch, positions=positions + leaking)[leaking]

    with compiled(ops.attention, fault):
        yield


# The kernel is that of all layers: which of them first has a maximum that much higher, the drawn values decide.
@KERNELS.add(
    "no rescaling past 64 keys", *(f"layers.{i}.self_attn/attention[0]" for i in range(3)),
    reference="float64", num_hidden_layers=3,
)  # fmt: skip
def _(model):
    """attention: a later block of 64 keys with a higher maximum does not rescale what was added up before."""

    def fault(launch, run):
        q, k, v, positions = (launch.inputs[name] for name in ("q", "k", "v", "positions"))
        last = positions.max() + 1
        scores = ops.scores.reference(q, k[:last], positions, scale=launch.constants["scale"])
        v = np.repeat(v[:last].astype("float64"), q.shape[1] // v.shape[1], axis=1)
        top = np.full((*q.shape[:2], 1), -np.inf)
        total, mixed = np.zeros_like(top), np.zeros(q.shape)
        for start in range(0, last, 64):
            block = scores[..., start : start + 64]
            top = np.maximum(top, block.max(-1, keepdims=True))
            e = np.exp(block - top)
            total, mixed = total + e.sum(-1, keepdims=True), mixed + np.einsum("nht,thd->nhd", e, v[start : start + 64])
        launch.output[...] = mixed / total

    with compiled(ops.attention, fault):
        yield


@KERNELS.add("window one too wide", in_mistral("layers.0.self_attn/attention[0]"), model_type="mistral")
def _(model):
    """attention: a window of w keys holds w + 1."""

    def fault(launch, run):
        launch.output[...] = _attention(launch, window=launch.constants["window"] + 1)

    with compiled(ops.attention, fault):
        yield


@KERNELS.add(
    "softcap left out", Place("layers.0.self_attn/attention[0]", CappedAttention.forward, "ops.attention("),
    reference="float64", capped=True,
)  # fmt: skip
def _(model):
    """attention: the kernel knows no softcap."""

    def fault(launch, run):
        launch.output[...] = _attention(launch, softcap=None)

    with compiled(ops.attention, fault):
        yield


@KERNELS.add(
    "softmax without its maximum", "layers.4.self_attn/attention[0]", reference="float64", num_hidden_layers=6,
    larger={r"layers\.4\.self_attn\.[qk]_proj\.weight": 7.0},
)  # fmt: skip
def _(model):
    """attention: exp(score) overflows in layer 4, where scores pass 88: NaN is born there."""

    def fault(launch, run):
        run()
        q, k, positions = (launch.inputs[name] for name in ("q", "k", "positions"))
        scores = ops.scores.reference(q, k[: positions.max() + 1], positions, scale=launch.constants["scale"])
        launch.output[scores.max(-1) > 88.7] = np.nan

    with compiled(ops.attention, fault):
        yield
