"""Generation: the right text, in pieces that join to it, stopped where it should, resumed where it was."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llm
import ops
from llm import generate
from llm.errors import ContextOverflow
from llm.tokenizer import Detokenizer

from . import small

STORIES = Path(__file__).resolve().parents[2] / "../shared/data/stories260K"
LIMIT = small.CONFIG["max_position_embeddings"]


@pytest.fixture
def model(rng: np.random.Generator) -> Any:
    """Nothing ends its text but the length: what a random model says next is chance."""
    result = small.model(rng)
    result.tokenizer.eos_ids = frozenset()
    return result


@pytest.fixture(scope="module")
def stories() -> Any:
    if not STORIES.is_dir():
        pytest.skip("needs stories260K in ../shared/data")
    return llm.load(STORIES / "stories260K.bin")


def told(model: Any, tokens: list[int]) -> str:
    return model.tokenizer.decode(tokens)


def test_a_trained_model_tells_its_story(stories):
    wanted = (STORIES / "greedy.txt").read_bytes()
    story = stories.generate("", max_tokens=256)  # as many positions as llama2.c takes by default
    assert story.encode() == wanted
    assert (len(story.tokens), story.finish_reason) == (256, "length")
    assert wanted.startswith(stories.generate("", max_tokens=200).encode())


def test_it_begins_alike_with_eight_bits_and_a_half_precision_cache(stories):
    story = llm.load(STORIES / "stories260K.bin", weights="q8").generate("", max_tokens=100)
    assert story.startswith("Once upon a time, there was a little girl named Lily. She loved to play outside in the")
    assert stories.generate("", max_tokens=200, cache_dtype="float16") == stories.generate("", max_tokens=200)


def test_a_prompt_goes_on_as_if_it_had_been_written(stories):
    story = stories.generate("", max_tokens=100)
    for words in (1, 3, 10):
        prompt = " ".join(story.split(" ")[:words])  # the space that follows is the first of what is generated
        taken = len(stories.tokenizer.encode(prompt)) - 1
        assert prompt + stories.generate(prompt, max_tokens=100 - taken) == story


def test_a_story_ends_where_the_next_begins(stories):
    whole = stories.generate("", max_tokens=512)
    assert whole.finish_reason == "stop"
    assert len(whole.tokens) < 400
    assert whole.rstrip().endswith((".", "!", '"'))


def test_pieces_join_to_the_whole(model, rng):
    for temperature in (0.0, 1.5):
        options: dict[str, Any] = {"max_tokens": 60, "temperature": temperature, "seed": int(rng.integers(2**31))}
        stream = model.stream("Begin", **options)
        pieces = list(stream)
        whole = model.generate("Begin", **options)
        assert "".join(pieces) == whole == told(model, whole.tokens)
        assert stream.tokens == whole.tokens
        assert pieces[-1].token == whole.tokens[-1]
        assert stream.finish() == whole  # when it is over
        half = model.stream("Begin", **options)
        taken = list(itertools.islice(half, 5))
        assert half.finish() == whole  # and when some pieces were taken before
        assert "".join(taken) == "".join(pieces[:5])


class Scripted(llm.Module):
    """A head that makes a model say `text`, and then end."""

    def __init__(self, model: Any, text: str):
        self._ids = iter([*model.tokenizer.encode(text, bos=False), 257])

    def forward(self, x: ops.Tensor) -> ops.Tensor:
        logits = np.full((1, 258), -5.0, "float32")
        logits[0, next(self._ids)] = 5.0
        return ops.tensor(logits)


def says(model: Any, text: str, **options: Any) -> tuple[Any, list[str]]:
    """The stream of a model that says `text`, run to its end, and its pieces."""
    model.tokenizer.eos_ids = frozenset({small.EOS})
    model.lm_head = Scripted(model, text)
    stream = model.stream("x", **options)
    with ops.intercepted(ops.Interceptor()):  # while somebody looks on, there is no dry run that would call the head
        return stream, [str(piece) for piece in stream]


def test_characters_come_whole(model):
    stream, pieces = says(model, "a🙂é你b")
    assert pieces == ["a", "🙂", "é", "你", "b"]
    assert (len(stream.tokens), stream.finish_reason) == (11, "stop")
    stream, pieces = says(model, "a🙂", max_tokens=3)  # cut within the character
    assert pieces == ["a", "\ufffd"]
    assert stream.finish_reason == "length"


@pytest.mark.parametrize(
    ("text", "stop", "wanted"),
    [
        ("one two three", "two", ["o", "n", "e", " "]),
        ("one twin two", "two", ["o", "n", "e", " ", "twi", "n", " "]),
        ("aaab", "aab", ["a"]),
        ("one two", ["nothing", "e t"], ["o", "n"]),
        ("one two", ["two", "wo"], ["o", "n", "e", " "]),
        ("one two", "🙂", list("one two")),
        ("x🙂y", "🙂", ["x"]),
        ("one tw", "two", ["o", "n", "e", " ", "tw"]),
        ("one", "one", []),
        ("one", ["", "e"], ["o", "n"]),
    ],
)
def test_stops(model, text, stop, wanted):
    stream, pieces = says(model, text, stop=stop)
    assert pieces == wanted
    assert stream.finish_reason == "stop"
    assert stream.finish() == "".join(wanted)


def test_a_stop_in_what_is_held_back_to_the_end(model):
    stream, pieces = says(model, "ab🙂", stop="\ufffd", max_tokens=4)  # the broken character comes at the end
    assert pieces == ["a", "b"]
    assert stream.finish_reason == "stop"


def test_no_tokens(model):
    nothing = model.generate("Hi", max_tokens=0)
    assert (nothing, nothing.tokens, nothing.logprobs, nothing.finish_reason) == ("", [], [], "length")


def test_logprobs(model):
    made = model.generate("Hi", max_tokens=12, logprobs=3, temperature=1.0, seed=1)
    assert len(made.logprobs) == len(made.top_logprobs) == len(made.tokens) == 12
    prompt = model.tokenizer.encode("Hi")
    logits = model([*prompt, *made.tokens]).numpy()[len(prompt) - 1 : -1].astype("float64")
    exact = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    for i, token in enumerate(made.tokens):
        assert made.logprobs[i] == pytest.approx(exact[i, token], abs=1e-4)
        best = np.argsort(-exact[i])[:3]
        assert [id for id, _ in made.top_logprobs[i]] == best.tolist()
        np.testing.assert_allclose([p for _, p in made.top_logprobs[i]], exact[i, best], atol=1e-4)
    for piece in model.stream("Hi", max_tokens=5, logprobs=2):
        assert piece.logprob == piece.top_logprobs[0][1]
        assert piece.token == piece.top_logprobs[0][0]
    assert model.generate("Hi", max_tokens=2).top_logprobs == []


def test_seeds(model):
    def tokens(**options: Any) -> list[int]:
        return model.generate("Hi", max_tokens=30, temperature=2.0, **options).tokens

    assert tokens(seed=5) == tokens(seed=5)
    assert tokens(seed=5) != tokens(seed=6)
    assert tokens() != tokens()


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1},
        {"temperature": "hot"},
        {"top_k": -1},
        {"top_k": 1.5},
        {"top_p": 0.0},
        {"min_p": 2},
        {"repetition_penalty": 0},
        {"seed": -1},
        {"max_tokens": -1},
        {"max_tokens": 2.5},
        {"max_tokens": None},
        {"logprobs": -1},
        {"stop": 5},
        {"stop": ["a", 5]},
        {"temp": 1.0},
    ],
)
def test_options_are_checked_before_anything_runs(model, options):
    with pytest.raises(llm.UserError) as caught:
        model.stream("Hi", **options)
    (name, value), message = next(iter(options.items())), str(caught.value)
    assert name in message
    assert "\n" not in message
    assert repr(value) in message or name == "temp"


@pytest.mark.parametrize("ids", [[], [1.5], ["a"], [-1], [258], [[1]], None])
def test_ids_are_checked(model, ids):
    with pytest.raises(llm.UserError, match=r"ids must be a non-empty list of ints|outside the vocabulary of 258"):
        model.stream(ids)


def test_ids_serve_as_a_prompt(model):
    ids = model.tokenizer.encode("Hi")
    wanted = model.generate("Hi", max_tokens=5)
    for given in (ids, np.array(ids), ops.tensor(np.array(ids, "int32"))):
        assert model.generate(given, max_tokens=5) == wanted


def test_the_end_of_the_context(model):
    with pytest.raises(ContextOverflow, match=f"{LIMIT + 1} tokens do not fit: this model's context holds {LIMIT}"):
        model.stream([1] * (LIMIT + 1))
    full = model.generate([1] * LIMIT, max_tokens=9)
    assert (len(full.tokens), full.finish_reason) == (1, "length")
    near = model.generate([1] * (LIMIT - 3), max_tokens=9)
    assert (len(near.tokens), near.finish_reason) == (4, "length")
    cache = model.new_cache()
    model([1] * (LIMIT - 1), cache)
    with pytest.raises(ContextOverflow, match=f"{LIMIT - 1} tokens in the cache and 2 more do not fit"):
        model.stream([1, 1], cache=cache)


def test_going_on_with_a_cache(model, stories):
    for each, prompt in ((model, "Hi"), (stories, "Once")):
        whole = each.generate(prompt, max_tokens=40)
        cache = each.new_cache()
        first = each.generate(prompt, max_tokens=15, cache=cache)
        assert len(cache) == len(each.tokenizer.encode(prompt)) + 14  # the last token was never read
        rest = each.generate(first.tokens[-1:], max_tokens=25, cache=cache)
        assert first.tokens + rest.tokens == whole.tokens
        if each is stories:
            assert first + rest == whole
    options: dict[str, Any] = {"repetition_penalty": 3.0, "temperature": 0.0}
    whole, cache = model.generate("Hi", max_tokens=40, **options), model.new_cache()
    first = model.generate("Hi", max_tokens=15, cache=cache, **options)
    rest = model.generate(first.tokens[-1:], max_tokens=25, cache=cache, **options)
    assert first.tokens + rest.tokens == whole.tokens, "what the cache holds has been said too"
    with pytest.raises(llm.UserError, match="the prompt is empty, and the cache needs a token to go on from"):
        stories.stream("", cache=cache)


class Interrupts(ops.Interceptor):
    """Ctrl-C at the `at`-th call."""

    def __init__(self, at: int):
        self.at = at

    def call(self, call: ops.Call, launch: Any) -> Any:
        self.at -= 1
        if self.at < 0:
            raise KeyboardInterrupt
        return launch(call)


def test_an_interrupted_generation_goes_on(model, rng):
    whole = model.generate("Hi", max_tokens=30)
    calls = len(small.addresses(lambda: model.generate("Hi", max_tokens=30)))
    for at in rng.integers(calls // 30 + 1, calls, 6).tolist():  # after the prompt
        cache = model.new_cache()
        stream = model.stream("Hi", max_tokens=30, cache=cache)
        with pytest.raises(KeyboardInterrupt), ops.intercepted(Interrupts(at)):
            list(stream)
        done = len(stream.tokens)
        assert stream.tokens == whole.tokens[:done]
        assert stream.finish().finish_reason is None
        assert len(cache) == len(model.tokenizer.encode("Hi")) + done - 1
        rest = model.generate(stream.tokens[-1:], max_tokens=30 - done, cache=cache)
        assert stream.tokens + rest.tokens == whole.tokens


def test_decoding_compiles_nothing(model):
    model.generate("Hi", max_tokens=2)
    before = len(ops.build.log)
    assert len(model.generate("Hi", max_tokens=256).tokens) == 256
    assert ops.build.log[before:] == []


def test_decoding_allocates_nothing(model):
    model.generate("Hi", max_tokens=120)
    for options in ({}, {"temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.2}, {"logprobs": 2}):
        allocations = []
        for _ in model.stream("Hi", max_tokens=120, **options):
            allocations.append(ops.memory.statistics()["allocations"])
        assert allocations[-1] == allocations[-20], options  # the cache grows at the 64th token and not again


def test_what_others_hold_keeps_its_values(model):
    held: list[tuple[Any, np.ndarray]] = []

    class Holds(ops.Interceptor):
        def call(self, call: ops.Call, launch: Any) -> Any:
            output = launch(call)
            if isinstance(output, ops.Tensor) and len(held) < 60:
                kinds = (output, output.numpy(), np.from_dlpack(output), output.reshape(-1))
                held.append((kinds[len(held) % 4], output.numpy().copy()))
            return output

    with ops.intercepted(Holds()):
        wanted = model.generate("Hi", max_tokens=8).tokens
    assert model.generate("Hi", max_tokens=60).tokens[:8] == wanted
    assert len(held) == 60
    for kept, values in held:
        assert np.array_equal(np.asarray(kept).reshape(-1), values.reshape(-1))


def test_a_prompt_may_be_read_in_pieces(model, rng):
    ids = rng.integers(0, 256, 100).tolist()
    whole = model(ids).numpy().copy()
    for sizes in ([100], [1] * 100, [17, 40, 2, 30, 11], [99, 1], [16, 16, 16, 16, 16, 16, 4]):
        cache, parts, at = model.new_cache(), [], 0
        for size in sizes:
            parts.append(model(ids[at : at + size], cache).numpy().copy())
            at += size
        error = np.abs(np.concatenate(parts) - whole).max() / np.abs(whole).max()
        assert error <= 1e-5, sizes
    for keep in (1, 3, 100, 200):
        last = model(ids, logits_to_keep=keep).numpy()
        np.testing.assert_allclose(last, whole[-keep:], rtol=1e-4, atol=1e-5)
    with pytest.raises(llm.UserError, match="logits_to_keep is -1, expected a number of tokens, or 0 for all"):
        model(ids, logits_to_keep=-1)


def test_a_dry_run_is_not_seen(model, monkeypatch):
    """Kernels are built before the first token by forwards that compute nothing: nobody may stop in them."""
    seen: list[float] = []
    kept: list[float] = []

    class Stops(llm.Module):
        def __init__(self, inner: Any):
            self.inner = inner

        def forward(self, x: ops.Tensor, rotate: Any, cache: Any) -> ops.Tensor:
            kept.append(float(np.abs(x.numpy()).max()))
            breakpoint()
            return self.inner(x, rotate, cache)

    model.layers[0] = Stops(model.layers[0])
    monkeypatch.setattr(sys, "breakpointhook", lambda: seen.append(1))
    model.generate("Hi", max_tokens=3)
    assert len(seen) == len(kept) == 3 and min(kept) > 0
    watched = small.addresses(lambda: model.generate("Hi", max_tokens=3))
    assert watched.count("/embedding[0]") + watched.count("embed_tokens/embedding[0]") == 3
    assert generate.prepare(model, 3) == 0
    assert sys.breakpointhook is not sys.__breakpointhook__


def test_the_text_before_decides_how_the_next_begins(stories):
    ids = stories.tokenizer.encode("Once upon a time")
    for cut in range(1, len(ids)):
        detokenizer = Detokenizer(stories.tokenizer, after=ids[:cut])
        pieces = [detokenizer.add(id) for id in ids[cut:]]
        assert stories.tokenizer.decode(ids[:cut]) + "".join(pieces) + detokenizer.finish() == "Once upon a time"
    model_ids = small.tokenizer().encode("a🙂b")
    detokenizer = Detokenizer(small.tokenizer(), after=model_ids[:3])  # in the middle of the character
    assert [detokenizer.add(id) for id in model_ids[3:]] == ["", "", "🙂", "b"]


def test_a_conversation_reads_each_token_once(model):
    model.tokenizer.chat_template = small.TEMPLATE
    chat, messages = generate.Chat(model), [{"role": "user", "content": "Hello"}]
    for said in ("more", "and more", "enough"):
        stream = chat.answer(messages, max_tokens=9, repetition_penalty=1.5)
        assert stream.finish() == model.chat(messages, max_tokens=9, repetition_penalty=1.5).finish()
        whole = len(model.tokenizer.encode(generate.chat_prompt(model, messages)))
        assert stream.prompt_tokens == whole if len(messages) == 1 else stream.prompt_tokens < whole - 12
        messages += [{"role": "assistant", "content": "an answer " * 5}, {"role": "user", "content": said}]
    messages[0]["content"] = "Another beginning"
    assert chat.answer(messages, max_tokens=9).finish() == model.chat(messages, max_tokens=9).finish()
