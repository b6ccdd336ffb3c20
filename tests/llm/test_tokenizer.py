"""Reference ids of GPT-2 and Llama 2, llama2.c's own encoder, and streaming against decoding all at once."""

import json
import random
import shutil
import struct
import time
from itertools import pairwise
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from llm.errors import TokenizerError
from llm.tokenizer import Detokenizer, Tokenizer

DATA = Path(__file__).resolve().parents[2] / "../shared/data"
HARD_TEXTS = ["", " ", "   ", " " * 37, "\n\n", " a", "\t\tb\n", "naïve café", "你好 世界 龘靐齉", "👩\u200d👧"]
HARD_TEXTS += ["🏳️\u200d🌈 🙂", "�", "x � y", "<s> </s>"]


def shared(name: str) -> Path:
    path = DATA / name
    if not path.exists():
        pytest.skip(f"needs {name} in ../shared/data")
    return path


def directory(tmp_path: Path, name: str, **files: object) -> Path:
    """A Hugging Face directory with the named shared tokenizer and the JSON files given."""
    shutil.copyfile(shared(f"tokenizers/{name}_tokenizer.json"), tmp_path / "tokenizer.json")
    for stem, content in files.items():
        (tmp_path / f"{stem}.json").write_text(json.dumps(content))
    return tmp_path


_loaded: dict[str, Tokenizer] = {}


def load(name: str) -> Tokenizer:
    """gpt2 or llama2; loaded once, since Llama 2's takes a while."""
    if name not in _loaded:
        backend = tokenizers.Tokenizer.from_file(str(shared(f"tokenizers/{name}_tokenizer.json")))
        ids = {"gpt2": (50256, [50256]), "llama2": (1, [2])}[name]
        _loaded[name] = Tokenizer(backend, bos_id=ids[0], eos_ids=ids[1])
    return _loaded[name]


def small() -> tokenizers.Tokenizer:
    """A byte-level BPE without merges, for tests that need no real vocabulary."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<bos>", "<eos>"])
    return backend


def stream(tokenizer: Tokenizer, ids: list[int], skip_special: bool = True) -> str:
    detokenizer = Detokenizer(tokenizer, skip_special)
    return "".join(detokenizer.add(i) for i in ids) + detokenizer.finish()


@pytest.mark.parametrize(("name", "reference"), [("gpt2", "gpt2_encoded_tokens"), ("llama2", "llama_encoded")])
def test_reference_ids(name: str, reference: str) -> None:
    want = json.loads(shared(f"tokenizers/{reference}.json").read_text())
    tokenizer = load(name)
    ids = tokenizer.encode(want["text"])
    assert ids == want["token_ids"]
    assert tokenizer.decode(ids) == stream(tokenizer, ids) == want["text"]
    assert stream(tokenizer, ids, skip_special=False) == tokenizer.decode(ids, skip_special=False)


@pytest.mark.parametrize("name", ["gpt2", "llama2"])
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_streaming_equals_decoding_random_ids(name: str, data: st.DataObject) -> None:
    tokenizer = load(name)
    some = st.integers(0, tokenizer.vocab_size + 5)
    few = st.integers(0, 300)  # mostly single bytes: broken and split characters
    ids = data.draw(st.lists(st.one_of(some, few), max_size=40))
    for skip in (True, False):
        assert stream(tokenizer, ids, skip) == tokenizer.decode(ids, skip)


@pytest.mark.parametrize("name", ["gpt2", "llama2"])
@settings(max_examples=100, deadline=None)
@given(text=st.one_of(st.text(max_size=30), st.text("你好世界龘靐🙂🏳️‍🌈é \n�", max_size=30)), bos=st.booleans())
def test_streaming_equals_decoding_texts(name: str, text: str, bos: bool) -> None:
    tokenizer = load(name)
    ids = tokenizer.encode(text, bos=bos)
    assert stream(tokenizer, ids) == tokenizer.decode(ids)


@pytest.mark.parametrize("name", ["gpt2", "llama2"])
@pytest.mark.parametrize("text", HARD_TEXTS)
def test_round_trip(name: str, text: str) -> None:
    tokenizer = load(name)
    ids = tokenizer.encode(text, bos=False)
    assert stream(tokenizer, ids, skip_special=False) == tokenizer.decode(ids, skip_special=False)
    if "<s>" not in text or name == "gpt2":
        assert stream(tokenizer, ids) == text


def test_pieces_are_final() -> None:
    """No piece ends within a character, and nothing that is certain is held back."""
    tokenizer = Tokenizer(small())
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.add(i) for i in tokenizer.encode("a🙂é b")]
    assert pieces == ["a", "", "", "", "🙂", "", "é", " ", "b"]
    assert detokenizer.finish() == ""
    byte = {b: tokenizer.encode(chr(b))[-1] for b in (0x80, 0xE9)}  # é and U+0080 end in these bytes' tokens
    assert [detokenizer.add(byte[0x80]) for _ in range(3)] == ["�", "�", "�"]
    assert detokenizer.add(tokenizer.encode("é")[0]) == ""
    assert detokenizer.finish() == "�"
    assert detokenizer.finish() == ""


def test_llama_gives_the_byte_run_with_the_next_token() -> None:
    tokenizer = load("llama2")
    detokenizer = Detokenizer(tokenizer)
    newline = tokenizer.token_to_id("<0x0A>")
    assert newline is not None
    assert [detokenizer.add(i) for i in [*tokenizer.encode("Hi"), newline]] == ["", "Hi", ""]
    assert detokenizer.add(tokenizer.encode("you", bos=False)[0]) == "\n you"


def test_streaming_with_an_empty_token(seed: int, tmp_path: Path) -> None:
    """A token without text must not make the next one look like the first, whose space is dropped."""
    pieces, rng = [*special_and_bytes(), b"", b" ", b" a", b"b"], random.Random(seed)
    path = write_llama2c(tmp_path / "tok.bin", pieces, [-float(i) for i in range(len(pieces))])
    tokenizer = Tokenizer.from_llama2c(path, len(pieces))
    assert stream(tokenizer, [1, 261, 259, 261]) == "a a"
    for _ in range(200):
        ids = rng.choices([0, 1, 43, 198, 172, *range(259, 263)], k=rng.randrange(12))
        assert stream(tokenizer, ids) == tokenizer.decode(ids), ids


@pytest.mark.parametrize("name", ["gpt2", "llama2"])
@pytest.mark.parametrize("kind", ["words", "one token", "broken bytes"])
def test_streaming_cost_does_not_grow(name: str, kind: str) -> None:
    tokenizer = load(name)
    byte = tokenizer.token_to_id("<0x80>") if name == "llama2" else tokenizer.encode("\u0080")[-1]
    assert byte is not None
    one = tokenizer.encode(" and", bos=False)
    many = {"words": tokenizer.encode("and then 你好 🙂 ", bos=False), "one token": one, "broken bytes": [byte]}[kind]

    def seconds(count: int) -> float:
        ids = (many * count)[:count]
        best = float("inf")
        for _ in range(3):
            start = time.perf_counter()
            stream(tokenizer, ids)
            best = min(best, time.perf_counter() - start)
        return best

    assert seconds(8000) < 40 * seconds(500)  # 16 when linear, 256 when quadratic


@pytest.mark.parametrize(
    ("files", "eos", "token"),
    [
        ({"generation_config": {"eos_token_id": [2, 13]}, "config": {"eos_token_id": 7}}, {2, 13}, "</s>"),
        ({"generation_config": {}, "config": {"eos_token_id": 7}}, {7}, "</s>"),
        ({}, {2}, "</s>"),
    ],
)
def test_configured_ids_win(tmp_path: Path, files: dict, eos: set[int], token: str) -> None:
    names = {"bos_token": {"content": "<s>", "special": True}, "eos_token": "</s>", "chat_template": "{{ 1 }}"}
    tokenizer = Tokenizer.from_directory(directory(tmp_path, "llama2", tokenizer_config=names, **files))
    assert (tokenizer.eos_ids, tokenizer.eos_token, tokenizer.bos_id) == (eos, token, 1)
    assert (tokenizer.bos_token, tokenizer.chat_template, tokenizer.vocab_size) == ("<s>", "{{ 1 }}", 32000)


def write_small(path: Path, **files: object) -> Path:
    small().save(str(path / "tokenizer.json"))
    for stem, content in files.items():
        (path / f"{stem}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_directory_without_names(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_directory(write_small(tmp_path, config={"bos_token_id": 256, "eos_token_id": [257]}))
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<bos>", "<eos>")
    assert tokenizer.chat_template is None
    (tmp_path / "config.json").unlink()
    bare = Tokenizer.from_directory(tmp_path)
    assert (bare.bos_id, bare.eos_ids, bare.bos_token, bare.eos_token) == (None, frozenset(), "", "")
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "<eos>"}')
    assert Tokenizer.from_directory(tmp_path).eos_ids == {257}


def test_chat_template_sources(tmp_path: Path) -> None:
    several = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    write_small(tmp_path, tokenizer_config={"chat_template": several})
    assert Tokenizer.from_directory(tmp_path).chat_template == "D"
    (tmp_path / "chat_template.jinja").write_text("é J")
    assert Tokenizer.from_directory(tmp_path).chat_template == "é J"


def test_no_second_bos() -> None:
    llama = load("llama2")
    assert llama.encode("Hi")[:1] == [1] and llama.encode("Hi", bos=False)[0] != 1
    assert llama.encode("<s>Hi").count(1) == 1
    gpt2 = load("gpt2")  # never adds its bos, so two in the text stay two
    assert gpt2.encode("<|endoftext|><|endoftext|>Hi")[:2] == [50256, 50256]
    assert gpt2.encode("Hi") == gpt2.encode("Hi", bos=False)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer_config": "{"}, r"tokenizer_config\.json cannot be read"),
        ({"config": "[]"}, r"config\.json holds a list; expected a JSON object"),
        ({"generation_config": {"eos_token_id": "</s>"}}, r"eos_token_id is '</s>'; expected an id"),
        ({"generation_config": {"eos_token_id": [True]}}, r"eos_token_id is \[True\]"),
        ({"tokenizer_config": {"bos_token": 3}}, r"bos_token is 3; expected a string"),
        ({"tokenizer_config": {"eos_token": "<nowhere>"}}, r"'<nowhere>' is not in the vocabulary"),
        ({"tokenizer_config": {"chat_template": 3}}, r"chat_template is not a string"),
    ],
)
def test_damaged_directory(tmp_path: Path, files: dict, message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_directory(write_small(tmp_path, **files))


def test_missing_and_truncated_tokenizer_json(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"No tokenizer\.json in"):
        Tokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer.model").touch()
    with pytest.raises(TokenizerError, match=r"It has tokenizer\.model: convert"):
        Tokenizer.from_directory(tmp_path)
    write_small(tmp_path)
    content = (tmp_path / "tokenizer.json").read_bytes()
    for size in (0, 1, len(content) // 2, len(content) - 2):
        (tmp_path / "tokenizer.json").write_bytes(content[:size])
        with pytest.raises(TokenizerError, match=r"tokenizer\.json cannot be read") as error:
            Tokenizer.from_directory(tmp_path)
        assert "\n" not in str(error.value)


def test_check_fits_and_lookups() -> None:
    tokenizer = Tokenizer(small())
    tokenizer.check_fits(258)
    tokenizer.check_fits(300)
    with pytest.raises(TokenizerError, match=r"ids reach 257 \('<eos>'\) but the model's embedding has 257 rows"):
        tokenizer.check_fits(257)
    assert tokenizer.id_to_token(257) == "<eos>" and tokenizer.token_to_id("<eos>") == 257
    assert tokenizer.id_to_token(258) is tokenizer.id_to_token(-1) is tokenizer.id_to_token(2**40) is None
    assert tokenizer.token_to_id("nothing") is None
    with pytest.raises(TokenizerError, match="lone surrogate at position 2"):
        tokenizer.encode("ab\udc80")


def write_llama2c(path: Path, pieces: list[bytes], scores: list[float]) -> Path:
    body = b"".join(struct.pack("<fi", s, len(p)) + p for p, s in zip(pieces, scores, strict=True))
    path.write_bytes(struct.pack("<i", max(map(len, pieces))) + body)
    return path


def read_llama2c(path: Path) -> tuple[list[bytes], list[float]]:
    data, offset, pieces, scores = path.read_bytes(), 4, [], []
    while offset < len(data):
        score, length = struct.unpack_from("<fi", data, offset)
        pieces.append(data[offset + 8 : offset + 8 + length])
        scores.append(score)
        offset += 8 + length
    return pieces, scores


def reference_encode(pieces: list[bytes], scores: list[float], text: str) -> list[int]:
    """llama2.c's `encode` with bos: characters or bytes, then the best pair, the first of equals, until none."""
    lookup = {piece: i for i, piece in enumerate(pieces)}
    ids = [1, lookup[b" "]] if text else [1]
    for character in text:
        encoded = character.encode()
        ids += [lookup[encoded]] if encoded in lookup else [byte + 3 for byte in encoded]
    while True:
        pairs = [lookup.get(pieces[a] + pieces[b], -1) for a, b in pairwise(ids)]
        best = max((i for i, id in enumerate(pairs) if id >= 0), key=lambda i: (scores[pairs[i]], -i), default=None)
        if best is None:
            return ids
        ids[best : best + 2] = [pairs[best]]


def special_and_bytes() -> list[bytes]:
    return [b"<unk>", b"\n<s>\n", b"\n</s>\n", *(b"<0x%02X>" % byte for byte in range(256))]


def trained(rng: random.Random) -> tuple[list[bytes], list[float]]:
    """Random merges, the later the lower the score; then characters; then runs of spaces that tie, as Llama 2 has."""
    characters = " abc"[: rng.randrange(2, 5)]
    merged: list[str] = []
    while len(merged) < rng.randrange(5, 60):
        left, right = (rng.choice([*characters, *merged]) for _ in range(2))
        if len(left + right) < 12 and (left + right).strip() and left + right not in merged:
            merged.append(left + right)
    distinct, runs = [*merged, *characters], [" " * n for n in range(2, rng.randrange(3, 18))]
    scores = [0.0] * 259 + [-float(i) for i in range(len(distinct))] + [-1e9] * len(runs)
    return special_and_bytes() + [token.encode() for token in distinct + runs], scores


def test_llama2c_encodes_as_llama2c(seed: int, tmp_path: Path) -> None:
    path, rng = shared("stories260K/tok512.bin"), random.Random(seed)
    pieces, scores = read_llama2c(path)
    tokenizer = Tokenizer.from_llama2c(path, 512)
    tokenizer.check_fits(512)
    alphabets = ["the andwas ,.\n", "  ab\n\t", "abcdefghijklmnopqrstuvwxyz .,!'\"", "é“”—😀漢字ñ\u200b a", "<0x0A>s/ "]
    for _ in range(500):
        text = "".join(rng.choices(rng.choice(alphabets), k=rng.randrange(60)))
        ids = tokenizer.encode(text)
        assert ids == reference_encode(pieces, scores, text), repr(text)
        assert tokenizer.encode(text, bos=False) == ids[1:]
        assert tokenizer.decode(ids) == stream(tokenizer, ids) == text


def test_llama2c_random_vocabularies(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    for _ in range(20):
        pieces, scores = trained(rng)
        tokenizer = Tokenizer.from_llama2c(write_llama2c(tmp_path / "tok.bin", pieces, scores), len(pieces))
        for _ in range(50):
            text = "".join(rng.choices(rng.choice([" abcé", "   a"]), k=rng.randrange(40)))
            assert tokenizer.encode(text) == reference_encode(pieces, scores, text), repr(text)


def test_llama2c_from_llama2_gives_llama2s_ids(tmp_path: Path) -> None:
    """Llama 2's vocabulary in the form of llama2.c's tok.bin: scores fall with the id, runs of spaces have -1e9."""
    llama = load("llama2")
    pieces = [(llama.id_to_token(i) or "").replace("▁", " ").encode() for i in range(llama.vocab_size)]
    scores = [-1e9 if not piece.strip(b" ") else -float(max(i - 259, 0)) for i, piece in enumerate(pieces)]
    tokenizer = Tokenizer.from_llama2c(write_llama2c(tmp_path / "tok.bin", pieces, scores), llama.vocab_size)
    for text in [json.loads(shared("tokenizers/llama_encoded.json").read_text())["text"], *HARD_TEXTS]:
        if "<s>" not in text:
            assert tokenizer.encode(text) == llama.encode(text)
    assert 1 not in tokenizer.encode("<s>", bos=False)  # text is only text to llama2.c


def test_llama2c_story() -> None:
    tokenizer = Tokenizer.from_llama2c(shared("stories260K/tok512.bin"), 512)
    story = shared("stories260K/greedy.txt").read_text()
    assert stream(tokenizer, tokenizer.encode(story)) == story


def test_damaged_llama2c(seed: int, tmp_path: Path) -> None:
    pieces, scores = trained(random.Random(seed))
    path, size = tmp_path / "tok.bin", len(pieces)
    content = write_llama2c(path, pieces, scores).read_bytes()
    assert Tokenizer.from_llama2c(path, size).vocab_size == size

    def fails(changed: bytes, message: str, count: int = size) -> None:
        path.write_bytes(changed)
        with pytest.raises(TokenizerError, match=message):
            Tokenizer.from_llama2c(path, count)

    for cut in (0, 3, 4, 9, len(content) // 2, len(content) - 1):
        fails(content[:cut], "ends within token")
    fails(content, f"ends within token {size}, the model has {size + 1}", size + 1)
    fails(content, "goes on for", size - 1)
    fails(content[:8] + struct.pack("<i", -1) + content[12:], "token 0 has length -1")
    fails(content[:8] + struct.pack("<i", 10**9) + content[12:], "token 0 has length 1000000000")
    fails(content[:12] + b"\xff" + content[13:], "token 0 is not UTF-8")
    fails(content.replace(b"<0x41>", b"<0y41>"), "not a llama2.c tokenizer")
    fails(write_llama2c(path, [*pieces[:-1], pieces[-2]], scores).read_bytes(), "1 tokens occur twice")
    path.unlink()
    with pytest.raises(TokenizerError, match="cannot be read: No such file"):
        Tokenizer.from_llama2c(path, size)
