"""Both sides in turns, round by round, and what the rounds say."""

from __future__ import annotations

import statistics
from typing import Any

from .process import Load, Worker
from .table import Row

_CALM = 0.05  # share of the machine that other processes may use in a round that counts
_ATTEMPTS = 3  # times the wanted rounds, while too few are calm
_WARM_TIMEOUT, _TIMEOUT = 600.0, 300.0  # seconds; torch.compile compiles in the first


def warm(rows: list[Row], ours: Worker, theirs: Worker) -> None:
    """Everything built, compiled and filled: each side does each test twice, as a recompile may come with the second.

    Raises WorkerError.
    """
    for row in rows:
        for side in (ours, theirs):
            for _ in range(2):
                side.ask(_WARM_TIMEOUT, **row.test)
            side.settle()


def take(rows: list[Row], ours: Worker, theirs: Worker, rounds: int) -> dict[Row, list[dict[str, Any]]]:
    """The raw rounds of each row: {"ours", "theirs": {variant: seconds of each run}, "others": shares, "compiles"}.

    One side computes at a time, the other sleeps; who begins alternates. Rows go on, up to a limit, until `rounds` of
    theirs were calm. Raises WorkerError.
    """
    taken: dict[Row, list[dict[str, Any]]] = {row: [] for row in rows}
    for attempt in range(_ATTEMPTS * rounds):
        for row, each in taken.items():
            if sum(max(one["others"].values()) <= _CALM for one in each) < rounds:
                each.append(_round(row, ours, theirs, attempt % 2 == 0))
    return taken


def _round(row: Row, ours: Worker, theirs: Worker, ours_first: bool) -> dict[str, Any]:
    sides, answers, others = {"ours": ours, "theirs": theirs}, {}, {}
    for name in sorted(sides, reverse=not ours_first):
        load = Load()
        with load.beside(sides[name]):
            answers[name] = sides[name].ask(_TIMEOUT, **row.test)
        others[name] = load.share
        sides[name].settle()
    seconds = {name: answer["seconds"] for name, answer in answers.items()}
    return seconds | {"others": others, "compiles": answers["ours"].get("compiles", 0)}


def summary(row: Row, taken: list[dict[str, Any]], rounds: int) -> dict[str, Any]:
    """A row of the report: the calmest `rounds` count; of each side's variants the fastest; ratios round by round.

    A round's figure is the median of its runs. `of_fastest` compares the fastest run of each side: on a busy machine it
    tells more.
    """
    calmest = sorted(range(len(taken)), key=lambda i: max(taken[i]["others"].values()))[:rounds]
    used = [taken[i] for i in sorted(calmest)]
    (_, ours, our_fastest), (variant, theirs, their_fastest) = _fastest(used, "ours"), _fastest(used, "theirs")
    ratios = [their / our for our, their in zip(ours, theirs, strict=True)]
    ratio = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
    amount, unit = row.amount
    return {
        "name": row.name,
        "work": row.work,
        "against": row.against,
        "variant": variant,
        "unit": unit,
        "ours": amount / statistics.median(ours),
        "theirs": amount / statistics.median(theirs),
        "ratio": ratio | {"of_fastest": their_fastest / our_fastest},
        "wanted": row.wanted,
        "met": None if row.wanted is None else ratio["median"] >= row.wanted,
        "others": max(max(each["others"].values()) for each in used),
        "compiles": sum(each["compiles"] for each in taken),
        "rounds": [each | {"counts": i in calmest} for i, each in enumerate(taken)],
    }


def _fastest(used: list[dict[str, Any]], side: str) -> tuple[str, list[float], float]:
    """The side's best variant: its name, the median seconds of each round, and the least seconds of all runs."""
    medians = {name: [statistics.median(each[side][name]) for each in used] for name in used[0][side]}
    best = min(medians, key=lambda name: statistics.median(medians[name]))
    return best, medians[best], min(min(each[side][best]) for each in used)
