"""GGUF files written with the library `gguf` and read back: numbers, text, and one clear error for what is wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

import llm
import ops
from llm.errors import CheckpointError, ConfigError
from llm.load import config_values
from llm.weights import write_file
from llm.weights.blocks import Kind
from llm.weights.gguf import read_gguf
from tests.llm import gguf_files
from tests.llm.gguf_files import SIZES, byte_level, write

KINDS = "F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL MXFP4".split()  # noqa: SIM905
PACKED = {"Q4_0": "q4", "Q8_0": "q8", "Q4_K": "q4k", "Q6_K": "q6k", "MXFP4": "mxfp4"}
HEADS = {"attn_q": 4, "attn_k": 2}
NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def hugging_face(tensors):
    """The same weights as the library unpacks them, float32, under the names and in the order of Hugging Face."""
    found = {}
    for name, (kind, raw) in tensors.items():
        values = gguf.dequantize(raw, kind)
        parts = name.split(".")
        if parts[0] == "blk":
            if parts[2] in HEADS:  # the converter: reshape(heads, 2, half, inputs).swapaxes(1, 2)
                half = values.shape[0] // HEADS[parts[2]] // 2
                values = values.reshape(HEADS[parts[2]], half, 2, -1).swapaxes(1, 2).reshape(values.shape)
            found[f"model.layers.{parts[1]}.{NAMES[parts[2]]}.weight"] = values
        else:
            found[
                {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}.get(parts[0], "lm_head") + ".weight"
            ] = values
    return found


def beside(path: Path, model, tensors) -> Path:
    """A directory in Hugging Face's layout with the same weights, unpacked."""
    import json

    path.mkdir()
    values = config_values(model)
    (path / "config.json").write_text(json.dumps(values))
    write_file(path / "model.safetensors", {name: np.ascontiguousarray(a) for name, a in hugging_face(tensors).items()})
    return path


def weights(model):
    return {name: np.asarray(weight.numpy(), "float32") for name, weight in model.parameters()}


@pytest.mark.parametrize("kind", KINDS)
def test_every_type(rng, tmp_path, kind):
    tied = KINDS.index(kind) % 2 == 0
    tensors = gguf_files.model(rng, Kind[kind], tied)
    path = write(tmp_path / "model.gguf", tensors, metadata=byte_level())
    model = llm.load(path)
    held = {weight.dtype for name, weight in model.parameters() if weight.ndim == 2}
    assert held == {PACKED.get(kind, {"F16": "float16", "BF16": "bfloat16"}.get(kind, "float32"))}
    assert model.config.tie_word_embeddings == tied
    given, wanted = weights(model), hugging_face(tensors)
    assert given.keys() == {name.removeprefix("model.") for name in wanted}
    for name, values in wanted.items():
        # Norms are float32 in the file, and take the dtype of the rest.
        exact = values.astype(model.dtype if values.ndim == 1 else "float32").astype("float32")
        assert np.array_equal(given[name.removeprefix("model.")], exact), name
    if kind in ("F16", "BF16"):
        return
    folder = beside(tmp_path / "plain", model, tensors)
    floats, twin = llm.load(path, weights="float32"), llm.load(folder)
    twin.tokenizer = model.tokenizer
    text = floats.generate("Once", max_tokens=24)
    assert text == twin.generate("Once", max_tokens=24)
    if kind == "Q4_0":  # packed once more from the floats, it is what it was
        again = llm.load(folder, weights="q4")
        again.tokenizer = model.tokenizer
        assert model.generate("Once", max_tokens=24) == again.generate("Once", max_tokens=24)
    if kind in PACKED:
        ids = rng.integers(0, 256, 20).tolist()
        ours, exact = model(ids).numpy().copy(), floats(ids).numpy().copy()
        assert np.sqrt(np.mean((ours - exact) ** 2) / np.mean(exact**2)) < 0.03  # activations round to 8 bits
        with ops.linear.use(ops.linear.reference):
            reference = model(ids).numpy()
        assert np.sqrt(np.mean((ours - reference) ** 2) / np.mean(reference**2)) < 0.03


def test_types_may_be_mixed_and_asked_for(rng, tmp_path):
    tensors = gguf_files.model(rng, Kind.Q4_K)
    other = gguf_files.model(rng, Kind.Q6_K)
    tensors |= {name: other[name] for name in tensors if "ffn_down" in name or name == "output.weight"}
    path = write(tmp_path / "model.gguf", tensors)
    model = llm.load(path)
    assert model.layers[0].mlp.down_proj.weight.dtype == "q6k" and model.embed_tokens.weight.dtype == "q4k"
    assert model.dtype == "float32" and model.new_cache().dtype == "float16" and model.tokenizer is None
    half = llm.load(path, dtype="bfloat16")
    assert half.dtype == "bfloat16" and half.layers[0].mlp.down_proj.weight.dtype == "q6k"
    assert half([1, 2, 3]).dtype == "bfloat16"
    packed = llm.load(path, weights="q4")
    assert {weight.dtype for _, weight in packed.parameters() if weight.ndim == 2} == {"q4"}
    floats = weights(llm.load(path, weights="float32"))
    for name, values in weights(packed).items():
        assert np.abs(values - floats[name]).max() <= np.abs(floats[name]).max() / 8, name


def test_repacked_once_then_mapped(rng, tmp_path, monkeypatch):
    path = write(tmp_path / "model.gguf", gguf_files.model(rng, Kind.Q4_K))
    first = weights(llm.load(path))
    monkeypatch.setattr("llm.weights.blocks.quantize.assemble", None)
    again = weights(llm.load(path))
    assert all(np.array_equal(values, again[name]) for name, values in first.items())


def test_saved_in_hugging_faces_layout(rng, tmp_path):
    path = write(tmp_path / "model.gguf", gguf_files.model(rng, Kind.Q8_0), metadata=byte_level())
    model = llm.load(path)
    again = llm.load(model.save(tmp_path / "saved"))
    assert again.config == model.config
    given = weights(again)
    assert all(np.array_equal(values, given[name]) for name, values in weights(model).items())
    assert again.tokenizer.encode(" a12") == model.tokenizer.encode(" a12")


def test_several_files(rng, tmp_path):
    tensors = gguf_files.model(rng, Kind.Q8_0)
    names = [*tensors]
    for place in range(3):
        metadata = {"split.no": place, "split.count": 3, "split.tensors.count": len(names)}
        write(
            tmp_path / f"m-{place + 1:05}-of-00003.gguf",
            {name: tensors[name] for name in names[place::3]},
            SIZES if place == 0 else {},
            metadata=metadata,
        )
    given = weights(llm.load(tmp_path / "m-00001-of-00003.gguf"))
    whole = weights(llm.load(write(tmp_path / "whole.gguf", tensors)))
    assert all(np.array_equal(values, given[name]) for name, values in whole.items())
    with pytest.raises(CheckpointError, match="is one of 3 parts: give the first"):
        llm.load(tmp_path / "m-00002-of-00003.gguf")
    (tmp_path / "m-00003-of-00003.gguf").unlink()
    with pytest.raises(CheckpointError, match=r"has 3 parts, and m-00003-of-00003.gguf is not beside it"):
        llm.load(tmp_path / "m-00001-of-00003.gguf")


def test_chat_template_and_command_line(rng, tmp_path):
    template = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    path = write(tmp_path / "m.gguf", gguf_files.model(rng, Kind.Q4_0), metadata=byte_level(chat_template=template))
    model = llm.load(path)
    assert model.tokenizer.chat_template == template
    assert model.chat([{"role": "user", "content": "Hi"}], max_tokens=3).finish() is not None
    shown = subprocess.run([sys.executable, "-m", "llm", "info", path], capture_output=True, text=True)
    assert shown.returncode == 0 and "as q4 and float32" in shown.stdout and "tokenizer of 261" in shown.stdout
    said = subprocess.run(
        [sys.executable, "-m", "llm", "generate", "Once", "-m", path, "-n", "4"], capture_output=True, text=True
    )
    assert said.returncode == 0 and said.stdout.rstrip("\n").encode() == b"Once" + model.generate(
        "Once", max_tokens=4
    ).encode().rstrip(b"\n")


def test_llama_31s_frequencies(rng, tmp_path):
    tensors = gguf_files.model(rng, Kind.F32)
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    plain = llm.load(write(tmp_path / "plain.gguf", tensors))
    folder = beside(tmp_path / "hf", plain, tensors)
    import json

    values = json.loads((folder / "config.json").read_text()) | {
        "rope_scaling": rope | {"original_max_position_embeddings": 64}
    }
    (folder / "config.json").write_text(json.dumps(values))
    theirs = llm.load(folder)
    # What the converter stores: by how much each frequency is divided.
    from llm import rope as ropes

    scaled, _ = ropes.frequencies(theirs.config.rope, 400)
    unscaled, _ = ropes.frequencies(plain.config.rope, 400)
    factors = (unscaled / scaled).astype("float32")
    assert factors.max() > 7.9
    ours = llm.load(write(tmp_path / "m.gguf", {**tensors, "rope_freqs.weight": (Kind.F32, factors.view("uint8"))}))
    ids = rng.integers(0, 256, 300).tolist()
    given, wanted = ours(ids).numpy().copy(), theirs(ids).numpy()
    assert np.abs(given - wanted).max() <= 2e-4 * np.abs(wanted).max()
    assert np.abs(plain(ids).numpy() - wanted).max() > 1e-2 * np.abs(wanted).max(), "the scaling matters here"


@pytest.mark.parametrize(
    ("change", "error", "reason"),
    [
        ({"block_count": 3}, CheckpointError, "block_count is 3, and there are tensors of 2 layers"),
        ({"block_count": 2**31 - 1}, CheckpointError, "block_count is 2147483647"),
        ({"context_length": None}, ConfigError, "the metadata lack llama.context_length"),
        ({"embedding_length": 0}, ConfigError, "llama.embedding_length is 0, expected a positive integer"),
        ({"attention.head_count": 3}, (ConfigError, CheckpointError), "not a multiple|does not fit"),
        ({"attention.swing": 3.0}, ConfigError, r"llama.attention.swing = 3.0 is not understood for llama"),
        ({"attention.value_length": 32}, ConfigError, "attention.value_length is 32, only 64 is supported"),
        ({"rope.scaling.type": "bent"}, ConfigError, "rope scaling 'bent' with {} is not understood"),
        ({"rope.dimension_count": 128}, ConfigError, "rope.dimension_count is 128, expected 2 to 64"),
        ({"rope.swing": 1}, ConfigError, "llama.rope.swing = 1 is not understood"),
        ({"feed_forward_length": 1024}, CheckpointError, "wrong shape: layers.0.mlp.gate_proj.weight"),
    ],
)
def test_a_config_that_does_not_fit(rng, tmp_path, change, error, reason):
    values = {key: value for key, value in (SIZES | change).items() if value is not None}
    with pytest.raises(error, match=reason) as caught:
        llm.load(write(tmp_path / "m.gguf", gguf_files.model(rng, Kind.F32), values))
    assert "\n" not in str(caught.value)


def test_tensors_that_do_not_belong(rng, tmp_path):
    tensors = gguf_files.model(rng, Kind.F32)
    strange = {
        **tensors,
        "blk.0.attn_swing.weight": tensors["output_norm.weight"],
        "v.patch": tensors["output_norm.weight"],
    }
    with pytest.raises(CheckpointError, match=r"that a llama does not have: 'blk.0.attn_swing.weight', 'v.patch'"):
        llm.load(write(tmp_path / "m.gguf", strange))
    less = {name: value for name, value in tensors.items() if name != "blk.1.ffn_up.weight"}
    with pytest.raises(CheckpointError, match=r"missing: layers.1.mlp.up_proj.weight"):
        llm.load(write(tmp_path / "m.gguf", less))
    none = {name: value for name, value in tensors.items() if name != "token_embd.weight"}
    with pytest.raises(CheckpointError, match=r"has no matrix token_embd.weight: it is a vocabulary"):
        llm.load(write(tmp_path / "m.gguf", none))


def test_an_architecture_that_is_not_supported(rng, tmp_path):
    path = write(tmp_path / "m.gguf", gguf_files.model(rng, Kind.F32), architecture="bloom")
    with pytest.raises(ConfigError, match=r"architecture 'bloom' is not supported; supported are llama, qwen2"):
        llm.load(path)


def test_other_metadata_are_kept(rng, tmp_path):
    listed = np.array([1.5, 2.5], "float32")
    metadata = {"general.name": "é", "general.flag": True, "general.list": listed, "general.names": ["a", ""]}
    given = read_gguf(write(tmp_path / "m.gguf", gguf_files.model(rng, Kind.F32), metadata=metadata)).metadata
    assert given["general.name"] == "é" and given["general.flag"] is True
    assert np.array_equal(given["general.list"], listed) and given["general.names"] == ["a", ""]
