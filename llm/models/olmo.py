"""OLMo: Llama with norms without weights, and queries, keys and values kept within bounds. HF: OlmoForCausalLM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

import ops
from llm.blocks import MLP
from llm.cache import Cache, Layer
from llm.model import Model
from llm.nn import Embedding, Linear, Module, RotaryEmbedding, Rotation
from llm.rope import Rope
from ops import Tensor


@dataclass(kw_only=True)
class Config:
    """HF's OlmoConfig, as far as it changes what is computed."""

    vocab_size: int = 50304
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: Literal["silu"] = "silu"
    max_position_embeddings: int = 2048
    layer_norm_eps: float = 1e-5  # no key of HF, which has it in its code: GGUF says it
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    clip_qkv: float | None = None
    rope: Rope

    def __post_init__(self):
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads


class Norm(Module):
    """Normalisation to mean 0 and variance 1, and nothing else: the ones are no parameter."""

    def __init__(self, width: int, eps: float, dtype: str):
        self.eps, self._ones = eps, ops.tensor(np.ones(width, "float32"), dtype)

    def forward(self, x: Tensor) -> Tensor:
        return ops.layer_norm(x, self._ones, eps=self.eps)


class Attention(Module):
    def __init__(self, c: Any, dtype: str):
        self.head_dim, self.bound = c.head_dim, c.clip_qkv
        queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.q_proj = Linear(c.hidden_size, queries, c.attention_bias, dtype)
        self.k_proj = Linear(c.hidden_size, keys, c.attention_bias, dtype)
        self.v_proj = Linear(c.hidden_size, keys, c.attention_bias, dtype)
        self.o_proj = Linear(queries, c.hidden_size, c.attention_bias, dtype)

    def forward(self, x: Tensor, rotate: Rotation, cache: Layer) -> Tensor:
        tokens = x.shape[0]
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.bound is not None:
            q, k, v = (ops.clamp(each, limit=self.bound) for each in (q, k, v))
        q, k, v = (each.reshape(tokens, -1, self.head_dim) for each in (q, k, v))
        q, k = rotate(q), rotate(k)
        keys, values = cache.write(k, v, rotate.positions)
        mixed = ops.attention(q, keys, values, rotate.positions, scale=self.head_dim**-0.5)
        return self.o_proj(mixed.reshape(tokens, -1))


class Block(Module):
    def __init__(self, c: Any, dtype: str):
        self.self_attn = Attention(c, dtype)
        self.mlp = MLP(c.hidden_size, c.intermediate_size, dtype)
        self.input_layernorm = Norm(c.hidden_size, c.layer_norm_eps, dtype)
        self.post_attention_layernorm = Norm(c.hidden_size, c.layer_norm_eps, dtype)

    def forward(self, x: Tensor, rotate: Rotation, cache: Layer) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotate, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Olmo(Model):
    model_type = "olmo"

    def __init__(self, config: Config, dtype: str = "float32"):
        self.config, self.dtype = config, dtype
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype)
        self.layers = [Block(config, dtype) for _ in range(config.num_hidden_layers)]
        self.norm = Norm(config.hidden_size, config.layer_norm_eps, dtype)
        self.rotary = RotaryEmbedding(config.rope)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, dtype=dtype)

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
