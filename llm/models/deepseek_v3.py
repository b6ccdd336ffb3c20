"""DeepSeek-V3 and R1: latent attention, experts scored by sigmoid and chosen by groups. HF: DeepseekV3ForCausalLM."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

import ops
from llm.blocks import MLP
from llm.cache import Cache, Layer
from llm.errors import ConfigError
from llm.experts import Experts, stacked, unstacked
from llm.latent import LatentAttention, latent_values
from llm.model import Model
from llm.nn import Embedding, Linear, Module, RMSNorm, RotaryEmbedding, Rotation
from llm.rope import Rope
from ops import Spec, Tensor

_UNUSED = ("head_dim", "qk_head_dim", "num_nextn_predict_layers", "num_mtp_layers")


@dataclass(kw_only=True)
class Config:
    """HF's DeepseekV3Config, as far as it changes what is computed."""

    vocab_size: int = 129280
    hidden_size: int = 7168
    intermediate_size: int = 18432
    moe_intermediate_size: int = 2048
    num_hidden_layers: int = 61
    num_attention_heads: int = 128
    num_key_value_heads: int | None = None
    n_routed_experts: int = 256
    n_shared_experts: int = 1
    num_experts_per_tok: int = 8
    first_k_dense_replace: int = 3
    moe_layer_freq: Literal[1] = 1
    kv_lora_rank: int = 512
    q_lora_rank: int | None = 1536
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    n_group: int = 8
    topk_group: int = 4
    routed_scaling_factor: float = 2.5
    topk_method: Literal["noaux_tc"] = "noaux_tc"
    scoring_func: Literal["sigmoid"] = "sigmoid"
    norm_topk_prob: bool = True
    rope_interleave: bool = True
    hidden_act: Literal["silu"] = "silu"
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    rope: Rope

    @staticmethod
    def modern(raw: Mapping[str, Any]) -> dict[str, Any]:
        """Without what follows from the rest, and the layers that guess further tokens, which no forward needs."""
        return {key: value for key, value in raw.items() if key not in _UNUSED}

    def __post_init__(self):
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        if self.num_key_value_heads != self.num_attention_heads:
            raise ConfigError(
                f"num_key_value_heads is {self.num_key_value_heads}, expected {self.num_attention_heads}: "
                f"every head has keys of its own"
            )
        groups = self.n_group
        if self.n_routed_experts % groups:
            raise ConfigError(f"{self.n_routed_experts} experts are no {groups} equal groups")

    @property
    def head_dim(self) -> int:
        return self.qk_rope_head_dim


class Gate(Module):
    """Scores of the experts; the bias counts for the choice only."""

    def __init__(self, c: Any):
        self.weight: Any = Spec((c.n_routed_experts, c.hidden_size), "float32")
        self.e_score_correction_bias: Any = Spec((c.n_routed_experts,), "float32")
        self.options = {
            "k": c.num_experts_per_tok, "scoring": "sigmoid", "normalise": c.norm_topk_prob,
            "scale": c.routed_scaling_factor, "groups": c.n_group, "kept": c.topk_group, "best": 2,
        }  # fmt: skip

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = ops.linear(ops.cast(x, dtype="float32"), self.weight)
        return ops.route(logits, self.e_score_correction_bias, **self.options)


class MoE(Module):
    def __init__(self, c: Any, dtype: str):
        self.gate = Gate(c)
        self.experts = Experts(c.n_routed_experts, c.hidden_size, c.moe_intermediate_size, dtype)
        self.shared_experts = MLP(c.hidden_size, c.moe_intermediate_size * c.n_shared_experts, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x, *self.gate(x)) + self.shared_experts(x)


class Block(Module):
    def __init__(self, c: Any, layer: int, dtype: str):
        dense = layer < c.first_k_dense_replace
        self.self_attn = LatentAttention(c, dtype)
        self.mlp = MLP(c.hidden_size, c.intermediate_size, dtype) if dense else MoE(c, dtype)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps, dtype)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps, dtype)

    def forward(self, x: Tensor, rotate: Rotation, cache: Layer) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotate, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class DeepseekV3(Model):
    model_type = "deepseek_v3"
    kept = (".gate.weight",)

    @property
    def token_values(self) -> int:
        return len(self.layers) * latent_values(self.config)

    def __init__(self, config: Config, dtype: str = "float32"):
        self.config, self.dtype = config, dtype
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype)
        self.layers = [Block(config, i, dtype) for i in range(config.num_hidden_layers)]
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.rotary = RotaryEmbedding(config.rope, interleaved=config.rope_interleave)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, dtype=dtype)

    def from_checkpoint(self, named: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        layers = self.config.num_hidden_layers
        return stacked({name: each for name, each in named.items() if _layer(name) < layers})

    def to_checkpoint(self, named: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        return unstacked(named, self.config.n_routed_experts)

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


def _layer(name: str) -> int:
    """The number of the layer that a weight belongs to, -1 for one of none."""
    found = re.match(r"(?:model\.)?layers\.(\d+)\.", name)
    return int(found[1]) if found else -1
