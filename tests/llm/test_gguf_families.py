"""What GGUF calls things, against the library's own tables, and what the converter does to tensors, undone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from llm.config import parse_config
from llm.errors import CheckpointError, ConfigError
from llm.models import ARCHITECTURES, architecture
from llm.weights.gguf import Container
from llm.weights.gguf_families import FAMILIES
from llm.weights.gguf_model import translate

LIBRARY = {"mixtral": "llama"}
# What the library's table does not spell as checkpoints do.
SPELT = {
    ".experts.{e}.": ".experts.",
    ".norms.{e}": "",
    "mixer.dt": "mixer.dt_proj",
}
VALUES: dict[str, Any] = {
    "context_length": 100,
    "embedding_length": 8,
    "feed_forward_length": 12,
    "block_count": 1,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 9.999999747378752e-06,
    "rope.freq_base": 10000.0,
}
LAYER_NORM = {k: v for k, v in VALUES.items() if "rms" not in k} | {
    "attention.layer_norm_epsilon": 9.999999747378752e-06
}
STATES = {k: VALUES[k] for k in ("context_length", "embedding_length", "block_count")} | {
    "feed_forward_length": 0,
    "attention.head_count": 0,
    "attention.layer_norm_rms_epsilon": 9.999999747378752e-06,
    "ssm.conv_kernel": 4,
    "ssm.inner_size": 16,
    "ssm.state_size": 3,
    "ssm.time_step_rank": 4,
    "ssm.group_count": 2,
}


def values_of(name: str) -> dict[str, Any]:
    """Those that every family has, with the kind of norm that this one has."""
    if "ssm.state_size" in FAMILIES[name].values:
        return STATES
    return LAYER_NORM if "attention.layer_norm_epsilon" in FAMILIES[name].values else VALUES


def container(name: str, tensors: dict[str, np.ndarray], values: dict[str, Any] = VALUES) -> Container:
    metadata = {"general.architecture": name} | {f"{name}.{key}": value for key, value in values.items()}
    there = {"token_embd.weight": np.zeros((10, values.get("embedding_length", 8)), "float32"), **tensors}
    one = {"olmo": "attn_v", "olmo2": "post_ffw_norm"}.get(name, "attn_norm")  # that the family has
    there.setdefault(f"blk.0.{one}.weight", np.ones(8, "float32"))
    return Container([Path("m.gguf")], metadata, there)


def translated(name: str, tensors: dict[str, np.ndarray], values: dict[str, Any] = VALUES) -> tuple[dict, dict]:
    config, found = translate(container(name, tensors, values))
    return config, {key: np.asarray(array) for key, array in found.items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_names_are_those_of_the_library(name):
    kind = next(each for each, text in gguf.MODEL_ARCH_NAMES.items() if text == LIBRARY.get(name, name))
    table = gguf.get_tensor_name_map(kind, 1)
    for ours, theirs in FAMILIES[name].tensors.items():
        spelt = theirs.replace("{i}", "0")
        for old, new in SPELT.items():
            spelt = None if spelt is None or (old in spelt and new is None) else spelt.replace(old, new or "")
        if spelt is not None and (name, spelt) not in (("gemma", "lm_head"), ("gemma2", "lm_head")):  # always tied
            assert table.get_name(spelt) == ours.replace("{i}", "0"), theirs


@pytest.mark.parametrize("name", FAMILIES)
def test_every_tensor_of_a_family_has_a_name(name):
    """All that the library lists of an architecture, but what says how to rotate, and what few files have apart."""
    kind = next(each for each, text in gguf.MODEL_ARCH_NAMES.items() if text == LIBRARY.get(name, name))
    listed = {gguf.TENSOR_NAMES[each].replace("{bid}", "{i}") for each in gguf.MODEL_TENSORS[kind]}
    apart = {"rope_freqs", "rope_factors_long", "rope_factors_short", "blk.{i}.attn_rot_embd"}
    apart |= {f"blk.{{i}}.{each}" for each in ("attn_k_b", "attn_v_b") if name == "deepseek2"}
    lacking = listed - FAMILIES[name].tensors.keys() - apart
    allowed = {
        "llama": {"blk.{i}.ffn_gate_inp", "blk.{i}.ffn_gate_exps", "blk.{i}.ffn_down_exps", "blk.{i}.ffn_up_exps"},
        "mixtral": {"blk.{i}.ffn_gate", "blk.{i}.ffn_up", "blk.{i}.ffn_down"},
        "phi2": {"blk.{i}.attn_qkv", "blk.{i}.ffn_norm"},
        "phi3": {"blk.{i}.attn_q", "blk.{i}.attn_k", "blk.{i}.attn_v"},
        "deepseek2": {"blk.{i}.attn_k", "blk.{i}.attn_v"},
    }
    assert lacking <= allowed.get(name, set())


@pytest.mark.parametrize("name", ["llama", "granite", "smollm3", "mixtral"])
def test_rotated_pairs_are_put_apart(rng, name):
    q, k = rng.standard_normal((8, 8)).astype("float32"), rng.standard_normal((4, 8)).astype("float32")

    def permuted(values, heads):  # the converter of llama.cpp
        return (
            values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
            .swapaxes(1, 2)
            .reshape(values.shape)
        )

    given = {
        "blk.0.attn_q.weight": permuted(q, 4),
        "blk.0.attn_k.weight": permuted(k, 2),
        "blk.0.attn_q.bias": permuted(q[:, 0], 4),
    }
    values = VALUES | ({"expert_count": 2, "expert_used_count": 1} if name == "mixtral" else {})
    config, found = translated(LIBRARY.get(name, name), given, values)
    assert np.array_equal(found["model.layers.0.self_attn.q_proj.weight"], q)
    assert np.array_equal(found["model.layers.0.self_attn.k_proj.weight"], k)
    assert np.array_equal(found["model.layers.0.self_attn.q_proj.bias"], q[:, 0])
    assert config["model_type"] == name and config["rms_norm_eps"] == 1e-5 and config["rope_theta"] == 10000.0


def test_no_others_are_permuted(rng):
    q = rng.standard_normal((8, 8)).astype("float32")
    for name in sorted(
        {*FAMILIES}
        - {"llama", "granite", "smollm3", "olmo", "mixtral", "phi3", "gpt2", "gptneox", "deepseek2", "mamba2"}
    ):
        values = values_of(name)
        _, found = translated(name, {"blk.0.attn_q.weight": q}, values)
        assert np.array_equal(found["model.layers.0.self_attn.q_proj.weight"], q), name


def test_experts_are_taken_apart(rng):
    stack = rng.standard_normal((3, 12, 8)).astype("float32")
    values = VALUES | {"expert_count": 3, "expert_used_count": 2, "expert_feed_forward_length": 12}
    for name, place, key in (
        ("llama", "block_sparse_moe.experts.{}.w1", "num_local_experts"),
        ("qwen3moe", "mlp.experts.{}.gate_proj", "num_experts"),
        ("qwen2moe", "mlp.experts.{}.gate_proj", "num_experts"),
    ):
        chosen = {k: v for k, v in values.items() if name != "llama" or k != "expert_feed_forward_length"}
        config, found = translated(name, {"blk.0.ffn_gate_exps.weight": stack}, chosen)
        assert config[key] == 3 and config["num_experts_per_tok"] == 2
        for i in range(3):
            assert np.array_equal(found[f"model.layers.0.{place.format(i)}.weight"], stack[i])
    gate = rng.standard_normal(8).astype("float32")
    _, found = translated("qwen2moe", {"blk.0.ffn_gate_inp_shexp.weight": gate}, values)
    assert np.array_equal(found["model.layers.0.mlp.shared_expert_gate.weight"], gate[None])


@pytest.mark.parametrize("name", ["gemma", "gemma2", "gemma3"])
def test_gemmas_norms(rng, name):
    norm = rng.standard_normal(8).astype("float32")
    config, found = translated(name, {"blk.0.attn_norm.weight": norm + 1, "output_norm.weight": norm + 1})
    for key in ("model.layers.0.input_layernorm.weight", "model.norm.weight"):
        assert np.allclose(found[key], norm, atol=1e-7)
    assert config["tie_word_embeddings"] is True
    assert config.get("query_pre_attn_scalar", 2) == 2
    if name == "gemma3":
        _, found = translated(name, {"blk.0.attn_q_norm.weight": norm[:2] + 1})
        assert np.allclose(found["model.layers.0.self_attn.q_norm.weight"], norm[:2], atol=1e-7)


def test_gpt2s_matrices_and_tied_output(rng):
    weight, table = rng.standard_normal((24, 8)).astype("float32"), rng.standard_normal((10, 8)).astype("float32")
    values = {k: v for k, v in LAYER_NORM.items() if k not in ("rope.freq_base", "attention.head_count_kv")}
    given = {"token_embd.weight": table, "output.weight": table.copy(), "blk.0.attn_qkv.weight": weight}
    config, found = translated("gpt2", {**given, "blk.0.attn_qkv.bias": weight[:, 0]}, values)
    assert np.array_equal(found["transformer.h.0.attn.c_attn.weight"], weight.T)
    assert np.array_equal(found["transformer.h.0.attn.c_attn.bias"], weight[:, 0])
    assert "lm_head.weight" not in found and config["tie_word_embeddings"] is True
    assert (config["n_embd"], config["n_head"], config["n_layer"], config["n_positions"]) == (8, 4, 1, 100)
    _, found = translated("gpt2", {**given, "output.weight": -table}, values)
    assert np.array_equal(found["lm_head.weight"], -table)


def test_gpt_neoxs_queries_keys_and_values(rng):
    theirs = rng.standard_normal((24, 8)).astype("float32")  # [heads, 3, size] rows
    stored = theirs.reshape(4, 3, 2, 8).swapaxes(0, 1).reshape(24, 8)
    values = {k: v for k, v in LAYER_NORM.items() if k != "attention.head_count_kv"} | {
        "use_parallel_residual": True,
        "rope.dimension_count": 1,
    }
    values["embedding_length"] = 8
    config, found = translated("gptneox", {"blk.0.attn_qkv.weight": stored}, values)
    assert np.array_equal(found["gpt_neox.layers.0.attention.query_key_value.weight"], theirs)
    assert config["use_parallel_residual"] is True and config["rotary_pct"] == 0.5
    config, _ = translated("gptneox", {"blk.0.attn_qkv.weight": stored}, values | {"use_parallel_residual": False})
    assert config["use_parallel_residual"] is False


def test_deepseeks_keys_and_values(rng):
    """Two heads; keys of 3 + 2 of which 2 rotate, values of 4, out of 6."""
    kv_b = rng.standard_normal((2, 3 + 4, 6)).astype("float32")
    values = {k: v for k, v in VALUES.items() if "kv" not in k} | {
        "attention.head_count": 2, "attention.head_count_kv": 1, "attention.key_length": 8, "attention.value_length": 6,
        "attention.key_length_mla": 5, "attention.value_length_mla": 4, "rope.dimension_count": 2,
        "attention.kv_lora_rank": 6, "expert_weights_scale": 2.5, "expert_weights_norm": True, "expert_gating_func": 2,
        "leading_dense_block_count": 1, "expert_count": 2, "expert_used_count": 1, "expert_shared_count": 1,
    }  # fmt: skip
    given = {
        "blk.0.attn_k_b.weight": np.ascontiguousarray(kv_b[:, :3].swapaxes(1, 2)),
        "blk.0.attn_v_b.weight": np.ascontiguousarray(kv_b[:, 3:]),
        "blk.0.exp_probs_b.bias": np.ones(2, "float32"),
    }
    config, found = translated("deepseek2", given, values)
    assert np.array_equal(found["model.layers.0.self_attn.kv_b_proj.weight"], kv_b.reshape(14, 6))
    assert "model.layers.0.mlp.gate.e_score_correction_bias" in found
    wanted = {
        "model_type": "deepseek_v3",
        "qk_nope_head_dim": 3,
        "qk_rope_head_dim": 2,
        "v_head_dim": 4,
        "kv_lora_rank": 6,
    }
    assert config.items() >= wanted.items() and config["q_lora_rank"] is None and config["norm_topk_prob"] is True


def test_gpt_osss_experts(rng):
    gate, up = rng.standard_normal((2, 3, 5, 8)).astype("float32")
    sinks = rng.standard_normal(4).astype("float32")
    given = {
        "blk.0.ffn_gate_exps.weight": gate, "blk.0.ffn_up_exps.weight": up, "blk.0.attn_sinks.weight": sinks,
        "blk.0.ffn_gate_exps.bias": gate[..., 0], "blk.0.ffn_up_exps.bias": up[..., 0],
    }  # fmt: skip
    values = VALUES | {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 32.0,
        "rope.scaling.original_context_length": 50,
    }
    config, found = translated(
        "gpt-oss", given, values | {"attention.sliding_window": 7, "expert_count": 3, "expert_used_count": 2}
    )
    for name, wanted in (("gate", gate), ("up", up)):  # one below the other, as the model has them
        assert np.array_equal(found[f"model.layers.0.mlp.experts.{name}_proj.weight"], wanted.reshape(15, 8))
        assert np.array_equal(found[f"model.layers.0.mlp.experts.{name}_proj.bias"], wanted[..., 0].reshape(15))
    assert np.array_equal(found["model.layers.0.self_attn.sinks"], sinks)
    assert config["rope_scaling"] == {
        "rope_type": "yarn",
        "factor": 32.0,
        "original_max_position_embeddings": 50,
        "truncate": False,
    }
    assert (config["sliding_window"], config["num_local_experts"]) == (7, 3)


def test_mamba2s_state_space(rng):
    """Two groups, four heads of 4; 16 + 2 * 2 * 3 channels are convolved."""
    conv, norm = rng.standard_normal((28, 4)).astype("float32"), rng.standard_normal((2, 8)).astype("float32")
    decay, skip = (rng.standard_normal(4).astype("float32") for _ in range(2))
    given = {
        "blk.0.ssm_a": -np.exp(decay)[:, None], "blk.0.ssm_d": skip[:, None], "blk.0.ssm_dt.bias": decay + 1,
        "blk.0.ssm_conv1d.weight": conv, "blk.0.ssm_conv1d.bias": conv[:, 0], "blk.0.ssm_norm.weight": norm,
    }  # fmt: skip
    config, found = translated("mamba2", given, STATES)
    mixer = {name.removeprefix("backbone.layers.0.mixer."): each for name, each in found.items() if "mixer" in name}
    assert np.allclose(mixer.pop("A_log"), decay, atol=1e-6)
    wanted = {"D": skip, "dt_bias": decay + 1, "conv1d.weight": conv[:, None], "conv1d.bias": conv[:, 0],
              "norm.weight": norm.reshape(-1)}  # fmt: skip
    assert mixer.keys() == wanted.keys() and all(np.array_equal(mixer[name], wanted[name]) for name in wanted)
    assert "backbone.layers.0.norm.weight" in found and "backbone.embeddings.weight" in found
    sizes = {"head_dim": 4, "num_heads": 4, "expand": 2, "state_size": 3, "n_groups": 2, "conv_kernel": 4}
    biases = {"use_bias": False, "use_conv_bias": True}
    assert config.items() >= (sizes | biases | {"hidden_size": 8, "layer_norm_epsilon": 1e-5}).items()
    with pytest.raises(CheckpointError, match="holds a value that is not below 0"):
        translated("mamba2", {"blk.0.ssm_a": np.zeros((4, 1), "float32")}, STATES)
    for wrong in ("blk.0.ssm_a.weight", "blk.0.ssm_in", "blk.0.ssm_x.weight"):
        with pytest.raises(CheckpointError, match=f"tensors that a mamba2 does not have: '{wrong}'"):
            translated("mamba2", {wrong: conv}, STATES)
    for changes, message in (
        ({"attention.head_count": 4}, "attention.head_count is 4, expected 0: a mamba2 has no attention"),
        ({"ssm.inner_size": 20}, "ssm.inner_size 20 is no multiple of 4 heads and of the width 8"),
        ({"ssm.state_size": 0}, "mamba2.ssm.state_size is 0, expected a positive integer"),
        ({"ssm.dt_b_c_rms": True}, "mamba2.ssm.dt_b_c_rms = True is not understood"),
    ):
        with pytest.raises(ConfigError, match=message):
            translated("mamba2", {}, STATES | changes)
    with pytest.raises(ConfigError, match=r"the metadata lack mamba2\.ssm\.group_count"):
        translated("mamba2", {}, {key: value for key, value in STATES.items() if key != "ssm.group_count"})


def test_phi3s_two_sets_of_factors():
    short, long = np.array([1.0, 1.5], "float32"), np.array([2.0, 4.25], "float32")
    values = VALUES | {
        "embedding_length": 16,
        "rope.scaling.original_context_length": 40,
        "rope.scaling.attn_factor": 1.25,
        "attention.sliding_window": 0,
    }
    given = {"rope_factors_long.weight": long, "rope_factors_short.weight": short}
    config, _ = translated("phi3", given, values)
    wanted = {"rope_type": "longrope", "long_factor": [2.0, 4.25], "short_factor": [1.0, 1.5], "attention_factor": 1.25}
    assert config["rope_scaling"] == wanted | {"original_max_position_embeddings": 40}
    assert config["original_max_position_embeddings"] == 40 and "sliding_window" not in config


def test_granites_multipliers_and_biases():
    values = VALUES | {"attention.scale": 0.5, "embedding_scale": 12.0, "residual_scale": 0.25, "logit_scale": 8.0}
    bias = {"blk.0.attn_q.bias": np.zeros(8, "float32"), "blk.0.ffn_gate.bias": np.zeros(12, "float32")}
    config, _ = translated("granite", bias, values)
    wanted = {
        "attention_multiplier": 0.5,
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.25,
        "logits_scaling": 8.0,
    }
    assert config.items() >= (wanted | {"attention_bias": True, "mlp_bias": True}).items()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_config_is_that_of_the_model(name):
    """Where the family's file is there, its dataclass takes all that GGUF says; else it is refused by name."""
    values = values_of(name) | {"embedding_length": 64, "attention.head_count_kv": 4}
    if name == "mamba2":
        values = STATES | {"embedding_length": 64, "ssm.inner_size": 128}
    if name == "gpt2":
        values = {k: v for k, v in values.items() if k != "rope.freq_base"}
    if name in ("gptneox", "stablelm"):
        values = values | {"use_parallel_residual": False}
    if name == "deepseek2":
        values = values | {
            "attention.key_length": 24,
            "attention.value_length": 16,
            "rope.dimension_count": 8,
            "attention.kv_lora_rank": 6,
        }
    if name in ("mixtral", "qwen2moe", "qwen3moe", "gpt-oss", "deepseek2"):
        values = values | {"expert_count": 4, "expert_used_count": 2}
    output = {"output.weight": np.zeros((10, 64), "float32")} if name == "phi2" else {}  # which is never tied
    config, _ = translated(LIBRARY.get(name, name), output, values)
    if config["model_type"] not in ARCHITECTURES:
        with pytest.raises(ConfigError, match=f"model_type '{config['model_type']}' is not supported"):
            architecture(config["model_type"])
        return
    parsed = parse_config(architecture(config["model_type"])[0], config)
    assert parsed.vocab_size == 10


def test_unreadable_names_and_sizes():
    with pytest.raises(CheckpointError, match=r"does not fit the config"):
        translated("llama", {"blk.0.attn_q.weight": np.zeros((7, 8), "float32")})
    with pytest.raises(CheckpointError, match=r"tensors of 2 layers, the last being 5"):
        translate(container("llama", {"blk.5.attn_norm.weight": np.ones(8, "float32")}))
    with pytest.raises(ConfigError, match=r"rope_freqs.weight is not there, or has not 1 values"):
        translated("llama", {"rope_freqs.weight": np.ones(3, "float32")})
