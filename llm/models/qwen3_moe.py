"""Qwen3 with mixtures of experts: norms of each head's queries and keys, some layers dense. HF: Qwen3MoeForCausalLM."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

import ops
from llm.blocks import MLP
from llm.cache import Cache, Layer
from llm.experts import Experts, stacked, unstacked
from llm.model import Model
from llm.nn import Embedding, Linear, Module, RMSNorm, RotaryEmbedding, Rotation
from llm.rope import Rope
from ops import Tensor


@dataclass(kw_only=True)
class Config:
    """HF's Qwen3MoeConfig, as far as it changes what is computed."""

    vocab_size: int = 151936
    hidden_size: int = 2048
    intermediate_size: int = 6144
    num_hidden_layers: int = 24
    num_attention_heads: int = 32
    num_key_value_heads: int = 4
    head_dim: int | None = None
    hidden_act: Literal["silu"] = "silu"
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    use_sliding_window: bool = False
    sliding_window: int | None = 4096
    decoder_sparse_step: int = 1
    mlp_only_layers: list[int] | None = None
    moe_intermediate_size: int = 768
    num_experts: int = 128
    num_experts_per_tok: int = 8
    norm_topk_prob: bool = False
    rope: Rope

    @staticmethod
    def modern(raw: Mapping[str, Any]) -> dict[str, Any]:
        """transformers 5 writes `num_local_experts`."""
        return {"num_experts" if key == "num_local_experts" else key: value for key, value in raw.items()}

    def __post_init__(self):
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        self.sliding_window = self.sliding_window if self.use_sliding_window else None
        self.mlp_only_layers = self.mlp_only_layers or []

    def is_sparse(self, layer: int) -> bool:
        return layer not in (self.mlp_only_layers or []) and (layer + 1) % self.decoder_sparse_step == 0


class Attention(Module):
    def __init__(self, c: Any, dtype: str):
        self.head_dim, self.window = c.head_dim, c.sliding_window
        queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.q_proj = Linear(c.hidden_size, queries, c.attention_bias, dtype)
        self.k_proj = Linear(c.hidden_size, keys, c.attention_bias, dtype)
        self.v_proj = Linear(c.hidden_size, keys, c.attention_bias, dtype)
        self.o_proj = Linear(queries, c.hidden_size, c.attention_bias, dtype)
        self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps, dtype)
        self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps, dtype)

    def forward(self, x: Tensor, rotate: Rotation, cache: Layer) -> Tensor:
        tokens, d = x.shape[0], self.head_dim
        q = rotate(self.q_norm(self.q_proj(x).reshape(-1, d)).reshape(tokens, -1, d))
        k = rotate(self.k_norm(self.k_proj(x).reshape(-1, d)).reshape(tokens, -1, d))
        v = self.v_proj(x).reshape(tokens, -1, d)
        keys, values = cache.write(k, v, rotate.positions)
        mixed = ops.attention(q, keys, values, rotate.positions, scale=d**-0.5, window=self.window)
        return self.o_proj(mixed.reshape(tokens, -1))


class MoE(Module):
    def __init__(self, c: Any, dtype: str):
        self.k, self.normalise = c.num_experts_per_tok, c.norm_topk_prob
        self.gate = Linear(c.hidden_size, c.num_experts, dtype=dtype)
        self.experts = Experts(c.num_experts, c.hidden_size, c.moe_intermediate_size, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x, *ops.route(self.gate(x), k=self.k, normalise=self.normalise))


class Block(Module):
    def __init__(self, c: Any, layer: int, dtype: str):
        self.self_attn = Attention(c, dtype)
        self.mlp = MoE(c, dtype) if c.is_sparse(layer) else MLP(c.hidden_size, c.intermediate_size, dtype)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps, dtype)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps, dtype)

    def forward(self, x: Tensor, rotate: Rotation, cache: Layer) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotate, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Qwen3Moe(Model):
    model_type = "qwen3_moe"
    kept = (".gate.weight",)

    def __init__(self, config: Config, dtype: str = "float32"):
        self.config, self.dtype = config, dtype
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype)
        self.layers = [Block(config, i, dtype) for i in range(config.num_hidden_layers)]
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.rotary = RotaryEmbedding(config.rope)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, dtype=dtype)

    def from_checkpoint(self, named: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        return stacked(named)

    def to_checkpoint(self, named: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        return unstacked(named, self.config.num_experts)

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
