"""StableLM: layer norms, also a norm for each head, partial rotary, parallel blocks. HF: StableLmForCausalLM."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

import ops
from llm.blocks import MLP
from llm.cache import Cache, Layer
from llm.experts import stacked, unstacked
from llm.model import Model
from llm.nn import Embedding, LayerNorm, Linear, Module, RotaryEmbedding, Rotation
from llm.rope import Rope
from ops import Spec, Tensor


@dataclass(kw_only=True)
class Config:
    """HF's StableLmConfig, as far as it changes what is computed."""

    vocab_size: int = 50304
    hidden_size: int = 2560
    intermediate_size: int = 6912
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    hidden_act: Literal["silu"] = "silu"
    max_position_embeddings: int = 4096
    layer_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    use_qkv_bias: bool = False
    qk_layernorm: bool = False
    use_parallel_residual: bool = False
    rope: Rope = field(metadata={"partial_rotary_factor": 0.25})

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


class HeadNorms(Module):
    """A layer norm without bias for each head."""

    def __init__(self, heads: int, head_dim: int, eps: float, dtype: str):
        self.norms: Any = Module()  # the checkpoint's list of them, one behind the other
        self.norms.weight = Spec((heads * head_dim,), dtype)
        self.head_dim, self.eps = head_dim, eps
        self._ones = ops.tensor(np.ones(head_dim, "float32"))

    def forward(self, x: Tensor) -> Tensor:
        normed = ops.layer_norm(x.reshape(-1, self.head_dim), self._ones, eps=self.eps)
        return normed.reshape(x.shape) * self.norms.weight


class Attention(Module):
    def __init__(self, c: Any, dtype: str):
        self.head_dim, self.normed = c.head_dim, c.qk_layernorm
        keys = c.num_key_value_heads * c.head_dim
        self.q_proj = Linear(c.hidden_size, c.hidden_size, c.use_qkv_bias, dtype)
        self.k_proj = Linear(c.hidden_size, keys, c.use_qkv_bias, dtype)
        self.v_proj = Linear(c.hidden_size, keys, c.use_qkv_bias, dtype)
        self.o_proj = Linear(c.hidden_size, c.hidden_size, dtype=dtype)
        if c.qk_layernorm:
            self.q_layernorm = HeadNorms(c.num_attention_heads, c.head_dim, c.layer_norm_eps, dtype)
            self.k_layernorm = HeadNorms(c.num_key_value_heads, c.head_dim, c.layer_norm_eps, dtype)

    def forward(self, x: Tensor, rotate: Rotation, cache: Layer) -> Tensor:
        tokens = x.shape[0]
        q, k = self.q_proj(x), self.k_proj(x)
        if self.normed:
            q, k = self.q_layernorm(q), self.k_layernorm(k)
        q, k, v = (each.reshape(tokens, -1, self.head_dim) for each in (q, k, self.v_proj(x)))
        q, k = rotate(q), rotate(k)
        keys, values = cache.write(k, v, rotate.positions)
        mixed = ops.attention(q, keys, values, rotate.positions, scale=self.head_dim**-0.5)
        return self.o_proj(mixed.reshape(tokens, -1))


class Block(Module):
    def __init__(self, c: Any, dtype: str):
        self.parallel = c.use_parallel_residual
        self.self_attn = Attention(c, dtype)
        self.mlp = MLP(c.hidden_size, c.intermediate_size, dtype)
        self.input_layernorm = LayerNorm(c.hidden_size, c.layer_norm_eps, dtype)
        if not self.parallel:
            self.post_attention_layernorm = LayerNorm(c.hidden_size, c.layer_norm_eps, dtype)

    def forward(self, x: Tensor, rotate: Rotation, cache: Layer) -> Tensor:
        normed = self.input_layernorm(x)
        attended = x + self.self_attn(normed, rotate, cache)
        return attended + self.mlp(normed if self.parallel else self.post_attention_layernorm(attended))


class StableLm(Model):
    model_type = "stablelm"

    def __init__(self, config: Config, dtype: str = "float32"):
        self.config, self.dtype = config, dtype
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype)
        self.layers = [Block(config, dtype) for _ in range(config.num_hidden_layers)]
        self.norm = LayerNorm(config.hidden_size, config.layer_norm_eps, dtype)
        self.rotary = RotaryEmbedding(config.rope)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, dtype=dtype)

    def from_checkpoint(self, named: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        return stacked(named, "norms")

    def to_checkpoint(self, named: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        queries = {name: each for name, each in named.items() if "q_layernorm" in name}
        others = {name: each for name, each in named.items() if name not in queries}
        heads, kv_heads = self.config.num_attention_heads, self.config.num_key_value_heads
        return unstacked(queries, heads, "norms") | unstacked(others, kv_heads, "norms")

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
