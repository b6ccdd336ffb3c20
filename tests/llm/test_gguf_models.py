"""Every family there is, as the converter of llama.cpp would write it: loaded from GGUF it gives the same logits.

Names come from the library's tables; what else the converter does to tensors is written out here once more.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import llm
import ops
from llm.config import parse_config
from llm.load import build
from llm.models import architecture
from llm.weights.blocks import Kind
from llm.weights.gguf_families import FAMILIES
from tests.llm.gguf_files import write

SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
RMS = {"rms_norm_eps": 1e-5, "rope_theta": 10000.0}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT = {
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}
GROUPS = {"n_group": 2, "topk_group": 1, "routed_scaling_factor": 2.5, "norm_topk_prob": True}
YARN = {
    "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "truncate": False},
}
MULTIPLIERS = {
    "attention_multiplier": 0.3,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.5,
    "logits_scaling": 4.0,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**RMS, "attention_bias": True},
    "mixtral": {**RMS, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2": RMS,
    "qwen3": {**RMS, "head_dim": 32},
    "qwen3_moe": {**RMS, **MOE, "num_experts": 4, "head_dim": 32, "norm_topk_prob": True},
    "gemma": {**RMS, "head_dim": 16, "tie_word_embeddings": True},
    "gemma2": {**RMS, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8},
    "gemma3_text": {**RMS, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8},
    "phi": {"partial_rotary_factor": 0.5, "layer_norm_eps": 1e-5, "rope_theta": 10000.0},
    "phi3": RMS,
    "gpt2": {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 128, "n_inner": 96, "layer_norm_epsilon": 1e-5},
    "gpt_neox": {"rotary_pct": 0.5, "layer_norm_eps": 1e-5, "rotary_emb_base": 10000.0, "use_parallel_residual": True},
    "stablelm": {"partial_rotary_factor": 0.25, "layer_norm_eps": 1e-5, "rope_theta": 10000.0},
    "starcoder2": {"norm_epsilon": 1e-5, "rope_theta": 10000.0, "head_dim": 24, "sliding_window": 8},
    "granite": {**RMS, **MULTIPLIERS},
    "olmo": {"clip_qkv": 0.8, "layer_norm_eps": 1e-5, "rope_theta": 10000.0},
    "olmo2": RMS,
    "smollm3": RMS,
    "deepseek_v2": {**RMS, **MOE, **LATENT, "q_lora_rank": None},
    "deepseek_v3": {**RMS, **MOE, **LATENT, **GROUPS, "q_lora_rank": 24},
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 2, "conv_kernel": 3, "use_bias": True},
    "gpt_oss": {**RMS, **YARN, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
}
NAMES = {family.model_type: name for name, family in FAMILIES.items()} | {"deepseek_v3": "deepseek2"}
PERMUTED = ("llama", "mixtral", "granite", "smollm3", "olmo")


def raw(model_type: str) -> dict[str, Any]:
    base = {"vocab_size": 96} if model_type == "gpt2" else SMALL
    if model_type == "mamba2":
        base = {key: SMALL[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers")}
    values = {**base, **CONFIGS[model_type], "model_type": model_type}
    if model_type == "gpt_neox":
        del values["num_key_value_heads"]
    return values


def metadata(model_type: str, values: dict[str, Any]) -> dict[str, Any]:
    """The values under GGUF's keys; and what a converter adds."""
    named = FAMILIES[NAMES[model_type]].values
    found = {key: values[theirs] for key, theirs in named.items() if values.get(theirs) is not None}
    if model_type == "mamba2":  # the zeros are for what it does not have
        zeros = {"feed_forward_length": 0, "attention.head_count": 0}
        eps = {"attention.layer_norm_rms_epsilon": 1e-5}
        return found | zeros | eps | {"context_length": 2**20, "ssm.inner_size": 2 * values["hidden_size"]}
    head = values.get("head_dim") or 16
    part = values.get("partial_rotary_factor", values.get("rotary_pct", 1.0))
    if model_type.startswith("deepseek"):
        found |= {"attention.key_length": 24, "attention.value_length": 16, "rope.dimension_count": 8}
        found["expert_gating_func"] = 2 if model_type.endswith("3") else 1
    elif model_type != "gpt2":
        found["rope.dimension_count"] = int(head * part)
    if model_type == "gpt_oss":
        found |= {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32}
    return {key: float(v) if key.startswith("rope.freq") else v for key, v in found.items()}


def converted(model_type: str, values: dict[str, Any], tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tensors under GGUF's names, changed as the converter changes them."""
    kind = next(
        each for each, text in gguf.MODEL_ARCH_NAMES.items() if text == NAMES[model_type].replace("mixtral", "llama")
    )
    table = gguf.get_tensor_name_map(kind, 2)
    found: dict[str, np.ndarray] = {}
    stacks: dict[str, list[np.ndarray]] = {}
    for name, array in tensors.items():
        if model_type.startswith("gemma") and name.endswith("norm.weight"):
            array = array + 1
        if (model_type in PERMUTED and ".q_proj." in name) or (model_type in PERMUTED and ".k_proj." in name):
            heads = values["num_attention_heads" if ".q_proj." in name else "num_key_value_heads"]
            array = (
                array.reshape(heads, 2, len(array) // heads // 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
            )
        if model_type == "gpt2" and array.ndim == 2 and ".h." in name:
            array = array.T
        if model_type == "gpt_neox" and "query_key_value" in name:
            array = array.reshape(4, 3, 16, *array.shape[1:]).swapaxes(0, 1).reshape(array.shape)
        if model_type == "gpt_oss" and ".mlp.experts." in name:
            layer = name.split(".")[2]
            bias = name.endswith("_bias")
            rows = array if bias else array.swapaxes(1, 2)
            ending = "bias" if bias else "weight"
            if "gate_up" in name:
                found[f"blk.{layer}.ffn_gate_exps.{ending}"] = rows[:, ::2]
                found[f"blk.{layer}.ffn_up_exps.{ending}"] = rows[:, 1::2]
            else:
                found[f"blk.{layer}.ffn_down_exps.{ending}"] = rows
            continue
        if model_type == "mamba2":
            name, array = _state_space(name, array, values["n_groups"])
        name = name.replace("e_score_correction_bias", "e_score_correction.bias")
        name = f"{name}.weight" if name.endswith("sinks") else name
        parts = name.split(".")
        if "experts" in parts:
            at = parts.index("experts") + 1
            stacks.setdefault(".".join([*parts[:at], *parts[at + 1 :]]), []).append(array)
            continue
        found[table.get_name(name, (".weight", ".bias")) or f"? {name}"] = array
    found |= {
        table.get_name(name, (".weight", ".bias")) or f"? {name}": np.stack(each) for name, each in stacks.items()
    }
    return found


def _state_space(name: str, array: np.ndarray, groups: int) -> tuple[str, np.ndarray]:
    """A tensor of Mamba 2 as the converter changes it."""
    match name.rpartition("mixer.")[2]:
        case "A_log":
            array = -np.exp(array)[:, None]
        case "D":
            array = array[:, None]
        case "conv1d.weight":
            array = array[:, 0]
        case "norm.weight":
            array = array.reshape(groups, -1)
    return name.replace("dt_bias", "dt_proj.bias"), array


@pytest.mark.parametrize("model_type", CONFIGS)
def test_a_family_from_gguf(rng, tmp_path: Path, model_type):
    values = raw(model_type)
    parse_config(architecture(model_type)[0], values)
    model: Any = build(values)
    for name, spec in list(model.parameters()):
        drawn = rng.standard_normal(spec.shape) * 0.2 + (
            name.endswith("norm.weight") and not model_type.startswith("gemma")
        )
        model.set_parameter(name, ops.tensor(drawn.astype("float32")))
    theirs = {name: weight.numpy() for name, weight in model.named_tensors().items()}
    theirs = dict(model.to_checkpoint(theirs)) if hasattr(model, "to_checkpoint") else theirs
    tensors = converted(model_type, values, theirs)
    assert not [name for name in tensors if name.startswith("?")]
    held = {
        name: (Kind.F32, np.ascontiguousarray(a, "float32").view("uint8").reshape(*a.shape[:-1], -1))
        for name, a in tensors.items()
    }
    name = NAMES[model_type].replace("mixtral", "llama")
    path = write(tmp_path / "m.gguf", held, metadata(model_type, values), name)
    loaded = llm.load(path)
    ids = rng.integers(0, 96, 40).tolist()
    given, wanted = loaded(ids).numpy().copy(), model(ids).numpy()
    assert np.abs(given - wanted).max() <= 1e-5 * np.abs(wanted).max()
