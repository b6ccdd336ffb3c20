"""Mixtures of experts from GGUF files: their matrices stay as they are packed, and are the library's numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import llm
import ops
from llm.errors import CheckpointError
from llm.load import build
from llm.weights.blocks import Blocks, Kind
from ops import target
from tests.llm.gguf_files import byte_level, random_raw, write
from tests.llm.test_gguf import PACKED
from tests.llm.test_gguf_models import NAMES, converted, metadata, raw

Tensors = dict[str, tuple[Kind, np.ndarray]]
BLOCK = 256  # widths that every type's blocks make up
ROUTER = "ffn_gate_inp"  # which is never quantised
# Each family, and each type with blocks of 32 and of 256.
MIXTURES = [
    ("mixtral", "Q4_K"), ("mixtral", "Q4_0"), ("qwen3_moe", "Q6_K"), ("qwen3_moe", "Q4_0"),
    ("deepseek_v2", "Q4_K"), ("deepseek_v3", "Q8_0"), ("gpt_oss", "Q8_0"), ("gpt_oss", "Q6_K"), ("gpt_oss", "MXFP4"),
]  # fmt: skip


def sizes(model_type: str, **changes: Any) -> dict[str, Any]:
    """The values of a config.json."""
    values = raw(model_type) | {"vocab_size": 263, "hidden_size": BLOCK, "intermediate_size": BLOCK}
    if "moe_intermediate_size" in values:
        values["moe_intermediate_size"] = BLOCK
    if not model_type.startswith("deepseek"):
        values["head_dim"] = 64
    return values | changes


def mixture(rng: np.random.Generator, values: dict[str, Any], kind: Kind) -> Tensors:
    """The tensors of a random model, matrices in `kind` where its blocks make up their rows."""
    model = build(values)
    shapes = {name: np.empty(spec.shape, "float32") for name, spec in names_of(model).items()}
    found: Tensors = {}
    for name, each in converted(values["model_type"], values, dict(model.to_checkpoint(shapes))).items():
        block = gguf.GGML_QUANT_SIZES[kind][0]
        if each.ndim > 1 and name.endswith(".weight") and each.shape[-1] % block == 0 and ROUTER not in name:
            found[name] = kind, random_raw(rng, kind, each.shape)
        else:
            near = 1.0 if name.endswith("norm.weight") else 0.0
            found[name] = plain((rng.standard_normal(each.shape) * 0.1 + near).astype("float32"))
    return found


def names_of(model: Any) -> dict[str, Any]:
    """What the model wants, by the checkpoint's names."""
    return {name if name.startswith(model.heads) else f"{model.base}{name}": spec for name, spec in model.parameters()}


def plain(array: np.ndarray) -> tuple[Kind, np.ndarray]:
    return Kind.F32, np.ascontiguousarray(array).view("uint8").reshape(*array.shape[:-1], -1)


def stored(path: Path, values: dict[str, Any], tensors: Tensors) -> Path:
    name = NAMES[values["model_type"]].replace("mixtral", "llama")
    return write(path, tensors, metadata(values["model_type"], values), name, byte_level())


def dequantised(path: Path, values: dict[str, Any], tensors: Tensors) -> Path:
    """The same file with all numbers as the library dequantises them."""
    return stored(path, values, {name: plain(gguf.dequantize(raw, kind)) for name, (kind, raw) in tensors.items()})


def weights(model: Any) -> dict[str, np.ndarray]:
    return {name: np.asarray(weight.numpy(), "float32") for name, weight in model.parameters()}


def experts_of(model: Any) -> dict[str, str]:
    """The dtypes of the experts' matrices."""
    return {
        name: weight.dtype for name, weight in model.parameters() if ".experts." in name and name.endswith(".weight")
    }


def error(given: Any, wanted: Any) -> float:
    a, b = (np.asarray(each.numpy(), "float64") for each in (given, wanted))
    return float(np.sqrt(np.mean((a - b) ** 2) / np.mean(b**2)))


@pytest.mark.parametrize(
    ("model_type", "kind"),
    [pytest.param(*each, marks=() if each[0] == "mixtral" else pytest.mark.families) for each in MIXTURES],
)
def test_experts_stay_as_they_are_packed(rng, tmp_path, model_type, kind):
    values = sizes(model_type)
    tensors = mixture(rng, values, Kind[kind])
    path = stored(tmp_path / "m.gguf", values, tensors)
    model, twin = llm.load(path), llm.load(dequantised(tmp_path / "plain.gguf", values, tensors))
    held = experts_of(model)
    assert len(held) == 3 * (2 - model_type.startswith("deepseek")) and {*held.values()} == {PACKED[kind]}
    routers = [each.dtype for name, each in model.parameters() if name.endswith(("gate.weight", "router.weight"))]
    assert routers == ["float32"] * (len(held) // 3) and model.dtype == "float32"
    given, wanted = weights(model), weights(twin)
    assert given.keys() == wanted.keys()
    for name, exact in wanted.items():
        assert np.array_equal(given[name], exact), name
    floats = llm.load(path, weights="float32")
    assert {*experts_of(floats).values()} == {"float32"}
    assert floats.generate("Once", max_tokens=24) == twin.generate("Once", max_tokens=24)
    # A layer's experts with the same choice: what differs is that activations round to 8 bits.
    x = ops.tensor(rng.standard_normal((9, BLOCK)).astype("float32"))
    routes = ops.route(ops.tensor(rng.standard_normal((9, 4)).astype("float32")), k=2, normalise=True)
    ours, exact = (mlp(each, model_type).experts(x, *routes) for each in (model, floats))
    assert error(ours, exact) < 0.03


def mlp(model: Any, model_type: str) -> Any:
    return getattr(model.layers[-1], "block_sparse_moe" if model_type == "mixtral" else "mlp")


@pytest.mark.parametrize(("model_type", "kind"), [("mixtral", "Q4_K"), ("qwen3_moe", "Q6_K"), ("gpt_oss", "Q4_0")])
def test_a_model_is_near_its_definition(rng, tmp_path, model_type, kind):
    values = sizes(model_type)
    model = llm.load(stored(tmp_path / "m.gguf", values, mixture(rng, values, Kind[kind])))
    ids = rng.integers(0, 256, 20).tolist()
    ours = ops.tensor(model(ids).numpy().copy())
    with ops.linear.use(ops.linear.reference), ops.experts_linear.use(ops.experts_linear.reference) as use:
        assert error(model(ids), ours) < 0.03
    assert use.hits == 6


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_packed_once_more_from_the_floats_it_is_what_it_was(rng, tmp_path, model_type):
    values = sizes(model_type)
    tensors = mixture(rng, values, Kind.Q4_0)
    model = llm.load(stored(tmp_path / "m.gguf", values, tensors))
    again = llm.load(dequantised(tmp_path / "plain.gguf", values, tensors), weights="q4")
    assert experts_of(model) == experts_of(again)
    assert model.generate("Once", max_tokens=24) == again.generate("Once", max_tokens=24)
    back = weights(llm.load(model.save(tmp_path / "saved"), weights="q4"))
    assert all(np.array_equal(each, back[name]) for name, each in weights(model).items())


def test_no_packed_matrix_is_ever_made_of_floats(rng, tmp_path, monkeypatch):
    values = sizes("mixtral")
    path = stored(tmp_path / "m.gguf", values, mixture(rng, values, Kind.Q4_K))
    monkeypatch.setattr(Blocks, "_unpacked", None)
    model = llm.load(path)
    assert {weight.dtype for name, weight in model.parameters() if weight.ndim == 2 and "gate." not in name} == {"q4k"}
    with pytest.raises(TypeError, match="not callable"):
        llm.load(path, weights="float32")


def test_types_may_differ_from_matrix_to_matrix(rng, tmp_path):
    """As in files of "Q4_K_M"; one of a type that is not held packed becomes floats, by itself."""
    values = sizes("qwen3_moe")
    tensors = mixture(rng, values, Kind.Q4_K)
    kinds = {"blk.0.ffn_down": Kind.Q6_K, "blk.1.ffn_down": Kind.Q5_K, "blk.1.ffn_up": Kind.Q8_0}
    for start, kind in kinds.items():
        tensors[f"{start}_exps.weight"] = kind, random_raw(rng, kind, (4, BLOCK, BLOCK))
    model = llm.load(stored(tmp_path / "m.gguf", values, tensors))
    first, second = (model.layers[i].mlp.experts for i in range(2))
    held = [[getattr(each, f"{name}_proj").weight.dtype for name in ("gate", "up", "down")] for each in (first, second)]
    assert held == [["q4k", "q4k", "q6k"], ["q4k", "q8", "float32"]]
    wanted = weights(llm.load(dequantised(tmp_path / "plain.gguf", values, tensors)))
    assert all(np.array_equal(given, wanted[name]) for name, given in weights(model).items())
    ids = rng.integers(0, 256, 20).tolist()
    ours = ops.tensor(model(ids).numpy().copy())
    with ops.linear.use(ops.linear.reference), ops.experts_linear.use(ops.experts_linear.reference):
        assert error(model(ids), ours) < 0.03


@pytest.mark.parametrize("asked", [None, "q4"])
@pytest.mark.parametrize(("model_type", "kind"), [("mixtral", "Q8_0"), ("gpt_oss", "Q4_0")])
def test_experts_that_would_share_a_record_become_floats(rng, tmp_path, model_type, kind, asked):
    rows = 2 * target.lanes() + 1  # of gate and up; down has so many inputs, which are no blocks
    values = sizes(model_type, intermediate_size=rows)
    tensors = mixture(rng, values, Kind[kind])
    path = stored(tmp_path / "m.gguf", values, tensors)
    model, wanted = llm.load(path, weights=asked), weights(llm.load(path, weights="float32"))
    given = weights(model)
    held = experts_of(model)
    assert {held[name] for name in held if "down" not in name and ".w2." not in name} == {"float32"}
    assert model.layers[0].self_attn.q_proj.weight.dtype == (asked or PACKED[kind])
    same = [name for name in wanted if asked is None or held.get(name) == "float32"]
    assert len(same) >= 4 and all(np.array_equal(given[name], wanted[name]) for name in same)
    assert np.isfinite(model([1, 2, 3]).numpy()).all()


@pytest.mark.parametrize(
    ("model_type", "shape", "reason"),
    [
        ("mixtral", (3, BLOCK, BLOCK), "wrong shape: .*block_sparse_moe.experts.w3.weight is .768, 256., expected"),
        ("mixtral", (4, BLOCK // 2, BLOCK), "wrong shape: .*w3.weight is .512, 256., expected .1024, 256."),
        ("mixtral", (4 * BLOCK, BLOCK), "wrong shape: .*w3.weight is .262144., expected"),
        ("gpt_oss", (3, BLOCK, BLOCK), "wrong shape: .*experts.up_proj.weight is .768, 256., expected .1024, 256."),
        ("gpt_oss", (BLOCK,), "wrong shape: .*up_proj.weight is .256., expected .1024, 256."),
    ],
)
def test_experts_of_other_shapes_are_refused(rng, tmp_path, model_type, shape, reason):
    values = sizes(model_type)
    tensors = mixture(rng, values, Kind.Q4_K)
    tensors["blk.0.ffn_up_exps.weight"] = Kind.Q4_K, random_raw(rng, Kind.Q4_K, shape)
    with pytest.raises(CheckpointError, match=reason):
        llm.load(stored(tmp_path / "m.gguf", values, tensors))
