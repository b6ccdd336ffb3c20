"""Sampling against straightforward float64 references of transformers' processors."""

import random
import time
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from llm.errors import UserError
from llm.sampling import Sampler, Sampling, candidates, top_logprobs

SEED = random.SystemRandom().randrange(10**6)


def softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


def reference(logits: np.ndarray, history: Sequence[int], params: Sampling) -> np.ndarray:
    """Probabilities [vocab] in float64, the processors written out one by one with full sorts."""
    scores = logits.astype(np.float64)
    for token in set(history):
        scores[token] *= params.repetition_penalty if scores[token] < 0 else 1 / params.repetition_penalty
    scores = scores / params.temperature
    if params.top_k:
        scores[scores < np.sort(scores)[-min(params.top_k, scores.size)]] = -np.inf
    if params.top_p < 1:
        order = np.argsort(scores, kind="stable")
        removed = np.cumsum(softmax(scores)[order]) <= 1 - params.top_p
        removed[-1] = False
        scores[order[removed]] = -np.inf
    if params.min_p:
        probabilities = softmax(scores)
        scores[probabilities < params.min_p * probabilities.max()] = -np.inf
    return softmax(scores)


def processed(logits: np.ndarray, params: Sampling) -> np.ndarray:
    ids, weights = candidates(logits.astype(np.float64), params)
    probabilities = np.zeros(logits.size)
    probabilities[ids] = weights / weights.sum()
    return probabilities


def random_params(rng: np.random.Generator) -> Sampling:
    return Sampling(
        temperature=float(rng.choice([0.2, 0.7, 1.0, 3.0])),
        top_k=int(rng.choice([0, 0, 1, 5, 40, 10**6])),
        top_p=float(rng.choice([1.0, 1 - rng.random() ** 4, rng.uniform(0.01, 1)])),
        min_p=float(rng.choice([0.0, 0.0, rng.random() ** 2, 1.0])),
    )


def test_processing_equals_the_reference(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(400):
        logits = rng.normal(scale=rng.choice([0.01, 1.0, 4.0, 30.0]), size=rng.integers(1, 3000)).astype(np.float32)
        params = random_params(rng)
        np.testing.assert_allclose(processed(logits, params), reference(logits, [], params), rtol=1e-9, atol=1e-300)


def test_ties_equal_the_reference(seed: int) -> None:
    """Scores of few values, and impossible tokens. (No drawn limit falls on a sum, where rounding would decide.)"""
    rng = np.random.default_rng(seed)
    for _ in range(400):
        logits = rng.choice(np.log([1.0, 2.0, 4.0]), size=rng.integers(1, 200))
        logits[rng.random(logits.size) < 0.2] = -np.inf
        logits[rng.integers(logits.size)] = 0.0
        params = random_params(rng)
        np.testing.assert_allclose(processed(logits, params), reference(logits, [], params), rtol=1e-9, atol=1e-300)


def test_ties_by_hand() -> None:
    equal = np.zeros(8)
    assert np.flatnonzero(processed(equal, Sampling(1.0, top_p=0.5))).tolist() == [4, 5, 6, 7]
    assert np.flatnonzero(processed(equal, Sampling(1.0, top_p=0.51))).tolist() == [3, 4, 5, 6, 7]
    assert np.flatnonzero(processed(equal, Sampling(1.0, top_p=1e-300))).tolist() == [7]
    assert np.flatnonzero(processed(equal, Sampling(1.0, top_k=1))).size == 8
    assert np.flatnonzero(processed(equal, Sampling(1.0, min_p=1.0))).size == 8
    # top_p sees what top_k has left: 4 of 7 and 2 of 7, of 8 in all
    powers = np.log([1.0, 4.0, 1.0, 2.0])
    assert np.flatnonzero(processed(powers, Sampling(1.0, top_k=2, top_p=0.6))).tolist() == [1]
    assert np.flatnonzero(processed(powers, Sampling(1.0, top_p=0.6))).tolist() == [1, 3]


def test_greedy_and_log_probability(seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.normal(scale=5, size=1000).astype(np.float32)
    greedy = Sampler(Sampling())
    best = int(logits.argmax())
    token, logprob = greedy(logits, [])
    assert token == best
    assert logprob == pytest.approx(np.log(softmax(logits.astype(np.float64))[best]), abs=1e-12)
    assert greedy(np.array([1.0, 3.0, 3.0, 2.0]), [])[0] == 1
    # The penalty turns the choice, never the log-probability told.
    logits[:] = np.minimum(logits, 0.0)
    logits[[7, 9]] = 2.0, 1.5
    token, logprob = Sampler(Sampling(repetition_penalty=2.0))(logits, [7, 7, 3])
    assert token == 9
    assert logprob == pytest.approx(np.log(softmax(logits.astype(np.float64))[9]), abs=1e-12)


def test_distribution(seed: int) -> None:
    """Chi-square over 40000 draws; the bound is about 5 standard deviations above its mean."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(scale=1.5, size=60).astype(np.float32)
    history = rng.integers(0, 60, size=20).tolist()
    params = Sampling(0.8, top_k=40, top_p=0.95, min_p=0.01, repetition_penalty=1.3, seed=seed)
    sampler, draws = Sampler(params), 40000
    counts = np.bincount([sampler(logits, history)[0] for _ in range(draws)], minlength=60)
    expected = reference(logits, history, params) * draws
    possible = expected > 0
    assert counts[~possible].sum() == 0
    freedom = possible.sum() - 1
    chi_square = ((counts[possible] - expected[possible]) ** 2 / expected[possible]).sum()
    assert chi_square < freedom + 5 * np.sqrt(2 * freedom) + 10


def test_seeds() -> None:
    logits = np.random.default_rng(SEED).normal(size=500)

    def draws(seed: int | None) -> list[int]:
        sampler = Sampler(Sampling(temperature=1.0, top_p=0.9, seed=seed))
        return [sampler(logits, [])[0] for _ in range(30)]

    assert draws(SEED) == draws(SEED)
    assert draws(SEED) != draws(SEED + 1)
    assert draws(None) != draws(None)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_dtypes_and_read_only(dtype: Any) -> None:
    logits = np.array([0.0, 1.0, -2.0, 4.0], dtype=dtype)
    logits.flags.writeable = False
    sampler = Sampler(Sampling(temperature=1e-320, top_k=3, top_p=0.9, repetition_penalty=1.1, seed=0))
    assert sampler(logits, [0, 3])[0] == 3
    assert logits.tolist() == [0.0, 1.0, -2.0, 4.0]


def test_top_logprobs() -> None:
    logits = np.array([1.0, 3.0, 2.0, 3.0, -np.inf])
    want = np.log(softmax(logits)[:4])
    assert [i for i, _ in top_logprobs(logits, 2)] == [1, 3]
    assert [i for i, _ in top_logprobs(logits, 1)] == [1]
    got = top_logprobs(logits, 9)
    assert [i for i, _ in got] == [1, 3, 2, 0, 4]
    np.testing.assert_allclose([p for _, p in got[:4]], want[[1, 3, 2, 0]], rtol=1e-12)
    assert got[4][1] == -np.inf
    assert top_logprobs(logits, 0) == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -0.1}, r"^temperature is -0\.1; it must be 0 \(greedy\) or above\.$"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"top_k": -1}, r"^top_k is -1; it must be an integer, 0 \(off\) or above\.$"),
        ({"top_k": 1.5}, r"top_k is 1\.5"),
        ({"top_k": True}, "top_k is True"),
        ({"top_p": 0.0}, r"^top_p is 0\.0; it must be above 0 and at most 1 \(off\)\.$"),
        ({"top_p": 1.01}, r"top_p is 1\.01"),
        ({"min_p": -0.1}, r"^min_p is -0\.1; it must be between 0 \(off\) and 1\.$"),
        ({"repetition_penalty": 0.0}, r"^repetition_penalty is 0\.0; it must be above 0; 1 is off\.$"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty is inf"),
        ({"seed": -1}, r"^seed is -1; it must be an integer, 0 or above\.$"),
    ],
)
def test_wrong_parameters(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Sampling(**values)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    ("logits", "history", "message"),
    [
        ([0.0, np.nan, 1.0, np.nan], [], r"contain NaN: 2 of 4, the first for token 1\."),
        ([0.0, np.inf], [], r"contain \+inf, for token 1\."),
        ([-np.inf, -np.inf], [], "only -inf"),
        ([[0.0, 1.0]], [], r"shape \[1, 2\]"),
        ([], [], r"shape \[0\]"),
        ([0.0, 1.0], [0, 2], "history holds ids from 0 to 2; the logits have 2"),
        ([0.0, 1.0], [-1], "history holds ids from -1"),
    ],
)
def test_wrong_logits(temperature: float, logits: list, history: list[int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Sampler(Sampling(temperature, repetition_penalty=1.1))(np.array(logits), history)


@pytest.mark.parametrize("scale", [0.0, 0.01, 1.0, 4.0])
def test_128k_vocabulary_is_fast(scale: float) -> None:
    """About 2 ms a token; the bound leaves room for a busy machine, and a full argsort is far beyond it."""
    logits = np.random.default_rng(SEED).normal(scale=scale, size=131072).astype(np.float32)
    sampler, best = Sampler(Sampling(temperature=0.8, top_p=0.95, seed=0)), float("inf")
    for _ in range(10):
        start = time.perf_counter()
        sampler(logits, [])
        best = min(best, time.perf_counter() - start)
    assert best < 0.02
