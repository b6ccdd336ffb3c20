"""GPT-OSS: attention sinks, windows in every second layer, mixtures of experts, MXFP4. HF: GptOssForCausalLM."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

import ops
from llm.cache import Cache, Layer
from llm.config import LayerType, check_layer_types
from llm.experts import ExpertLinear
from llm.model import Model
from llm.nn import Embedding, Linear, Module, RMSNorm, RotaryEmbedding, Rotation
from llm.rope import Rope
from llm.weights.mxfp4 import read_mxfp4
from ops import Spec, Tensor

_YARN = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
_OLD = ("experts_per_token", "initial_context_length")  # said by num_experts_per_tok and the rope parameters


@dataclass(kw_only=True)
class Config:
    """HF's GptOssConfig, as far as it changes what is computed."""

    vocab_size: int = 201088
    hidden_size: int = 2880
    intermediate_size: int = 2880
    num_hidden_layers: int = 36
    num_attention_heads: int = 64
    num_key_value_heads: int = 8
    head_dim: int = 64
    hidden_act: Literal["silu"] = "silu"
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    attention_bias: bool = True
    sliding_window: int | None = 128
    layer_types: list[LayerType] | None = None
    num_local_experts: int = 128
    num_experts_per_tok: int = 4
    swiglu_alpha: float = 1.702
    swiglu_limit: float = 7.0
    rope: Rope = field(metadata={"theta": 150000.0})

    @staticmethod
    def modern(raw: Mapping[str, Any]) -> dict[str, Any]:
        """Without what the first checkpoints say twice, and without MXFP4, which is undone as the weights are read."""
        values = {key: value for key, value in raw.items() if key not in _OLD}
        if not (values.get("rope_parameters") or values.get("rope_scaling")):
            values["rope_parameters"] = _YARN | {"original_max_position_embeddings": 4096}
        quantization = values.get("quantization_config")
        if isinstance(quantization, Mapping) and quantization.get("quant_method") == "mxfp4":
            del values["quantization_config"]
        return values

    def __post_init__(self):
        if self.layer_types is None:
            kinds: tuple[LayerType, LayerType] = ("sliding_attention", "full_attention")
            self.layer_types = [kinds[i % 2] for i in range(self.num_hidden_layers)]
        check_layer_types(self)


class Attention(Module):
    def __init__(self, c: Any, kind: LayerType, dtype: str):
        self.head_dim, self.window = c.head_dim, c.sliding_window if kind == "sliding_attention" else None
        queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.q_proj = Linear(c.hidden_size, queries, c.attention_bias, dtype)
        self.k_proj = Linear(c.hidden_size, keys, c.attention_bias, dtype)
        self.v_proj = Linear(c.hidden_size, keys, c.attention_bias, dtype)
        self.o_proj = Linear(queries, c.hidden_size, c.attention_bias, dtype)
        self.sinks: Any = Spec((c.num_attention_heads,), dtype)

    def forward(self, x: Tensor, rotate: Rotation, cache: Layer) -> Tensor:
        tokens = x.shape[0]
        q = self.q_proj(x).reshape(tokens, -1, self.head_dim)
        k = self.k_proj(x).reshape(tokens, -1, self.head_dim)
        v = self.v_proj(x).reshape(tokens, -1, self.head_dim)
        q, k = rotate(q), rotate(k)
        keys, values = cache.write(k, v, rotate.positions)
        scale, window = self.head_dim**-0.5, self.window
        mixed = ops.attention(q, keys, values, rotate.positions, self.sinks, scale=scale, window=window)
        return self.o_proj(mixed.reshape(tokens, -1))


class Experts(Module):
    def __init__(self, c: Any, dtype: str):
        self.alpha, self.limit = c.swiglu_alpha, c.swiglu_limit
        self.gate_proj = ExpertLinear(c.num_local_experts, c.hidden_size, c.intermediate_size, dtype, bias=True)
        self.up_proj = ExpertLinear(c.num_local_experts, c.hidden_size, c.intermediate_size, dtype, bias=True)
        self.down_proj = ExpertLinear(c.num_local_experts, c.intermediate_size, c.hidden_size, dtype, bias=True)

    def forward(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        gate, up = self.gate_proj(x, ids), self.up_proj(x, ids)
        mixed = ops.clamped_swiglu(gate, up, alpha=self.alpha, limit=self.limit)
        return ops.combine(self.down_proj(mixed, ids), weights)


class MLP(Module):
    def __init__(self, c: Any, dtype: str):
        self.k = c.num_experts_per_tok
        self.router = Linear(c.hidden_size, c.num_local_experts, True, dtype)
        self.experts = Experts(c, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x, *ops.route(self.router(x), k=self.k, normalise=True))


class Block(Module):
    def __init__(self, c: Any, kind: LayerType, dtype: str):
        self.layer_type = kind
        self.self_attn = Attention(c, kind, dtype)
        self.mlp = MLP(c, dtype)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps, dtype)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps, dtype)

    def forward(self, x: Tensor, rotate: Rotation, cache: Layer) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotate, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class GptOss(Model):
    model_type = "gpt_oss"
    kept = (".router.weight",)

    def __init__(self, config: Config, dtype: str = "float32"):
        self.config, self.dtype = config, dtype
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype)
        self.layers = [Block(config, kind, dtype) for kind in config.layer_types or ()]
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.rotary = RotaryEmbedding(config.rope)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, dtype=dtype)

    def from_checkpoint(self, named: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """Experts one below the other. The checkpoint has [experts, inputs, outputs], gate and up taking turns.

        What is so already, as of a GGUF file, stays.
        """
        result: dict[str, np.ndarray] = {}
        for name, each in read_mxfp4(named).items():
            head, found, tail = name.partition(".mlp.experts.")
            matrix, bias, _ = tail.partition("_bias")
            if not found or each.ndim != (2 if bias else 3):
                result[name] = each
                continue
            rows = each if bias else np.swapaxes(each, 1, 2)  # [experts, outputs, inputs], or [experts, outputs]
            parts = {"down_proj": rows}
            if matrix == "gate_up_proj":
                parts = {"gate_proj": rows[:, ::2], "up_proj": rows[:, 1::2]}
            for part, values in parts.items():
                result[f"{head}{found}{part}.{'bias' if bias else 'weight'}"] = values.reshape(-1, *rows.shape[2:])
        return result

    def to_checkpoint(self, named: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        result: dict[str, np.ndarray] = {}
        for name, each in named.items():
            head, found, tail = name.partition(".mlp.experts.")
            part, _, kind = tail.partition(".")
            if not found:
                result[name] = each
                continue
            if part == "up_proj":
                continue  # goes with the gate
            rows = each.reshape(self.config.num_local_experts, -1, *each.shape[1:])
            if part == "gate_proj":
                other = named[f"{head}{found}up_proj.{kind}"].reshape(rows.shape)
                rows = np.stack([rows, other], axis=2).reshape(len(rows), -1, *rows.shape[2:])
            whole = f"{head}{found}{'gate_up_proj' if part == 'gate_proj' else part}"
            result[whole + ("_bias" if kind == "bias" else "")] = rows if kind == "bias" else np.swapaxes(rows, 1, 2)
        return result

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
