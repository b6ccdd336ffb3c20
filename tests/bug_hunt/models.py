"""Bugs in a model's code or config: every kernel does what it is asked to, but is asked for the wrong thing."""

from __future__ import annotations

import contextlib
import dataclasses

import numpy as np

import ops
from llm.models import llama
from llm.nn import RotaryEmbedding

from .bug import Bugs, Place, in_mistral
from .factory import YARN
from .planting import changed, weights

MODELS = Bugs()


def shifted(positions, by: int, low: int = 0):
    """Positions moved by some, but not below `low` nor above the last of them."""
    moved = positions.numpy() + np.int32(by)
    return ops.tensor(np.clip(moved, low, max(positions.numpy().max(), low)).astype("int32"))


class Attention(llama.Attention):
    """Llama's attention in parts, for bugs in one of them."""

    def forward(self, x, rotate, cache):
        tokens = x.shape[0]
        q, k, v = (each(x).reshape(tokens, -1, self.head_dim) for each in (self.q_proj, self.k_proj, self.v_proj))
        q, k = self.rotated(q, k, rotate)
        keys, values = cache.write(k, v, rotate.positions)
        mixed = self.mixed(q, keys, values, rotate.positions)
        return self.o_proj(mixed.reshape(tokens, -1))

    def rotated(self, q, k, rotate):
        return rotate(q), rotate(k)

    def mixed(self, q, keys, values, positions):
        return ops.attention(q, keys, values, positions, scale=self.head_dim**-0.5)


# ---- positions


def _rotary(model, **fields):
    return changed(model, rotary=RotaryEmbedding(dataclasses.replace(model.config.rope, **fields)))


@MODELS.add("rope theta", "layers.0.self_attn/rope[0]", rope_theta=500000.0)
def _(model):
    """The frequencies are made with a theta of 10000, the default, where the config says 500000."""
    with _rotary(model, theta=10000.0):
        yield


@MODELS.add(
    "rope scaling left out", "layers.0.self_attn/rope[0]",
    rope_scaling={"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    | {"original_max_position_embeddings": 64},
)  # fmt: skip
def _(model):
    """Llama 3.1's scaling of the frequencies is not applied."""
    with _rotary(model, scaling=None):
        yield


@MODELS.add("yarn without its factor", "layers.0.self_attn/rope[0]", rope_scaling=YARN)
def _(model):
    """YaRN's attention factor, which multiplies cos and sin, is taken as 1."""
    with _rotary(model, scaling=dataclasses.replace(model.config.rope.scaling, attention_factor=1.0)):
        yield


class Interleaved(Attention):
    def rotated(self, q, k, rotate):
        turn = {"interleaved": True, "scale": rotate.scale}
        q = ops.rope(q, rotate.positions, rotate.frequencies, **turn)
        return q, ops.rope(k, rotate.positions, rotate.frequencies, **turn)


@MODELS.add("rope interleaved", Place("layers.1.self_attn/rope[0]", Interleaved.rotated, "q = ops.rope("))
def _(model):
    """Layer 1 rotates neighbouring pairs, as GPT-J does, instead of halves."""
    with changed(model.layers[1].self_attn, __class__=Interleaved):
        yield


class LateQueries(Attention):
    def rotated(self, q, k, rotate):
        late = rotate._replace(positions=ops.tensor(rotate.positions.numpy() + np.int32(1)))
        return late(q), rotate(k)


@MODELS.add("queries one late", Place("layers.2.self_attn/rope[0]", LateQueries.rotated, "return late(q)"))
def _(model):
    """Layer 2 rotates its queries for the next position, its keys for the right one."""
    with changed(model.layers[2].self_attn, __class__=LateQueries):
        yield


class PlainKeys(Attention):
    def rotated(self, q, k, rotate):
        return rotate(q), k


# An op left out is no wrong call itself: the last one before it and the first one that gets the wrong input count.
@MODELS.add(
    "keys not rotated",
    Place("layers.1.self_attn/rope[0]", PlainKeys.rotated, "return rotate(q), k"),
    "layers.1.self_attn/cache_write[0]",
)
def _(model):
    """Layer 1 puts its keys into the cache as they are."""
    with changed(model.layers[1].self_attn, __class__=PlainKeys):
        yield


# ---- attention


class Leaking(Attention):
    def mixed(self, q, keys, values, positions):
        return ops.attention(q, keys, values, shifted(positions, 1), scale=self.head_dim**-0.5)


@MODELS.add("mask leaks one", Place("layers.2.self_attn/attention[0]", Leaking.mixed, "ops.attention("))
def _(model):
    """In layer 2 every token but the last sees the one after it."""
    with changed(model.layers[2].self_attn, __class__=Leaking):
        yield


class WrongScale(Attention):
    def mixed(self, q, keys, values, positions):
        size = self.head_dim * q.shape[1] // keys.shape[1]
        return ops.attention(q, keys, values, positions, scale=size**-0.5)


@MODELS.add("attention scale", Place("layers.1.self_attn/attention[0]", WrongScale.mixed, "ops.attention("))
def _(model):
    """Layer 1 scales its scores by the size of a group of heads instead of that of a head."""
    with changed(model.layers[1].self_attn, __class__=WrongScale):
        yield


class Capped(Attention):
    def mixed(self, q, keys, values, positions):
        return ops.attention(q, keys, values, positions, scale=self.head_dim**-0.5, softcap=30.0)


@MODELS.add("softcap added", Place("layers.2.self_attn/attention[0]", Capped.mixed, "ops.attention("))
def _(model):
    """Layer 2 bounds its scores by 30, which is another model's."""
    with changed(model.layers[2].self_attn, __class__=Capped):
        yield


@MODELS.add("sliding window", in_mistral("layers.2.self_attn/attention[0]"), model_type="mistral")
def _(model):
    """The window of layer 2 is one too short."""
    with changed(model.layers[2].self_attn, window=model.config.sliding_window - 1):
        yield


@MODELS.add("no window", in_mistral("layers.1.self_attn/attention[0]"), model_type="mistral")
def _(model):
    """Layer 1 attends to everything."""
    with changed(model.layers[1].self_attn, window=None):
        yield


# ---- the feed-forward


class Swapped(llama.MLP):
    def forward(self, x):
        gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(ops.silu_mul(up, gate))


@MODELS.add(
    "gate and up swapped", Place("layers.4.mlp/silu_mul[0]", Swapped.forward, "ops.silu_mul("), num_hidden_layers=6
)
def _(model):
    """Layer 4 activates up and multiplies by gate."""
    with changed(model.layers[4].mlp, __class__=Swapped):
        yield


class Gelu(llama.MLP):
    def forward(self, x):
        gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(ops.gelu_mul(gate, up))


@MODELS.add("gelu for silu", Place("layers.1.mlp/gelu_mul[0]", Gelu.forward, "ops.gelu_mul("))
def _(model):
    """Layer 1 has another activation."""
    with changed(model.layers[1].mlp, __class__=Gelu):
        yield


# ---- norms and residuals


class NormedTwice(llama.Block):
    def forward(self, x, rotate, cache):
        x = x + self.self_attn(self.input_layernorm(x), rotate, cache)
        y = self.post_attention_layernorm(x)
        y = self.post_attention_layernorm(y)
        return x + self.mlp(y)


@MODELS.add(
    "norm applied twice",
    Place("layers.1.post_attention_layernorm/rms_norm[0]", NormedTwice.forward, "layernorm(y)"),
)
def _(model):
    """Layer 1 normalises twice before its feed-forward."""
    with changed(model.layers[1], __class__=NormedTwice):
        yield


class NotNormed(llama.Block):
    def forward(self, x, rotate, cache):
        x = x + self.self_attn(self.input_layernorm(x), rotate, cache)
        return x + self.mlp(x)


# The norm is not called: the addition before it counts, and the first call that gets the wrong input, the gate's. That
# may be shown at its own line, or at the line of the block where the norm is missing.
@MODELS.add(
    "norm left out",
    Place("layers.2/add[0]", NotNormed.forward, "x = x + self.self_attn("),
    "layers.2.mlp.gate_proj/linear[0]",
    Place("layers.2.mlp.gate_proj/linear[0]", NotNormed.forward, "return x + self.mlp(x)"),
)
def _(model):
    """Layer 2 does not normalise before its feed-forward."""
    with changed(model.layers[2], __class__=NotNormed):
        yield


class Absent(llama.RMSNorm):
    def forward(self, x):
        return x


# Left out: the head that gets its input counts, and the last call before it, the last layer's second addition.
@MODELS.add(
    "final norm left out",
    "lm_head/linear[0]",
    Place("layers.4/add[1]", llama.Block.forward, "return x + self.mlp("),
    num_hidden_layers=5,
)
def _(model):
    """The head reads the last layer's output."""
    with changed(model.norm, __class__=Absent):
        yield


class ResidualTwice(llama.Block):
    def forward(self, x, rotate, cache):
        h = x + self.self_attn(self.input_layernorm(x), rotate, cache)
        y = self.mlp(self.post_attention_layernorm(h))
        return h + x + y


# Of two additions in one line, the first is one too many and the second gives what is wrong.
@MODELS.add(
    "residual added twice",
    Place("layers.1/add[1]", ResidualTwice.forward, "return h + x + y"),
    Place("layers.1/add[2]", ResidualTwice.forward, "return h + x + y"),
)
def _(model):
    """Layer 1 adds its input at its end as well."""
    with changed(model.layers[1], __class__=ResidualTwice):
        yield


class ResidualAfterNorm(llama.Block):
    def forward(self, x, rotate, cache):
        x = self.input_layernorm(x)
        x = x + self.self_attn(x, rotate, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


@MODELS.add("residual after the norm", Place("layers.2/add[0]", ResidualAfterNorm.forward, "x = x + self.self_attn(x"))
def _(model):
    """Layer 2 adds its attention to the normalised input."""
    with changed(model.layers[2], __class__=ResidualAfterNorm):
        yield


@MODELS.add("eps", "layers.0.input_layernorm/rms_norm[0]", rms_norm_eps=1e-5)
def _(model):
    """The first norm has the default eps, 1e-6, where the config says 1e-5."""
    with changed(model.layers[0].input_layernorm, eps=1e-6):
        yield


class PlusOne(llama.RMSNorm):
    def forward(self, x):
        return ops.rms_norm(x, self.weight, eps=self.eps, plus_one=True)


@MODELS.add("norm plus one", Place("norm/rms_norm[0]", PlusOne.forward, "ops.rms_norm("))
def _(model):
    """The final norm multiplies by 1 + weight, as Gemma does."""
    with changed(model.norm, __class__=PlusOne):
        yield


# ---- range


@MODELS.add(
    "overflow in float16", "layers.7.mlp/silu_mul[0]", num_hidden_layers=8,
    larger={r"layers\.7\.mlp\.(gate|up)_proj\.weight": 150.0, r"layers\.7\.mlp\.down_proj\.weight": 1 / 150},
)  # fmt: skip
def _(model):
    """Held in float16, gate * up of layer 7 passes 65504: infinite there, and then NaN. In float32 it is fine."""
    halves = {name: ops.tensor(each.numpy(), "float16") for name, each in model.parameters()}
    with contextlib.ExitStack() as stack:
        stack.enter_context(weights(model, halves))
        stack.enter_context(changed(model.embed_tokens, dtype="float16"))
        stack.enter_context(changed(model, dtype="float16"))
        yield
