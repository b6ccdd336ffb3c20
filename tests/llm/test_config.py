"""Parsing config.json: real ones are understood in full, and nothing that is not understood passes."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from llm.config import HARMLESS, HARMLESS_AT, parse_config
from llm.errors import ConfigError
from llm.rope import ROPE_KEYS, Rope, RopeScaling, parse_rope

CONFIGS = Path(__file__).resolve().parents[2] / "../shared/data/configs"


@dataclass(frozen=True)
class Llama:
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    max_position_embeddings: int
    rope_parameters: Rope
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    hidden_act: str = "silu"
    head_dim: int | None = None
    sliding_window: int | None = None


RAW: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 256,
}


def parse(**changes: Any) -> Llama:
    return parse_config(Llama, {**RAW, **changes})


def refused(**changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(**changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def real(name: str) -> dict[str, Any]:
    path = CONFIGS / f"{name}.json"
    if not path.is_file():
        pytest.skip(f"no {path}: the real configs are not part of the repository")
    return json.loads(path.read_text())


def test_missing_keys_take_defaults_and_the_rest_is_kept() -> None:
    config = parse(rms_norm_eps=1, model_type="llama", unsloth_version="x", torch_dtype="bfloat16")
    assert config.rms_norm_eps == 1.0 and type(config.rms_norm_eps) is float
    assert (config.hidden_size, config.head_dim, config.tie_word_embeddings) == (64, None, False)
    assert config.rope_parameters == Rope(10000.0, 16, 256)


def test_all_missing_required_keys_are_listed() -> None:
    with pytest.raises(
        ConfigError, match="missing keys 'num_attention_heads', 'num_key_value_heads', 'vocab_size', 'max_"
    ):
        parse_config(Llama, {"hidden_size": 64, "intermediate_size": 1, "num_hidden_layers": 1})


def test_everything_wrong_is_said_at_once() -> None:
    message = refused(vocab_size="100", hidden_sise=3, pretraining_tp=2)
    assert "'vocab_size' is '100' (str), expected int" in message
    assert "unknown key 'hidden_sise' = 3" in message and "did you mean 'hidden_size'?" in message
    assert "'pretraining_tp' is 2, only 1 is supported here: it splits the projections" in message


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("hidden_size", True, "'hidden_size' is True (bool), expected int"),
        ("hidden_size", 64.0, "'hidden_size' is 64.0 (float), expected int"),
        ("hidden_size", None, "'hidden_size' is None (null), expected int"),
        ("hidden_size", -64, "'hidden_size' is -64, expected at least 1"),
        ("num_hidden_layers", 0, "'num_hidden_layers' is 0, expected at least 1"),
        ("sliding_window", 0, "'sliding_window' is 0, expected at least 1"),
        ("rms_norm_eps", -1e-6, "'rms_norm_eps' is -1e-06, expected no negative number"),
        ("num_key_value_heads", 3, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ("num_key_value_heads", 8, "num_attention_heads 4 is not a multiple of num_key_value_heads 8"),
        ("rms_norm_eps", "1e-5", "'rms_norm_eps' is '1e-5' (str), expected finite float"),
        ("rms_norm_eps", float("nan"), "expected finite float"),
        ("rms_norm_eps", 10**400, "expected finite float"),
        ("tie_word_embeddings", 1, "'tie_word_embeddings' is 1 (int), expected bool"),
        ("hidden_act", ["silu"], "expected str"),
        ("head_dim", "16", "'head_dim' is '16' (str), expected int or null"),
    ],
)
def test_wrong_types_and_sizes(key: str, value: Any, expected: str) -> None:
    assert expected in refused(**{key: value})


@pytest.mark.parametrize("key", sorted(HARMLESS_AT))
def test_harmless_at_one_value_only(key: str) -> None:
    @dataclass
    class Empty:
        pass

    value, reason = HARMLESS_AT[key]
    assert parse_config(Empty, {key: value}) == Empty()
    other = 7 if not value or isinstance(value, bool) else False
    with pytest.raises(ConfigError, match="is supported here") as caught:
        parse_config(Empty, {key: other})
    assert reason in str(caught.value)


def test_false_is_no_zero_and_one_is_no_true() -> None:
    assert "chunk_size_feed_forward" in refused(chunk_size_feed_forward=False)
    assert "attention_bias" in refused(attention_bias=0)


def test_unknown_keys_and_the_ways_to_accept_them() -> None:
    assert "unknown key 'swiglu_limit' = 7.0, which could change the arithmetic" in refused(swiglu_limit=7.0)
    assert parse_config(Llama, {**RAW, "swiglu_limit": 7.0}, ignored={"swiglu_limit"}) == parse()
    assert "layer_types" in refused(layer_types=["full_attention", "sliding_attention"])
    assert parse(layer_types=["full_attention"] * 2) == parse()
    assert "max_window_layers" in refused(max_window_layers=2)
    assert parse(max_window_layers=2, use_sliding_window=False) == parse()
    assert parse(**dict.fromkeys(HARMLESS, "anything")) == parse()


def test_a_class_without_rope_refuses_rope_keys() -> None:
    @dataclass
    class Bare:
        hidden_size: int

    for key in ROPE_KEYS - {"rope_scaling", "rope_parameters", "partial_rotary_factor"}:
        with pytest.raises(ConfigError, match=f"unknown key '{key}'"):
            parse_config(Bare, {"hidden_size": 1, key: 500000})
    with pytest.raises(ConfigError, match="rotary frequencies"):
        parse_config(Bare, {"hidden_size": 1, "rope_scaling": {"type": "linear", "factor": 2.0}})


def test_compound_annotations() -> None:
    @dataclass
    class Compound:
        layers: list[int]
        act: Literal["silu", "gelu"] = "silu"
        pair: tuple[float, int] = (0.0, 0)
        many: tuple[float, ...] = ()
        ids: int | list[int] | None = None
        extra: dict[str, float] = field(default_factory=dict)
        free: Any = None

    got = parse_config(
        Compound, {"layers": [0, 1], "act": "gelu", "pair": [1, 2], "many": [1, 2.5], "ids": [3], "extra": {"a": 1}}
    )
    assert got == Compound([0, 1], "gelu", (1.0, 2), (1.0, 2.5), [3], {"a": 1})
    assert type(got.pair[0]) is float and type(got.many) is tuple
    for key, value in {
        "layers": [0, "1"],
        "act": "relu",
        "pair": [1],
        "many": [None],
        "ids": ["x"],
        "extra": {"a": "b"},
    }.items():
        with pytest.raises(ConfigError, match=f"'{key}' is"):
            parse_config(Compound, {"layers": [], key: value})


def test_only_dataclasses_are_built() -> None:
    with pytest.raises(TypeError, match="builds dataclasses"):
        parse_config(int, {})


@pytest.mark.parametrize("name", ["llama3.1-8b.1layer", "mistral-7b-v0.1.1layer", "olmo2-7b", "phi3-mini-4k.1layer"])
def test_real_configs_of_llama_like_families(name: str) -> None:
    raw = real(name)
    config = parse_config(Llama, raw)
    assert config.hidden_size == raw["hidden_size"] and config.sliding_window == raw.get("sliding_window")
    assert config.rope_parameters.theta == raw["rope_theta"]
    assert config.rope_parameters.rotary_dim == raw["hidden_size"] // raw["num_attention_heads"]


def test_real_llama31_scaling() -> None:
    scaling = parse_config(Llama, real("llama3.1-8b.1layer")).rope_parameters.scaling
    assert scaling == RopeScaling("llama3", 8.0, 8192, low_freq_factor=1.0, high_freq_factor=4.0)


@pytest.mark.parametrize("name", ["qwen2-7b.1layer", "qwen3-0.6b.1layer"])
def test_real_qwen_configs_have_the_window_switched_off(name: str) -> None:
    raw = real(name)
    config = parse_config(Llama, raw)
    assert config.rope_parameters.rotary_dim == raw.get("head_dim", 128) == 128


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("gemma-2-2b-it", ("query_pre_attn_scalar", "final_logit_softcapping", "hidden_activation")),
        ("gpt-oss-20b", ("swiglu_limit", "num_local_experts", "layer_types", "attention_bias")),
        ("mixtral.1layer", ("num_local_experts",)),
        ("deepseek-v3.4layer", ("kv_lora_rank", "routed_scaling_factor", "scoring_func")),
        ("qwen3-30b-a3b.1layer", ("num_experts", "norm_topk_prob")),
    ],
)
def test_real_configs_of_other_families_are_not_taken_for_llama(name: str, keys: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(Llama, real(name))
    assert all(f"'{key}'" in str(caught.value) for key in keys)


def rope(head_dim: int = 64, **raw: Any) -> Rope:
    return parse_rope({"max_position_embeddings": 4096, **raw}, head_dim)


def test_both_spellings_of_rope_agree() -> None:
    old = rope(rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2})
    new = rope(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5})
    assert old == new == Rope(5e5, 64, 4096, RopeScaling("linear", 2.0))
    assert rope(rope_scaling={"type": "linear", "rope_type": "linear", "factor": 2}).scaling == old.scaling
    assert rope(rope_scaling=None) == rope(rope_parameters={"rope_type": "default"}) == Rope(10000.0, 64, 4096)
    assert rope(partial_rotary_factor=0.25).rotary_dim == 16
    assert rope(rope_parameters={"partial_rotary_factor": 0.25, "rope_theta": 1e4}).rotary_dim == 16


def test_rope_by_layer_type() -> None:
    raw = {
        "max_position_embeddings": 4096,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    }
    assert parse_rope(raw, 64, layer_type="full_attention") == Rope(1e6, 64, 4096, RopeScaling("linear", 8.0))
    assert parse_rope(raw, 64, layer_type="sliding_attention") == Rope(1e4, 64, 4096)
    for layer_type in (None, "chunked_attention"):
        with pytest.raises(ConfigError, match=r"layer types \['full_attention', 'sliding_attention'\]"):
            parse_rope(raw, 64, layer_type=layer_type)
    assert parse_rope({"rope_theta": 1e6}, 64, layer_type="full_attention") == Rope(1e6, 64)


def test_where_the_original_length_comes_from() -> None:
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    inside = {**llama3, "original_max_position_embeddings": 512}

    def original(**raw: Any) -> int | None:
        scaling = rope(**raw).scaling
        assert scaling is not None
        return scaling.original_max_position_embeddings

    assert original(rope_scaling=llama3) == 4096
    assert original(rope_scaling=inside) == 512
    assert original(rope_scaling=inside, original_max_position_embeddings=1024) == 1024
    with pytest.raises(ConfigError, match="needs original_max_position_embeddings or max_position_embeddings"):
        parse_rope({"rope_scaling": llama3}, 64)


def test_su_is_longrope() -> None:
    short, long = [1.0] * 32, [2] * 32
    scaling = rope(rope_scaling={"type": "su", "short_factor": short, "long_factor": long}).scaling
    assert scaling == RopeScaling("longrope", None, 4096, short_factor=(1.0,) * 32, long_factor=(2.0,) * 32)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (
            {"rope_scaling": {"type": "magic"}},
            "unknown rope type 'magic'; known: default, linear, dynamic, llama3, yarn",
        ),
        ({"rope_scaling": {"type": 3}}, "unknown rope type '3'"),
        ({"rope_scaling": "linear"}, "must be an object, given 'linear'"),
        ({"rope_scaling": {"type": "linear"}}, "rope type 'linear' lacks the keys 'factor'"),
        ({"rope_scaling": {"type": "llama3", "factor": 8}}, "lacks the keys 'high_freq_factor', 'low_freq_factor'"),
        ({"rope_scaling": {"type": "yarn"}}, "lacks the keys 'factor'"),
        ({"rope_scaling": {"type": "longrope"}}, "lacks the keys 'long_factor', 'short_factor'"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2, "alpha": 3}},
            "unknown keys 'alpha'; known: factor, partial",
        ),
        ({"rope_scaling": {"type": "default", "mrope_section": [1]}}, "unknown keys 'mrope_section'"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor is '2', expected a number above 0"),
        ({"rope_scaling": {"type": "linear", "factor": True}}, "factor is True"),
        ({"rope_scaling": {"type": "linear", "factor": float("inf")}}, "factor is inf"),
        ({"rope_scaling": {"type": "linear", "factor": None}}, "factor is None"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor is 0"),
        ({"rope_scaling": {"type": "linear", "rope_type": "dynamic", "factor": 2}}, "contradict each other"),
        ({"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": {"type": "default"}}, "contradict"),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}}, "rope_theta is 1000000.0 in the rope parameters"),
        ({"rope_theta": 1}, "rope_theta is 1, expected a number above 1"),
        ({"rope_theta": "10000"}, "rope_theta is '10000'"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor 1.5 of head_dim 64"),
        ({"partial_rotary_factor": 0.33}, "must be an even size"),
        ({"max_position_embeddings": 4096.0}, "max_position_embeddings is 4096.0, expected an integer"),
        (
            {"rope_scaling": {"type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}},
            "low_freq_factor 4.0 must be below high_freq_factor 4.0",
        ),
        ({"rope_scaling": {"type": "yarn", "factor": 8, "beta_fast": 0.5}}, "beta_slow 1 exceeds beta_fast 0.5"),
        ({"rope_scaling": {"type": "yarn", "factor": 8, "truncate": 1}}, "truncate is 1, expected true or false"),
        (
            {"rope_scaling": {"type": "su", "short_factor": [1.0] * 31, "long_factor": [1.0] * 32}},
            "short_factor has 31 values, expected a list of 32 numbers",
        ),
        (
            {"rope_scaling": {"type": "su", "short_factor": [1.0] * 32, "long_factor": [1.0] * 31 + [-1]}},
            "long_factor[31] is -1",
        ),
    ],
)
def test_rope_errors(raw: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        rope(**raw)
    assert expected in str(caught.value)


def test_dynamic_needs_a_length() -> None:
    with pytest.raises(ConfigError, match="needs max_position_embeddings"):
        parse_rope({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, 64)


def test_head_dim_must_follow_from_the_config() -> None:
    assert "hidden_size 64 is not a multiple of num_attention_heads 3" in refused(num_attention_heads=3)
    assert parse(num_attention_heads=3, num_key_value_heads=1, head_dim=32).rope_parameters.rotary_dim == 32
