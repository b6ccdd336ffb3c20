"""Of each family whose layout is not Llama's: a part that is left out is seen by the comparison with transformers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import llm
import ops
from tests import parity
from tests.llm.full import SEED, error, expected, made, needs_the_extra, stored

pytestmark = pytest.mark.families


def zeros(first: Any, *_: Any, **__: Any) -> Any:
    return np.zeros_like(first)


def still(x: Any, *_: Any, **__: Any) -> Any:
    """Rotates nothing."""
    return x


def attention(q, k, v, positions, sinks=None, *, scale, window=None, softcap=None):
    return ops.attention.reference(q, k, v, positions, sinks, scale=scale, window=window, softcap=softcap)


def no_sinks(q, k, v, positions, sinks=None, *, scale, window=None, softcap=None):
    return attention(q, k, v, positions, scale=scale, window=window)


def no_window(q, k, v, positions, sinks=None, *, scale, window=None, softcap=None):
    return attention(q, k, v, positions, sinks, scale=scale)


def no_scale(q, k, v, positions, sinks=None, *, scale, window=None, softcap=None):
    return attention(q, k, v, positions, sinks, scale=q.shape[-1] ** -0.5, window=window)


def no_norm(x, weight, bias=None, **_):
    return x


def first_experts(logits, bias=None, **options):
    weights, ids = ops.route.reference(logits, bias, **options)
    return weights, np.broadcast_to(np.arange(ids.shape[1], dtype="int32"), ids.shape)


def route_without(**changes: Any) -> Any:
    return lambda logits, bias=None, **options: ops.route.reference(logits, bias, **(options | changes))


def no_bias(logits, bias=None, **options):
    return ops.route.reference(logits, **options)


def no_limit(gate, up, *, alpha, limit):
    return ops.clamped_swiglu.reference(gate, up, alpha=alpha, limit=1e6)


def no_alpha(gate, up, *, alpha, limit):
    return ops.clamped_swiglu.reference(gate, up, alpha=1.0, limit=limit)


def pairs_apart(x, positions, frequencies, *, interleaved=False, scale=1.0):
    return ops.rope.reference(x, positions, frequencies, interleaved=not interleaved, scale=scale)


def no_memory(key, value, decay, first, state):
    return ops.wkv.reference(key, value, decay, first, np.stack([state[0] * 0, state[1] * 0, state[2] * 0 - 1e30]))


def no_shift(x, before, mix):
    return x


def forgetting(x, step, decay, b, c, skip, state):
    return ops.selective_scan.reference(x, step, decay, b, c, skip, state * 0)


def fading_alike(x, step, decay, b, c, skip, state):
    return ops.selective_scan.reference(x, step, decay * 0, b, c, skip, state)


def no_skip(x, step, decay, b, c, skip, state):
    return ops.selective_scan.reference(x, step, decay, b, c, skip * 0, state)


def one_group(x, step, decay, b, c, skip, state):
    b, c = (np.broadcast_to(each[:, :1], each.shape) for each in (b, c))
    return ops.selective_scan.reference(x, step, decay, b, c, skip, state)


def no_past(x, before, weight, bias=None):
    return ops.causal_conv.reference(x, before * 0, weight, bias)


LEFT_OUT: list[tuple[str, str, Any, Any]] = [
    ("gpt2", "attention", ops.attention, zeros),
    ("gpt2", "scale by layer", ops.attention, no_scale),
    ("gpt2", "gelu", ops.gelu, zeros),
    ("gpt2", "norms", ops.layer_norm, no_norm),
    ("gpt_neox", "rope", ops.rope, still),
    ("gpt_neox", "gelu", ops.gelu, zeros),
    ("phi", "rope", ops.rope, still),
    ("phi", "gelu", ops.gelu, zeros),
    ("phi", "norms", ops.layer_norm, no_norm),
    ("stablelm", "rope", ops.rope, still),
    ("stablelm", "mlp", ops.silu_mul, zeros),
    ("stablelm", "weights of head norms", ops.mul_row, lambda x, y: x),
    ("starcoder2", "rope", ops.rope, still),
    ("starcoder2", "window", ops.attention, no_window),
    ("starcoder2", "gelu", ops.gelu, zeros),
    ("starcoder2", "norms", ops.layer_norm, no_norm),
    ("olmo", "rope", ops.rope, still),
    ("olmo", "bounds", ops.clamp, still),
    ("olmo", "norms", ops.layer_norm, no_norm),
    ("olmo2", "rope", ops.rope, still),
    ("olmo2", "mlp", ops.silu_mul, zeros),
    ("olmo2", "norms", ops.rms_norm, no_norm),
    ("mixtral", "choice", ops.route, first_experts),
    ("mixtral", "window", ops.attention, no_window),
    ("mixtral", "rope", ops.rope, still),
    ("qwen3_moe", "choice", ops.route, first_experts),
    ("qwen3_moe", "normalising", ops.route, route_without(normalise=False)),
    ("qwen3_moe", "window", ops.attention, no_window),
    ("gpt_oss", "choice", ops.route, first_experts),
    ("gpt_oss", "sinks", ops.attention, no_sinks),
    ("gpt_oss", "window", ops.attention, no_window),
    ("gpt_oss", "limit", ops.clamped_swiglu, no_limit),
    ("gpt_oss", "alpha", ops.clamped_swiglu, no_alpha),
    ("deepseek_v2", "groups", ops.route, route_without(groups=1, kept=1)),
    ("deepseek_v2", "scale of experts", ops.route, route_without(scale=1.0)),
    ("deepseek_v2", "mscale", ops.attention, no_scale),
    ("deepseek_v2", "pairs", ops.rope, pairs_apart),
    ("deepseek_v3", "groups", ops.route, route_without(groups=1, kept=1)),
    ("deepseek_v3", "the two best of a group", ops.route, route_without(best=1)),
    ("deepseek_v3", "bias of the choice", ops.route, no_bias),
    ("deepseek_v3", "normalising", ops.route, route_without(normalise=False)),
    ("deepseek_v3", "pairs", ops.rope, pairs_apart),
    ("rwkv", "state", ops.wkv, no_memory),
    ("rwkv", "token before", ops.token_mix, no_shift),
    ("rwkv", "receptance", ops.sigmoid, lambda x: np.ones_like(x)),
    ("mamba2", "state", ops.selective_scan, forgetting),
    ("mamba2", "fading", ops.selective_scan, fading_alike),
    ("mamba2", "skip", ops.selective_scan, no_skip),
    ("mamba2", "groups", ops.selective_scan, one_group),
    ("mamba2", "convolution", ops.causal_conv, lambda x, *_: x),
    ("mamba2", "what was before", ops.causal_conv, no_past),
    ("mamba2", "limits", ops.softplus, lambda x, low, high: ops.softplus.reference(x)),
    ("mamba2", "gate", ops.silu_mul, lambda gate, up: up),
]


@pytest.mark.parametrize(("family", "part", "op", "without"), LEFT_OUT, ids=[f"{f}, {p}" for f, p, _, _ in LEFT_OUT])
def test_a_part_that_is_left_out_is_seen(family, part, op, without, tmp_path):
    needs_the_extra()
    theirs, ids = made(family, SEED)
    ours = llm.load(stored(theirs, tmp_path))
    with op.use(without) as use:
        assert error(ours, ids, expected(family, SEED), steps=3) > 2 * parity.BOUNDS["float32"]
    assert use.hits
