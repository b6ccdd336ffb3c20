"""Further cases of `tests.parity`: families whose layout is not Llama's, mixtures of experts, recurrent ones."""

from __future__ import annotations

from typing import Any

_TEXT = {"vocab_size": 131, "num_hidden_layers": 3, "hidden_size": 64, "max_position_embeddings": 256}

# The small config of the families that do not take Llama's names.
BASES: dict[str, dict[str, Any]] = {
    "gpt2": {"vocab_size": 131, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 256, "n_inner": 112},
    "gpt_neox": _TEXT | {"intermediate_size": 112, "num_attention_heads": 4},
    "phi": _TEXT | {"intermediate_size": 112, "num_attention_heads": 4, "num_key_value_heads": 2},
    "stablelm": _TEXT | {"intermediate_size": 112, "num_attention_heads": 4, "num_key_value_heads": 2},
    "olmo": _TEXT | {"intermediate_size": 112, "num_attention_heads": 4, "eos_token_id": None, "pad_token_id": None},
    "starcoder2": _TEXT
    | {
        "intermediate_size": 112,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "bos_token_id": None,
        "eos_token_id": None,  # no text ends early
    },
    "rwkv": {
        "vocab_size": 131,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 4,
        "context_length": 256,
    },
    "mamba2": {
        "vocab_size": 131,
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_heads": 8,
        "head_dim": 16,
        "state_size": 32,
        "n_groups": 1,
        "chunk_size": 16,
        "bos_token_id": None,
        "eos_token_id": None,  # no text ends early
        "pad_token_id": None,
    },
}


def _rope(parameters: dict[str, Any]) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 10000.0} | parameters}


_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 24.0}
_OSS_YARN = _YARN | {"truncate": False, "rope_theta": 150000.0}
_TIED = {"tie_word_embeddings": True}
_UNTIED = {"tie_word_embeddings": False}
_SERIAL = {"use_parallel_residual": False}
_EXPERTS = {"num_local_experts": 5, "num_experts_per_tok": 2}
_QWEN_EXPERTS = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 40, "head_dim": 24}
_OSS = {"num_local_experts": 5, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 8} | _rope(_OSS_YARN)
_LATENT = {
    "kv_lora_rank": 24, "q_lora_rank": 40, "qk_nope_head_dim": 20, "qk_rope_head_dim": 8, "v_head_dim": 12,
    "n_routed_experts": 8, "n_shared_experts": 2, "num_experts_per_tok": 3, "moe_intermediate_size": 40,
    "first_k_dense_replace": 1, "routed_scaling_factor": 1.7, "num_key_value_heads": 4,
}  # fmt: skip
_GROUPS = {"n_group": 4, "topk_group": 2}
_LIMITED = {"n_groups": 2, "state_size": 20, "use_bias": True, "time_step_limit": [0.3, 0.9]}
_MSCALE = _rope(_YARN | {"mscale": 0.8, "mscale_all_dim": 1.2})

# (name, model_type, config)
_FLOAT32: list[tuple[str, str, dict[str, Any]]] = [
    ("gpt2, tied", "gpt2", {}),
    ("gpt2, scaled by layer, upcast, untied", "gpt2", {
        "scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True,
    } | _UNTIED),
    ("gpt2, unscaled, relu, four times as wide", "gpt2",
     {"n_inner": None, "scale_attn_weights": False, "activation_function": "relu"}),
    ("gpt_neox, parallel, a quarter rotates", "gpt_neox", {}),
    ("gpt_neox, serial, gelu_new, tied", "gpt_neox", _SERIAL | _TIED | {"hidden_act": "gelu_new"}),
    ("gpt_neox, no attention biases, all rotates, yarn", "gpt_neox",
     {"attention_bias": False} | _rope(_YARN | {"partial_rotary_factor": 1.0})),
    ("phi, half rotates", "phi", {}),
    ("phi, norms of queries and keys, a quarter rotates", "phi",
     {"qk_layernorm": True} | _rope({"partial_rotary_factor": 0.25})),
    ("stablelm, a quarter rotates", "stablelm", {}),
    ("stablelm, parallel, biases, head norms, tied", "stablelm",
     {"use_parallel_residual": True, "use_qkv_bias": True, "qk_layernorm": True} | _TIED),
    ("stablelm, serial, head norms, linear", "stablelm",
     {"qk_layernorm": True} | _rope({"rope_type": "linear", "factor": 2.5, "partial_rotary_factor": 0.5})),
    ("starcoder2, tied", "starcoder2", {}),
    ("starcoder2, window 8, no biases, untied", "starcoder2",
     {"sliding_window": 8, "use_bias": False, "num_key_value_heads": 4} | _UNTIED),
    ("starcoder2, gelu, window 8, head_dim 24", "starcoder2",
     {"hidden_act": "gelu", "sliding_window": 8, "head_dim": 24, "norm_epsilon": 1e-3} | _rope(_YARN)),
    ("olmo, MHA", "olmo", {"num_key_value_heads": None}),
    ("olmo, clipped, GQA, biases, tied, yarn", "olmo",
     {"clip_qkv": 0.6, "num_key_value_heads": 2, "attention_bias": True} | _TIED | _rope(_YARN)),
    ("olmo2", "olmo2", {}),
    ("olmo2, biases, tied, MHA, yarn", "olmo2",
     {"attention_bias": True, "num_key_value_heads": 4} | _TIED | _rope(_YARN)),
    ("mixtral", "mixtral", _EXPERTS),
    ("mixtral, window 8, one expert, head_dim 24, tied", "mixtral",
     _EXPERTS | {"num_experts_per_tok": 1, "sliding_window": 8, "head_dim": 24} | _TIED),
    ("qwen3_moe, not normalised", "qwen3_moe", _QWEN_EXPERTS),
    ("qwen3_moe, normalised, every second, window 8", "qwen3_moe", _QWEN_EXPERTS | {
        "norm_topk_prob": True, "decoder_sparse_step": 2, "use_sliding_window": True, "sliding_window": 8,
        "attention_bias": True,
    } | _TIED),
    ("qwen3_moe, dense first layer", "qwen3_moe", _QWEN_EXPERTS | {"mlp_only_layers": [0], "norm_topk_prob": True}),
    ("gpt_oss, yarn, window 8, sinks", "gpt_oss", _OSS | {"swiglu_limit": 0.7}),
    ("gpt_oss, no biases, other layer types, tied", "gpt_oss", _OSS | {
        "attention_bias": False, "layer_types": ["full_attention", "full_attention", "sliding_attention"],
        "swiglu_alpha": 1.1,
    } | _TIED),
    ("deepseek_v2, greedy, biases", "deepseek_v2", _LATENT | {"attention_bias": True, "mlp_bias": True}),
    ("deepseek_v2, groups, yarn with mscale, tied", "deepseek_v2",
     _LATENT | _GROUPS | _MSCALE | _TIED | {"topk_method": "group_limited_greedy"}),
    ("deepseek_v2, wide queries", "deepseek_v2", _LATENT | {"q_lora_rank": None, "first_k_dense_replace": 0}),
    ("deepseek_v3, groups, yarn with mscale", "deepseek_v3", _LATENT | _GROUPS | _MSCALE),
    ("deepseek_v3, halves rotate, biases, tied", "deepseek_v3", _LATENT | _TIED | {
        "rope_interleave": False, "norm_topk_prob": False, "n_group": 1, "topk_group": 1, "attention_bias": True,
    }),
    ("deepseek_v3, wide queries", "deepseek_v3", _LATENT | _GROUPS | {"q_lora_rank": None, "n_shared_experts": 1}),
    ("rwkv, halved every 2 layers", "rwkv", {"rescale_every": 2}),
    ("rwkv, never halved, tied", "rwkv", {"rescale_every": 0, "intermediate_size": None} | _TIED),
    ("mamba2", "mamba2", {}),
    ("mamba2, two groups, biases, limited steps, tied", "mamba2", _LIMITED | _TIED),
    ("mamba2, four groups, kernel 3 without bias, three times as wide", "mamba2", {
        "n_groups": 4, "use_conv_bias": False, "conv_kernel": 3, "expand": 3, "num_heads": 12,
        "layer_norm_epsilon": 1e-3, "residual_in_fp32": False,
    }),
]  # fmt: skip
# In bfloat16 the last bit may decide which expert a token takes: here it takes all of them.
_ALL = {"num_experts_per_tok": 5}
_ALL_ROUTED = {"num_experts_per_tok": 8, "n_group": 4, "topk_group": 4}
_BFLOAT16: list[tuple[str, str, dict[str, Any]]] = [
    ("gpt2", "gpt2", {}),
    ("gpt_neox", "gpt_neox", {}),
    ("phi, norms of queries and keys", "phi", {"qk_layernorm": True}),
    ("stablelm, parallel, head norms", "stablelm", {"use_parallel_residual": True, "qk_layernorm": True}),
    ("starcoder2, window 8", "starcoder2", {"sliding_window": 8}),
    ("olmo, clipped", "olmo", {"clip_qkv": 0.8}),
    ("olmo2", "olmo2", {}),
    ("mixtral, window 8", "mixtral", _EXPERTS | _ALL | {"sliding_window": 8}),
    ("qwen3_moe, normalised", "qwen3_moe", _QWEN_EXPERTS | {"norm_topk_prob": True, "num_experts_per_tok": 6}),
    ("gpt_oss, window 8", "gpt_oss", _OSS | _ALL),
    ("deepseek_v2, yarn", "deepseek_v2", _LATENT | _MSCALE | _ALL_ROUTED),
    ("deepseek_v3, yarn", "deepseek_v3", _LATENT | _MSCALE | _ALL_ROUTED),
    ("rwkv", "rwkv", {"rescale_every": 2}),
    ("mamba2, two groups", "mamba2", {"n_groups": 2}),
    ("mamba2, residuals in 16 bits", "mamba2", {"residual_in_fp32": False, "use_bias": True}),
]  # fmt: skip
# Larger embeddings where a norm makes the branches large, whatever comes in: else a bfloat16 reference, 2e-2 to 1e-1
# away from itself in float32, tells nothing. With these it is below 1e-2 away, and a state left out makes 9e-2.
_EMBEDDING = {"mamba2": 1.0}

MORE: list[dict[str, Any]] = [
    {"name": name, "model_type": kind, "config": config} for name, kind, config in _FLOAT32
] + [
    {"name": f"{name}, bfloat16", "model_type": kind, "config": config, "dtype": "bfloat16",
     "embedding": _EMBEDDING.get(kind, 0.02)}
    for name, kind, config in _BFLOAT16
]  # fmt: skip
