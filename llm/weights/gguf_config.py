"""The values of a config.json from the metadata of a GGUF file: every key is understood, or an error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from llm.errors import ConfigError
from llm.weights.gguf import Container
from llm.weights.gguf_families import Family

_REQUIRED = ("context_length", "embedding_length", "block_count", "attention.head_count")
# A recurrent model has no attention, which is said by numbers that are 0.
_OF_STATES = (
    *("context_length", "embedding_length", "block_count", "ssm.conv_kernel", "ssm.inner_size"),
    *("ssm.state_size", "ssm.time_step_rank", "ssm.group_count"),
)
_NO_ATTENTION = ("feed_forward_length", "attention.head_count", "attention.head_count_kv")
# Said by the tensors too, or of no effect on the arithmetic.
_IDLE = {"vocab_size", "tensor_data_layout", "rope.scaling.finetuned", "expert_gating_func"}
# Nothing, as if the key were not there.
_NONE_AT_ZERO = (
    "attention.clamp_kqv",
    "attention.sliding_window",
    "attention.scale",
    "logit_scale",
    "expert_count",
    "expert_used_count",
)
# Without effect at one value, which says that a feature is off.
_IDLE_AT: Mapping[str, Any] = {
    "expert_group_count": 1,
    "expert_group_used_count": 1,
    "attention.causal": True,
    "attention.max_alibi_bias": 0.0,
    "nextn_predict_layers": 0,
    "rope.scale_linear": 1.0,
    "use_parallel_residual": False,
    "interleave_moe_layer_step": 0,
    "pooling_type": 0,
}
_BIASED = {"use_bias": "ssm_in", "use_conv_bias": "ssm_conv1d"}
_YARN = {"yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow"}
# In these sizes Gemma scales attention by the width over the heads, else by the size of a head.
_LARGEST_GEMMA = {"gemma2": 46, "gemma3_text": 62}


def config(given: Container, family: Family) -> dict[str, Any]:
    """The values under Hugging Face's names. Raises ConfigError for keys that are missing or not understood."""
    path, prefix = given.files[0], f"{given.metadata['general.architecture']}."
    keys = {key.removeprefix(prefix): _plain(v) for key, v in given.metadata.items() if key.startswith(prefix)}
    required = _OF_STATES if family.model_type == "mamba2" else _REQUIRED
    if missing := [f"{prefix}{key}" for key in required if key not in keys]:
        raise ConfigError(f"{path}: the metadata lack {', '.join(missing)}")
    for key in required:
        if type(keys[key]) is not int or not 0 < keys[key] < 2**31:
            raise ConfigError(f"{path}: {prefix}{key} is {keys[key]!r:.60}, expected a positive integer")
    rows = given.tensors["token_embd.weight"].shape[0]
    values: dict[str, Any] = {"model_type": family.model_type, "vocab_size": rows, **family.fixed}
    values["tie_word_embeddings"] = "output.weight" not in given.tensors
    if family.model_type == "mamba2":
        return values | _states(path, keys, given) | _understood(path, prefix, keys, family)
    rope = {key: keys.pop(key) for key in [*keys] if key.startswith("rope.") and key not in family.values}
    heads = keys["attention.head_count"]
    values |= _attention(path, keys, family, heads) | _understood(path, prefix, keys, family)
    if family.model_type == "deepseek_v2":
        _deepseek(values, rope, given)
    head_dim = values.get("head_dim") or values.get("qk_rope_head_dim") or keys["embedding_length"] // heads
    values |= _rope(path, prefix, rope, family, head_dim, given, keys["context_length"])
    if family.model_type in _LARGEST_GEMMA:
        largest = keys["block_count"] == _LARGEST_GEMMA[family.model_type]
        values["query_pre_attn_scalar"] = keys["embedding_length"] // heads if largest else head_dim
    return values | _biases(given, family)


def _understood(path: Any, prefix: str, keys: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """What the family's table says of the keys. Raises ConfigError for one that it does not know."""
    values: dict[str, Any] = {}
    for key, value in keys.items():
        if key in _NONE_AT_ZERO and value == 0:
            continue
        if key in family.values:
            values[family.values[key]] = value
        elif key not in _IDLE and (key not in _IDLE_AT or value != _IDLE_AT[key]):
            raise ConfigError(
                f"{path}: {prefix}{key} = {value!r:.60} is not understood for {family.model_type}, and could change "
                "the arithmetic"
            )
    return values


def _states(path: Any, keys: dict[str, Any], given: Container) -> dict[str, Any]:
    """The sizes of a Mamba 2, and which of its parts have biases. The length is no limit of a state."""
    keys.pop("context_length")
    for key in _NO_ATTENTION:
        if (value := keys.pop(key, 0)) != 0:
            raise ConfigError(f"{path}: {key} is {value!r:.60}, expected 0: a mamba2 has no attention and no MLP")
    inner, heads, width = keys.pop("ssm.inner_size"), keys["ssm.time_step_rank"], keys["embedding_length"]
    if inner % heads or inner % width:
        raise ConfigError(f"{path}: ssm.inner_size {inner} is no multiple of {heads} heads and of the width {width}")
    biased = {name: f"blk.0.{each}.bias" in given.tensors for name, each in _BIASED.items()}
    return {"head_dim": inner // heads, "expand": inner // width, **biased}


def _plain(value: Any) -> Any:
    """Numbers as config.json would have them; a list that repeats one number is that number, as said of all layers."""
    if isinstance(value, np.ndarray):
        listed = value.tolist()
        return listed[0] if listed and all(each == listed[0] for each in listed) else listed
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _attention(path: Any, keys: dict[str, Any], family: Family, heads: int) -> dict[str, Any]:
    """The sizes of heads, which not every family may choose."""
    keys.setdefault("attention.head_count_kv", heads)
    size = keys.get("attention.key_length", keys["embedding_length"] // heads)
    sizes = {"attention.key_length": size, "attention.value_length": size, "attention.head_count_kv": heads}
    if family.model_type == "deepseek_v2":
        kv = [keys.pop(key, None) for key in ("attention.key_length", "attention.value_length")]
        mla = [keys.pop(f"attention.{key}_length_mla", old) for key, old in zip(("key", "value"), kv, strict=True)]
        keys.pop("attention.head_count_kv")
        if not all(type(each) is int for each in mla):
            raise ConfigError(f"{path}: the sizes of keys and values are {mla}, expected integers")
        return {"qk_head": mla[0], "v_head_dim": mla[1]}
    for key, wanted in sizes.items():
        if key not in family.values:
            value = keys.pop(key, wanted)
            if value != wanted and not (key == "attention.key_length"):
                raise ConfigError(f"{path}: {key} is {value!r:.60}, only {wanted} is supported for {family.model_type}")
    return {}


def _deepseek(values: dict[str, Any], rope: Mapping[str, Any], given: Container) -> None:
    """V3 differs from V2 by a bias of its router; both give sizes of heads in parts."""
    whole, rotary = values.pop("qk_head"), rope.get("rope.dimension_count")
    if type(rotary) is not int or rotary >= whole:
        raise ConfigError(f"{given.files[0]}: rope.dimension_count is {rotary!r:.60}, expected less than {whole}")
    values |= {"qk_rope_head_dim": rotary, "qk_nope_head_dim": whole - rotary}
    values["num_key_value_heads"] = values["num_attention_heads"]
    values.setdefault("q_lora_rank", None)
    if any(name.endswith("exp_probs_b.bias") for name in given.tensors):
        values["model_type"] = "deepseek_v3"


def _biases(given: Container, family: Family) -> dict[str, bool]:
    """Which projections have biases; only what a family may choose."""
    q, gate = "blk.0.attn_q.bias" in given.tensors, "blk.0.ffn_gate.bias" in given.tensors
    if family.model_type == "stablelm":
        return {"use_qkv_bias": q, "qk_layernorm": "blk.0.attn_q_norm.weight" in given.tensors}
    if family.model_type == "starcoder2":
        return {"use_bias": q}
    if family.model_type in ("llama", "granite", "smollm3"):
        return {"attention_bias": q, "mlp_bias": gate}
    return {"attention_bias": q} if family.model_type in ("qwen3", "qwen3_moe", "gpt_oss", "olmo", "olmo2") else {}


def _rope(
    path: Any, prefix: str, keys: dict[str, Any], family: Family, head_dim: int, given: Container, context: int
) -> dict[str, Any]:
    """What is rotated, and how it is scaled."""
    values: dict[str, Any] = {}
    rotated = keys.pop("rope.dimension_count", head_dim)
    if rotated != head_dim and family.model_type != "gpt2":
        if type(rotated) is not int or not 0 < rotated < head_dim:
            raise ConfigError(f"{path}: {prefix}rope.dimension_count is {rotated!r:.60}, expected 2 to {head_dim}")
        values["rotary_pct" if family.model_type == "gpt_neox" else "partial_rotary_factor"] = rotated / head_dim
    kind = keys.pop("rope.scaling.type", "none")
    linear = keys.pop("rope.scale_linear", 1.0)
    scaling = {key.removeprefix("rope.scaling."): keys.pop(key) for key in [*keys] if key.startswith("rope.scaling.")}
    if keys:
        key, value = next(iter(keys.items()))
        raise ConfigError(f"{path}: {prefix}{key} = {value!r:.60} is not understood, and could change the arithmetic")
    if "rope_freqs.weight" in given.tensors:  # Llama 3.1's scaling, as factors
        factors = _factors(path, "rope_freqs", given, rotated)
        if kind != "none" or linear != 1.0:
            raise ConfigError(f"{path}: rope_freqs.weight and rope scaling {kind!r:.40} contradict each other")
        return values | {"rope_scaling": _longrope(factors, factors, context, 1.0)} if set(factors) != {1.0} else values
    if "rope_factors_long.weight" in given.tensors:
        long, short = (_factors(path, f"rope_factors_{each}", given, rotated) for each in ("long", "short"))
        original = scaling.get("original_context_length", context)
        values["original_max_position_embeddings"] = original
        return values | {"rope_scaling": _longrope(long, short, original, scaling.get("attn_factor"))}
    if kind == "none":
        return values if linear == 1.0 else values | {"rope_scaling": {"rope_type": "linear", "factor": linear}}
    return values | {"rope_scaling": _scaled(path, kind, scaling, family)}


def _factors(path: Any, name: str, given: Container, rotated: int) -> list[float]:
    array = given.tensors.get(f"{name}.weight")
    if array is None or array.shape != (rotated // 2,):
        raise ConfigError(f"{path}: {name}.weight is not there, or has not {rotated // 2} values")
    return [float(str(each)) for each in np.asarray(array, "float32")]


def _longrope(long: list[float], short: list[float], original: Any, attention: float | None) -> dict[str, Any]:
    found = {"rope_type": "longrope", "long_factor": long, "short_factor": short}
    found["original_max_position_embeddings"] = original
    return found if attention is None else found | {"attention_factor": attention}


def _scaled(path: Any, kind: Any, scaling: dict[str, Any], family: Family) -> dict[str, Any]:
    scaling.pop("finetuned", None)
    found: dict[str, Any] = {"rope_type": kind, "factor": scaling.pop("factor", None)}
    original = scaling.pop("original_context_length", None)
    if kind == "yarn":
        if original is not None:
            found["original_max_position_embeddings"] = original
        found |= {ours: scaling.pop(theirs) for theirs, ours in _YARN.items() if theirs in scaling}
        if (multiplier := scaling.pop("yarn_log_multiplier", None)) is not None:
            found |= {"mscale": float(multiplier) * 10, "mscale_all_dim": float(multiplier) * 10}
        if family.model_type == "gpt_oss":
            found["truncate"] = False
    if kind not in ("linear", "yarn") or (scaling and scaling.get("attn_factor", 1.0) != 1.0):
        raise ConfigError(f"{path}: rope scaling {kind!r:.40} with {scaling!r:.80} is not understood")
    return found
