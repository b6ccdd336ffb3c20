"""Multi-head latent attention: queries, and keys with values, go through a narrow layer. DeepSeek-AI 2024 (V2)."""

from __future__ import annotations

import math
from typing import Any

import ops
from ops import Tensor

from .cache import Layer
from .nn import Linear, Module, RMSNorm, Rotation
from .rope import Rope

_EPS = 1e-6  # of the norms inside, whatever the config says of the others


class LatentAttention(Module):
    """Attention whose heads have a part that rotates, of which all share one key, and a part that does not."""

    def __init__(self, c: Any, dtype: str):
        self.rank, self.still, self.turned, self.value = (
            c.kv_lora_rank, c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim
        )  # fmt: skip
        heads, width = c.num_attention_heads, c.hidden_size
        dim = self.still + self.turned
        self.scale = dim**-0.5 * attention_factor(c.rope) ** 2
        self.narrow = c.q_lora_rank is not None
        if self.narrow:
            self.q_a_proj = Linear(width, c.q_lora_rank, c.attention_bias, dtype)
            self.q_a_layernorm = RMSNorm(c.q_lora_rank, _EPS, dtype)
            self.q_b_proj = Linear(c.q_lora_rank, heads * dim, dtype=dtype)
        else:
            self.q_proj = Linear(width, heads * dim, dtype=dtype)
        self.kv_a_proj_with_mqa = Linear(width, self.rank + self.turned, c.attention_bias, dtype)
        self.kv_a_layernorm = RMSNorm(self.rank, _EPS, dtype)
        self.kv_b_proj = Linear(self.rank, heads * (self.still + self.value), dtype=dtype)
        self.o_proj = Linear(heads * self.value, width, c.attention_bias, dtype)

    def forward(self, x: Tensor, rotate: Rotation, cache: Layer) -> Tensor:
        tokens, still, dim = x.shape[0], self.still, self.still + self.turned
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))) if self.narrow else self.q_proj(x)
        q = q.reshape(tokens, -1, dim)
        q = ops.join(ops.columns(q, start=0, stop=still), rotate(ops.columns(q, start=still, stop=dim)))
        both = self.kv_a_proj_with_mqa(x)
        shared = ops.columns(both, start=self.rank, stop=self.rank + self.turned).reshape(tokens, 1, self.turned)
        latent = self.kv_a_layernorm(ops.columns(both, start=0, stop=self.rank))
        kv = self.kv_b_proj(latent).reshape(tokens, -1, still + self.value)
        k = ops.join(ops.columns(kv, start=0, stop=still), rotate(shared))
        v = ops.columns(kv, start=still, stop=still + self.value)
        keys, values = cache.write(k, v, rotate.positions)
        mixed = ops.attention(q, keys, values, rotate.positions, scale=self.scale)
        return self.o_proj(mixed.reshape(tokens, -1))


def attention_factor(rope: Rope) -> float:
    """What YaRN with `mscale_all_dim` multiplies queries and keys by, each."""
    s = rope.scaling
    if s is None or not s.mscale_all_dim or s.factor is None or s.factor <= 1:
        return 1.0
    return 0.1 * s.mscale_all_dim * math.log(s.factor) + 1.0


def latent_values(c: Any) -> int:
    """How many numbers a layer's cache keeps of a token: each head's key and value, spread out."""
    return c.num_attention_heads * (c.qk_nope_head_dim + c.qk_rope_head_dim + c.v_head_dim)
