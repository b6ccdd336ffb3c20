"""StarCoder 2: Llama's attention with biases, norms with mean and bias, a plain MLP. HF: Starcoder2ForCausalLM."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ops
from llm.blocks import Nonlinearity, activate
from llm.cache import Cache, Layer
from llm.model import Model
from llm.nn import Embedding, LayerNorm, Linear, Module, RotaryEmbedding, Rotation
from llm.rope import Rope
from ops import Tensor

# In the real configs, after StarCoder 1 and the trainer; transformers reads none of them.
_UNREAD = {
    "activation_function", "attention_softmax_in_fp32", "layer_norm_epsilon", "mlp_type", "norm_type", "rms_norm_eps",
    "scale_attention_softmax_in_fp32", "scale_attn_weights",
}  # fmt: skip


@dataclass(kw_only=True)
class Config:
    """HF's Starcoder2Config, as far as it changes what is computed."""

    vocab_size: int = 49152
    hidden_size: int = 3072
    intermediate_size: int = 12288
    num_hidden_layers: int = 30
    num_attention_heads: int = 24
    num_key_value_heads: int = 2
    head_dim: int | None = None
    hidden_act: Nonlinearity = "gelu_pytorch_tanh"
    max_position_embeddings: int = 4096
    norm_epsilon: float = 1e-5
    sliding_window: int | None = None
    use_bias: bool = True
    tie_word_embeddings: bool = True
    rope: Rope

    @staticmethod
    def modern(raw: Mapping[str, Any]) -> dict[str, Any]:
        """Without what means nothing."""
        return {key: value for key, value in raw.items() if key not in _UNREAD}

    def __post_init__(self):
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads


class Attention(Module):
    def __init__(self, c: Any, dtype: str):
        self.head_dim, self.window = c.head_dim, c.sliding_window
        queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.q_proj = Linear(c.hidden_size, queries, c.use_bias, dtype)
        self.k_proj = Linear(c.hidden_size, keys, c.use_bias, dtype)
        self.v_proj = Linear(c.hidden_size, keys, c.use_bias, dtype)
        self.o_proj = Linear(queries, c.hidden_size, c.use_bias, dtype)

    def forward(self, x: Tensor, rotate: Rotation, cache: Layer) -> Tensor:
        tokens = x.shape[0]
        q = self.q_proj(x).reshape(tokens, -1, self.head_dim)
        k = self.k_proj(x).reshape(tokens, -1, self.head_dim)
        v = self.v_proj(x).reshape(tokens, -1, self.head_dim)
        q, k = rotate(q), rotate(k)
        keys, values = cache.write(k, v, rotate.positions)
        mixed = ops.attention(q, keys, values, rotate.positions, scale=self.head_dim**-0.5, window=self.window)
        return self.o_proj(mixed.reshape(tokens, -1))


class MLP(Module):
    def __init__(self, c: Any, dtype: str):
        self.c_fc = Linear(c.hidden_size, c.intermediate_size, c.use_bias, dtype)
        self.c_proj = Linear(c.intermediate_size, c.hidden_size, c.use_bias, dtype)
        self.activation = c.hidden_act

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(activate(self.c_fc(x), self.activation))


class Block(Module):
    def __init__(self, c: Any, dtype: str):
        self.self_attn = Attention(c, dtype)
        self.mlp = MLP(c, dtype)
        self.input_layernorm = LayerNorm(c.hidden_size, c.norm_epsilon, dtype)
        self.post_attention_layernorm = LayerNorm(c.hidden_size, c.norm_epsilon, dtype)

    def forward(self, x: Tensor, rotate: Rotation, cache: Layer) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotate, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Starcoder2(Model):
    model_type = "starcoder2"

    def __init__(self, config: Config, dtype: str = "float32"):
        self.config, self.dtype = config, dtype
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype)
        self.layers = [Block(config, dtype) for _ in range(config.num_hidden_layers)]
        self.norm = LayerNorm(config.hidden_size, config.norm_epsilon, dtype)
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
