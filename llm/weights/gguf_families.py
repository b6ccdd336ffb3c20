"""What GGUF calls things, by architecture: tensors, and values of the config. Data; `gguf_model` reads it.

Names are after the library's own tables (`gguf.get_tensor_name_map`), which the tests hold against these. What the
converter of llama.cpp does to tensors besides renaming, and so is undone, has a name in `changes`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Family:
    """`model_type` is Hugging Face's. In names `{i}` is a layer and `{e}` an expert, whose matrices GGUF stacks.

    tensors: a tensor's name in GGUF, without `.weight` or `.bias`, to that in the checkpoint.
    values: a key of the metadata, without the architecture in front, to that of config.json.
    fixed: values that the architecture implies. changes: what to do with a tensor, by its name without the layer.
    optional: keys that say nothing to this runtime, or what the tensors say as well.
    """

    model_type: str
    tensors: Mapping[str, str]
    values: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    changes: Mapping[str, str] = field(default_factory=dict)


_VALUES = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
_LAYER_NORM = {
    **{k: v for k, v in _VALUES.items() if v not in ("head_dim", "rms_norm_eps")},
    "attention.layer_norm_epsilon": "layer_norm_eps",
}
_EXPERTS = {
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
_SOFT_CAPS = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "attention.sliding_window": "sliding_window",
}
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_ATTENTION = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
_QK_NORM = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_GEMMA_NORMS = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_MLP_EXPERTS = {
    "ffn_gate_exps": "mlp.experts.{e}.gate_proj",
    "ffn_up_exps": "mlp.experts.{e}.up_proj",
    "ffn_down_exps": "mlp.experts.{e}.down_proj",
    "ffn_gate_inp": "mlp.gate",
}
_PERMUTED = {"attn_q": "heads", "attn_k": "kv heads"}


def _layers(*tables: Mapping[str, str], base: str = "model.layers.{i}.") -> dict[str, str]:
    return {f"blk.{{i}}.{ours}": base + theirs for table in tables for ours, theirs in table.items()}


def _plus_one(*names: str) -> dict[str, str]:
    return dict.fromkeys(("output_norm", *names), "plus one")


_LLAMA = {**_TOP, **_layers(_NORMS, _ATTENTION, _MLP)}

FAMILIES: dict[str, Family] = {
    "llama": Family("llama", _LLAMA, _VALUES, changes=_PERMUTED),
    "mixtral": Family(  # GGUF's architecture is llama, with experts
        "mixtral",
        {
            **_TOP,
            **_layers(_NORMS, _ATTENTION),
            "blk.{i}.ffn_gate_inp": "model.layers.{i}.block_sparse_moe.gate",
            "blk.{i}.ffn_gate_exps": "model.layers.{i}.block_sparse_moe.experts.{e}.w1",
            "blk.{i}.ffn_down_exps": "model.layers.{i}.block_sparse_moe.experts.{e}.w2",
            "blk.{i}.ffn_up_exps": "model.layers.{i}.block_sparse_moe.experts.{e}.w3",
        },
        {**_VALUES, "expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"},
        changes=_PERMUTED,
    ),
    "qwen2": Family("qwen2", _LLAMA, _VALUES),
    "qwen3": Family("qwen3", {**_LLAMA, **_layers(_QK_NORM)}, _VALUES),
    "qwen2moe": Family(
        "qwen2_moe",
        {
            **_TOP,
            **_layers(_NORMS, _ATTENTION, _MLP_EXPERTS),
            "blk.{i}.ffn_gate_inp_shexp": "model.layers.{i}.mlp.shared_expert_gate",
            "blk.{i}.ffn_gate_shexp": "model.layers.{i}.mlp.shared_expert.gate_proj",
            "blk.{i}.ffn_up_shexp": "model.layers.{i}.mlp.shared_expert.up_proj",
            "blk.{i}.ffn_down_shexp": "model.layers.{i}.mlp.shared_expert.down_proj",
        },
        {**_VALUES, **_EXPERTS, "expert_shared_feed_forward_length": "shared_expert_intermediate_size"},
        {"norm_topk_prob": False},
        {"ffn_gate_inp_shexp": "one row"},
    ),
    "qwen3moe": Family(
        "qwen3_moe",
        {**_TOP, **_layers(_NORMS, _ATTENTION, _QK_NORM, _MLP_EXPERTS)},
        {**_VALUES, **_EXPERTS},
        {"norm_topk_prob": True},
    ),
    "gemma": Family("gemma", _LLAMA, _VALUES, changes=_plus_one(*_NORMS)),
    "gemma2": Family(
        "gemma2",
        {**_TOP, **_layers(_GEMMA_NORMS, _ATTENTION, _MLP)},
        {**_VALUES, **_SOFT_CAPS},
        changes=_plus_one(*_GEMMA_NORMS),
    ),
    "gemma3": Family(
        "gemma3_text",
        {**_TOP, **_layers(_GEMMA_NORMS, _ATTENTION, _QK_NORM, _MLP)},
        {**_VALUES, **_SOFT_CAPS, "rope.freq_base_swa": "rope_local_base_freq"},
        changes=_plus_one(*_GEMMA_NORMS, *_QK_NORM),
    ),
    "phi2": Family(
        "phi",
        {
            "token_embd": "model.embed_tokens",
            "output_norm": "model.final_layernorm",
            "output": "lm_head",
            **_layers(
                _ATTENTION,
                {
                    "attn_norm": "input_layernorm",
                    "attn_output": "self_attn.dense",
                    "ffn_up": "mlp.fc1",
                    "ffn_down": "mlp.fc2",
                },
            ),
        },
        _LAYER_NORM,
    ),
    "phi3": Family(
        "phi3",
        {
            **_TOP,
            **_layers(
                _NORMS,
                {
                    "attn_qkv": "self_attn.qkv_proj",
                    "attn_output": "self_attn.o_proj",
                    "ffn_up": "mlp.gate_up_proj",
                    "ffn_down": "mlp.down_proj",
                },
            ),
        },
        {**_VALUES, "attention.sliding_window": "sliding_window"},
    ),
    "gpt2": Family(
        "gpt2",
        {
            "token_embd": "transformer.wte",
            "position_embd": "transformer.wpe",
            "output_norm": "transformer.ln_f",
            "output": "lm_head",
            **_layers(
                {
                    "attn_norm": "ln_1",
                    "attn_qkv": "attn.c_attn",
                    "attn_output": "attn.c_proj",
                    "ffn_norm": "ln_2",
                    "ffn_up": "mlp.c_fc",
                    "ffn_down": "mlp.c_proj",
                },
                base="transformer.h.{i}.",
            ),
        },
        {
            "context_length": "n_positions",
            "embedding_length": "n_embd",
            "block_count": "n_layer",
            "feed_forward_length": "n_inner",
            "attention.head_count": "n_head",
            "attention.layer_norm_epsilon": "layer_norm_epsilon",
        },
        changes=dict.fromkeys(("attn_qkv", "attn_output", "ffn_up", "ffn_down"), "transposed"),
    ),
    "gptneox": Family(
        "gpt_neox",
        {
            "token_embd": "gpt_neox.embed_in",
            "output_norm": "gpt_neox.final_layer_norm",
            "output": "embed_out",
            **_layers(
                {
                    **_NORMS,
                    "attn_qkv": "attention.query_key_value",
                    "attn_output": "attention.dense",
                    "ffn_up": "mlp.dense_h_to_4h",
                    "ffn_down": "mlp.dense_4h_to_h",
                },
                base="gpt_neox.layers.{i}.",
            ),
        },
        {
            **{k: v for k, v in _LAYER_NORM.items() if v not in ("num_key_value_heads", "rope_theta")},
            "rope.freq_base": "rotary_emb_base",
            "use_parallel_residual": "use_parallel_residual",
        },
        changes={"attn_qkv": "by head"},
    ),
    "stablelm": Family(
        "stablelm",
        {
            **_LLAMA,
            **_layers(
                {"attn_q_norm": "self_attn.q_layernorm.norms.{e}", "attn_k_norm": "self_attn.k_layernorm.norms.{e}"}
            ),
        },
        {**_LAYER_NORM, "use_parallel_residual": "use_parallel_residual"},
    ),
    "starcoder2": Family(
        "starcoder2",
        {
            **_TOP,
            **_layers(_NORMS, _ATTENTION, {"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}),
        },
        {
            **_LAYER_NORM,
            "attention.layer_norm_epsilon": "norm_epsilon",
            "attention.layer_norm_rms_epsilon": "rms_norm_eps",  # the 15B's config has one, which nobody reads
            "attention.key_length": "head_dim",
            "attention.sliding_window": "sliding_window",
        },
    ),
    "granite": Family(
        "granite",
        _LLAMA,
        {
            **_VALUES,
            "attention.scale": "attention_multiplier",
            "embedding_scale": "embedding_multiplier",
            "residual_scale": "residual_multiplier",
            "logit_scale": "logits_scaling",
        },
        changes=_PERMUTED,
    ),
    "olmo": Family(  # its norms have no weights
        "olmo",
        {"token_embd": "model.embed_tokens", "output": "lm_head", **_layers(_ATTENTION, _MLP)},
        {**_LAYER_NORM, "attention.clamp_kqv": "clip_qkv"},
        changes=_PERMUTED,
    ),
    "olmo2": Family(
        "olmo2",
        {
            **_TOP,
            **_layers(
                _ATTENTION,
                _QK_NORM,
                _MLP,
                {
                    "post_attention_norm": "post_attention_layernorm",
                    "post_ffw_norm": "post_feedforward_layernorm",
                },
            ),
        },
        _VALUES,
    ),
    "smollm3": Family("smollm3", _LLAMA, _VALUES, changes=_PERMUTED),
    "deepseek2": Family(  # V2 and V3: which, a tensor of the latter tells
        "deepseek_v2",
        {
            **_TOP,
            **_layers(
                _NORMS,
                _MLP,
                _MLP_EXPERTS,
                {
                    "attn_q": "self_attn.q_proj",
                    "attn_q_a": "self_attn.q_a_proj",
                    "attn_q_a_norm": "self_attn.q_a_layernorm",
                    "attn_q_b": "self_attn.q_b_proj",
                    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
                    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
                    "attn_kv_b": "self_attn.kv_b_proj",
                    "attn_output": "self_attn.o_proj",
                    "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
                    "ffn_up_shexp": "mlp.shared_experts.up_proj",
                    "ffn_down_shexp": "mlp.shared_experts.down_proj",
                    "exp_probs_b": "mlp.gate.e_score_correction",
                },
            ),
        },
        {
            **{key: name for key, name in _VALUES.items() if name not in ("head_dim", "num_key_value_heads")},
            "expert_count": "n_routed_experts",
            "expert_used_count": "num_experts_per_tok",
            "expert_feed_forward_length": "moe_intermediate_size",
            "expert_shared_count": "n_shared_experts",
            "expert_weights_scale": "routed_scaling_factor",
            "expert_weights_norm": "norm_topk_prob",
            "expert_group_count": "n_group",
            "expert_group_used_count": "topk_group",
            "leading_dense_block_count": "first_k_dense_replace",
            "attention.q_lora_rank": "q_lora_rank",
            "attention.kv_lora_rank": "kv_lora_rank",
        },
        changes={"exp_probs_b": "underscore"},
    ),
    "mamba2": Family(
        "mamba2",
        {
            "token_embd": "backbone.embeddings",
            "output_norm": "backbone.norm_f",
            "output": "lm_head",
            **_layers(
                {
                    "attn_norm": "norm",
                    "ssm_in": "mixer.in_proj",
                    "ssm_conv1d": "mixer.conv1d",
                    "ssm_dt": "mixer.dt",
                    "ssm_a": "mixer.A_log",
                    "ssm_d": "mixer.D",
                    "ssm_norm": "mixer.norm",
                    "ssm_out": "mixer.out_proj",
                },
                base="backbone.layers.{i}.",
            ),
        },
        {
            "embedding_length": "hidden_size",
            "block_count": "num_hidden_layers",
            "attention.layer_norm_rms_epsilon": "layer_norm_epsilon",
            "ssm.conv_kernel": "conv_kernel",
            "ssm.state_size": "state_size",
            "ssm.time_step_rank": "num_heads",
            "ssm.group_count": "n_groups",
        },
        changes={
            "ssm_conv1d": "no axis",
            "ssm_dt": "underscore",
            "ssm_a": "minus exp",
            "ssm_d": "column",
            "ssm_norm": "by group",
        },
    ),
    "gpt-oss": Family(
        "gpt_oss",
        {
            **_TOP,
            **_layers(
                _ATTENTION,
                {
                    "attn_norm": "input_layernorm",
                    "post_attention_norm": "post_attention_layernorm",
                    "attn_sinks": "self_attn.sinks",
                    "ffn_gate_inp": "mlp.router",
                    "ffn_gate_exps": "mlp.experts.gate_proj",
                    "ffn_up_exps": "mlp.experts.up_proj",
                    "ffn_down_exps": "mlp.experts.down_proj",
                },
            ),
        },
        {
            **_VALUES,
            "attention.sliding_window": "sliding_window",
            "expert_count": "num_local_experts",
            "expert_used_count": "num_experts_per_tok",
        },
        changes={"attn_sinks": "bare", **dict.fromkeys(("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"), "stack")},
    ),
}
