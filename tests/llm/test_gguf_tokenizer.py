"""Tokenizers from GGUF metadata: the ids that llama.cpp gives for each vocabulary's cases, and what is refused."""

import base64
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers

from llm.errors import TokenizerError
from llm.gguf_patterns import PRE
from llm.gguf_tokenizer import from_metadata
from llm.weights.gguf import read_gguf
from tests.llm.gguf_files import byte_level, letters

DATA = Path(__file__).resolve().parents[2] / "../shared/data"
VOCABULARIES = sorted(path.name.removesuffix(".inp") for path in (DATA / "vocab").glob("*.gguf.inp"))
HERE = Path("model.gguf")
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


def cases(name):
    """Pairs of a text and its ids."""
    texts = (DATA / "vocab" / f"{name}.inp").read_text("utf-8").split("\n__ggml_vocab_test__\n")
    if not texts[-1]:  # after the last mark
        texts.pop()
    lines = (DATA / "vocab" / f"{name}.out").read_text("utf-8").removesuffix("\n").split("\n")
    return list(zip(texts, ([int(each) for each in line.split()] for line in lines), strict=True))


def llama3():
    """Llama 3's vocabulary out of its tiktoken file, as the converter makes it: a token's merge is of what it is of."""
    file = DATA / "tokenizers" / "tokenizer_llama3.tiktoken"
    if not file.is_file():
        pytest.skip("no vocabulary of Llama 3 in ../shared/data/tokenizers")
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(str.split, file.read_text().splitlines())}
    spelling = letters()

    def spelt(token):
        return "".join(spelling[byte] for byte in token)

    merges = []
    for token, rank in ranks.items():
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:  # what the ranks below its own make of it
            best = min((ranks.get(a + b, rank), i) for i, (a, b) in enumerate(pairwise(parts)))
            if best[0] >= rank:
                break
            parts[best[1] : best[1] + 2] = [parts[best[1]] + parts[best[1] + 1]]
        if len(parts) == 2:
            merges.append((rank, f"{spelt(parts[0])} {spelt(parts[1])}"))
    tokens = [spelt(token) for token in sorted(ranks, key=ranks.__getitem__)]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": [*tokens, "<|begin_of_text|>"],
        "tokenizer.ggml.token_type": np.array([NORMAL] * len(tokens) + [CONTROL], "int32"),
        "tokenizer.ggml.merges": [pair for _, pair in sorted(merges)],
        "tokenizer.ggml.bos_token_id": len(tokens),
    }


@pytest.mark.skipif(not VOCABULARIES, reason="no vocabularies in ../shared/data/vocab")
@pytest.mark.parametrize("name", VOCABULARIES)
def test_every_case_of_every_vocabulary(name):
    file = DATA / "vocab" / name
    if file.is_file():
        metadata = read_gguf(file).metadata
    elif name == "ggml-vocab-llama-bpe.gguf":
        metadata = llama3()
    else:
        pytest.skip(f"no vocabulary {name}, only its cases")
    tokenizer = from_metadata(metadata, file)
    given = cases(name)
    assert len(given) >= 46
    wrong = [
        (text, tokenizer.encode(text, bos=False), ids)
        for text, ids in given
        if tokenizer.encode(text, bos=False) != ids
    ]
    assert not wrong
    for text, ids in given:
        decoded = tokenizer.decode(ids)
        assert decoded == text or (decoded == text.removeprefix(" ") and metadata["tokenizer.ggml.model"] == "llama")


def sentencepiece(**changes):
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "ab", "▁ab", "<user>"]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * 5, USER_DEFINED]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array(types, "int32"),
        "tokenizer.ggml.scores": np.array([0.0] * 259 + [-5.0, -6.0, -7.0, -1.0, -2.0, 0.0], "float32"),
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        **{f"tokenizer.{key.replace('_ggml_', 'ggml.')}": value for key, value in changes.items()},
    }


def test_sentencepiece():
    tokenizer = from_metadata(sentencepiece(chat_template="{{ bos_token }}"), HERE)
    assert tokenizer.encode("ab") == [1, 263] and tokenizer.encode("ab", bos=False) == [263]
    assert tokenizer.encode("<user>ab</s>") == [1, 264, 263, 2], "special tokens are found in the text"
    assert tokenizer.encode("é") == [1, 259, 3 + 0xC3, 3 + 0xA9]
    assert tokenizer.decode([1, 263, 259, 260, 3 + 0xC3, 3 + 0xA9]) == "ab aé"
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.bos_token, tokenizer.eos_token) == (1, {2}, "<s>", "</s>")
    assert tokenizer.chat_template == "{{ bos_token }}"
    bare = from_metadata(sentencepiece(_ggml_add_space_prefix=False, _ggml_add_bos_token=False), HERE)
    assert bare.encode("ab ab") == [262, 263]
    both = from_metadata(sentencepiece(_ggml_add_eos_token=True), HERE)
    assert both.encode("ab") == [1, 263, 2]


def test_byte_level():
    tokenizer = from_metadata(byte_level(), HERE)
    assert tokenizer.encode(" a123<|im_end|>") == [256, 258, 259], "a piece that is a token is taken whole"
    assert from_metadata(byte_level(_ggml_pre="gpt-2"), HERE).encode("123")[:1] == [257]
    assert tokenizer.eos_ids == {259, 260} and tokenizer.bos_id is None
    assert tokenizer.decode([256, 258]) == " a123"
    told = from_metadata(byte_level(_ggml_bos_token_id=260), HERE)
    assert told.encode("a")[0] == 260, "Llama 3's vocabularies put bos first"
    assert from_metadata(byte_level(_ggml_bos_token_id=260, _ggml_pre="qwen2"), HERE).encode("a")[0] != 260


@pytest.mark.parametrize("name", PRE)
def test_every_pattern_compiles_and_loses_nothing(name):
    tokenizer = from_metadata(byte_level(_ggml_pre=name, _ggml_bos_token_id=260, _ggml_add_bos_token=False), HERE)
    text = "Hello, I'm 12345 — naïve  Ω漢字かな한국어\n\n\tx = {'a': 1}\r\n  \u200bдюйм 🙂 नमस्ते   "
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_wordpiece_as_the_library_from_berts_own_vocabulary():
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "hello", "##s", "##ab", "w", "##or", "##ld", ",", "cafe", "漢", "字"]
    marked = [w if w[0] == "[" else w[2:] if w.startswith("##") else f"▁{w}" for w in words]
    metadata = {
        "tokenizer.ggml.model": "bert",
        "tokenizer.ggml.tokens": marked,
        "tokenizer.ggml.token_type": np.array([CONTROL] * 4 + [NORMAL] * 10, "int32"),
        "tokenizer.ggml.unknown_token_id": 1,
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.seperator_token_id": 3,
    }
    theirs = tokenizers.Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    theirs.normalizer, theirs.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    tokenizer = from_metadata(metadata, HERE)
    for text in ("Hello, WORLD", "hellosab Café", "漢字 xyz"):
        assert tokenizer.encode(text) == [2, *theirs.encode(text).ids, 3]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"_ggml_model": "t5"}, r"tokenizer 't5' is not supported; supported are llama, gpt2, bert"),
        ({"_ggml_model": None}, "tokenizer None is not supported"),
        ({"_ggml_pre": "kimi-k2"}, r"pre-tokenizer 'kimi-k2' is not supported; supported are default, gpt-2"),
        ({"_ggml_pre": 3}, "tokenizer.ggml.pre is 3, expected str"),
        ({"_ggml_tokens": []}, "tokenizer.ggml.tokens is missing"),
        ({"_ggml_tokens": ["a", "a"], "_ggml_token_type": None}, "the token 'a' is in the vocabulary twice"),
        ({"_ggml_token_type": np.array([1], "int32")}, r"token_type is 1 values, expected 261 numbers"),
        ({"_ggml_merges": None}, "tokenizer.ggml.merges is (missing|None)"),
        ({"_ggml_merges": ["xx yy"]}, "the vocabulary is damaged: .*"),
        ({"_ggml_merges": ["nospace"]}, "the vocabulary is damaged: .*"),
        ({"_ggml_tokens": ["a" * 2000], "_ggml_token_type": None}, "a token has 2000 characters, at most 1024"),
        ({"_ggml_bos_token_id": 1.5}, "bos_token_id is 1.5, expected int"),
    ],
)
def test_what_is_refused(change, reason):
    with pytest.raises(TokenizerError, match=reason) as caught:
        from_metadata(byte_level(**change), HERE)
    assert str(caught.value).startswith("model.gguf: ") and "\n" not in str(caught.value)


def test_a_special_token_that_is_not_there_is_none():
    tokenizer = from_metadata(byte_level(_ggml_bos_token_id=4000, _ggml_eot_token_id=258), HERE)
    assert tokenizer.bos_id is None and tokenizer.eos_ids == {258, 259, 260}
