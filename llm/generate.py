"""Text from a model: prefill, then one token a step, streamed as soon as it is certain."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import ops
from ops import Tensor

from .cache import Cache
from .chat import render
from .errors import UserError
from .sampling import Sampler, Sampling, top_logprobs
from .tokenizer import Detokenizer

if TYPE_CHECKING:
    from .model import Model

_MANY = 17  # tokens from which on a prompt runs on the same kernels, however long it is
_prepared: WeakKeyDictionary[Model, set[tuple[int, str | None, str]]] = WeakKeyDictionary()


class Piece(str):
    """A piece of generated text, with the last token that made it and that token's log-probability."""

    token: int
    logprob: float
    top_logprobs: list[tuple[int, float]]


class Generation(str):
    """Generated text. `tokens`, `logprobs` (of the tokens), `top_logprobs` where asked for, and `finish_reason`."""

    tokens: list[int]
    logprobs: list[float]
    top_logprobs: list[list[tuple[int, float]]]
    finish_reason: str | None


class TextStream:
    """Iterate over it for `Piece`s of text; `finish()` gives the whole.

    `prompt` is text, or token ids. `max_tokens` is how many tokens at the most; `temperature`, `top_k`, `top_p`,
    `min_p`, `repetition_penalty`, `seed` as in `llm.sampling.Sampling`; `stop` is one text or several that end the
    generation and are not part of it; `logprobs` asks for that many alternatives a token. `cache` goes on where an
    earlier generation ended: the prompt then comes after what it holds, and only tokens that were read are in it.
    Without one there is a new one, of `cache_dtype` (float32, float16, bfloat16; default: as the model has it).

    Afterwards: `tokens`, `logprobs`, `finish_reason` ("stop", "length"), `prompt_tokens`, `prefill_seconds`,
    `decode_seconds`. Raises UserError for options out of range and ContextOverflow for a prompt that does not fit.
    """

    def __init__(
        self,
        model: Model,
        prompt: str | Sequence[int],
        *,
        max_tokens: int = 256,
        stop: str | Sequence[str] = (),
        logprobs: int = 0,
        cache: Cache | None = None,
        cache_dtype: str | None = None,
        **sampling: Any,
    ):
        if model.tokenizer is None:
            raise UserError("this model has no tokenizer: put its tokenizer.json, or llama2.c's tok*.bin, beside it")
        self.model, self.tokenizer = model, model.tokenizer
        self.max_tokens = _count("max_tokens", max_tokens)
        self.alternatives = _count("logprobs", logprobs)
        self.stops = _stops(stop)
        self.sampler = _sampler(sampling)
        if cache is not None and cache_dtype not in (None, cache.dtype):
            raise UserError(
                f"cache_dtype is {cache_dtype!r} and the given cache has {cache.dtype!r}: give one of the two"
            )
        self.cache = model.new_cache(cache_dtype) if cache is None else cache
        self.prompt = self._prompt_ids(prompt)
        self.cache.require(len(self.prompt))
        self.prompt_tokens = len(self.prompt)
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.top_logprobs: list[list[tuple[int, float]]] = []
        self.finish_reason: str | None = None
        self.prefill_seconds = self.decode_seconds = 0.0
        self._text: list[str] = []
        self._pieces = self._run()

    def __iter__(self) -> Iterator[Piece]:
        return self._pieces

    def finish(self) -> Generation:
        """Run to the end and give the whole text, with the pieces that were taken before."""
        for _ in self:
            pass
        whole = Generation("".join(self._text))
        whole.tokens, whole.logprobs, whole.top_logprobs = self.tokens, self.logprobs, self.top_logprobs
        whole.finish_reason = self.finish_reason
        return whole

    def _prompt_ids(self, prompt: str | Sequence[int]) -> list[int]:
        """Ids of the prompt; a sequence begins with the beginning-of-sequence token where the tokenizer has one."""
        if not isinstance(prompt, str):
            return self.model.ids(prompt).numpy().tolist()
        ids = self.tokenizer.encode(prompt, bos=not len(self.cache))
        if not ids and not len(self.cache) and self.tokenizer.bos_id is not None:
            ids = [self.tokenizer.bos_id]
        if not ids:
            reason = "the cache needs a token to go on from" if len(self.cache) else "this tokenizer has no first token"
            raise UserError(f"the prompt is empty, and {reason}; give a prompt")
        return ids

    def _run(self) -> Iterator[Piece]:
        detokenizer, waiting = Detokenizer(self.tokenizer, after=self.prompt), ""
        for token in self._sampled():
            certain, waiting = self._cut(waiting + detokenizer.add(token))
            if certain:
                yield self._piece(certain)
            if self.finish_reason:  # a stop was found
                return
        rest, _ = self._cut(waiting + detokenizer.finish(), last=True)
        if rest:
            yield self._piece(rest)

    def _cut(self, text: str, last: bool = False) -> tuple[str, str]:
        """What of `text` is certain, and what waits, as it may be the beginning of a stop. A stop ends the text."""
        found = min((at for each in self.stops if (at := text.find(each)) >= 0), default=-1)
        if found >= 0:
            self.finish_reason = "stop"
            return text[:found], ""
        longest = 0 if last else max(map(len, self.stops), default=0)
        ends = (text[at:] for at in range(max(len(text) - longest + 1, 0), len(text)))
        held = next((end for end in ends if any(each.startswith(end) for each in self.stops)), "")
        return text[: len(text) - len(held)], held

    def _piece(self, text: str) -> Piece:
        self._text.append(text)
        piece = Piece(text)
        piece.token, piece.logprob = self.tokens[-1], self.logprobs[-1]
        piece.top_logprobs = self.top_logprobs[-1] if self.top_logprobs else []
        return piece

    def _sampled(self) -> Iterator[int]:
        """Token after token, until one ends the text or there are enough."""
        if self.max_tokens == 0:
            self.finish_reason = "length"
            return
        if not _watched() and _is_ours(self.model):
            prepare(self.model, len(self.prompt), self.cache.dtype)
        history = [*self.cache.ids, *self.prompt]
        started = time.perf_counter()
        logits = self.model(self.prompt, self.cache, logits_to_keep=1)
        self.prefill_seconds = time.perf_counter() - started
        while True:
            started = time.perf_counter()
            token = self._sample(logits, history)
            if token in self.tokenizer.eos_ids:
                self.finish_reason = "stop"
                return
            history.append(token)
            self.decode_seconds += time.perf_counter() - started
            yield token
            if len(self.tokens) >= self.max_tokens or len(self.cache) >= self.cache.limit:
                self.finish_reason = "length"
                return
            started = time.perf_counter()
            logits = self.model([token], self.cache, logits_to_keep=1)
            self.decode_seconds += time.perf_counter() - started

    def _sample(self, logits: Tensor, history: list[int]) -> int:
        """The next token. The view of the logits ends here, before they do: so their buffer goes back to the pool."""
        values = logits.numpy()[0]
        token, logprob = self.sampler(values, history)
        if token not in self.tokenizer.eos_ids:
            self.tokens.append(token)
            self.logprobs.append(logprob)
            if self.alternatives:
                self.top_logprobs.append(top_logprobs(values, self.alternatives))
        return token


class Chat:
    """A conversation with a chat model; each token is read once, as far as the template keeps what was said.

    `cache_dtype` as for `TextStream`.
    """

    def __init__(self, model: Model, cache_dtype: str | None = None):
        self.model, self.cache = model, model.new_cache(cache_dtype)

    def answer(self, messages: list[dict[str, Any]], **options: Any) -> TextStream:
        """Stream the answer to all the `messages` so far ({"role", "content"}); options as for `TextStream`."""
        prompt = chat_prompt(self.model, messages)  # says first when the model cannot chat
        ids = self.model.tokenizer.encode(prompt) if self.model.tokenizer else []
        same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(self.cache.ids, ids[:-1], strict=False))
        self.cache.truncate(sum(1 for _ in same))
        return TextStream(self.model, ids[len(self.cache) :], cache=self.cache, **options)


def prepare(model: Model, tokens: int, dtype: str | None = None, progress: bool = True) -> int:
    """Build the kernels for a prompt of `tokens` tokens and for decoding; gives how many had to be compiled.

    `dtype` is that of the cache, by default the model's. Looked into once for a model, a range of lengths and a dtype.
    """
    tokens, dtype = min(tokens, _MANY), dtype or model.cache_dtype
    ready = _prepared.setdefault(model, set())
    if (tokens, dtype, model.device) in ready:
        return 0

    def run() -> None:
        cache = model.new_cache(dtype)
        model([0] * min(tokens, cache.limit), cache, logits_to_keep=1)
        if len(cache) < cache.limit:
            model([0], cache, logits_to_keep=1)

    compiled = ops.prepare(run, progress)
    ready.add((tokens, dtype, model.device))
    return compiled


def _watched() -> bool:
    """A debugger or an interceptor looks on: it must see the forwards that compute, and only those."""
    monitoring = getattr(sys, "monitoring", None)  # what a debugger may use from Python 3.12 on
    debugger = monitoring is not None and monitoring.get_tool(monitoring.DEBUGGER_ID) is not None
    return debugger or sys.gettrace() is not None or bool(ops.intercept.chain())


def _is_ours(module: Any) -> bool:
    """No layer is the user's: such a one may keep what it sees, and a dry run would show it zeros."""
    return type(module).__module__.startswith("llm.") and all(_is_ours(child) for _, child in module.children())


def chat_prompt(model: Model, messages: list[dict[str, Any]]) -> str:
    """`messages` rendered with the model's chat template. Raises UserError when it has none."""
    tokenizer = model.tokenizer
    if tokenizer is None or tokenizer.chat_template is None:
        raise UserError("this model has no chat template: it is not made for chat; use generate")
    return render(tokenizer.chat_template, messages, bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token)


def _count(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise UserError(f"{name} is {value!r}, expected an integer, 0 or above")
    return value


def _stops(given: str | Sequence[str]) -> tuple[str, ...]:
    stops = (given,) if isinstance(given, str) else tuple(given) if isinstance(given, Sequence) else (given,)
    if not all(isinstance(each, str) for each in stops):
        raise UserError(f"stop is {given!r}, expected a text or a list of texts")
    return tuple(each for each in stops if each)


def _sampler(options: dict[str, Any]) -> Sampler:
    known = Sampling.__dataclass_fields__
    unknown = [name for name in options if name not in known]
    if unknown:
        raise UserError(
            f"unknown option {', '.join(unknown)}; known are max_tokens, stop, logprobs, {', '.join(known)}"
        )
    return Sampler(Sampling(**options))
