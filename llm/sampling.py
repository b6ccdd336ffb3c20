"""Choosing the next token from logits, with NumPy. Semantics and order are those of transformers' generation."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llm.errors import UserError

Floats = NDArray[np.float64]
Ids = NDArray[np.intp]


@dataclass(frozen=True)
class Sampling:
    """How to sample. The defaults switch everything off: greedy.

    temperature: 0 is greedy. top_k: 0 is off. top_p: 1 is off. min_p: 0 is off. repetition_penalty: 1 is off.
    seed: None draws a fresh one. Raises UserError for a value out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, "0 (greedy) or above", lambda v: v >= 0)
        _check("top_k", self.top_k, "an integer, 0 (off) or above", lambda v: v >= 0, Integral)
        _check("top_p", self.top_p, "above 0 and at most 1 (off)", lambda v: 0 < v <= 1)
        _check("min_p", self.min_p, "between 0 (off) and 1", lambda v: 0 <= v <= 1)
        _check("repetition_penalty", self.repetition_penalty, "above 0; 1 is off", lambda v: v > 0)
        if self.seed is not None:
            _check("seed", self.seed, "an integer, 0 or above", lambda v: v >= 0, Integral)


def _check(name: str, value: Any, wanted: str, in_range: Callable[[Any], bool], kind: type = Real) -> None:
    number = isinstance(value, kind) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not in_range(value):
        raise UserError(f"{name} is {value!r}; it must be {wanted}.")


class Sampler:
    """Draws tokens; the same parameters, seed and logits give the same tokens. One random number a token."""

    def __init__(self, params: Sampling) -> None:
        self.params = params
        self._rng = np.random.Generator(np.random.PCG64(params.seed))

    def __call__(self, logits: ArrayLike, history: Sequence[int] = ()) -> tuple[int, float]:
        """One token id and its log-probability under the model's own distribution, before any processing.

        logits: [vocab], any float dtype. history: the ids so far, prompt included (for repetition_penalty).
        Raises UserError: NaN or infinite logits, or an id in history beyond the vocabulary.
        """
        raw = _checked(logits)
        scores = _penalise(raw, history, self.params.repetition_penalty)
        if self.params.temperature == 0:
            token = int(np.argmax(scores))
        else:
            ids, weights = candidates(scores, self.params)
            mass = np.cumsum(weights)
            token = int(ids[np.searchsorted(mass, self._rng.random() * mass[-1], side="right")])
        return token, float(raw[token] - _log_total(raw))


def candidates(scores: Floats, params: Sampling) -> tuple[Ids, Floats]:
    """The ids that may be drawn and their unnormalised probabilities: temperature, top_k, top_p, min_p in this order.

    scores: [vocab] after the repetition penalty; params.temperature is above 0.
    """
    with np.errstate(over="ignore"):  # at a tiny temperature all but the best go to -inf, as they should
        scores = (scores - scores.max()) / params.temperature
    ids = np.arange(scores.size)
    if 0 < params.top_k < scores.size:  # all that tie with the k-th stay (transformers' TopKLogitsWarper)
        ids = np.flatnonzero(scores >= np.partition(scores, -params.top_k)[-params.top_k])
    if params.top_p < 1:
        ids = ids[_nucleus(scores[ids], params.top_p)]
    weights = np.exp(scores[ids])
    if params.min_p > 0:  # the best token's weight is 1 (MinPLogitsWarper)
        kept = weights >= params.min_p
        ids, weights = ids[kept], weights[kept]
    return ids, weights


def _nucleus(scores: Floats, top_p: float, bins: int = 4096) -> Ids:
    """Indices of the smallest set of best scores with at least top_p of the probability (max(scores) is 0).

    Holtzman et al. 2019; of equal scores the higher index goes in first, as in transformers' TopPLogitsWarper. Linear
    in the vocabulary: probability is summed in bins of falling score, and only the bin where the set ends is sorted.
    """
    weights = np.exp(scores)
    target = top_p * weights.sum()
    # All tokens below this score together hold less than 1 - top_p (by a factor e: rounding is no matter).
    floor = math.log(weights.sum()) + math.log1p(-top_p) - math.log(scores.size) - 1
    near = np.flatnonzero(scores > floor)
    bin_of = (scores[near] * (bins / floor)).astype(np.intp)
    mass = np.cumsum(np.bincount(bin_of, weights=weights[near]))
    last = np.searchsorted(mass, target)
    inside = near[bin_of < last]
    edge = near[bin_of == last][::-1]
    edge = edge[np.argsort(-scores[edge], kind="stable")]
    before = (mass[last - 1] if last else 0.0) + np.cumsum(weights[edge]) - weights[edge]
    return np.concatenate([inside, edge[before < target]])


def top_logprobs(logits: ArrayLike, k: int) -> list[tuple[int, float]]:
    """The k most probable (id, log-probability), best first, the lower id first where equal. logits: [vocab]."""
    raw = _checked(logits)
    k = min(k, raw.size)
    if k <= 0:
        return []
    best = np.flatnonzero(raw >= np.partition(raw, -k)[-k])
    best = best[np.argsort(-raw[best], kind="stable")][:k]
    return [(int(i), float(p)) for i, p in zip(best, raw[best] - _log_total(raw), strict=True)]


def _checked(logits: ArrayLike) -> Floats:
    raw = np.asarray(logits)
    if raw.ndim != 1 or raw.size == 0:
        raise UserError(f"The logits have shape {list(raw.shape)}; sampling takes those of one position, [vocab].")
    raw = raw.astype(np.float64)
    best = raw.max()
    if np.isnan(best):
        bad = np.flatnonzero(np.isnan(raw))
        raise UserError(
            f"The logits contain NaN: {bad.size} of {raw.size}, the first for token {bad[0]}. "
            "Look for the first op that makes them; the weights or a kernel are wrong."
        )
    if np.isinf(best):
        what = f"+inf, for token {int(raw.argmax())}" if best > 0 else "only -inf: no token is possible"
        raise UserError(f"The logits contain {what}.")
    return raw


def _penalise(scores: Floats, history: Sequence[int], penalty: float) -> Floats:
    """Keskar et al. 2019 (CTRL), as transformers' RepetitionPenaltyLogitsProcessor: once for each token seen."""
    if penalty == 1 or len(history) == 0:
        return scores
    seen = np.asarray(history, dtype=np.intp)
    if seen.min() < 0 or seen.max() >= scores.size:
        raise UserError(f"The history holds ids from {seen.min()} to {seen.max()}; the logits have {scores.size}.")
    scores = scores.copy()
    scores[seen] = np.where(scores[seen] < 0, scores[seen] * penalty, scores[seen] / penalty)
    return scores


def _log_total(raw: Floats) -> float:
    best = raw.max()
    return float(best + np.log(np.exp(raw - best).sum()))
