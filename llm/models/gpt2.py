"""GPT-2: learned positions, layer norms, matrices that the checkpoint holds transposed. HF: GPT2LMHeadModel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

import ops
from llm.blocks import Nonlinearity, activate
from llm.cache import Cache, Layer
from llm.errors import ConfigError
from llm.model import Model
from llm.nn import Embedding, LayerNorm, Linear, Module
from ops import Tensor

_TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # HF's Conv1D


@dataclass(kw_only=True)
class Config:
    """HF's GPT2Config, as far as it changes what is computed."""

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    activation_function: Nonlinearity = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    reorder_and_upcast_attn: bool = False  # scores in float32, as they are here in any case
    add_cross_attention: Literal[False] = False
    tie_word_embeddings: bool = True

    @staticmethod
    def modern(raw: Mapping[str, Any]) -> dict[str, Any]:
        """Older configs say the context twice: `n_ctx` is no more read."""
        return {key: value for key, value in raw.items() if key != "n_ctx"}

    def __post_init__(self):
        if self.n_embd % self.n_head:
            raise ConfigError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")

    @property
    def max_position_embeddings(self) -> int:
        return self.n_positions


class Attention(Module):
    def __init__(self, c: Config, layer: int, dtype: str):
        self.head_dim, self.width = c.n_embd // c.n_head, c.n_embd
        self.scale = self.head_dim**-0.5 if c.scale_attn_weights else 1.0
        if c.scale_attn_by_inverse_layer_idx:
            self.scale /= layer + 1
        self.c_attn = Linear(c.n_embd, 3 * c.n_embd, True, dtype)
        self.c_proj = Linear(c.n_embd, c.n_embd, True, dtype)

    def forward(self, x: Tensor, positions: Tensor, cache: Layer) -> Tensor:
        tokens, qkv = x.shape[0], self.c_attn(x)
        q, k, v = (
            ops.columns(qkv, start=i * self.width, stop=(i + 1) * self.width).reshape(tokens, -1, self.head_dim)
            for i in range(3)
        )
        keys, values = cache.write(k, v, positions)
        return self.c_proj(ops.attention(q, keys, values, positions, scale=self.scale).reshape(tokens, -1))


class MLP(Module):
    def __init__(self, c: Config, dtype: str):
        self.c_fc = Linear(c.n_embd, c.n_inner or 4 * c.n_embd, True, dtype)
        self.c_proj = Linear(c.n_inner or 4 * c.n_embd, c.n_embd, True, dtype)
        self.activation: Nonlinearity = c.activation_function

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(activate(self.c_fc(x), self.activation))


class Block(Module):
    def __init__(self, c: Config, layer: int, dtype: str):
        self.ln_1 = LayerNorm(c.n_embd, c.layer_norm_epsilon, dtype)
        self.attn = Attention(c, layer, dtype)
        self.ln_2 = LayerNorm(c.n_embd, c.layer_norm_epsilon, dtype)
        self.mlp = MLP(c, dtype)

    def forward(self, x: Tensor, positions: Tensor, cache: Layer) -> Tensor:
        x = x + self.attn(self.ln_1(x), positions, cache)
        return x + self.mlp(self.ln_2(x))


class GPT2(Model):
    model_type = "gpt2"
    hf_class = "GPT2LMHeadModel"
    base = "transformer."
    ignored = (".attn.bias", ".attn.masked_bias")  # masks

    @property
    def token_values(self) -> int:
        return len(self.h) * 2 * self.config.n_embd

    def __init__(self, config: Config, dtype: str = "float32"):
        self.config, self.dtype = config, dtype
        self.wte = Embedding(config.vocab_size, config.n_embd, dtype)
        self.wpe = Embedding(config.n_positions, config.n_embd, dtype)
        self.h = [Block(config, i, dtype) for i in range(config.n_layer)]
        self.ln_f = LayerNorm(config.n_embd, config.layer_norm_epsilon, dtype)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.n_embd, config.vocab_size, dtype=dtype)

    def from_checkpoint(self, named: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        return {name: each.T if name.endswith(_TRANSPOSED) else each for name, each in named.items()}

    def to_checkpoint(self, named: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        return self.from_checkpoint(named)

    def forward(self, ids: Any, cache: Cache | None = None, logits_to_keep: int = 0) -> Tensor:
        """Logits [n, vocabulary] for token ids [n], or for the last `logits_to_keep` of them; 0 is all.

        Raises ContextOverflow when the cache has no room for n more tokens.
        """
        ids = self.ids(ids)
        cache = self.new_cache() if cache is None else cache
        positions = cache.extend(len(ids))
        x = self.wte(ids) + self.wpe(positions)
        for i, block in enumerate(self.h):
            x = block(x, positions, cache[i])
        x = self.ln_f(self.last(x, logits_to_keep))
        logits = ops.linear(x, self.wte.weight) if self.config.tie_word_embeddings else self.lm_head(x)
        cache.commit(ids)
        return logits
