"""Mixtral: Mistral's layout with eight feed-forward layers, of which a token takes two. HF: MixtralForCausalLM."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

import ops
from llm.cache import Cache, Layer
from llm.experts import ExpertLinear, stacked, unstacked
from llm.model import Model
from llm.nn import Embedding, Linear, Module, RMSNorm, RotaryEmbedding, Rotation
from llm.rope import Rope
from ops import Tensor


@dataclass(kw_only=True)
class Config:
    """HF's MixtralConfig, as far as it changes what is computed."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = 8
    head_dim: int | None = None
    hidden_act: Literal["silu"] = "silu"
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    sliding_window: int | None = None
    num_local_experts: int = 8
    num_experts_per_tok: int = 2
    rope: Rope = field(metadata={"theta": 1e6})

    def __post_init__(self):
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads


class Attention(Module):
    def __init__(self, c: Any, dtype: str):
        self.head_dim, self.window = c.head_dim, c.sliding_window
        queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.q_proj = Linear(c.hidden_size, queries, dtype=dtype)
        self.k_proj = Linear(c.hidden_size, keys, dtype=dtype)
        self.v_proj = Linear(c.hidden_size, keys, dtype=dtype)
        self.o_proj = Linear(queries, c.hidden_size, dtype=dtype)

    def forward(self, x: Tensor, rotate: Rotation, cache: Layer) -> Tensor:
        tokens = x.shape[0]
        q = self.q_proj(x).reshape(tokens, -1, self.head_dim)
        k = self.k_proj(x).reshape(tokens, -1, self.head_dim)
        v = self.v_proj(x).reshape(tokens, -1, self.head_dim)
        q, k = rotate(q), rotate(k)
        keys, values = cache.write(k, v, rotate.positions)
        mixed = ops.attention(q, keys, values, rotate.positions, scale=self.head_dim**-0.5, window=self.window)
        return self.o_proj(mixed.reshape(tokens, -1))


class Experts(Module):
    def __init__(self, c: Any, dtype: str):
        self.w1 = ExpertLinear(c.num_local_experts, c.hidden_size, c.intermediate_size, dtype)
        self.w2 = ExpertLinear(c.num_local_experts, c.intermediate_size, c.hidden_size, dtype)
        self.w3 = ExpertLinear(c.num_local_experts, c.hidden_size, c.intermediate_size, dtype)

    def forward(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        mixed = ops.silu_mul(self.w1(x, ids), self.w3(x, ids))
        return ops.combine(self.w2(mixed, ids), weights)


class MoE(Module):
    def __init__(self, c: Any, dtype: str):
        self.k = c.num_experts_per_tok
        self.gate = Linear(c.hidden_size, c.num_local_experts, dtype=dtype)
        self.experts = Experts(c, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x, *ops.route(self.gate(x), k=self.k, normalise=True))


class Block(Module):
    def __init__(self, c: Any, dtype: str):
        self.self_attn = Attention(c, dtype)
        self.block_sparse_moe = MoE(c, dtype)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps, dtype)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps, dtype)

    def forward(self, x: Tensor, rotate: Rotation, cache: Layer) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotate, cache)
        return x + self.block_sparse_moe(self.post_attention_layernorm(x))


class Mixtral(Model):
    model_type = "mixtral"
    kept = (".gate.weight",)

    def __init__(self, config: Config, dtype: str = "float32"):
        self.config, self.dtype = config, dtype
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype)
        self.layers = [Block(config, dtype) for _ in range(config.num_hidden_layers)]
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.rotary = RotaryEmbedding(config.rope)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, dtype=dtype)

    def from_checkpoint(self, named: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        return stacked(named)

    def to_checkpoint(self, named: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        return unstacked(named, self.config.num_local_experts)

    def forward(self, ids: Any, cache: Cache | None = None, logits_to_keep: int = 0) -> Tensor:
        """Logits [n, vocabulary] for token ids [n], or for the last `logits_to_keep` of them; 0 is all.

        Raises ContextOverflow when the cache has no room for n more tokens.
        """
        ids = self.ids(ids)
        cache = self.new_cache() if cache is None else cache
        rotate = self.rotary.at(cache.extend(len(ids)), len(cache) + len(ids))
        x = self.embed_tokens(ids)
        for i, layer in enumerate(self.layers):
            x = layer(x, rotate, cache[i])
        x = self.norm(self.last(x, logits_to_keep))
        logits = ops.linear(x, self.embed_tokens.weight) if self.config.tie_word_embeddings else self.lm_head(x)
        cache.commit(ids)
        return logits
