"""The doctor: from a wrong model to the call, the line and the weight that are wrong, by comparison with a reference.

d = debug.doctor(model, hf_model)
d.ok, d.findings[0]
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

import ops
from ops.progress import tracked

from .comparison import definition_values, label_of, values_of
from .examination import Examination, cuts, feed
from .findings import Check, Diagnosis, Found
from .huggingface import HuggingFace, is_torch
from .sweep import FAR, MOST, Sweep, check_reads
from .values import Values, Weights

_SHORT, _LONG = 72, 160  # tokens in texts whose values are compared with the reference's
_SHARE = 0.25  # of the time that is left, for each of the stages before the kernels
_SEED = 20240229  # of the token ids, when none are given


def doctor(
    model: Any, reference: Any = "float64", ids: Sequence[int] | None = None, seconds: float = 60.0
) -> Diagnosis:
    """Find what is wrong with a Limpid model, by its `reference`, in about so many seconds, building kernels apart.

    The reference is a model of transformers or another Limpid model, which tells whether weights, kernels and the
    model's code are right; a mapping of a checkpoint's names to arrays, its pristine weights; or "float64": every op
    by its NumPy definition, which tells about kernels and cuts. Looked into in this order, until something is found:

    - weights: equal to the reference's, as far as the dtypes tell;
    - the model's code: every op by its definition, on the reference's values, against the reference's result;
    - cuts: the same text in pieces, token by token, after truncating, against the text in one;
    - kernels: each call against its definition, for prompts and caches of every length that the time allows;
    - reads: what a call reads is what the call gave that made it.

    `ids` are token ids of the text that is used; random ones when None.
    """
    known = reference == "float64" if isinstance(reference, str) else isinstance(reference, Mapping)
    if not known and not is_torch(reference) and not hasattr(reference, "parameters"):
        raise ops.OpError(f"the reference is {reference!r}, expected 'float64', a model or a mapping of weights")
    return _Doctor(model, reference, ids, seconds).diagnosis()


class _Doctor:
    def __init__(self, model: Any, reference: Any, ids: Sequence[int] | None, seconds: float):
        self.model, self.reference = model, reference
        self.deadline = time.monotonic() + seconds
        self.long = self._ids(ids)
        label = "the given weights" if isinstance(reference, Mapping) else label_of(reference, model)
        self.found = Diagnosis(f"{type(model).__name__} {model.dtype}", label)
        self.weights = self._weights()

    def diagnosis(self) -> Diagnosis:
        stages = {
            "weights": self._check_weights,
            "model": self._check_model,
            "cuts": self._check_cuts,
            "kernels": self._check_kernels,
            "reads": self._check_reads,
        }
        for name, stage in tracked(stages.items(), f"Looking at {', '.join(stages)}", len(stages)):
            if self.found.ok:
                self._take(name, stage)
        return self.found

    def _take(self, name: str, stage: Callable[[], str]) -> None:
        started = time.monotonic()
        try:
            text = stage()
        except Found as found:
            self.found.findings.append(found.finding)
            text = "not right"
        self.found.checks.append(Check(name, text, time.monotonic() - started))

    def _check_weights(self) -> str:
        from .weights import check_weights

        findings, text = check_weights(self.model, self.weights)
        self.found.findings += findings
        return text

    def _check_model(self) -> str:
        if not self._tells_values():
            return "the reference has only weights" if self.weights else "the reference is the model's own definition"
        deadline, done, spent = self._part(), [], 0.0
        for length in self._lengths():
            if length > _SHORT and time.monotonic() + spent * length / done[-1] > deadline:
                break
            started = time.monotonic()
            self._examination(length, "model").run(feed(length), deadline)
            spent = time.monotonic() - started
            done.append(length)
        return f"every call on the reference's values, for texts of {', '.join(map(str, done))} tokens"

    def _check_cuts(self) -> str:
        length = min(_native(self.model), _LONG - 20, len(self.long))
        short = min(length, _SHORT)
        examination, started = self._examination(short, "cut"), time.monotonic()
        examination.run(feed(short), self.deadline)
        whole = time.monotonic() - started
        deadline, texts = self._part(), []
        if time.monotonic() + whole * length < deadline:  # a step of one token takes less than a short text
            short, examination = length, self._examination(length, "cut")
        for name, steps in cuts(short):
            if examination.run(steps, deadline, name) == len(steps):
                texts.append(name)
        return f"{', '.join(texts) or 'none: no time was left'}; {short} tokens"

    def _check_kernels(self) -> str:
        sweep, started = Sweep(self.model, self.long), time.monotonic()
        sweep.prepare()
        return sweep.run(self.deadline + time.monotonic() - started)

    def _check_reads(self) -> str:
        return check_reads(self.model, self.long[:_SHORT])

    def _ids(self, given: Sequence[int] | None) -> list[int]:
        """Token ids for the longest text: those given, again and again."""
        vocabulary, length = self.model.config.vocab_size, min(self.model.context, max(*FAR, MOST) + 1)
        if given is None:
            return np.random.default_rng(_SEED).integers(0, vocabulary, length).tolist()
        plain = [int(each) for each in given]
        if not plain or min(plain) < 0 or max(plain) >= vocabulary:
            raise ops.OpError(f"ids are to be from 0 to {vocabulary - 1}, at least one; given {plain[:8]}")
        return (plain * (length // len(plain) + 1))[:length]

    def _weights(self) -> Weights | None:
        base = getattr(self.model, "base", "")
        if isinstance(self.reference, Mapping):
            return Weights(self.reference, base)
        if is_torch(self.reference):
            return Weights(HuggingFace(self.reference, base).weights, base)
        if isinstance(self.reference, str):
            return None
        return Weights({name: weight.numpy() for name, weight in self.reference.parameters()}, base)

    def _tells_values(self) -> bool:
        return not isinstance(self.reference, (str, Mapping))

    def _lengths(self) -> list[int]:
        """Of the texts whose values are compared: short ones first, then long ones, beyond a window and a regime."""
        most = min(len(self.long), _LONG)
        beyond = [_native(self.model) + 1, 2 * (getattr(self.model.config, "sliding_window", None) or 0) + 1]
        wanted = [2, _SHORT // 2, _SHORT, *(each for each in beyond if _SHORT < each <= 4 * _LONG), most]
        return sorted({each for each in wanted if each <= len(self.long)})

    def _examination(self, length: int, kind: Any) -> Examination:
        ids = self.long[:length]
        weights = self.weights if self._tells_values() else None  # the model's own definition has its own
        return Examination(self.model, ids, self._values(ids), weights, kind)

    def _values(self, ids: Sequence[int]) -> Values:
        if self._tells_values() and not is_torch(self.reference):
            return definition_values(self.reference, ids)
        return values_of(self.reference if self._tells_values() else "float64", self.model, ids)

    def _part(self) -> float:
        """The deadline of a stage."""
        now = time.monotonic()
        return now + _SHARE * max(self.deadline - now, 0.0)


def _native(model: Any) -> int:
    """Tokens up to which the positions are turned alike however long the text is."""
    scaling = getattr(getattr(model.config, "rope", None), "scaling", None)
    original = getattr(scaling, "original_max_position_embeddings", None)
    return min(each for each in (model.context, model.config.max_position_embeddings, original) if each)
