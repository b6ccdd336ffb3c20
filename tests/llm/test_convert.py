"""From Hugging Face's layout to GGUF and back: the same numbers, text, tokenizer and template; the rest refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

import llm
import ops
from llm import convert as module
from llm.convert import convert
from llm.errors import CheckpointError, ConfigError, TokenizerError, UserError
from llm.gguf_tokenizer import from_metadata
from llm.gguf_vocabulary import PROBES, metadata
from llm.quantise import quantise
from llm.tokenizer import Tokenizer
from llm.weights.gguf import read_gguf

from . import small as smaller
from .test_families import drawn, named, raw

DATA = Path(__file__).resolve().parents[2] / "../shared/data"
# Families and features that GGUF can say; the other cases of tests/parity.py are refused.
WRITTEN = """
llama, GQA, untied|llama, MHA, tied|llama, biases|llama, rope linear|llama, rope llama3|llama, rope yarn
llama, rope longrope, past its length|mistral, no window, MHA|qwen2, no window|qwen3, head_dim 24, tied|gemma, tied
phi3, GQA, three quarters rotate, tied|phi3, longrope, past its length, partial|granite, multipliers, biases|gpt2, tied
gpt_neox, parallel, a quarter rotates|phi, half rotates|olmo2|mixtral
"""
REFUSED = {
    "llama, rope dynamic, past its length": "scaled by 'dynamic'",
    "llama, rope yarn, attention factor": "cannot say that rope of this llama",
    "mistral, window 8": "a mistral with a sliding window cannot be written",
    "qwen2, window 8 from layer 1 on, tied": "use_sliding_window of this qwen2 is True: it is read as False",
    "gemma, untied, biases": "attention_bias of this gemma",
    "gpt2, scaled by layer, upcast, untied": "scale_attn_by_inverse_layer_idx",
    "mixtral, window 8, one expert, head_dim 24, tied": "sliding_window of this mixtral is 8",
    "qwen3_moe, not normalised": "norm_topk_prob",
    "qwen3_moe, dense first layer": r"no name for 'model\.layers\.0\.mlp\.gate_proj\.weight'",
    "gpt_oss, yarn, window 8, sinks": "a gpt_oss cannot be written as GGUF; supported are llama, ",
    "rwkv, never halved, tied": "a rwkv cannot be written",
}
GEMMA = {"query_pre_attn_scalar": 16, "head_dim": 16}


def tokenizer(**options: Any) -> Tokenizer:
    """Bytes, 256 and 257 made by merges, <s>, </s>."""
    alphabet = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġa", "ab"]
    vocab = {token: i for i, token in enumerate(alphabet)}
    backend = tokenizers.Tokenizer(models.BPE(vocab, [("Ġ", "a"), ("a", "b")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    bos, eos = (len(alphabet), len(alphabet) + 1)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    return Tokenizer(backend, bos_id=bos, eos_ids=[eos], bos_token="<s>", eos_token="</s>", **options)


def small_model(rng: np.random.Generator, dtype: str = "float32", **changes: Any) -> Any:
    """A random Llama whose vocabulary has merges."""
    model = smaller.model(rng, dtype, **{"vocab_size": 262} | changes)
    model.tokenizer = tokenizer()
    return model


def same_weights(a: Any, b: Any) -> bool:
    first, second = dict(a.parameters()), dict(b.parameters())
    return list(first) == list(second) and all(
        first[name].dtype == second[name].dtype and np.array_equal(first[name].numpy(), second[name].numpy())
        for name in first
    )


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_there_and_back(rng, tmp_path, dtype):
    model = small_model(rng, dtype)
    model.tokenizer = tokenizer(chat_template=smaller.TEMPLATE)
    source = model.save(tmp_path / "source")
    convert(source, tmp_path / "m.gguf", progress=False)
    there = llm.load(tmp_path / "m.gguf")
    assert same_weights(there, model)
    convert(tmp_path / "m.gguf", tmp_path / "back", progress=False)
    back = llm.load(tmp_path / "back")
    assert same_weights(back, model) and back.config == model.config
    for each in (there, back):
        assert each.generate("ab c", max_tokens=24) == model.generate("ab c", max_tokens=24)
        assert each.tokenizer.chat_template == smaller.TEMPLATE
        assert (each.tokenizer.bos_id, each.tokenizer.eos_ids) == (258, {259})
        assert all(each.tokenizer.encode(text) == model.tokenizer.encode(text) for text in PROBES)


@pytest.mark.parametrize("type", ["f32", "f16", "bf16", "q8_0", "q4_0"])
def test_types_are_the_library_s_own(rng, tmp_path, type):
    model = small_model(rng, hidden_size=32, intermediate_size=64)
    convert(model.save(tmp_path / "source"), tmp_path / "m.gguf", type, progress=False)
    read = {each.name: each for each in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    weight = model.layers[1].mlp.up_proj.weight.numpy()
    kind = gguf.GGMLQuantizationType[type.upper()]
    given = read["blk.1.ffn_up.weight"]
    assert given.tensor_type == kind
    assert np.array_equal(gguf.dequantize(given.data, kind), gguf.dequantize(gguf.quantize(weight, kind), kind))
    assert read["blk.1.ffn_norm.weight"].tensor_type == gguf.GGMLQuantizationType.F32
    there = llm.load(tmp_path / "m.gguf")
    assert np.array_equal(there.layers[1].mlp.up_proj.weight.numpy(), gguf.dequantize(given.data, kind))
    assert there.generate("a", max_tokens=4) is not None


def test_queries_lie_in_pairs(rng, tmp_path):
    """As the converter of llama.cpp puts them."""
    model = small_model(rng)
    convert(model.save(tmp_path / "source"), tmp_path / "m.gguf", progress=False)
    read = read_gguf(tmp_path / "m.gguf").tensors
    q, k = (getattr(model.layers[0].self_attn, each).weight.numpy() for each in ("q_proj", "k_proj"))
    for given, heads, name in ((q, 4, "attn_q"), (k, 2, "attn_k")):
        wanted = given.reshape(heads, 2, len(given) // heads // 2, -1).swapaxes(1, 2).reshape(given.shape)
        assert np.array_equal(read[f"blk.0.{name}.weight"], wanted)


@pytest.mark.parametrize(("ours", "theirs"), [("q4", "Q4_0"), ("q8", "Q8_0")])
def test_packed_codes_stay_as_they_are(rng, tmp_path, ours, theirs):
    model = small_model(rng, hidden_size=64, intermediate_size=96)
    quantise(model, ours, tmp_path / "packed", [f"embed_tokens={ours}"], "abc", progress=False)
    convert(tmp_path / "packed", tmp_path / "m.gguf", progress=False)
    kinds = {each.tensor_type.name for each in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert kinds == {theirs, "F32"}
    convert(tmp_path / "m.gguf", tmp_path / "back", progress=False)
    wanted = llm.load(tmp_path / "packed")
    for each in (llm.load(tmp_path / "m.gguf"), llm.load(tmp_path / "back")):
        assert same_weights(each, wanted)
        assert each.generate("ab", max_tokens=8) == wanted.generate("ab", max_tokens=8)


@pytest.mark.parametrize("name", WRITTEN.strip().replace("\n", "|").split("|"))
def test_families(name, rng, tmp_path):
    model = drawn(rng, raw(named(name)))
    convert(model.save(tmp_path / "source"), tmp_path / "m.gguf", progress=False)
    back, ids = llm.load(tmp_path / "m.gguf"), [1, 2, 3, 50, 60, 9, 9, 4]
    assert type(back) is type(model) or "mistral" in name
    wanted, given = model(ids).numpy(), back(ids).numpy()
    assert np.abs(given - wanted).max() <= 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("name", ["gemma2, caps, window 8", "gemma3, window 8, a pattern of 2"])
def test_gemmas_of_usual_scales(name, rng, tmp_path):
    changes = {**GEMMA, "sliding_window_pattern": 6} if "gemma3" in name else GEMMA
    model = drawn(rng, raw(named(name), **changes))
    convert(model.save(tmp_path / "source"), tmp_path / "m.gguf", progress=False)
    wanted, given = model([1, 2, 3, 50]).numpy(), llm.load(tmp_path / "m.gguf")([1, 2, 3, 50]).numpy()
    assert np.abs(given - wanted).max() <= 1e-5 * np.abs(wanted).max()


def test_gpt2_four_times_as_wide(rng, tmp_path):
    model = drawn(rng, raw(named("gpt2, tied"), n_inner=None))
    convert(model.save(tmp_path / "source"), tmp_path / "m.gguf", progress=False)
    assert same_weights(llm.load(tmp_path / "m.gguf"), model)


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_file_cannot_say_is_refused(name, rng, tmp_path):
    source = drawn(rng, raw(named(name))).save(tmp_path / "source")
    with pytest.raises(UserError, match=REFUSED[name]):
        convert(source, tmp_path / "m.gguf", progress=False)
    assert [*tmp_path.iterdir()] == [source]


def vocabularies() -> list[Any]:
    found = [pytest.param(path, id=path.stem) for path in sorted((DATA / "vocab").glob("*.gguf"))]
    found += [pytest.param(path, id=path.stem) for path in sorted((DATA / "tokenizers").glob("*_tokenizer.json"))]
    return found or [pytest.param(None, marks=pytest.mark.skip(reason="needs ../shared/data"))]


@pytest.mark.parametrize("path", vocabularies())
def test_vocabularies(path, tmp_path):
    """Of real models: written as metadata and read back, all texts give the same ids."""
    if path.suffix == ".gguf":
        given = from_metadata(read_gguf(path).metadata, path)
        texts = path.with_suffix(".gguf.inp").read_text("utf-8").split("\n__ggml_vocab_test__\n")
    else:
        (tmp_path / "tokenizer.json").write_bytes(path.read_bytes())
        given, texts = Tokenizer.from_directory(tmp_path), []
    back = from_metadata(metadata(given, given.vocab_size), path)
    for text in [*texts, *PROBES]:
        assert back.encode(text) == given.encode(text)
        assert back.decode(back.encode(text)) == given.decode(given.encode(text))


def test_the_embedded_model(tmp_path):
    convert("tiny", tmp_path / "tiny.gguf", "f16", progress=False)
    wanted, given = llm.load("tiny", dtype="float16"), llm.load(tmp_path / "tiny.gguf")
    assert given.generate("Once", max_tokens=30) == wanted.generate("Once", max_tokens=30)


def test_tokenizers_that_no_file_describes(rng):
    given = tokenizer()
    given.backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(tokenizers.Regex("[aeiou]"), "removed"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    with pytest.raises(TokenizerError, match="no name for how this tokenizer splits"):
        metadata(given, 262)
    words = Tokenizer(tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, "a")))
    with pytest.raises(TokenizerError, match="type 'WordLevel' is not supported"):
        metadata(words, 1)
    with pytest.raises(TokenizerError, match="without merges"):
        metadata(smaller.tokenizer(), 258)


def test_rows_without_a_token_and_no_tokenizer_at_all(rng, tmp_path):
    model = small_model(rng, vocab_size=300)
    convert(model.save(tmp_path / "source"), tmp_path / "m.gguf", progress=False)
    there = llm.load(tmp_path / "m.gguf")
    assert there.tokenizer.encode("abc") == model.tokenizer.encode("abc") and there.config.vocab_size == 300
    assert there.tokenizer.vocab_size == model.tokenizer.vocab_size == 260
    assert there.tokenizer.decode([66, 280, 67]) == model.tokenizer.decode([66, 280, 67])
    model.tokenizer = None
    convert(model.save(tmp_path / "bare"), tmp_path / "bare.gguf", progress=False)
    assert llm.load(tmp_path / "bare.gguf").tokenizer is None


def test_rows_that_blocks_do_not_make_up(rng, tmp_path):
    source = small_model(rng).save(tmp_path / "source")
    with pytest.raises(CheckpointError, match=r"blk\.0\.ffn_down\.weight has rows of 48 .*Q8_0's blocks of 32.*f16"):
        convert(source, tmp_path / "m.gguf", "q8_0", progress=False)
    with pytest.raises(UserError, match="type 'q5' is not supported; choose one of f32"):
        convert(source, tmp_path / "m.gguf", "q5", progress=False)
    assert [*tmp_path.iterdir()] == [source]


@pytest.mark.parametrize("type", ["f16", "q4_0"])
def test_a_folder_of_a_type(rng, tmp_path, type):
    model = small_model(rng)
    source = model.save(tmp_path / "source")
    convert(source, tmp_path / "out", type, progress=False)
    wanted = ops.tensor(model.layers[0].mlp.up_proj.weight.numpy(), {"f16": "float16", "q4_0": "q4"}[type])
    given = llm.load(tmp_path / "out").layers[0].mlp.up_proj.weight
    assert given.dtype == wanted.dtype and np.array_equal(given.numpy(), wanted.numpy())


def test_the_check_sees_what_would_be_lost(rng, tmp_path, monkeypatch):
    """A key left out of the tables is found before a file is there."""
    source = small_model(rng, rms_norm_eps=3e-4).save(tmp_path / "source")
    from llm.weights import gguf_write

    def lossy(config: Any, values: Any, family: Any) -> Any:
        found, pieces = keys(config, values, family)
        return found | {"attention.layer_norm_rms_epsilon": 1e-5}, pieces

    keys = gguf_write.keys
    monkeypatch.setattr(gguf_write, "keys", lossy)
    with pytest.raises(ConfigError, match=r"rms_norm_eps of this llama is 0\.0003: it is read as 1e-05"):
        convert(source, tmp_path / "m.gguf", progress=False)
    assert [*tmp_path.iterdir()] == [source]


@pytest.mark.parametrize("out", ["m.gguf", "folder"])
def test_what_is_there_stays_and_interrupted_writing_leaves_nothing(rng, tmp_path, monkeypatch, out):
    source = small_model(rng).save(tmp_path / "source")
    (tmp_path / out).write_text("mine")
    with pytest.raises(UserError, match="exists"):
        convert(source, tmp_path / out, progress=False)
    assert (tmp_path / out).read_text() == "mine"

    def broken(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", broken)
    monkeypatch.setattr(module, "write_checkpoint", broken)
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "new" / out, progress=False)
    assert [*(tmp_path / "new").iterdir()] == []


def test_command(limpid, rng, tmp_path):
    model = small_model(rng)
    source, out = model.save(tmp_path / "source"), tmp_path / "m.gguf"
    code, said, errors = limpid("convert", str(source), str(out), "--type", "f32")
    assert (code, errors) == (0, "") and said.endswith(f"wrote {out}\n")
    wanted = model.generate("a", max_tokens=4)
    assert limpid("generate", "a", "-m", str(out), "-n", "4")[:2] == (0, f"a{wanted}\n")
    code, _, errors = limpid("convert", str(source), str(out))
    assert code == 2 and "exists" in errors and errors.count("\n") == 1
