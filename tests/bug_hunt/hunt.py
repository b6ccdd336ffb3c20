"""The hunt: one bug, or one clean model, and one call of the doctor."""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import factory
from .bug import Bug
from .effect import transcript
from .judge import Verdict, judge

# What clean models are held as, and against what: no doctor may find anything.
CLEAN = (
    ("llama", "float32", "hf"),
    ("mistral", "float32", "hf"),
    ("llama", "bfloat16", "float64"),
    ("llama", "q4", "float64"),
    ("llama", "q4", "weights"),
    ("llama", "q8", "float64"),
    ("llama", "q8", "weights"),
)
PATIENCE = 180.0  # seconds for a bug: a kernel that is wrong at one length is found within 30 on a quiet machine
TOKENS = 130  # of the prompt by which a model is known to be the same as before


@dataclass(frozen=True)
class Hunt:
    """What came of one call of the doctor."""

    name: str
    verdict: Verdict
    seconds: float


def examine(model: Any, reference: Any, ids: list[int] | None = None, **options: float) -> Any:
    """The one command that is on trial."""
    from debug import doctor

    return doctor(model, reference, ids, **options)


def hunt(bug: Bug, seed: int) -> Hunt:
    """Plant the bug into a model drawn from `seed`, call the doctor, and judge. The model must come out as it was."""
    rng = np.random.default_rng([seed, zlib.crc32(bug.name.encode())])
    pair = factory.draw(rng, **bug.recipe)
    try:
        tokens = factory.prompt(rng, pair.model, TOKENS)
        before = transcript(pair.model, tokens)
        ids = factory.prompt(rng, pair.model, bug.prompt) if bug.prompt else None
        reference = pair.reference(bug.reference)
        with bug.plant(pair.model):
            started = time.perf_counter()
            try:
                verdict = judge(bug, examine(pair.model, reference, ids, seconds=PATIENCE))
            except Exception as error:  # the hunt goes on; it is a miss, and the table says why
                verdict = Verdict((f"{type(error).__name__}: {error}",))
            seconds = time.perf_counter() - started
        if not np.array_equal(transcript(pair.model, tokens), before):
            verdict = Verdict((*verdict.wrong, "the model is not what it was"), verdict.said)
    finally:
        pair.close()
    return Hunt(bug.name, verdict, seconds)


def clean(seed: int, seconds: float) -> Iterator[Hunt]:
    """The doctor, with so many seconds, on models without a bug: a finding is a false alarm."""
    for model_type, held, kind in CLEAN:
        rng = np.random.default_rng([seed, zlib.crc32(f"{model_type} {held}".encode())])
        pair = factory.draw(rng, model_type, held, **factory.varied(rng, model_type))
        try:
            reference = pair.reference(kind)
            started = time.perf_counter()
            diagnosis = examine(pair.model, reference, seconds=seconds)
            took = time.perf_counter() - started
        finally:
            pair.close()
        alarms = tuple(f"{each.address}: {each.message}" for each in diagnosis.findings[:3])
        wrong = () if diagnosis.ok and not alarms else alarms or ("not ok, and no finding says why",)
        yield Hunt(f"{model_type} {held} against {kind}", Verdict(wrong), took)
