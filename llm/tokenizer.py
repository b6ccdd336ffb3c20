"""Text to token ids and back, over the `tokenizers` library: a Hugging Face directory or llama2.c's `tok*.bin`."""

import json
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, processors

from llm.errors import TokenizerError

REPLACEMENT = "\ufffd"
# What a byte-level BPE calls the bytes 0x80 and 0xBF: between them they continue every unfinished UTF-8 character.
CONTINUATION_BYTES = ("Ģ", "¿")


class Tokenizer:
    """A vocabulary with its special tokens and chat template; decoding is that of the `tokenizers` library.

    `bos_id` is None when the vocabulary has none; `eos_ids` are all ids that end a generation; `bos_token` and
    `eos_token` are the strings that a chat template is given ("" when there is none).
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_id: int | None = None,
        eos_ids: Iterable[int] = (),
        bos_token: str | None = None,
        eos_token: str | None = None,
        chat_template: str | None = None,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.bos_id = bos_id
        self.eos_ids = frozenset(eos_ids)
        self.bos_token = bos_token or ""
        self.eos_token = eos_token or ""
        self.chat_template = chat_template
        self.special_ids = frozenset(i for i, token in backend.get_added_tokens_decoder().items() if token.special)
        self.vocab_size = 1 + max(backend.get_vocab(with_added_tokens=True).values(), default=-1)
        # Only the post-processor knows whether bos is put in front: GPT-2 has a bos token and never adds it.
        self._adds_bos = bos_id is not None and backend.encode("").ids[:1] == [bos_id]
        self._decoder = backend.decoder

    @classmethod
    def from_directory(cls, path: Path) -> "Tokenizer":
        """Read `tokenizer.json`; names, ids and template come from the optional files beside it, as in transformers.

        The ids in generation_config.json win, then config.json's, then the tokens that tokenizer_config.json or
        special_tokens_map.json names. `chat_template.jinja` wins over tokenizer_config.json's `chat_template`.

        Raises TokenizerError: a file is missing or damaged, or names a token that is not in the vocabulary.
        """
        path = Path(path)
        backend = _load_backend(path / "tokenizer.json")
        settings = _read_json(path / "tokenizer_config.json")
        backend.encode_special_tokens = settings.get("split_special_tokens") is True  # text never matches them
        names = _read_json(path / "special_tokens_map.json") | {k: v for k, v in settings.items() if v is not None}
        bos_token, eos_token = _token_name(names, "bos_token", path), _token_name(names, "eos_token", path)
        bos_ids = _configured_ids(path, "bos_token_id") or _ids_of(backend, bos_token, path)
        eos_ids = _configured_ids(path, "eos_token_id") or _ids_of(backend, eos_token, path)
        if not names:  # only config.json is there: the ids are all that is known
            bos_token, eos_token = (backend.id_to_token(ids[0]) if ids else None for ids in (bos_ids, eos_ids))
        return cls(
            backend,
            bos_id=bos_ids[0] if bos_ids else None,
            eos_ids=eos_ids,
            bos_token=bos_token,
            eos_token=eos_token,
            chat_template=_chat_template(path, settings),
        )

    @classmethod
    def from_llama2c(cls, path: Path, vocab_size: int) -> "Tokenizer":
        """Read llama2.c's `tok*.bin` (int32 longest token; then float32 score, int32 length, bytes per token).

        Encodes as llama2.c's `encode`: a space in front, then the best-scored adjacent pair is merged, leftmost first,
        until none is left; what is not in the vocabulary falls back to bytes. Equal for scores as SentencePiece gives
        them: distinct, but for the runs of spaces, which tie. Text never matches the special tokens 0, 1 (bos), 2.

        Raises TokenizerError: the file is missing, truncated, damaged or does not hold exactly `vocab_size` tokens.
        """
        pieces, scores = _read_llama2c(Path(path), vocab_size)
        vocab = {piece: i for i, piece in enumerate(pieces)}
        if len(vocab) != vocab_size:
            raise TokenizerError(f"{path}: {vocab_size - len(vocab)} tokens occur twice; not a llama2.c tokenizer.")
        merged = [id > 2 for id in range(vocab_size)]
        model = models.BPE(
            vocab, merges_by_score(vocab, scores, merged), unk_token="<unk>", byte_fallback=True, fuse_unk=False
        )
        backend = tokenizers.Tokenizer(model)
        backend.normalizer = normalizers.Prepend(" ")
        backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        backend.add_special_tokens(["<unk>", "<s>", "</s>"])
        backend.encode_special_tokens = True
        # Its training data put a bos between texts and no eos: run.c ends at bos.
        return cls(backend, bos_id=1, eos_ids=(1, 2), bos_token="<s>", eos_token="</s>")

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Token ids; `bos` adds the special tokens that the tokenizer itself adds, never a second bos.

        Raises TokenizerError: the text is not valid Unicode (a lone surrogate).
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise TokenizerError(
                f"The text is not valid Unicode: a lone surrogate at position {error.start}. Give it as UTF-8."
            ) from error
        ids = self.backend.encode(text, add_special_tokens=bos).ids
        if bos and self._adds_bos and ids[1:2] == [self.bos_id]:
            del ids[0]
        return ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of the ids; ids that are not in the vocabulary have none."""
        # By id: the library's own skipping misses special tokens that are declared `normalized`, as Llama 2's are.
        shown = [i for i in ids if not (skip_special and i in self.special_ids)]
        return self.backend.decode(shown, skip_special_tokens=False)

    def decode_tokens(self, tokens: list[str]) -> str:
        """The text of tokens given as they are spelt in the vocabulary."""
        return self._decoder.decode(tokens) if self._decoder is not None else " ".join(tokens)

    def id_to_token(self, id: int) -> str | None:
        """The token as it is spelt in the vocabulary, None when there is none."""
        return self.backend.id_to_token(id) if 0 <= id < self.vocab_size else None

    def token_to_id(self, token: str) -> int | None:
        return self.backend.token_to_id(token)

    def check_fits(self, embedding_rows: int) -> None:
        """Raises TokenizerError when the tokenizer can give an id for which the embedding has no row."""
        if self.vocab_size > embedding_rows:
            last = self.vocab_size - 1
            raise TokenizerError(
                f"The tokenizer's ids reach {last} ({self.id_to_token(last)!r}) but the model's embedding has "
                f"{embedding_rows} rows. Use the tokenizer that belongs to this model."
            )

    def save(self, directory: Path) -> None:
        """Write what `from_directory` reads: tokenizer.json, tokenizer_config.json, the ids and the template."""
        self.backend.save(str(directory / "tokenizer.json"))
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self.bos_token or None,
            "eos_token": self.eos_token or None,
            "split_special_tokens": self.backend.encode_special_tokens,
        }
        _write_json(directory / "tokenizer_config.json", settings)
        _write_json(
            directory / "generation_config.json", {"bos_token_id": self.bos_id, "eos_token_id": sorted(self.eos_ids)}
        )
        if self.chat_template is not None:
            (directory / "chat_template.jinja").write_text(self.chat_template, "utf-8")

    def __repr__(self) -> str:
        return f"Tokenizer(vocab_size={self.vocab_size}, bos_id={self.bos_id}, eos_ids={sorted(self.eos_ids)})"


class Detokenizer:
    """Streaming decode: the pieces that `add` and `finish` return join to `decode` of all ids.

    A piece is given out once no later token can change it. Only a window is decoded: the tokens of the last piece
    (`_tokens[:_shown]`), which tell how the next one begins (SentencePiece drops a space only at the very start),
    and those after it. Each token is so decoded a bounded number of times. `after` are ids whose text came before.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True, after: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special else frozenset()
        self._byte_fallback = tokenizer.decode_tokens(["<0x41>"]) == "A"
        self._tokens = [
            token for id in after[-8:] if id not in self._skipped and (token := tokenizer.id_to_token(id)) is not None
        ]
        self._shown = len(self._tokens)
        self._shown_text = tokenizer.decode_tokens(self._tokens) if self._tokens else ""
        if self._inside_character(self._shown_text):  # which comes whole, with what continues it
            self._shown_text = self._shown_text.rstrip(REPLACEMENT)

    def add(self, id: int) -> str:
        """The text that has become final with this token, "" when there is none yet."""
        token = self._tokenizer.id_to_token(id)
        if token is None or id in self._skipped:
            return ""
        self._tokens.append(token)
        # A run of byte tokens is decoded as a whole: one bad byte turns all of it into replacement characters.
        if self._byte_fallback and _is_byte(token):
            return ""
        text = self._tokenizer.decode_tokens(self._tokens)
        return "" if self._inside_character(text) else self._advance(text)

    def finish(self) -> str:
        """What was held back; the detokenizer is then as new."""
        piece = self._tokenizer.decode_tokens(self._tokens)[len(self._shown_text) :] if self._tokens else ""
        self._tokens, self._shown, self._shown_text = [], 0, ""
        return piece

    def _inside_character(self, text: str) -> bool:
        """Whether a continuation byte would change the end of `text`, rather than stand there as one more bad byte."""
        if self._byte_fallback or not text.endswith(REPLACEMENT):
            return False
        decode = self._tokenizer.decode_tokens
        return any(decode([*self._tokens, byte]) != text + REPLACEMENT for byte in CONTINUATION_BYTES)

    def _advance(self, text: str) -> str:
        piece = text[len(self._shown_text) :]
        if piece:  # without text, the window keeps the tokens that tell how the next piece begins
            del self._tokens[: self._shown]
            self._shown = len(self._tokens)
            self._shown_text = self._tokenizer.decode_tokens(self._tokens)
        return piece


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _load_backend(file: Path) -> tokenizers.Tokenizer:
    if not file.is_file():
        other = [name for name in ("tokenizer.model", "tekken.json", "vocab.json") if (file.parent / name).is_file()]
        found = f" It has {other[0]}: convert it with transformers' save_pretrained." if other else ""
        raise TokenizerError(f"No tokenizer.json in {file.parent}.{found}")
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        raise TokenizerError(f"{file} cannot be read: {_one_line(error)}. Download it again.") from error


def _read_json(file: Path) -> dict[str, Any]:
    """The object in `file`, {} when there is no such file."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TokenizerError(f"{file} cannot be read: {_one_line(error)}. Download it again.") from error
    if not isinstance(content, dict):
        raise TokenizerError(f"{file} holds a {type(content).__name__}; expected a JSON object.")
    return content


def _write_json(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n", "utf-8")


def _token_name(names: dict[str, Any], key: str, path: Path) -> str | None:
    """A special token is written as a string, as an AddedToken object, or as null."""
    value = names.get(key)
    name = value.get("content") if isinstance(value, dict) else value
    if name is not None and not isinstance(name, str):
        raise TokenizerError(f"{path}: {key} is {value!r}; expected a string or an object with `content`.")
    return name


def _configured_ids(path: Path, key: str) -> list[int]:
    for file in ("generation_config.json", "config.json"):
        value = _read_json(path / file).get(key)
        if value is not None:
            ids = value if isinstance(value, list) else [value]
            if not all(type(i) is int and i >= 0 for i in ids):
                raise TokenizerError(f"{path / file}: {key} is {value!r}; expected an id or a list of ids.")
            return ids
    return []


def _ids_of(backend: tokenizers.Tokenizer, token: str | None, path: Path) -> list[int]:
    if token is None:
        return []
    if (id := backend.token_to_id(token)) is None:
        raise TokenizerError(f"{path}: the special token {token!r} is not in the vocabulary of tokenizer.json.")
    return [id]


def _chat_template(path: Path, settings: dict[str, Any]) -> str | None:
    file = path / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise TokenizerError(f"{file} cannot be read: {_one_line(error)}. Download it again.") from error
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, named: `default`, `tool_use`, `rag`
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise TokenizerError(f"{path / 'tokenizer_config.json'}: chat_template is not a string.")
    return template


def _read_llama2c(path: Path, vocab_size: int) -> tuple[list[str], list[float]]:
    """The tokens and their scores; the three special tokens under their usual names."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TokenizerError(f"{path} cannot be read: {error.strerror}.") from error
    pieces, scores, offset = [], [], 4
    try:
        (longest,) = struct.unpack_from("<i", data)
        for i in range(vocab_size):
            score, length = struct.unpack_from("<fi", data, offset)
            end = offset + 8 + length
            if not 0 <= length <= longest:
                raise TokenizerError(f"{path} is damaged: token {i} has length {length}, the longest is {longest}.")
            if end > len(data):
                raise struct.error
            pieces.append(data[offset + 8 : end].decode())
            scores.append(score)
            offset = end
    except struct.error as error:
        raise TokenizerError(
            f"{path} ends within token {len(pieces)}, the model has {vocab_size}: "
            "the file is truncated or belongs to another model."
        ) from error
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path} is damaged: token {len(pieces)} is not UTF-8.") from error
    if offset != len(data):
        raise TokenizerError(
            f"{path} goes on for {len(data) - offset} bytes after the model's {vocab_size} tokens: "
            "it belongs to another model."
        )
    # llama2.c itself takes byte b for token 3 + b.
    if pieces[3:259] != [f"<0x{byte:02X}>" for byte in range(256)]:
        raise TokenizerError(f"{path}: tokens 3 to 258 are not the bytes <0x00> to <0xFF>; not a llama2.c tokenizer.")
    return ["<unk>", "<s>", "</s>", *pieces[3:]], scores


def merges_by_score(vocab: dict[str, int], scores: Sequence[float], merged: Sequence[bool]) -> list[tuple[str, str]]:
    """All pairs of tokens whose concatenation is a token, best score first; `merged` says which ids may take part.

    llama2.c takes the leftmost of equal scores, but a merge's rank cannot depend on its place. For the runs of spaces,
    which all tie, longest left part first comes to the same: the first run grows by one space at a time.
    """
    ranked = []
    parts = {token for token, id in vocab.items() if merged[id]}
    for token in parts:
        for i in range(1, len(token)):
            left, right = token[:i], token[i:]
            if left in parts and right in parts:
                ranked.append((-scores[vocab[token]], -i, left, right))
    return [(left, right) for *_, left, right in sorted(ranked)]
