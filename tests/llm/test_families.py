"""Every family: what a config says is honoured, refused by name or kept through a save; `info` of a config alone."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llm
import ops
from llm.errors import ConfigError
from llm.load import build, randomize
from llm.models import ARCHITECTURES
from llm.recurrent import Memory
from llm.weights import read_file
from tests import parity

CONFIGS = [
    path
    for path in sorted((Path(__file__).resolve().parents[2] / "../shared/data/configs").glob("*.json"))
    if json.loads(path.read_text("utf-8"))["model_type"] in ARCHITECTURES
]
SINGLE = [case for case in parity.CASES if case.dtype == "float32"]
LIKE_LLAMA = ("gemma", "gemma2", "gemma3_text", "granite", "llama", "mistral", "phi3", "qwen2", "qwen3", "smollm3")
IDS = [1, 2, 3, 100, 5, 9, 9, 7, 3, 4, 60, 2, 8, 1, 30]


def raw(case: parity.Case, **changes: Any) -> dict[str, Any]:
    """The config.json of a case."""
    return {"model_type": case.model_type} | parity.BASES.get(case.model_type, parity.SMALL) | case.config | changes


def named(name: str) -> parity.Case:
    return next(case for case in parity.CASES if case.name == name)


def drawn(rng: np.random.Generator, values: dict[str, Any]) -> Any:
    """A model with weights that are large enough for every part to count."""
    model = build(values)
    for name, spec in list(model.parameters()):
        scale = 0.3 if len(spec.shape) == 1 else spec.shape[-1] ** -0.5
        array = rng.standard_normal(spec.shape) * scale + name.endswith("norm.weight")
        model.set_parameter(name, ops.tensor(array.astype("float32")))
    return model


@pytest.mark.parametrize("case", SINGLE, ids=lambda case: case.name)
def test_saved_and_loaded(case, rng, tmp_path):
    model = drawn(rng, raw(case))
    back = llm.load(model.save(tmp_path / "model"))
    assert (type(back), back.config) == (type(model), model.config)
    weights, twins = dict(model.parameters()), dict(back.parameters())
    assert list(weights) == list(twins)
    assert all(weights[name].numpy().tobytes() == twins[name].numpy().tobytes() for name in weights)


@pytest.mark.parametrize("case", [each for each in SINGLE if each.model_type in LIKE_LLAMA], ids=lambda case: case.name)
def test_the_names_are_those_of_transformers(case, tmp_path):
    torch = pytest.importorskip("torch", reason="the parity extra is not installed: pip install -e '.[parity]'")
    transformers = pytest.importorskip("transformers", reason="the parity extra is not installed")
    config = transformers.AutoConfig.for_model(
        case.model_type, **(parity.BASES.get(case.model_type, parity.SMALL) | case.config)
    )
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(config).named_parameters()
        wanted = {name: tuple(each.shape) for name, each in theirs}
    path = randomize(build(raw(case))).save(tmp_path / "model")
    assert {name: each.shape for name, each in read_file(path / "model.safetensors").items()} == wanted
    said = transformers.AutoConfig.from_pretrained(path)
    for name, value in vars(config).items():  # what is saved means the same to transformers
        if name in {field.name for field in dataclasses.fields(build(raw(case)).config)}:
            assert getattr(said, name) == value, name


@pytest.mark.parametrize("case", [each for each in SINGLE if each.model_type in LIKE_LLAMA], ids=lambda case: case.name)
def test_what_a_config_leaves_out_is_what_transformers_takes(case):
    """It writes layer types, thetas and lengths in full: a parity case alone says nothing of how they follow."""
    transformers = pytest.importorskip("transformers", reason="the parity extra is not installed")
    full = transformers.AutoConfig.for_model(case.model_type, **(parity.SMALL | case.config))
    assert build(json.loads(full.to_json_string(use_diff=False))).config == build(raw(case)).config


@pytest.mark.parametrize("case", {case.model_type: case for case in SINGLE}.values(), ids=lambda case: case.name)
def test_a_token_takes_what_info_says(case, rng):
    model = drawn(rng, raw(case))
    cache = model.new_cache()
    model(IDS, cache)
    held = 0 if isinstance(cache, Memory) else cache.nbytes  # which is of one size, whatever it remembers
    assert held == cache.capacity * model.token_values * 4


# (case, key, another value): what it computes is another thing then
CHANGES: list[tuple[str, str, Any]] = [
    ("qwen2, window 8 from layer 1 on, tied", "use_sliding_window", False),
    ("qwen2, window 8 from layer 1 on, tied", "sliding_window", 5),
    ("qwen2, window 8 from layer 1 on, tied", "max_window_layers", 2),
    ("qwen2, window 8 by layer types, rope yarn", "layer_types", ["sliding_attention", "full_attention"] * 2),
    ("qwen2, window 8 by layer types, rope yarn", "rope_parameters", None),
    ("qwen3, window 8, biases", "sliding_window", 5),
    ("qwen3, window 8, biases", "use_sliding_window", False),
    ("qwen3, window 8, biases", "rms_norm_eps", 0.1),
    ("gemma, tied", "rms_norm_eps", 0.1),
    ("gemma, tied", "rope_theta", 500.0),
    ("gemma2, caps, window 8", "attn_logit_softcapping", None),
    ("gemma2, caps, window 8", "attn_logit_softcapping", 1.0),
    ("gemma2, caps, window 8", "final_logit_softcapping", None),
    ("gemma2, caps, window 8", "query_pre_attn_scalar", 16),
    ("gemma2, caps, window 8", "sliding_window", 5),
    ("gemma2, caps, window 8", "layer_types", ["full_attention"] * 3),
    ("gemma3, window 8, a pattern of 2", "sliding_window_pattern", 3),
    ("gemma3, window 8, a pattern of 2", "rope_local_base_freq", 500.0),
    ("gemma3, window 8, a pattern of 2", "rope_theta", 500.0),
    ("gemma3, window 8, a pattern of 2", "rope_scaling", {"rope_type": "linear", "factor": 8.0}),
    ("gemma3, window 8, a pattern of 2", "query_pre_attn_scalar", 16),
    ("gemma3, window 8, a pattern of 2", "sliding_window", 5),
    ("gemma3, rope linear, two thetas, cap", "final_logit_softcapping", None),
    ("phi3, MHA, window 8", "sliding_window", None),
    ("phi3, MHA, window 8", "partial_rotary_factor", 0.5),
    ("phi3, longrope, below its length", "original_max_position_embeddings", 8),
    ("granite, multipliers, tied", "embedding_multiplier", 2.0),
    ("granite, multipliers, tied", "attention_multiplier", 0.25),
    ("granite, multipliers, tied", "residual_multiplier", 0.5),
    ("granite, multipliers, tied", "logits_scaling", 5.0),
    ("smollm3, every second layer without rope", "no_rope_layer_interval", 3),
    ("smollm3, every second layer without rope", "no_rope_layers", [0, 1, 1]),
    ("smollm3, window 8, biases, untied", "use_sliding_window", False),
    ("smollm3, window 8, biases, untied", "sliding_window", 5),
    ("mistral, window 8", "sliding_window", 5),
    ("mamba2", "time_step_limit", [0.3, 0.9]),
    ("mamba2", "layer_norm_epsilon", 0.1),
]


@pytest.mark.parametrize(("name", "key", "value"), CHANGES, ids=lambda each: str(each)[:40])
def test_every_key_counts(name, key, value, rng):
    values = raw(named(name))
    model = drawn(rng, values)
    changed = values | {key: value[:3] if isinstance(value, list) else value}
    other = build(changed)
    assert [n for n, _ in other.parameters()] == [n for n, _ in model.parameters()]
    for path, weight in model.parameters():
        other.set_parameter(path, weight)
    logits, others = model(IDS).numpy(), other(IDS).numpy()
    assert np.abs(logits - others).max() > 10 * parity.BOUNDS["float32"] * np.abs(logits).max()


@pytest.mark.parametrize(
    ("model_type", "changes", "expected"),
    [
        ("qwen2", {"hidden_act": "gelu"}, "'hidden_act' is 'gelu' (str), expected 'silu'"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 3}, "asks for sliding_attention, and there is no sliding_w"),
        ("qwen2", {"layer_types": ["full_attention"] * 2}, "layer_types has 2 entries, expected 3, one for each layer"),
        ("qwen2", {"layer_types": ["chunked_attention"] * 3}, "expected list of 'full_attention' or 'sliding_attent"),
        ("qwen2", {"attention_bias": True}, "'attention_bias' is True, only False is supported here"),
        ("qwen2", {"dual_chunk_attention_config": {}}, "unknown key 'dual_chunk_attention_config'"),
        ("qwen2", {"use_mrope": True}, "multimodal rotary positions"),
        ("qwen3", {"num_experts": 8}, "unknown key 'num_experts'"),
        ("gemma", {"use_bidirectional_attention": True}, "'use_bidirectional_attention' is True (bool), expected Fals"),
        ("gemma", {"hidden_activation": "gelu"}, "'hidden_activation' is 'gelu'"),
        ("gemma2", {"attn_logit_softcapping": 0}, "'attn_logit_softcapping' is 0, expected more than 0"),
        ("gemma2", {"query_pre_attn_scalar": 0}, "'query_pre_attn_scalar' is 0, expected at least 1"),
        ("gemma2", {"sliding_window": None}, "there is no sliding_window"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "it caps the attention scores"),
        ("gemma3_text", {"sliding_window_pattern": 0}, "'sliding_window_pattern' is 0, expected at least 1"),
        ("gemma3_text", {"_sliding_window_pattern": 4}, "unknown key '_sliding_window_pattern'"),
        ("gemma3_text", {"rope_parameters": {"rope_type": "default"}}, "are no objects for layer types"),
        ("gemma3_text", {"rope_scaling": "linear"}, "are no objects for layer types"),
        ("phi3", {"lm_head_bias": True}, "it adds a bias to the logits"),
        (
            "phi3",
            {"rope_scaling": {"type": "su", "short_factor": [1.0], "long_factor": [1.0]}},
            "has 1 values, expected",
        ),
        ("granite", {"logits_scaling": 0}, "'logits_scaling' is 0, expected more than 0"),
        ("granite", {"residual_multiplier": None}, "'residual_multiplier' is None (null), expected finite float"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers has 2 entries, expected 3"),
        ("smollm3", {"no_rope_layer_interval": 0}, "'no_rope_layer_interval' is 0, expected at least 1"),
        ("smollm3", {"layer_types": ["sliding_attention"] * 3, "sliding_window": 8}, "(or it is off)"),
    ],
    ids=lambda each: str(each)[:40],
)
def test_what_is_not_honoured_is_refused_by_name(model_type, changes, expected):
    with pytest.raises(ConfigError) as caught:
        build({"model_type": model_type} | parity.SMALL | changes)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_old_spellings():
    def config(model_type: str, **changes: Any) -> Any:
        return build({"model_type": model_type} | parity.SMALL | changes).config

    gemma = config("gemma", hidden_act="gelu", hidden_activation=None)
    assert gemma.tie_word_embeddings and gemma.hidden_act == "gelu"  # which is the approximation, as ever
    scaling = {"rope_type": "linear", "factor": 8.0}
    old = config("gemma3_text", rope_theta=1e6, rope_local_base_freq=1e4, rope_scaling=scaling)
    new = {"full_attention": {"rope_theta": 1e6, **scaling}, "sliding_attention": {"rope_type": "default"}}
    assert old == config("gemma3_text", rope_parameters=new)
    assert (old.rope.theta, old.rope.scaling.factor, old.local.theta, old.local.scaling) == (1e6, 8.0, 1e4, None)
    assert config("gemma3_text", layer_types=["full_attention"] * 3, _sliding_window_pattern=4).rope.theta == 1e6
    assert config("smollm3").rope.theta == 2e6 and config("smollm3", rope_theta=5e6).rope.theta == 5e6
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    yarn, su = (config("phi3", rope_scaling={"type": kind, **factors}) for kind in ("yarn", "su"))
    assert yarn == su and su.rope.scaling.original_max_position_embeddings == 4096


def test_a_layer_taken_out_takes_its_window_along(rng, tmp_path):
    for name in (
        "gemma2, caps, window 8",
        "smollm3, window 8, biases, untied",
        "qwen2, window 8 from layer 1 on, tied",
    ):
        model = drawn(rng, raw(named(name)))
        model.layers.pop(0)
        back = llm.load(model.save(tmp_path / model.model_type))
        assert back.config.num_hidden_layers == 2
        assert np.array_equal(back(IDS).numpy(), model(IDS).numpy())


def test_info_needs_no_weights(limpid, tmp_path):
    (tmp_path / "model").mkdir()
    path = tmp_path / "model/config.json"
    path.write_text(json.dumps(raw(named("gemma2, caps, window 8"), torch_dtype="bfloat16")))
    count = sum(spec.size for _, spec in build(json.loads(path.read_text())).parameters())
    for given in (path, path.parent):
        code, out, err = limpid("info", str(given))
        assert (code, err) == (0, "")
        for line in (f"parameters +{count:,}", "weights .* as bfloat16", "cache +768 B a token as float32, 384 B as"):
            assert re.search(f"^{line}", out, re.MULTILINE), line
    assert re.search("^weights .* as q8 and float32", limpid("info", str(path), "--weights", "q8")[1], re.MULTILINE)
    path.write_text(json.dumps(raw(named("gemma, tied"), hidden_act="relu")))
    code, out, err = limpid("info", str(path))
    assert (code, out) == (2, "") and "'hidden_act' is 'relu'" in err
    code, out, err = limpid("info", "nowhere.json")
    assert code == 2 and "no model at 'nowhere.json'" in err


@pytest.mark.parametrize("path", CONFIGS or [None], ids=lambda path: path.stem if path else "none")
def test_info_of_real_configs(path, limpid):
    if path is None:
        pytest.skip("the real configs are not part of the repository")
    transformers = pytest.importorskip("transformers", reason="the parity extra is not installed")
    import torch

    code, out, err = limpid("info", str(path))
    assert (code, err) == (0, ""), err
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(path))
    stored = theirs.state_dict()
    buffers = [each for name, each in theirs.named_buffers() if name in stored]  # of weights that training did not move
    count = sum(each.numel() for each in [*theirs.parameters(), *buffers])
    assert re.search(f"^parameters +{count:,} ", out, re.MULTILINE), count
    for line in (r"  as q4 +[\d.]+ [MG]B", r"cache +[\d.]+ [kM]?B a token as float32"):
        assert re.search(f"^{line}", out, re.MULTILINE), line
