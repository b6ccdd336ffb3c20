"""Text from a model: prefill, then one token a step, streamed as soon as it is certain."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import ops

from .cache import Cache
from .chat import render
from .errors import UserError
from .sampling import Sampler, Sampling, top_logprobs
from .tokenizer import Detokenizer, Tokenizer

if TYPE_CHECKING:
    from .model import Model


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
        **sampling: Any,
    ):
        if model.tokenizer is None:
            raise UserError("this model has no tokenizer; load one with llm.Tokenizer.from_directory(path)")
        if max_tokens < 0:
            raise UserError(f"max_tokens is {max_tokens}, expected 0 or more")
        self.model, self.tokenizer = model, model.tokenizer
        self.cache = model.new_cache() if cache is None else cache
        self.prompt = _prompt_ids(self.tokenizer, prompt, first=len(self.cache) == 0)
        self.max_tokens, self.alternatives = max_tokens, logprobs
        self.stops = tuple(each for each in ([stop] if isinstance(stop, str) else stop) if each)
        self.sampler = _sampler(sampling)
        self.prompt_tokens = len(self.prompt)
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.top_logprobs: list[list[tuple[int, float]]] = []
        self.finish_reason: str | None = None
        self.prefill_seconds = self.decode_seconds = 0.0
        self._pieces = self._run()

    def __iter__(self) -> Iterator[Piece]:
        return self._pieces

    def finish(self) -> Generation:
        """Run to the end and give the whole text."""
        whole = Generation("".join(self))
        whole.tokens, whole.logprobs, whole.top_logprobs = self.tokens, self.logprobs, self.top_logprobs
        whole.finish_reason = self.finish_reason
        return whole

    def _run(self) -> Iterator[Piece]:
        detokenizer, waiting = Detokenizer(self.tokenizer), ""
        longest = max(map(len, self.stops), default=0)
        for token in self._sampled():
            waiting += detokenizer.add(token)
            found = min((at for each in self.stops if (at := waiting.find(each)) >= 0), default=-1)
            if found >= 0:
                self.finish_reason, waiting = "stop", waiting[:found]
                break
            # The end of the text may be the beginning of a stop: hold back as much as could be.
            certain = len(waiting) - max((n for n in range(longest) if self._may_begin_stop(waiting, n)), default=0)
            if certain:
                yield self._piece(waiting[:certain])
                waiting = waiting[certain:]
        else:
            waiting += detokenizer.finish()
            found = min((at for each in self.stops if (at := waiting.find(each)) >= 0), default=-1)
            waiting = waiting[:found] if found >= 0 else waiting
        if waiting:
            yield self._piece(waiting)

    def _may_begin_stop(self, text: str, count: int) -> bool:
        return 0 < count <= len(text) and any(each.startswith(text[-count:]) for each in self.stops)

    def _piece(self, text: str) -> Piece:
        piece = Piece(text)
        piece.token, piece.logprob = self.tokens[-1], self.logprobs[-1]
        piece.top_logprobs = self.top_logprobs[-1] if self.top_logprobs else []
        return piece

    def _sampled(self) -> Iterator[int]:
        """Token after token, until one ends the text or there are enough."""
        if self.max_tokens == 0:
            self.finish_reason = "length"
            return
        prepare(self.model, len(self.prompt))
        started = time.perf_counter()
        logits = self.model(self.prompt, self.cache, logits_to_keep=1)
        self.prefill_seconds = time.perf_counter() - started
        history = list(self.prompt)
        while True:
            started = time.perf_counter()
            values = logits.numpy()[0].astype("float32", copy=False)
            token, logprob = self.sampler(values, history)
            if token in self.tokenizer.eos_ids:
                self.finish_reason = "stop"
                return
            self.tokens.append(token)
            self.logprobs.append(logprob)
            if self.alternatives:
                self.top_logprobs.append(top_logprobs(values, self.alternatives))
            history.append(token)
            self.decode_seconds += time.perf_counter() - started
            yield token
            if len(self.tokens) >= self.max_tokens or len(self.cache) >= self.cache.limit:
                self.finish_reason = "length"
                return
            started = time.perf_counter()
            logits = self.model([token], self.cache, logits_to_keep=1)
            self.decode_seconds += time.perf_counter() - started


def prepare(model: Model, tokens: int, progress: bool = True) -> int:
    """Build the kernels for a prompt of `tokens` tokens and for decoding; gives how many had to be compiled."""

    def run() -> None:
        cache = model.new_cache()
        model([0] * min(tokens, cache.limit), cache, logits_to_keep=1)
        if len(cache) < cache.limit:
            model([0], cache, logits_to_keep=1)

    return ops.prepare(run, progress)


def chat_prompt(model: Model, messages: list[dict[str, Any]]) -> str:
    """`messages` rendered with the model's chat template. Raises UserError when it has none."""
    tokenizer = model.tokenizer
    if tokenizer is None or tokenizer.chat_template is None:
        raise UserError("this model has no chat template: it is not made for chat; use generate")
    return render(tokenizer.chat_template, messages, bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token)


def _prompt_ids(tokenizer: Tokenizer, prompt: str | Sequence[int], first: bool) -> list[int]:
    """Ids of the prompt; a sequence begins with the beginning-of-sequence token where the tokenizer has one."""
    if not isinstance(prompt, str):
        ids = [int(each) for each in prompt]
    else:
        ids = tokenizer.encode(prompt, bos=first)
        if not ids and first and tokenizer.bos_id is not None:
            ids = [tokenizer.bos_id]
    if not ids:
        raise UserError("the prompt is empty, and this tokenizer has no token to begin a text with")
    return ids


def _sampler(options: dict[str, Any]) -> Sampler:
    known = Sampling.__dataclass_fields__
    unknown = [name for name in options if name not in known]
    if unknown:
        raise UserError(
            f"unknown option {', '.join(unknown)}; known are max_tokens, stop, logprobs, {', '.join(known)}"
        )
    return Sampler(Sampling(**options))
