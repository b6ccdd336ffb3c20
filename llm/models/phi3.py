"""Phi-3, Phi-3.5 and Phi-4: Llama's layout with fused projections and LongRoPE. HF: Phi3ForCausalLM."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import ops
from llm.cache import Cache, Layer
from llm.model import Model
from llm.nn import Embedding, Linear, Module, RMSNorm, RotaryEmbedding, Rotation
from llm.rope import Rope
from ops import Tensor


@dataclass(kw_only=True)
class Config:
    """HF's Phi3Config, as far as it changes what is computed."""

    vocab_size: int = 32064
    hidden_size: int = 3072
    intermediate_size: int = 8192
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: Literal["silu"] = "silu"
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    original_max_position_embeddings: int = 4096
    sliding_window: int | None = None
    rope: Rope

    @staticmethod
    def modern(raw: Mapping[str, Any]) -> dict[str, Any]:
        """Phi-3's first checkpoints call LongRoPE "yarn"."""
        values = dict(raw)
        for key in ("rope_scaling", "rope_parameters"):
            if isinstance(block := values.get(key), Mapping):
                values[key] = {
                    k: "longrope" if k in ("type", "rope_type") and v == "yarn" else v for k, v in block.items()
                }
        return values

    def __post_init__(self):
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads


class Attention(Module):
    def __init__(self, c: Any, dtype: str):
        self.head_dim, self.window = c.head_dim, c.sliding_window
        queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.parts = (0, queries), (queries, queries + keys), (queries + keys, queries + 2 * keys)
        self.qkv_proj = Linear(c.hidden_size, queries + 2 * keys, dtype=dtype)
        self.o_proj = Linear(queries, c.hidden_size, dtype=dtype)

    def forward(self, x: Tensor, rotate: Rotation, cache: Layer) -> Tensor:
        tokens = x.shape[0]
        qkv = self.qkv_proj(x)
        q, k, v = (ops.columns(qkv, start=a, stop=b).reshape(tokens, -1, self.head_dim) for a, b in self.parts)
        q, k = rotate(q), rotate(k)
        keys, values = cache.write(k, v, rotate.positions)
        mixed = ops.attention(q, keys, values, rotate.positions, scale=self.head_dim**-0.5, window=self.window)
        return self.o_proj(mixed.reshape(tokens, -1))


class MLP(Module):
    def __init__(self, c: Any, dtype: str):
        self.size = c.intermediate_size
        self.gate_up_proj = Linear(c.hidden_size, 2 * c.intermediate_size, dtype=dtype)
        self.down_proj = Linear(c.intermediate_size, c.hidden_size, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        both = self.gate_up_proj(x)
        gate, up = ops.columns(both, start=0, stop=self.size), ops.columns(both, start=self.size, stop=2 * self.size)
        return self.down_proj(ops.silu_mul(gate, up))


class Block(Module):
    def __init__(self, c: Any, dtype: str):
        self.self_attn = Attention(c, dtype)
        self.mlp = MLP(c, dtype)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps, dtype)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps, dtype)

    def forward(self, x: Tensor, rotate: Rotation, cache: Layer) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotate, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Phi3(Model):
    model_type = "phi3"

    def __init__(self, config: Config, dtype: str = "float32"):
        self.config, self.dtype = config, dtype
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype)
        self.layers = [Block(config, dtype) for _ in range(config.num_hidden_layers)]
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
