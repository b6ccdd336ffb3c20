"""Phi-1, 1.5 and 2: attention and feed-forward side by side, partial rotary, biases. HF: PhiForCausalLM."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import ops
from llm.blocks import Nonlinearity, activate
from llm.cache import Cache, Layer
from llm.model import Model
from llm.nn import Embedding, LayerNorm, Linear, Module, RotaryEmbedding, Rotation
from llm.rope import Rope
from ops import Tensor


@dataclass(kw_only=True)
class Config:
    """HF's PhiConfig, as far as it changes what is computed."""

    vocab_size: int = 51200
    hidden_size: int = 2048
    intermediate_size: int = 8192
    num_hidden_layers: int = 24
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    hidden_act: Nonlinearity = "gelu_new"
    max_position_embeddings: int = 2048
    layer_norm_eps: float = 1e-5
    tie_word_embeddings: Literal[False] = False  # the head has a bias of its own
    qk_layernorm: bool = False
    rope: Rope = field(metadata={"partial_rotary_factor": 0.5})

    def __post_init__(self):
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


class Attention(Module):
    def __init__(self, c: Any, dtype: str):
        self.head_dim = c.head_dim
        keys = c.num_key_value_heads * c.head_dim
        self.q_proj = Linear(c.hidden_size, c.hidden_size, True, dtype)
        self.k_proj = Linear(c.hidden_size, keys, True, dtype)
        self.v_proj = Linear(c.hidden_size, keys, True, dtype)
        self.dense = Linear(c.hidden_size, c.hidden_size, True, dtype)
        if c.qk_layernorm:
            self.q_layernorm = LayerNorm(c.head_dim, c.layer_norm_eps, dtype)
            self.k_layernorm = LayerNorm(c.head_dim, c.layer_norm_eps, dtype)
        self.normed = c.qk_layernorm

    def forward(self, x: Tensor, rotate: Rotation, cache: Layer) -> Tensor:
        tokens, d = x.shape[0], self.head_dim
        q, k = self.q_proj(x), self.k_proj(x)
        if self.normed:
            q, k = self.q_layernorm(q.reshape(-1, d)), self.k_layernorm(k.reshape(-1, d))
        q, k = rotate(q.reshape(tokens, -1, d)), rotate(k.reshape(tokens, -1, d))
        keys, values = cache.write(k, self.v_proj(x).reshape(tokens, -1, d), rotate.positions)
        mixed = ops.attention(q, keys, values, rotate.positions, scale=d**-0.5)
        return self.dense(mixed.reshape(tokens, -1))


class MLP(Module):
    def __init__(self, c: Any, dtype: str):
        self.fc1 = Linear(c.hidden_size, c.intermediate_size, True, dtype)
        self.fc2 = Linear(c.intermediate_size, c.hidden_size, True, dtype)
        self.activation = c.hidden_act

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(activate(self.fc1(x), self.activation))


class Block(Module):
    def __init__(self, c: Any, dtype: str):
        self.self_attn = Attention(c, dtype)
        self.mlp = MLP(c, dtype)
        self.input_layernorm = LayerNorm(c.hidden_size, c.layer_norm_eps, dtype)

    def forward(self, x: Tensor, rotate: Rotation, cache: Layer) -> Tensor:
        normed = self.input_layernorm(x)
        return self.self_attn(normed, rotate, cache) + self.mlp(normed) + x


class Phi(Model):
    model_type = "phi"

    def __init__(self, config: Config, dtype: str = "float32"):
        self.config, self.dtype = config, dtype
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype)
        self.layers = [Block(config, dtype) for _ in range(config.num_hidden_layers)]
        self.final_layernorm = LayerNorm(config.hidden_size, config.layer_norm_eps, dtype)
        self.rotary = RotaryEmbedding(config.rope)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, True, dtype)

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
        x = self.final_layernorm(self.last(x, logits_to_keep))
        logits = self.lm_head(x)
        cache.commit(ids)
        return logits
