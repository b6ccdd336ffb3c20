"""Qwen2, Qwen2.5: Llama with biases on queries, keys and values, and windows in some layers. HF: Qwen2ForCausalLM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import ops
from llm.blocks import MLP
from llm.cache import Cache, Layer
from llm.config import LayerType, check_layer_types
from llm.model import Model
from llm.nn import Embedding, Linear, Module, RMSNorm, RotaryEmbedding, Rotation
from llm.rope import Rope
from ops import Tensor


@dataclass(kw_only=True)
class Config:
    """HF's Qwen2Config, as far as it changes what is computed."""

    vocab_size: int = 151936
    hidden_size: int = 4096
    intermediate_size: int = 22016
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = 32
    head_dim: int | None = None
    hidden_act: Literal["silu"] = "silu"
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    use_sliding_window: bool = False
    sliding_window: int | None = 4096
    max_window_layers: int = 28
    layer_types: list[LayerType] | None = None
    rope: Rope

    def __post_init__(self):
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        self.sliding_window = self.sliding_window if self.use_sliding_window else None
        if self.layer_types is None:
            full = self.max_window_layers if self.sliding_window else self.num_hidden_layers
            kinds: tuple[LayerType, LayerType] = ("full_attention", "sliding_attention")
            self.layer_types = [kinds[i >= full] for i in range(self.num_hidden_layers)]
        check_layer_types(self)


class Attention(Module):
    def __init__(self, c: Any, window: int | None, dtype: str):
        self.head_dim, self.window = c.head_dim, window
        queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.q_proj = Linear(c.hidden_size, queries, bias=True, dtype=dtype)
        self.k_proj = Linear(c.hidden_size, keys, bias=True, dtype=dtype)
        self.v_proj = Linear(c.hidden_size, keys, bias=True, dtype=dtype)
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


class Block(Module):
    def __init__(self, c: Any, layer_type: LayerType, dtype: str):
        self.layer_type = layer_type
        self.self_attn = Attention(c, c.sliding_window if layer_type == "sliding_attention" else None, dtype)
        self.mlp = MLP(c.hidden_size, c.intermediate_size, dtype)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps, dtype)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps, dtype)

    def forward(self, x: Tensor, rotate: Rotation, cache: Layer) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotate, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Qwen2(Model):
    model_type = "qwen2"

    def __init__(self, config: Config, dtype: str = "float32"):
        self.config, self.dtype = config, dtype
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype)
        self.layers = [Block(config, kind, dtype) for kind in config.layer_types or ()]
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
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
