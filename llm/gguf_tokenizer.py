"""A tokenizer from the metadata of a GGUF file: SentencePiece's BPE ("llama"), byte-level BPE ("gpt2"), WordPiece."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from llm.errors import TokenizerError
from llm.gguf_patterns import PRE, Pre
from llm.tokenizer import Tokenizer, merges_by_score

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # types of tokens that text matches before anything is merged
_UNUSED = 5
_SPACE = "\u2581"
_LONGEST = 1024  # characters of a token: all ways to part one are looked at
# Tokens that end an answer, by their names: old files say only which one ends a text.
_ENDS = """
<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <end_of_turn> <|endoftext|> <|end_of_text|> <|eom_id|> <EOT>
<\uff5cend\u2581of\u2581sentence\uff5c> <end_of_utterance>
"""


class _Given(NamedTuple):
    """What the metadata say, checked: a type and a score for each token."""

    path: Path
    metadata: Mapping[str, Any]
    tokens: list[str]
    types: list[int]
    rows: int  # of the file's lists: with what pads the vocabulary, and means no text

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        value = self.metadata.get(f"tokenizer.ggml.{key}", default)
        if value is not default and type(value) is not kind:
            raise TokenizerError(f"{self.path}: tokenizer.ggml.{key} is {value!r:.60}, expected {kind.__name__}")
        return value

    def id(self, key: str) -> int | None:
        """A special token's id; None where it is not given, or stands for none."""
        value = self.get(f"{key}_token_id", int)
        return value if value is not None and 0 <= value < len(self.tokens) else None


def from_metadata(metadata: Mapping[str, Any], path: Path) -> Tokenizer:
    """The tokenizer that `metadata` of the file `path` describes, with its special tokens and chat template.

    Raises TokenizerError, by name, for a kind of vocabulary or a pre-tokenizer that is not supported, and for a
    vocabulary that contradicts itself.
    """
    given = _given(metadata, path)
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in _KINDS:
        raise TokenizerError(f"{path}: tokenizer {kind!r:.60} is not supported; supported are {', '.join(_KINDS)}")
    try:
        backend, adds_bos = _KINDS[kind](given)
        _add_special(backend, given)
    except TokenizerError:
        raise
    except Exception as error:  # the library raises nothing narrower
        raise TokenizerError(f"{path}: the vocabulary is damaged: {' '.join(str(error).split())[:200]}") from error
    bos, eos = given.id("bos"), given.id("eos")
    _surround(backend, given, bos if given.get("add_bos_token", bool, adds_bos) else None, eos)
    template = metadata.get("tokenizer.chat_template")
    return Tokenizer(
        backend,
        bos_id=bos,
        eos_ids=_ends(given, eos),
        bos_token=None if bos is None else given.tokens[bos],
        eos_token=None if eos is None else given.tokens[eos],
        chat_template=template if isinstance(template, str) else None,
    )


def _given(metadata: Mapping[str, Any], path: Path) -> _Given:
    tokens, types = (metadata.get(f"tokenizer.ggml.{each}") for each in ("tokens", "token_type"))
    if not isinstance(tokens, list) or not tokens:
        raise TokenizerError(f"{path}: tokenizer.ggml.tokens is missing, or is no list of strings")
    types = _numbers(path, "token_type", types, len(tokens), 1)
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]
    if len({*tokens}) != len(tokens):
        (twice, _), *_ = Counter(tokens).most_common(1)
        raise TokenizerError(f"{path}: the token {twice!r:.60} is in the vocabulary twice")
    if (longest := max(map(len, tokens))) > _LONGEST:
        raise TokenizerError(f"{path}: a token has {longest} characters, at most {_LONGEST} are supported")
    rows = count = len(tokens)
    while count > 1 and types[count - 1] == _UNUSED and tokens[count - 1] == f"[PAD{count - 1}]":
        count -= 1
    return _Given(path, metadata, tokens[:count], [int(each) for each in types[:count]], rows)


def _numbers(path: Path, key: str, given: Any, count: int, default: float) -> Sequence[float]:
    if given is None:
        return [default] * count
    if not isinstance(given, np.ndarray) or len(given) != count or not np.isfinite(given).all():
        shown = f"{len(given)} values" if isinstance(given, (list, np.ndarray)) else repr(given)[:60]
        raise TokenizerError(f"{path}: tokenizer.ggml.{key} is {shown}, expected {count} numbers")
    return given.tolist()


def _sentencepiece(given: _Given) -> tuple[tokenizers.Tokenizer, bool]:
    """The best-scored pair of neighbours is merged first; what is not in the vocabulary falls back to bytes."""
    vocab = {token: i for i, token in enumerate(given.tokens)}
    scores = _numbers(given.path, "scores", given.metadata.get("tokenizer.ggml.scores"), given.rows, 0.0)[: len(vocab)]
    merged = [kind not in (_UNKNOWN, _CONTROL) for kind in given.types]
    unknown = given.id("unknown")
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab,
            merges_by_score(vocab, scores, merged),
            unk_token=None if unknown is None else given.tokens[unknown],
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    spaced = given.get("add_space_prefix", bool, True)
    steps: list[Any] = [normalizers.Prepend(_SPACE)] if spaced else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if spaced else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend, True


def _byte_level(given: _Given) -> tuple[tokenizers.Tokenizer, bool]:
    pre = _pre(given)
    vocab = {token: i for i, token in enumerate(given.tokens)}
    merges = given.get("merges", list)
    if merges is None:
        raise TokenizerError(f"{given.path}: tokenizer.ggml.merges is missing, which the vocabulary needs")
    backend = tokenizers.Tokenizer(models.BPE(vocab, [_parted(each) for each in merges], ignore_merges=pre.whole))
    splits: list[Any] = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.patterns]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    backend.decoder = decoders.ByteLevel()
    return backend, pre.bos


def _parted(merge: str) -> tuple[str, str]:
    """The two sides of a merge; the left one may begin with a space."""
    at = merge.find(" ", 1)
    return merge[:at], merge[at + 1 :]


def _pre(given: _Given) -> Pre:
    name = given.get("pre", str, "default")
    if name not in PRE:
        raise TokenizerError(
            f"{given.path}: pre-tokenizer {name!r:.60} is not supported; supported are {', '.join(PRE)}"
        )
    return PRE[name]


def _wordpiece(given: _Given) -> tuple[tokenizers.Tokenizer, bool]:
    """The first piece of a word is marked in GGUF, the others are in BERT's own vocabularies."""
    special = (_UNKNOWN, _CONTROL, _USER_DEFINED)
    names = [
        token if kind in special else token[1:] if token.startswith(_SPACE) else f"##{token}"
        for token, kind in zip(given.tokens, given.types, strict=True)
    ]
    unknown = given.id("unknown")
    backend = tokenizers.Tokenizer(
        models.WordPiece(
            {name: i for i, name in enumerate(names)}, unk_token="[UNK]" if unknown is None else names[unknown]
        )
    )
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return backend, True


_KINDS = {"llama": _sentencepiece, "gpt2": _byte_level, "bert": _wordpiece}


def _add_special(backend: tokenizers.Tokenizer, given: _Given) -> None:
    """Tokens that are found in a text before all others."""
    for kind, special in ((_USER_DEFINED, False), (_CONTROL, True), (_UNKNOWN, True)):
        found = [
            AddedToken(token, special=special, normalized=False)
            for token, each in zip(given.tokens, given.types, strict=True)
            if each == kind
        ]
        add = backend.add_special_tokens if special else backend.add_tokens
        add(found)


def _surround(backend: tokenizers.Tokenizer, given: _Given, bos: int | None, eos: int | None) -> None:
    """What is put before and after each text."""
    after = eos if given.get("add_eos_token", bool, False) else None
    if given.metadata["tokenizer.ggml.model"] == "bert" and given.get("add_sep_token", bool, True):
        after = given.id("seperator")
    if bos is None and after is None:
        return
    names = {given.tokens[each]: each for each in (bos, after) if each is not None}
    template = [*([given.tokens[bos]] if bos is not None else []), "$A"]
    template += [given.tokens[after]] if after is not None else []
    backend.post_processor = processors.TemplateProcessing(
        single=[f"{each}:0" for each in template], special_tokens=list(names.items())
    )


def _ends(given: _Given, eos: int | None) -> set[int]:
    """All tokens that end an answer."""
    ends = {*_ENDS.split()}
    named = {i for i, token in enumerate(given.tokens) if token in ends and given.types[i] == _CONTROL}
    if "<|return|>" in given.tokens:  # gpt-oss ends messages before the answer by <|end|>
        named -= {i for i in named if given.tokens[i] == "<|end|>"}
    return named | {each for each in (eos, given.id("eot"), given.id("eom")) if each is not None}
