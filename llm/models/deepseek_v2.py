"""DeepSeek-V2: latent attention, shared and routed experts chosen by groups. HF: DeepseekV2ForCausalLM."""

from __future__ import annotations

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
from ops import Tensor


@dataclass(kw_only=True)
class Config:
    """HF's DeepseekV2Config, as far as it changes what is computed."""

    vocab_size: int = 102400
    hidden_size: int = 4096
    intermediate_size: int = 11008
    moe_intermediate_size: int = 1407
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    n_routed_experts: int = 64
    n_shared_experts: int = 2
    num_experts_per_tok: int
    first_k_dense_replace: int = 0
    moe_layer_freq: Literal[1] = 1
    kv_lora_rank: int = 512
    q_lora_rank: int | None = 1536
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    n_group: int | None = None
    topk_group: int | None = None
    routed_scaling_factor: float = 1.0
    topk_method: Literal["greedy", "group_limited_greedy"] = "greedy"
    scoring_func: Literal["softmax"] = "softmax"
    norm_topk_prob: Literal[False] = False
    mlp_bias: bool = False
    hidden_act: Literal["silu"] = "silu"
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    rope: Rope

    @staticmethod
    def modern(raw: Mapping[str, Any]) -> dict[str, Any]:
        """Without what follows from the rest."""
        return {key: value for key, value in raw.items() if key not in ("head_dim", "qk_head_dim")}

    def __post_init__(self):
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        if self.num_key_value_heads != self.num_attention_heads:
            raise ConfigError(
                f"num_key_value_heads is {self.num_key_value_heads}, expected {self.num_attention_heads}: "
                f"every head has keys of its own"
            )
        if self.topk_method == "group_limited_greedy" and not (self.n_group and self.topk_group):
            raise ConfigError("topk_method 'group_limited_greedy' needs n_group and topk_group")
        groups = self.n_group if self.topk_method == "group_limited_greedy" and self.n_group else 1
        if self.n_routed_experts % groups:
            raise ConfigError(f"{self.n_routed_experts} experts are no {groups} equal groups")

    @property
    def head_dim(self) -> int:
        return self.qk_rope_head_dim


class MoE(Module):
    def __init__(self, c: Any, dtype: str):
        grouped = c.topk_method == "group_limited_greedy"
        self.groups, self.kept = (c.n_group, c.topk_group) if grouped else (1, 1)
        self.k, self.factor = c.num_experts_per_tok, c.routed_scaling_factor
        self.gate = Linear(c.hidden_size, c.n_routed_experts, dtype=dtype)
        self.experts = Experts(c.n_routed_experts, c.hidden_size, c.moe_intermediate_size, dtype)
        self.shared_experts = MLP(c.hidden_size, c.moe_intermediate_size * c.n_shared_experts, dtype, c.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.gate(ops.cast(x, dtype="float32"))
        weights, ids = ops.route(logits, k=self.k, scale=self.factor, groups=self.groups, kept=self.kept)
        return self.experts(x, weights, ids) + self.shared_experts(x)


class Block(Module):
    def __init__(self, c: Any, layer: int, dtype: str):
        dense = layer < c.first_k_dense_replace
        self.self_attn = LatentAttention(c, dtype)
        self.mlp = MLP(c.hidden_size, c.intermediate_size, dtype, c.mlp_bias) if dense else MoE(c, dtype)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps, dtype)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps, dtype)

    def forward(self, x: Tensor, rotate: Rotation, cache: Layer) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotate, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class DeepseekV2(Model):
    model_type = "deepseek_v2"
    kept = (".gate.weight",)

    @property
    def token_values(self) -> int:
        return len(self.layers) * latent_values(self.config)

    def __init__(self, config: Config, dtype: str = "float32"):
        self.config, self.dtype = config, dtype
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype)
        self.layers = [Block(config, i, dtype) for i in range(config.num_hidden_layers)]
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.rotary = RotaryEmbedding(config.rope, interleaved=True)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, dtype=dtype)

    def from_checkpoint(self, named: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        return stacked(named)

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
