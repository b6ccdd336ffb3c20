"""GPT-NeoX and Pythia: projections fused by head, partial rotary, parallel blocks. HF: GPTNeoXForCausalLM."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import ops
from llm.blocks import Nonlinearity, activate
from llm.cache import Cache, Layer
from llm.model import Model
from llm.nn import Embedding, LayerNorm, Linear, Module, RotaryEmbedding, Rotation
from llm.rope import Rope
from ops import Tensor

_RENAMED = {"rotary_pct": "partial_rotary_factor", "rotary_emb_base": "rope_theta"}


@dataclass(kw_only=True)
class Config:
    """HF's GPTNeoXConfig, as far as it changes what is computed."""

    vocab_size: int = 50432
    hidden_size: int = 6144
    intermediate_size: int = 24576
    num_hidden_layers: int = 44
    num_attention_heads: int = 64
    hidden_act: Nonlinearity = "gelu"
    max_position_embeddings: int = 2048
    layer_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    use_parallel_residual: bool = True
    attention_bias: bool = True
    rope: Rope = field(metadata={"partial_rotary_factor": 0.25})

    @staticmethod
    def modern(raw: Mapping[str, Any]) -> dict[str, Any]:
        """Pythia's configs have names of their own for the rotary embedding."""
        return {_RENAMED.get(key, key): value for key, value in raw.items()}

    @staticmethod
    def written(values: Mapping[str, Any]) -> dict[str, Any]:
        """With those names, which transformers asks for."""
        old = {new: name for name, new in _RENAMED.items()}
        return {old.get(key, key): value for key, value in values.items()}

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


class Attention(Module):
    def __init__(self, c: Any, dtype: str):
        self.head_dim = c.head_dim
        self.query_key_value = Linear(c.hidden_size, 3 * c.hidden_size, c.attention_bias, dtype)
        self.dense = Linear(c.hidden_size, c.hidden_size, c.attention_bias, dtype)

    def forward(self, x: Tensor, rotate: Rotation, cache: Layer) -> Tensor:
        tokens, d = x.shape[0], self.head_dim
        qkv = self.query_key_value(x).reshape(tokens, -1, 3 * d)  # a head's query, key and value are neighbours
        q, k, v = (ops.columns(qkv, start=i * d, stop=(i + 1) * d) for i in range(3))
        q, k = rotate(q), rotate(k)
        keys, values = cache.write(k, v, rotate.positions)
        mixed = ops.attention(q, keys, values, rotate.positions, scale=d**-0.5)
        return self.dense(mixed.reshape(tokens, -1))


class MLP(Module):
    def __init__(self, c: Any, dtype: str):
        self.dense_h_to_4h = Linear(c.hidden_size, c.intermediate_size, True, dtype)
        self.dense_4h_to_h = Linear(c.intermediate_size, c.hidden_size, True, dtype)
        self.activation = c.hidden_act

    def forward(self, x: Tensor) -> Tensor:
        return self.dense_4h_to_h(activate(self.dense_h_to_4h(x), self.activation))


class Block(Module):
    def __init__(self, c: Any, dtype: str):
        self.parallel = c.use_parallel_residual
        self.input_layernorm = LayerNorm(c.hidden_size, c.layer_norm_eps, dtype)
        self.post_attention_layernorm = LayerNorm(c.hidden_size, c.layer_norm_eps, dtype)
        self.attention = Attention(c, dtype)
        self.mlp = MLP(c, dtype)

    def forward(self, x: Tensor, rotate: Rotation, cache: Layer) -> Tensor:
        attended = self.attention(self.input_layernorm(x), rotate, cache)
        if self.parallel:
            return self.mlp(self.post_attention_layernorm(x)) + attended + x
        x = attended + x
        return self.mlp(self.post_attention_layernorm(x)) + x


class GPTNeoX(Model):
    model_type = "gpt_neox"
    base = "gpt_neox."
    heads = ("embed_out",)
    ignored = (".attention.bias", ".attention.masked_bias", "rotary_emb.inv_freq")

    @property
    def token_values(self) -> int:
        return len(self.layers) * 2 * self.config.hidden_size

    def __init__(self, config: Config, dtype: str = "float32"):
        self.config, self.dtype = config, dtype
        self.embed_in = Embedding(config.vocab_size, config.hidden_size, dtype)
        self.layers = [Block(config, dtype) for _ in range(config.num_hidden_layers)]
        self.final_layer_norm = LayerNorm(config.hidden_size, config.layer_norm_eps, dtype)
        self.rotary = RotaryEmbedding(config.rope)
        if not config.tie_word_embeddings:
            self.embed_out = Linear(config.hidden_size, config.vocab_size, dtype=dtype)

    def forward(self, ids: Any, cache: Cache | None = None, logits_to_keep: int = 0) -> Tensor:
        """Logits [n, vocabulary] for token ids [n], or for the last `logits_to_keep` of them; 0 is all.

        Raises ContextOverflow when the cache has no room for n more tokens.
        """
        ids = self.ids(ids)
        cache = self.new_cache() if cache is None else cache
        rotate = self.rotary.at(cache.extend(len(ids)), len(cache) + len(ids))
        x = self.embed_in(ids)
        for i, layer in enumerate(self.layers):
            x = layer(x, rotate, cache[i])
        x = self.final_layer_norm(self.last(x, logits_to_keep))
        logits = ops.linear(x, self.embed_in.weight) if self.config.tie_word_embeddings else self.embed_out(x)
        cache.commit(ids)
        return logits
