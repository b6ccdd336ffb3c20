"""Families whose layout is not Llama's: what is saved comes back, configs are understood, MXFP4, packed experts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import llm
import ops
from llm.config import parse_config
from llm.errors import CheckpointError, ConfigError
from llm.experts import stacked, unstacked
from llm.load import build, randomize
from llm.models import architecture
from llm.weights.mxfp4 import read_mxfp4
from llm.weights.safetensors import read_file, write_file
from tests import parity
from tests.llm.full import CASES, SEED, error, made, needs_the_extra, stored
from tests.llm.small import addresses

CONFIGS = Path(__file__).resolve().parents[2] / "../shared/data/configs"


@pytest.mark.parametrize("family", CASES)
def test_what_is_saved_is_a_checkpoint_of_transformers(family, tmp_path):
    needs_the_extra()
    import transformers

    theirs, ids = made(family, SEED)
    ours = llm.load(stored(theirs, tmp_path / "theirs"))
    ours.save(tmp_path / "ours")
    wanted, found = (read_file(tmp_path / name / "model.safetensors") for name in ("theirs", "ours"))
    assert wanted.keys() == found.keys()
    assert all(np.array_equal(wanted[name], found[name]) for name in wanted)
    again = llm.load(tmp_path / "ours")
    assert again.config == ours.config
    assert np.array_equal(again(ids).numpy(), ours(ids).numpy())
    kind = getattr(transformers, type(theirs).__name__)
    back, info = kind.from_pretrained(tmp_path / "ours", attn_implementation="eager", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert error(ours, ids, parity._theirs(back.eval(), ids)) <= parity.BOUNDS["float32"]


@pytest.mark.parametrize("family", CASES)
def test_it_prints_and_runs_without_weights_of_its_own(family):
    needs_the_extra()
    theirs, ids = made(family, SEED)
    model = randomize(build(json.loads(theirs.config.to_json_string()), "float32"), SEED)
    assert np.isfinite(model(ids[:5]).numpy()).all()
    assert sum(weight.size for _, weight in model.parameters()) == sum(each.numel() for each in theirs.parameters()) + (
        sum(each.numel() for name, each in theirs.named_buffers() if "e_score" in name)
    )
    assert type(model).__name__ in repr(model)


def test_python_never_reads_the_choice():
    """The calls of a mixture are the same whatever experts are chosen, and there are few of them."""
    needs_the_extra()
    theirs, ids = made("qwen3_moe", SEED)
    model = randomize(build(json.loads(theirs.config.to_json_string()), "float32"), SEED)
    seen = [addresses(lambda ids=some: model(ids)) for some in (ids[:9], ids[9:18])]
    inside = [each for each in seen[0] if ".1.mlp" in each]
    assert seen[0] == seen[1] and len(inside) == 7, inside


def real(name: str) -> dict[str, Any]:
    path = CONFIGS / f"{name}.json"
    if not path.is_file():
        pytest.skip(f"no {path}: the real configs are not part of the repository")
    return json.loads(path.read_text())


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("deepseek-v3.4layer", None),
        ("gpt-oss-20b", 20_914_757_184),
        ("gpt2.vocab50260", 124_442_112),
        ("mixtral.1layer", None),
        ("olmo2-7b", 7_298_617_344),
        ("qwen3-30b-a3b.1layer", None),
    ],
)
def test_real_configs(name, parameters):
    needs_the_extra()
    import torch
    import transformers

    raw = real(name)
    model = build(raw, "bfloat16")
    count = sum(weight.size for _, weight in model.parameters())
    assert parameters is None or count == parameters
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**raw))
    buffers = sum(each.numel() for key, each in theirs.named_buffers() if "e_score_correction_bias" in key)
    assert count == sum(each.numel() for each in theirs.parameters()) + buffers


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("gpt2", {"add_cross_attention": True}, "'add_cross_attention' is True"),
    ("gpt2", {"activation_function": "swish"}, "'activation_function' is 'swish'"),
    ("gpt2", {"n_head": 5}, "n_embd 768 is not a multiple of n_head 5"),
    ("gpt_neox", {"rotary_pct": 0.01}, "must be an even size"),
    ("phi", {"tie_word_embeddings": True}, "'tie_word_embeddings' is True"),
    ("stablelm", {"hidden_act": "gelu"}, "'hidden_act' is 'gelu'"),
    ("starcoder2", {"hidden_act": "swish"}, "'hidden_act' is 'swish'"),
    ("starcoder2", {"mlp_bias": True}, "'mlp_bias' is True"),
    ("olmo", {"clip_qkv": 0}, "'clip_qkv' is 0, expected more than 0"),
    ("olmo", {"hidden_act": "gelu"}, "'hidden_act' is 'gelu'"),
    ("olmo2", {"clip_qkv": 8.0}, "it clamps queries, keys and values"),
    ("mixtral", {"num_local_experts": 0}, "'num_local_experts' is 0, expected at least 1"),
    ("qwen3_moe", {"shared_expert_intermediate_size": 64}, "it adds a shared expert"),
    ("gpt_oss", {"layer_types": ["full_attention"]}, "layer_types has 1 entries, expected 36"),
    ("gpt_oss", {"quantization_config": {"quant_method": "awq"}}, "quantized by another library"),
    ("deepseek_v2", {"num_experts_per_tok": 2, "norm_topk_prob": True}, "'norm_topk_prob' is True"),
    ("deepseek_v2", {"num_experts_per_tok": 2, "num_key_value_heads": 8}, "every head has keys of its own"),
    ("deepseek_v2", {"num_experts_per_tok": 2, "topk_method": "group_limited_greedy"}, "n_group and topk_group"),
    ("deepseek_v2", {}, "missing keys 'num_experts_per_tok'"),
    ("deepseek_v3", {"scoring_func": "softmax"}, "'scoring_func' is 'softmax'"),
    ("deepseek_v3", {"moe_layer_freq": 2}, "'moe_layer_freq' is 2"),
    ("deepseek_v3", {"n_group": 7}, "256 experts are no 7 equal groups"),
    ("rwkv", {"rescale_every": 2.5}, "'rescale_every' is 2.5"),
    ("mamba2", {"hidden_act": "gelu"}, "'hidden_act' is 'gelu'"),
    ("mamba2", {"rms_norm": False}, "its norms take the mean away"),
    ("mamba2", {"num_heads": 64}, r"hidden_size 4096 \* expand 2 is 8192, expected num_heads 64 \* head_dim 64, 4096"),
    ("mamba2", {"n_groups": 7}, "num_heads 128 is not a multiple of n_groups 7"),
    ("mamba2", {"n_groups": 0}, "'n_groups' is 0, expected at least 1"),
    ("mamba2", {"conv_kernel": 1}, "conv_kernel is 1, expected at least 2"),
    ("mamba2", {"time_step_limit": [0.5, 0.1]}, "time_step_limit is 0.5 to 0.1"),
    ("mamba2", {"time_step_limit": [-1.0, 1.0]}, "expected no negative number"),
    ("mamba2", {"time_step_limit": [0.0]}, "'time_step_limit' is .0.0. .list., expected list of"),
    ("mamba2", {"layer_types": ["full_attention", "linear_attention"]}, "unknown key 'layer_types'"),
]


@pytest.mark.parametrize(("family", "changes", "message"), REFUSED)
def test_what_a_config_may_not_ask(family, changes, message):
    config, _ = architecture(family)
    with pytest.raises(ConfigError, match=message):
        parse_config(config, {"model_type": family} | changes)


def test_old_names_of_pythia():
    config, _ = architecture("gpt_neox")
    old = parse_config(
        config, {"rotary_pct": 0.5, "rotary_emb_base": 5000, "hidden_size": 64, "num_attention_heads": 4}
    )
    assert (old.rope.theta, old.rope.rotary_dim) == (5000.0, 8)


@pytest.mark.parametrize("infinite", [float("inf"), {"__float__": "Infinity"}, None])
def test_steps_without_a_limit(infinite):
    """As JSON of old and of new transformers spells it; what only says how to draw weights is left aside."""
    config, _ = architecture("mamba2")
    unread = {"chunk_size": 64, "time_step_min": 0.1, "time_step_rank": "auto", "norm_before_gate": True}
    parsed = parse_config(config, {"time_step_limit": [0.25, infinite], "rms_norm": True} | unread)
    assert parsed.time_step_limit == (0.25, None)
    assert config.written({"time_step_limit": parsed.time_step_limit}) == {"time_step_limit": [0.25, float("inf")]}


def test_the_one_embedding_of_old_checkpoints(rng, tmp_path):
    needs_the_extra()
    theirs, ids = made("mamba2", SEED)
    path = stored(theirs, tmp_path)
    tensors = {name: each.copy() for name, each in read_file(path / "model.safetensors").items()}
    wanted = llm.load(path)(ids).numpy()
    tensors["backbone.embedding.weight"] = tensors.pop("backbone.embeddings.weight")
    write_file(path / "model.safetensors", tensors)
    assert np.array_equal(llm.load(path)(ids).numpy(), wanted)


def test_experts_of_a_checkpoint(rng):
    named = {f"model.layers.2.mlp.experts.{i}.up_proj.weight": rng.random((3, 4)) for i in (1, 0, 2)}
    named["model.layers.2.mlp.shared_experts.up_proj.weight"] = rng.random((3, 4))
    whole = stacked(named)
    assert [(name, each.shape) for name, each in whole.items()] == [
        ("model.layers.2.mlp.shared_experts.up_proj.weight", (3, 4)),
        ("model.layers.2.mlp.experts.up_proj.weight", (9, 4)),
    ]
    back = unstacked(whole, 3)
    assert back.keys() == named.keys() and all(np.array_equal(back[name], named[name]) for name in named)
    del named["model.layers.2.mlp.experts.1.up_proj.weight"]
    with pytest.raises(CheckpointError, match="has 2 experts, the last of number 2"):
        stacked(named)
    named["model.layers.2.mlp.experts.1.up_proj.weight"] = rng.random((2, 4))
    with pytest.raises(CheckpointError, match="expected all, of one kind"):
        stacked(named)


@pytest.mark.parametrize("weights", ["q8", "q4"])
def test_packed_experts(weights, tmp_path):
    """The router stays as it is; the products are near those of the floats."""
    needs_the_extra()
    theirs, ids = made("gpt_oss", SEED)
    path = stored(theirs, tmp_path)
    whole, packed = llm.load(path), llm.load(path, weights=weights)
    dtypes = {name: weight.dtype for name, weight in packed.parameters()}
    assert dtypes["layers.0.mlp.experts.gate_proj.weight"] == weights
    assert dtypes["layers.0.mlp.router.weight"] == "float32"
    first, second = whole.layers[1].mlp.experts, packed.layers[1].mlp.experts
    x = ops.tensor(np.random.default_rng(SEED).standard_normal((9, 64)).astype("float32"))
    routes = ops.route(whole.layers[1].mlp.router(x), k=2, normalise=True)
    difference = parity._relative(second(x, *routes).numpy(), first(x, *routes).numpy())
    assert difference < (0.05 if weights == "q8" else 0.5)
    assert np.isfinite(packed(ids).numpy()).all()


def test_mxfp4(tmp_path):
    """Exactly what transformers makes of the same bytes, and a model that runs with it."""
    needs_the_extra()
    import torch
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    rng = np.random.default_rng(SEED)
    theirs, ids = made("gpt_oss", SEED)
    path = stored(theirs, tmp_path)
    tensors = {name: each.copy() for name, each in read_file(path / "model.safetensors").items()}
    for name in [each for each in tensors if each.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        groups = -(-inputs // 32)
        blocks = rng.integers(0, 256, (experts, outputs, groups, 16), "uint8")
        scales = rng.integers(120, 126, (experts, outputs, groups), "uint8")
        expected = convert_moe_packed_tensors(torch.tensor(blocks), torch.tensor(scales)).float().numpy()
        found = read_mxfp4({f"{name}_blocks": blocks, f"{name}_scales": scales})[name]
        assert found.dtype == ml_dtypes.bfloat16 and np.array_equal(found.astype("float32"), expected)
        if inputs % 32 == 0:
            tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        else:
            tensors[name] = np.ascontiguousarray(expected[:, :inputs])
        with torch.no_grad():
            theirs.get_parameter(name).copy_(torch.tensor(expected[:, :inputs]))
    write_file(path / "model.safetensors", tensors)
    raw = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(raw | {"quantization_config": {"quant_method": "mxfp4"}}))
    ours = llm.load(path, dtype="float32")
    assert error(ours, ids, parity._theirs(theirs, ids)) <= parity.BOUNDS["float32"]
    made.cache_clear()  # its weights were changed
    for key, message in (("_scales", "scales are missing"), ("_blocks", "blocks are missing")):
        with pytest.raises(CheckpointError, match=message):
            read_mxfp4({name: each for name, each in tensors.items() if not name.endswith(key)})
    with pytest.raises(CheckpointError, match=r"expected uint8 \[experts, outputs, groups, 16\]"):
        read_mxfp4({"x_blocks": np.zeros((2, 3, 4, 8), "uint8"), "x_scales": np.zeros((2, 3, 4), "uint8")})


def test_further_layers_of_deepseek_v3_are_left_aside(tmp_path):
    """The layers past the last guess further tokens; checkpoints hold them."""
    needs_the_extra()
    theirs, ids = made("deepseek_v3", SEED)
    path = stored(theirs, tmp_path)
    tensors = {name: each.copy() for name, each in read_file(path / "model.safetensors").items()}
    wanted = llm.load(path)(ids).numpy()
    tensors |= {name.replace("layers.2", "layers.3"): each for name, each in tensors.items() if "layers.2" in name}
    tensors["model.layers.3.eh_proj.weight"] = np.zeros((64, 128), "float32")
    write_file(path / "model.safetensors", tensors)
    assert np.array_equal(llm.load(path)(ids).numpy(), wanted)


# What interrupts a forward of each recurrent family in its third layer; numbers of a layer's state.
RECURRENT = {
    "rwkv": (lambda model: model.blocks[2].attention, 2 * 64 + 3 * 64),
    "mamba2": (lambda model: model.layers[2].mixer, 3 * (128 + 2 * 32) + 8 * 16 * 32),
}


@pytest.mark.parametrize("family", RECURRENT)
class TestMemory:
    """States in the place of a cache."""

    @pytest.fixture
    def model(self, family, rng):
        model = build(parity.BASES[family] | {"model_type": family}, "float32")
        for name, spec in list(model.parameters()):
            norm = any(each in name for each in (".ln", "pre_ln", "norm"))
            values = rng.standard_normal(spec.shape) * 0.3 + (1.0 if norm else 0.0)
            model.set_parameter(name, ops.tensor(values.astype("float32")))
        return model

    def test_truncating_and_copying(self, model, rng):
        ids = rng.integers(0, 131, 20)
        whole = model(ids).numpy()
        cache = model.new_cache()
        model(ids[:15], cache)
        twin = cache.copy()
        cache.truncate(9)
        assert len(cache) == 9 and len(twin) == 15
        assert np.array_equal(model(ids[9:], cache).numpy(), whole[9:])
        assert np.array_equal(model(ids[15:], twin, logits_to_keep=2).numpy(), whole[-2:])
        assert cache.ids == ids.tolist()
        cache.truncate(0)
        assert np.array_equal(model(ids[:4], cache).numpy(), whole[:4])

    def test_a_forward_that_is_interrupted_leaves_it_as_it_was(self, family, model, rng, monkeypatch):
        ids = rng.integers(0, 131, 20)
        whole, cache = model(ids).numpy(), model.new_cache()
        model(ids[:9], cache)
        with monkeypatch.context() as patch:
            patch.setattr(RECURRENT[family][0](model), "forward", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                model(ids[9:], cache)
        assert np.array_equal(model(ids[9:], cache).numpy(), whole[9:])

    def test_it_does_not_grow(self, family, model, rng):
        cache = model.new_cache()
        cache.limit = 256
        model(rng.integers(0, 131, 3), cache)
        size = cache.nbytes
        model(rng.integers(0, 131, 100), cache)
        layers = parity.BASES[family]["num_hidden_layers"]
        assert cache.nbytes == size == layers * 4 * RECURRENT[family][1]
        with pytest.raises(llm.UserError, match="this model's context holds 256"):
            model(rng.integers(0, 131, 200), cache)
