"""A tokenizer as the metadata of a GGUF file: the inverse of `gguf_tokenizer`, checked by reading it back."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .errors import TokenizerError
from .gguf_patterns import PRE
from .gguf_tokenizer import from_metadata
from .tokenizer import Tokenizer

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
# Texts that tell tokenizers apart: runs of letters, digits, marks, spaces and newlines, scripts, contractions, bytes.
# ruff: noqa: RUF001
PROBES = (
    "Hello world! It's 3.14159, isn't it? They'LL say I'd've known; we're sure.",
    "  two leading spaces,   three inside, one behind ",
    "\n\n\nnew\nlines \n \n\twith\ttabs\r\nand returns\r\n\r\n",
    "1 12 123 1234 12345 123456 1234567 12345678 3,000,000.00 0x1F 1e-9",
    "def f(x):\n    return [i**2 for i in range(x)]  # comment\n\n\nclass A:\n\tpass\n",
    "Größe naïve café Ærø ſ ß ŉ ǅ ﬁ İstanbul e\u0301 a\u0308\u0323",
    "Привет, мир! Як справи? Ελληνικά ΑΒΓ. עברית שלום العربية مرحبا ١٢٣ हिन्दी नमस्ते ไทยสวัสดี",
    "你好，世界。今天天气很好！日本語のテキスト、カタカナ。 한국어 문장입니다",
    "🚀🚀 👩‍👩‍👧‍👦 🇩🇪 ✅️ \u200b zero \u00a0 nbsp \u3000 wide \ufeff bom",
    "!!!??? ... -- --- ==== //// \\\\ <tag attr='v'/> &amp; {[(<$%^@#~`|>)]} a_b-c.d/e",
    "camelCase HTTPServer XMLHttpRequest SCREAMING_CASE iPhone15Pro v2.0.1-rc3 Isn't CAN'T",
    "\x00\x01\x7f\u0080\u2028\ue000\U0010ffff",
    "a", " ", "\n", "  ", "\t", "'", "' s", "'s", "▁", "Ġ", "",
)  # fmt: skip


def metadata(tokenizer: Tokenizer, rows: int) -> dict[str, Any]:
    """The keys that describe `tokenizer`, for a model of `rows` rows of embeddings; the template is one of them.

    GGUF names how text is split rather than saying it, so what is written is read back and both are given texts.
    Raises TokenizerError where GGUF has no kind of vocabulary or name for what the tokenizer does.
    """
    given = json.loads(tokenizer.backend.to_str())
    model = given["model"]
    if model.get("type") != "BPE":
        raise TokenizerError(f"GGUF: a vocabulary of type {model.get('type')!r:.40} is not supported, only BPE is")
    if not model.get("merges"):
        raise TokenizerError("GGUF: a vocabulary without merges cannot be written")
    common = _tokens(tokenizer, model, rows) | _special(tokenizer)
    texts = [*PROBES, *_spelt(tokenizer)]
    wanted = [tokenizer.encode(text) for text in texts]
    for candidate in _spaced(model, common) if model.get("byte_fallback") else _byte_level(given, common):
        back = from_metadata(candidate, Path("the new file"))
        if back.eos_ids >= tokenizer.eos_ids and all(
            back.encode(text) == ids for text, ids in zip(texts, wanted, strict=True)
        ):
            return candidate
    raise TokenizerError(
        "GGUF has no name for how this tokenizer splits text, or marks its ends: none of the vocabularies that it can "
        "describe gives the same ids; convert the model without its tokenizer"
    )


def _tokens(tokenizer: Tokenizer, model: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """All tokens by id, and of which type they are; rows that have none get names of their own."""
    by_id = {i: token for token, i in tokenizer.backend.get_vocab(with_added_tokens=True).items()}
    added = tokenizer.backend.get_added_tokens_decoder()
    unknown, tokens, types = model.get("unk_token"), [], []
    for i in range(max(rows, tokenizer.vocab_size)):
        token = by_id.get(i)
        if token is None:
            kind = _UNUSED
        elif token == unknown:
            kind = _UNKNOWN
        elif i in added:
            kind = _CONTROL if added[i].special else _USER_DEFINED
        else:
            kind = _BYTE if model.get("byte_fallback") and len(token) == 6 and token[:3] == "<0x" else _NORMAL
        tokens.append(f"[PAD{i}]" if token is None else token)
        types.append(kind)
    return {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": np.array(types, "int32")}


def _special(tokenizer: Tokenizer) -> dict[str, Any]:
    """Which tokens begin and end texts; GGUF has keys for three that end one."""
    put = tokenizer.encode("")[:1]  # in front of every text
    found: dict[str, Any] = {"tokenizer.ggml.add_bos_token": bool(put)}
    if put or tokenizer.bos_id is not None:
        found["tokenizer.ggml.bos_token_id"] = put[0] if put else tokenizer.bos_id
    first = tokenizer.token_to_id(tokenizer.eos_token)
    ends = sorted(tokenizer.eos_ids, key=lambda each: (each != first, each))
    found |= {f"tokenizer.ggml.{key}_token_id": each for key, each in zip(("eos", "eot", "eom"), ends, strict=False)}
    ids = tokenizer.backend.encode("a").ids
    found["tokenizer.ggml.add_eos_token"] = len(ids) > 1 and ids[-1] == first
    if tokenizer.chat_template is not None:
        found["tokenizer.chat_template"] = tokenizer.chat_template
    return found


def _pairs(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The merges; older files spell them as one string."""
    parted = (each.split(" ", 1) if isinstance(each, str) else each for each in model["merges"])
    return [(left, right) for left, right in parted]


def _spaced(model: Mapping[str, Any], common: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """SentencePiece's: a token's score says when it is made, which here the first merge that makes it does."""
    rank: dict[str, int] = {}
    for i, (left, right) in enumerate(_pairs(model)):
        rank.setdefault(left + right, i)
    unknown, tokens = model.get("unk_token"), common["tokenizer.ggml.tokens"]
    scores = np.array([-float(rank.get(token, len(rank))) for token in tokens], "float32")
    found = {
        **common,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": scores,
    }
    if unknown in tokens:
        found["tokenizer.ggml.unknown_token_id"] = tokens.index(unknown)
    for prefix in (True, False):
        yield found | {"tokenizer.ggml.add_space_prefix": prefix}


def _byte_level(given: Mapping[str, Any], common: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """By the name of the pre-tokenizer: the ones that are spelt as the given one first."""
    patterns = tuple(_patterns(given.get("pre_tokenizer") or {}))
    whole, seen = given["model"].get("ignore_merges") is True, set()
    merges = [" ".join(pair) for pair in _pairs(given["model"])]
    for name in sorted(PRE, key=lambda each: PRE[each].patterns != patterns or PRE[each].whole != whole):
        if PRE[name] not in seen:
            seen.add(PRE[name])
            yield {
                **common, "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": name, "tokenizer.ggml.merges": merges,
            }  # fmt: skip


def _patterns(pre: Mapping[str, Any]) -> Iterator[str]:
    if pre.get("type") == "Sequence":
        for each in pre.get("pretokenizers", ()):
            yield from _patterns(each)
    elif pre.get("type") == "Split":
        yield pre.get("pattern", {}).get("Regex", "")
    elif pre.get("type") == "ByteLevel" and pre.get("use_regex"):
        yield PRE["gpt-2"].patterns[0]


def _spelt(tokenizer: Tokenizer) -> Iterable[str]:
    """The text of each token, by itself and after a word: those that are no bytes in the midst of a character."""
    added = tokenizer.backend.get_added_tokens_decoder()
    for i in range(tokenizer.vocab_size):
        text = "" if i in added else tokenizer.decode([i])
        if text and "\ufffd" not in text:
            yield text
