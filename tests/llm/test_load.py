"""From a directory to a model and back: equal, lazy, atomic; and one clear error for everything that does not fit."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import llm
import ops
from llm.errors import CheckpointError, ConfigError, ModelNotFound, TokenizerError
from llm.load import build, randomize
from llm.weights import read_file, write_directory

from . import small

STORIES = Path(__file__).resolve().parents[2] / "../shared/data/stories260K"
IDS = [1, 2, 3, 200, 5]


@pytest.fixture
def saved(rng: np.random.Generator, tmp_path: Path) -> Path:
    """A small model in Hugging Face's layout."""
    model = small.model(rng)
    model.tokenizer = small.tokenizer(chat_template=small.TEMPLATE)
    return model.save(tmp_path / "model")


def edit(path: Path, name: str = "config.json", **changes: Any) -> None:
    values = json.loads((path / name).read_text())
    (path / name).write_text(json.dumps({k: v for k, v in (values | changes).items() if v is not ...}))


def refused(path: Path, kind: type[Exception] = llm.UserError, **options: Any) -> str:
    """The one line of the error that loading gives."""
    with pytest.raises(kind) as caught:
        llm.load(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def rewritten(path: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    """The weights of a directory after `change` of the dict."""
    tensors = {name: array.copy() for name, array in read_file(path / "model.safetensors").items()}
    change(tensors)
    (path / "model.safetensors").unlink()
    write_directory(path, tensors)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True])
def test_round_trip(rng, tmp_path, dtype, tied):
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    model = small.model(rng, dtype, tie_word_embeddings=tied, attention_bias=tied, rope_scaling=rope if tied else None)
    model.tokenizer = small.tokenizer(chat_template=small.TEMPLATE)
    back = llm.load(model.save(tmp_path / "model"))
    assert (back.dtype, back.config, type(back)) == (dtype, model.config, type(model))
    weights, twins = dict(model.parameters()), dict(back.parameters())
    assert list(weights) == list(twins)
    assert all(weights[name].numpy().tobytes() == twins[name].numpy().tobytes() for name in weights)
    text = "<s> An é 🙂\n"
    assert back.tokenizer.encode(text) == model.tokenizer.encode(text)
    assert back.tokenizer.chat_template == small.TEMPLATE
    assert (back.tokenizer.bos_id, back.tokenizer.eos_ids) == (256, {257})
    if dtype == "float32":  # the others would only compile more kernels
        messages = [{"role": "user", "content": "Hi"}]
        assert model(IDS).numpy().tobytes() == back(IDS).numpy().tobytes()
        assert back.chat(messages, max_tokens=5).finish() == model.chat(messages, max_tokens=5).finish()


def test_every_architecture_round_trips(rng, tmp_path):
    model = small.model(rng, model_type="mistral", sliding_window=3)
    back = llm.load(model.save(tmp_path / "model"))
    assert back.model_type == "mistral"
    assert back.config == model.config
    assert np.array_equal(back(IDS).numpy(), model(IDS).numpy())


def test_transformers_reads_what_is_saved(saved):
    pytest.importorskip("torch", reason="the parity extra is not installed: pip install -e '.[parity]'")
    transformers = pytest.importorskip("transformers", reason="the parity extra is not installed")
    import torch

    theirs = transformers.AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
    with torch.no_grad():
        wanted = theirs(torch.tensor([IDS])).logits[0].numpy()
    ours = llm.load(saved)(IDS).numpy()
    assert np.abs(ours - wanted).max() <= 2e-4 * np.abs(wanted).max()


def test_shards(saved):
    model = llm.load(saved)
    tensors = {name: array.copy() for name, array in read_file(saved / "model.safetensors").items()}
    (saved / "model.safetensors").unlink()
    write_directory(saved, tensors, max_shard_bytes=40_000)
    assert len(list(saved.glob("model-*-of-*.safetensors"))) > 3
    assert np.array_equal(llm.load(saved)(IDS).numpy(), model(IDS).numpy())
    lost = sorted(saved.glob("model-*"))[1]
    lost.unlink()
    assert lost.name in refused(saved, CheckpointError)


def test_dtypes(saved):
    as_stored, half = llm.load(saved), llm.load(saved, dtype="bfloat16")
    assert as_stored.dtype == "float32"
    for (name, weight), (_, rounded) in zip(as_stored.parameters(), half.parameters(), strict=True):
        assert rounded.dtype == "bfloat16", name
        assert np.array_equal(rounded.numpy(), weight.numpy().astype(ml_dtypes.bfloat16)), name
    assert half.dtype == "bfloat16"
    # Most of the weights decide; the others follow.
    rewritten(saved, lambda t: t.update({n: a.astype("float16") for n, a in t.items() if "norm" not in n}))
    mixed = llm.load(saved)
    assert mixed.dtype == "float16"
    assert {weight.dtype for _, weight in mixed.parameters()} == {"float16"}
    assert refused(saved, dtype="int8") == "dtype 'int8' is not supported; choose one of float32, float16, bfloat16"
    assert refused(saved, device="tpu") == "no device 'tpu'; there are cpu, cuda, emulate"
    rewritten(saved, lambda t: t.update({n: a.astype("int32") for n, a in t.items() if n == "lm_head.weight"}))
    assert "lm_head.weight is int32" in refused(saved, CheckpointError)


def test_every_misfit_is_in_one_error(saved):
    def change(tensors: dict[str, np.ndarray]) -> None:
        del tensors["model.norm.weight"], tensors["model.layers.2.mlp.up_proj.weight"]
        tensors["model.layers.3.mlp.up_proj.weight"] = np.zeros((48, 32), "float32")
        tensors["model.layers.0.self_attn.k_proj.weight"] = np.zeros((32, 32), "float32")
        tensors["model.rotary_emb.inv_freq"] = np.zeros(4, "float32")  # an old checkpoint's, recomputed here

    rewritten(saved, change)
    assert refused(saved, CheckpointError) == (
        "the checkpoint does not fit Llama: missing: layers.2.mlp.up_proj.weight, norm.weight; "
        "left over: layers.3.mlp.up_proj.weight; "
        "wrong shape: layers.0.self_attn.k_proj.weight is [32, 32], expected [16, 32]"
    )


def test_one_weight_under_two_names_is_refused(saved):
    rewritten(saved, lambda t: t.update({"norm.weight": t["model.norm.weight"] * 2}))
    assert "norm.weight" in refused(saved, CheckpointError)


def test_tied_embeddings(rng, saved):
    edit(saved, tie_word_embeddings=True)
    assert llm.load(saved)(IDS).shape == (5, 258)  # a head that repeats the embedding may be left over
    edit(saved, tie_word_embeddings=False)
    rewritten(saved, lambda t: t.pop("lm_head.weight"))
    assert "missing: lm_head.weight" in refused(saved, CheckpointError)


def test_damage_is_an_error_or_harmless(saved, seed):
    path = saved / "model.safetensors"
    content, draw = path.read_bytes(), random.Random(seed)
    length = 8 + struct.unpack("<Q", content[:8])[0]
    for size in [0, 1, 7, 8, length - 1, length, len(content) - 1, *(draw.randrange(len(content)) for _ in range(10))]:
        path.write_bytes(content[:size])
        refused(saved, CheckpointError)
    outcomes = set()
    for _ in range(150):
        damaged = bytearray(content)
        for _ in range(draw.choice([1, 1, 3])):
            damaged[draw.randrange(length)] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            outcomes.add(type(llm.load(saved)))
        except CheckpointError as error:
            assert "\n" not in str(error)
            outcomes.add(CheckpointError)
    assert CheckpointError in outcomes
    for _ in range(10):  # in the data a flipped bit is another number
        damaged = bytearray(content)
        damaged[draw.randrange(length, len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        llm.load(saved)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"rope_scaling": {"rope_type": "wobbly", "factor": 2.0}}, "unknown rope type 'wobbly'"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "twist": 1}}, "unknown keys 'twist'"),
        ({"hidden_sise": 32}, "unknown key 'hidden_sise' = 32, which could change the arithmetic (did you mean"),
        ({"num_experts": 8}, "unknown key 'num_experts'"),
        ({"hidden_act": "gelu"}, "'hidden_act'"),
        ({"hidden_size": "32"}, "'hidden_size' is '32' (str), expected int"),
        ({"num_hidden_layers": 0}, "'num_hidden_layers' is 0, expected at least 1"),
        ({"model_type": "bert"}, "model_type 'bert' is not supported; supported are "),
        ({"model_type": ...}, "model_type None is not supported"),
        ({"model_type": ["llama"]}, "model_type ['llama'] is not supported"),
        ({"quantization_config": {"bits": 4}}, "quant_method None is not supported; supported are awq, gptq, mlx"),
    ],
)
def test_a_config_is_understood_or_refused(saved, changes, expected):
    edit(saved, **changes)
    assert expected in refused(saved, ConfigError)


@pytest.mark.parametrize("text", ["", "{", "[1]", "[" * 200_000, "\xff"])
def test_a_config_that_is_no_object(saved, text):
    (saved / "config.json").write_bytes(text.encode("latin-1"))
    assert "config.json" in refused(saved, ConfigError)
    (saved / "config.json").unlink()
    assert "has no config.json" in refused(saved, ConfigError)


def test_a_tokenizer_must_fit(saved):
    edit(saved, vocab_size=257)
    rewritten(saved, lambda t: t.update({n: a[:257] for n, a in t.items() if a.shape[0] == 258}))
    assert "ids reach 257 ('</s>') but the model's embedding has 257 rows" in refused(saved, TokenizerError)
    (saved / "tokenizer.json").write_text("{}")
    assert "tokenizer.json cannot be read" in refused(saved, TokenizerError)
    (saved / "tokenizer.json").unlink()
    bare = llm.load(saved)
    assert bare.tokenizer is None
    assert bare(IDS).shape == (5, 257)
    with pytest.raises(llm.UserError, match="this model has no tokenizer"):
        bare.generate("Hi")


def test_weights_are_mapped_and_the_file_never_changes(saved):
    content = (saved / "model.safetensors").read_bytes()
    arrays = read_file(saved / "model.safetensors")
    model = build(json.loads((saved / "config.json").read_text()))
    llm.nn.load_parameters(model, arrays, "model.")
    for name, weight in model.named_tensors().items():
        assert np.shares_memory(weight.numpy(), arrays[name]), name
    loaded = llm.load(saved)
    address = loaded.embed_tokens.weight.numpy().ctypes.data
    assert any(low <= address < high for low, high in _mapped(saved / "model.safetensors"))
    before = loaded(IDS).numpy().copy()
    for _, weight in loaded.parameters():
        weight.numpy()[...] = 0
    assert not loaded(IDS).numpy().any()
    assert (saved / "model.safetensors").read_bytes() == content
    assert np.array_equal(llm.load(saved)(IDS).numpy(), before)


def _mapped(path: Path) -> list[tuple[int, int]]:
    """The address ranges of this process that `path` is mapped to."""
    if not Path("/proc/self/maps").exists():
        pytest.skip("no /proc/self/maps on this system")
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    ranges = [line[0].split("-") for line in lines if line[-1] == str(path.resolve())]
    return [(int(low, 16), int(high, 16)) for low, high in ranges]


_HELD = """
import sys
import llm
from llm.info import peak_memory
small = llm.load(sys.argv[2])
small([1, 2, 3]); small([1])
before = peak_memory()
model = llm.load(sys.argv[1], weights=sys.argv[3] if len(sys.argv) > 3 else None)
model([1, 2, 3]); model([1])
print((peak_memory() - before) / model.nbytes)
"""


def test_weights_are_held_once(tmp_path):
    """Peak memory of a process that loads and runs a model: its weights once, and little more."""
    shape = small.CONFIG | {"hidden_size": 256, "intermediate_size": 512}
    for name, vocabulary in (("large", 150_000), ("small", 258)):
        randomize(build(shape | {"vocab_size": vocabulary, "tie_word_embeddings": True})).save(tmp_path / name)
    command = [sys.executable, "-c", _HELD, str(tmp_path / "large"), str(tmp_path / "small")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert 0.5 < float(done.stdout) < 1.2


def test_packed_weights_are_held_once(tmp_path, monkeypatch):
    """Packed on the first start, mapped on the second; the checkpoint's own pages are what the first one reads."""
    monkeypatch.setenv("LIMPID_CACHE", str(tmp_path / "cache"))
    shape = small.CONFIG | {"hidden_size": 256, "intermediate_size": 512}
    for name, vocabulary in (("large", 150_000), ("small", 258)):
        randomize(build(shape | {"vocab_size": vocabulary, "tie_word_embeddings": True})).save(tmp_path / name)
    command = [sys.executable, "-c", _HELD, str(tmp_path / "large"), str(tmp_path / "small"), "q8"]
    shares = [float(subprocess.run(command, capture_output=True, text=True, check=True).stdout) for _ in range(2)]
    float32 = 32 / 8.5  # the checkpoint over its packed weights
    assert 1 < shares[0] < 2 + float32  # and the pieces at hand
    assert 0.5 < shares[1] < 1.2


def test_an_unaligned_file_works(saved):
    model, tensors = llm.load(saved), read_file(saved / "model.safetensors")
    for odd in range(4):
        raw = safetensors.numpy.save(tensors)
        length = struct.unpack("<Q", raw[:8])[0]
        header = raw[8 : 8 + length].rstrip()
        header += b" " * ((odd - 8 - len(header)) % 4)
        other = shutil.copytree(saved, saved.with_name(f"odd{odd}"))
        (other / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + raw[8 + length :])
        loaded = llm.load(other)
        assert np.array_equal(loaded(IDS).numpy(), model(IDS).numpy()), f"data begin at {odd} modulo 4"
        assert np.array_equal(loaded([1]).numpy(), model([1]).numpy()), f"data begin at {odd} modulo 4"


def test_save_is_atomic(saved, tmp_path, monkeypatch):
    model = llm.load(saved)
    beside = sorted(os.listdir(tmp_path))

    def fails(_: Path) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(model.tokenizer, "save", fails)
    with pytest.raises(OSError, match="no space left"):
        model.save(tmp_path / "other")
    assert sorted(os.listdir(tmp_path)) == beside
    monkeypatch.undo()
    with pytest.raises(llm.UserError, match="exists and is not an empty directory"):
        model.save(saved)
    assert refused_file(model, saved / "config.json")
    (tmp_path / "empty").mkdir()
    assert model.save(tmp_path / "empty") == tmp_path / "empty"
    assert model.save(str(tmp_path / "a/b/c")) == tmp_path / "a/b/c"
    assert sorted(os.listdir(tmp_path)) == sorted([*beside, "a", "empty"])
    assert os.stat(tmp_path / "empty").st_mode & 0o777 == 0o755


def refused_file(model: Any, path: Path) -> bool:
    before = path.read_bytes()
    with pytest.raises(llm.UserError, match="not an empty directory"):
        model.save(path)
    return path.read_bytes() == before


def test_a_shorter_model_is_saved_as_it_is(saved, tmp_path):
    model = llm.load(saved)
    del model.layers[1]
    back = llm.load(model.save(tmp_path / "shorter"))
    assert back.config.num_hidden_layers == 2
    assert np.array_equal(back(IDS).numpy(), model(IDS).numpy())
    model.layers.append(model.layers[0])  # the same layer twice is two layers on disk
    back = llm.load(model.save(tmp_path / "longer"))
    assert np.array_equal(back(IDS).numpy(), model(IDS).numpy())


class Wrapper(llm.Module):
    def __init__(self, inner: Any):
        self.inner = inner

    def forward(self, x: ops.Tensor, rotate: Any, cache: Any) -> ops.Tensor:
        return self.inner(x, rotate, cache)


def test_what_no_config_can_say_is_not_saved(saved, tmp_path):
    model = llm.load(saved)
    model.layers[1] = Wrapper(model.layers[1])
    with pytest.raises(llm.UserError, match=r"layers\.1\.self_attn\.q_proj\.weight.* and 14 more would not load"):
        model.save(tmp_path / "wrapped")
    model.layers[1] = lambda x, rotate, cache: x
    with pytest.raises(llm.UserError, match=r"a config\.json cannot say how this model was changed"):
        model.save(tmp_path / "wrapped")
    assert not (tmp_path / "wrapped").exists()
    with pytest.raises(llm.UserError, match=r"weights are not loaded: embed_tokens\.weight"):
        build(small.CONFIG).save(tmp_path / "bare")


def test_llama2c(tmp_path):
    if not STORIES.is_dir():
        pytest.skip("needs stories260K in ../shared/data")
    for name in ("stories260K.bin", "tok512.bin"):
        shutil.copyfile(STORIES / name, tmp_path / name)
    model = llm.load(tmp_path / "stories260K.bin")
    assert (model.dtype, model.context, model.tokenizer.vocab_size) == ("float32", 512, 512)
    assert model.tokenizer.eos_ids == {1, 2}
    back = llm.load(model.save(tmp_path / "saved"))
    assert back.generate("", max_tokens=20) == model.generate("", max_tokens=20)
    for text in ("", "Once <s> upon </s>", " é🙂"):
        assert back.tokenizer.encode(text) == model.tokenizer.encode(text)
    (tmp_path / "tok4096.bin").write_bytes(b"another model's")
    (tmp_path / "tok512.bin").rename(tmp_path / "tokenizer.bin")
    assert llm.load(tmp_path / "stories260K.bin").tokenizer.vocab_size == 512
    (tmp_path / "tokenizer.bin").unlink()
    assert "tok4096.bin" in refused(tmp_path / "stories260K.bin", TokenizerError)
    (tmp_path / "tok4096.bin").unlink()
    bare = llm.load(tmp_path / "stories260K.bin", dtype="float16")
    assert bare.tokenizer is None
    assert {weight.dtype for _, weight in bare.parameters()} == {"float16"}
    with pytest.raises(llm.UserError, match=r"this model has no tokenizer: put .* tok\*\.bin, beside it"):
        bare.generate("")
    content = (tmp_path / "stories260K.bin").read_bytes()
    (tmp_path / "stories260K.bin").write_bytes(content[:-4])
    assert "truncated" in refused(tmp_path / "stories260K.bin", CheckpointError)
    (tmp_path / "weights.onnx").write_bytes(b"ONNX")
    assert "weights.onnx' is not a model" in refused(tmp_path / "weights.onnx", ModelNotFound)
