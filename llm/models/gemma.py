"""Gemma: Llama's layout with scaled embeddings, norms by 1 + weight and a GeGLU. HF: GemmaForCausalLM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import ops
from llm.blocks import MLP, ScaledEmbedding
from llm.cache import Cache, Layer
from llm.model import Model
from llm.nn import Linear, Module, RMSNorm, RotaryEmbedding, Rotation
from llm.rope import Rope
from ops import Tensor


@dataclass(kw_only=True)
class Config:
    """HF's GemmaConfig, as far as it changes what is computed."""

    vocab_size: int = 256000
    hidden_size: int = 3072
    intermediate_size: int = 24576
    num_hidden_layers: int = 28
    num_attention_heads: int = 16
    num_key_value_heads: int = 16
    head_dim: int = 256
    hidden_act: Literal["gelu_pytorch_tanh", "gelu"] = "gelu_pytorch_tanh"  # Google's "gelu" means the other
    hidden_activation: Literal["gelu_pytorch_tanh"] | None = None
    max_position_embeddings: int = 8192
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True
    attention_bias: bool = False
    use_bidirectional_attention: Literal[False] | None = None
    rope: Rope


class Attention(Module):
    def __init__(self, c: Any, dtype: str):
        self.head_dim = c.head_dim
        queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.q_proj = Linear(c.hidden_size, queries, c.attention_bias, dtype)
        self.k_proj = Linear(c.hidden_size, keys, c.attention_bias, dtype)
        self.v_proj = Linear(c.hidden_size, keys, c.attention_bias, dtype)
        self.o_proj = Linear(queries, c.hidden_size, c.attention_bias, dtype)

    def forward(self, x: Tensor, rotate: Rotation, cache: Layer) -> Tensor:
        tokens = x.shape[0]
        q = self.q_proj(x).reshape(tokens, -1, self.head_dim)
        k = self.k_proj(x).reshape(tokens, -1, self.head_dim)
        v = self.v_proj(x).reshape(tokens, -1, self.head_dim)
        q, k = rotate(q), rotate(k)
        keys, values = cache.write(k, v, rotate.positions)
        mixed = ops.attention(q, keys, values, rotate.positions, scale=self.head_dim**-0.5)
        return self.o_proj(mixed.reshape(tokens, -1))


class Block(Module):
    def __init__(self, c: Any, dtype: str):
        self.self_attn = Attention(c, dtype)
        self.mlp = MLP(c.hidden_size, c.intermediate_size, dtype, activation="gelu_pytorch_tanh")
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps, dtype, plus_one=True)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps, dtype, plus_one=True)

    def forward(self, x: Tensor, rotate: Rotation, cache: Layer) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotate, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Gemma(Model):
    model_type = "gemma"

    def __init__(self, config: Config, dtype: str = "float32"):
        self.config, self.dtype = config, dtype
        self.embed_tokens = ScaledEmbedding(config.vocab_size, config.hidden_size, dtype)
        self.layers = [Block(config, dtype) for _ in range(config.num_hidden_layers)]
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype, plus_one=True)
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
