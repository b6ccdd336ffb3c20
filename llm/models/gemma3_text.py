"""Gemma 3's text model: Gemma 2 with normalised queries and keys instead of capped scores, and a rotation of their own
for layers with a window. HF: Gemma3ForCausalLM."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import ops
from llm.blocks import MLP, ScaledEmbedding
from llm.cache import Cache, Layer
from llm.config import LayerType, check_layer_types
from llm.errors import ConfigError
from llm.model import Model
from llm.nn import Linear, Module, RMSNorm, RotaryEmbedding, Rotation
from llm.rope import Rope
from ops import Tensor

_THETAS = {"full_attention": "rope_theta", "sliding_attention": "rope_local_base_freq"}


@dataclass(kw_only=True)
class Config:
    """HF's Gemma3TextConfig, as far as it changes what is computed."""

    vocab_size: int = 262208
    hidden_size: int = 2304
    intermediate_size: int = 9216
    num_hidden_layers: int = 26
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 256
    hidden_activation: Literal["gelu_pytorch_tanh"] = "gelu_pytorch_tanh"
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True
    attention_bias: bool = False
    query_pre_attn_scalar: int = 256
    final_logit_softcapping: float | None = None
    use_bidirectional_attention: Literal[False] | None = False
    sliding_window: int | None = 4096
    sliding_window_pattern: int = 6
    layer_types: list[LayerType] | None = None
    rope: Rope = field(metadata={"layer_type": "full_attention", "theta": 1e6})
    local: Rope = field(metadata={"layer_type": "sliding_attention"})

    @staticmethod
    def modern(raw: Mapping[str, Any]) -> dict[str, Any]:
        """The two rotations side by side in `rope_parameters`, as transformers 5 writes them."""
        values = {k: v for k, v in raw.items() if k not in ("rope_parameters", "rope_scaling", *_THETAS.values())}
        if values.get("layer_types") is not None:
            values.pop("_sliding_window_pattern", None)
        ropes, scaling = raw.get("rope_parameters") or {}, raw.get("rope_scaling") or {}
        if not all(isinstance(each, Mapping) for each in (ropes, scaling, *ropes.values())):
            raise ConfigError(f"rope_parameters {ropes!r} and rope_scaling {scaling!r} are no objects for layer types")
        for kind, key in _THETAS.items():
            theta = {} if raw.get(key) is None else {"rope_theta": raw[key]}
            values.setdefault("rope_parameters", {})[kind] = theta | dict(ropes.get(kind, {}))
        values["rope_parameters"]["full_attention"] |= scaling
        return values

    def __post_init__(self):
        if self.layer_types is None:
            kinds: tuple[LayerType, LayerType] = ("sliding_attention", "full_attention")
            each = self.sliding_window_pattern
            self.layer_types = [kinds[(i + 1) % each == 0] for i in range(self.num_hidden_layers)]
        check_layer_types(self)


class Attention(Module):
    def __init__(self, c: Any, window: int | None, dtype: str):
        self.head_dim, self.window, self.scale = c.head_dim, window, c.query_pre_attn_scalar**-0.5
        queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.q_proj = Linear(c.hidden_size, queries, c.attention_bias, dtype)
        self.k_proj = Linear(c.hidden_size, keys, c.attention_bias, dtype)
        self.v_proj = Linear(c.hidden_size, keys, c.attention_bias, dtype)
        self.o_proj = Linear(queries, c.hidden_size, c.attention_bias, dtype)
        self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps, dtype, plus_one=True)
        self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps, dtype, plus_one=True)

    def forward(self, x: Tensor, rotate: Rotation, cache: Layer) -> Tensor:
        tokens = x.shape[0]
        q = self.q_norm(self.q_proj(x).reshape(-1, self.head_dim)).reshape(tokens, -1, self.head_dim)
        k = self.k_norm(self.k_proj(x).reshape(-1, self.head_dim)).reshape(tokens, -1, self.head_dim)
        v = self.v_proj(x).reshape(tokens, -1, self.head_dim)
        q, k = rotate(q), rotate(k)
        keys, values = cache.write(k, v, rotate.positions)
        mixed = ops.attention(q, keys, values, rotate.positions, scale=self.scale, window=self.window)
        return self.o_proj(mixed.reshape(tokens, -1))


class Block(Module):
    def __init__(self, c: Any, layer_type: LayerType, dtype: str):
        self.layer_type = layer_type
        self.self_attn = Attention(c, c.sliding_window if layer_type == "sliding_attention" else None, dtype)
        self.mlp = MLP(c.hidden_size, c.intermediate_size, dtype, activation="gelu_pytorch_tanh")
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps, dtype, plus_one=True)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps, dtype, plus_one=True)
        self.pre_feedforward_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps, dtype, plus_one=True)
        self.post_feedforward_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps, dtype, plus_one=True)

    def forward(self, x: Tensor, rotate: Rotation, cache: Layer) -> Tensor:
        x = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), rotate, cache))
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class Gemma3(Model):
    model_type = "gemma3_text"

    def __init__(self, config: Config, dtype: str = "float32"):
        self.config, self.dtype = config, dtype
        self.embed_tokens = ScaledEmbedding(config.vocab_size, config.hidden_size, dtype)
        self.layers = [Block(config, kind, dtype) for kind in config.layer_types or ()]
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype, plus_one=True)
        self.rotary, self.rotary_local = RotaryEmbedding(config.rope), RotaryEmbedding(config.local)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, dtype=dtype)

    def forward(self, ids: Any, cache: Cache | None = None, logits_to_keep: int = 0) -> Tensor:
        """Logits [n, vocabulary] for token ids [n], or for the last `logits_to_keep` of them; 0 is all.

        Raises ContextOverflow when the cache has no room for n more tokens.
        """
        ids = self.ids(ids)
        cache = self.new_cache() if cache is None else cache
        positions, length = cache.extend(len(ids)), len(cache) + len(ids)
        full, local = self.rotary.at(positions, length), self.rotary_local.at(positions, length)
        x = self.embed_tokens(ids)
        for i, layer in enumerate(self.layers):
            x = layer(x, local if layer.layer_type == "sliding_attention" else full, cache[i])
        x = self.norm(self.last(x, logits_to_keep))
        logits = ops.linear(x, self.embed_tokens.weight) if self.config.tie_word_embeddings else self.lm_head(x)
        if self.config.final_logit_softcapping is not None:
            logits = ops.softcap(logits, cap=self.config.final_logit_softcapping)
        cache.commit(ids)
        return logits
