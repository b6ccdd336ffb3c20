"""bisect: which of many changes makes a run go wrong.

    found = debug.bisect(lambda: perplexity() < 20, {
        "attention": lambda: ops.attention.use(mine),
        **{f"layer {i}": debug.patch(f"layers.{i}", ...) for i in range(32)},
    })
    found.guilty                                   # ("layer 17",)

A set of changes is *good* when the run with them passes. For one culprit among n the search takes at most
ceil(log2 n) + 1 runs, and none of them is spent on what another one says. Halving takes ceil(log2 n) runs; the last
one is for what halving has left open. Where it ended on a set that passed, the culprit is what remained, and is run
alone. Where every set failed, nothing has passed yet, and none of the changes is run. So the culprit has failed
without the others, which is more than that all together fail, and a set without it has passed. (Of one change there is
nothing to halve: it takes 2 runs, with it and without.) Where the last run says otherwise there is no single culprit:
all are run together, and when that fails delta debugging (Zeller and Hildebrandt 2002) finds a set that fails and of
which no member can be left out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np

import ops

from . import storage

_ROWS = 60


class BisectError(ops.OpError):
    """There is no culprit to find: all pass, all fail, or the run does not repeat itself."""


@dataclass(frozen=True)
class Run:
    """One run: the names of the changes that were made, whether it passed, and what it raised if it did."""

    changes: tuple[str, ...]
    good: bool
    seconds: float
    error: str = ""


@dataclass(frozen=True)
class Bisection:
    """`guilty`: names of the changes that fail together and of which none can be left out. `runs`, in order.

    `notes` say what does not fit the picture of changes that only ever do harm.
    """

    guilty: tuple[str, ...]
    of: int
    runs: tuple[Run, ...]
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        rows = [
            {"run": str(i + 1), "": "good" if run.good else "BAD", "seconds": f"{run.seconds:.2f}"}
            | {"changes": _listed(run.changes), "raised": run.error}
            for i, run in enumerate(self.runs)
        ]
        lines = [f"guilty: {_listed(self.guilty)}, of {self.of} changes, found in {len(self.runs)} runs", *self.notes]
        return "\n".join([*lines, storage.table(rows, _ROWS).rpartition("\n")[0]])


def bisect(
    run: Callable[[], bool | np.bool_], changes: Mapping[str, Any] | Iterable[Any], repeat: int = 1
) -> Bisection:
    """Find the smallest set of `changes` with which `run()` goes wrong: gives False, or raises.

    Each change is a context manager that can be entered again, a pair of functions (apply, undo), or a function that
    gives a handle with `remove()` or a context manager. Changes are made in their order and undone in the opposite
    one. Names are the keys of a mapping, else "0", "1", ... `repeat` runs every set so often and raises BisectError
    when the runs of one differ. Raises BisectError too when a run without changes fails, or one with all passes.
    """
    named = dict(changes) if isinstance(changes, Mapping) else {str(i): each for i, each in enumerate(changes)}
    if not named:
        raise ops.OpError("bisect: there are no changes to choose from")
    if repeat < 1:
        raise ops.OpError(f"bisect: repeat is {repeat}, expected 1 or more")
    return _Search(run, {name: _applier(name, change) for name, change in named.items()}, repeat).find()


class _Search:
    def __init__(
        self, run: Callable[[], bool | np.bool_], changes: dict[str, Callable[[ExitStack], None]], repeat: int
    ):
        self.run, self.changes, self.repeat = run, changes, repeat
        self.names = (*changes,)
        self.runs: list[Run] = []
        self.known: dict[frozenset[str], bool] = {}
        self.notes: list[str] = []

    def find(self) -> Bisection:
        guilty = self._single() or self._several()
        return Bisection(guilty, len(self.names), tuple(self.runs), tuple(self.notes))

    def _single(self) -> tuple[str, ...]:
        """The one culprit, or nothing when what was seen is not the work of one."""
        left = self.names
        while len(left) > 1:
            half = left[: len(left) // 2]
            left = left[len(left) // 2 :] if self.good(half) else half
        if self.good(left):
            return ()
        if not any(self.known.values()) and not self.good(()):
            raise BisectError(f"bisect: the run fails without any of the {len(self.names)} changes{self._raised()}")
        return left

    def _several(self) -> tuple[str, ...]:
        """A smallest set that fails, where no change was found to fail alone."""
        if self.good(self.names) and all(self.known.values()):
            raise BisectError(f"bisect: the run passes with all {len(self.names)} changes together; none is guilty")
        if not self.good(()):
            raise BisectError(f"bisect: the run fails without any of the {len(self.names)} changes{self._raised()}")
        smallest = min((each for each, good in self.known.items() if not good), key=len)
        guilty, parts = tuple(name for name in self.names if name in smallest), 2
        while len(guilty) > 1:
            pieces = [guilty[len(guilty) * i // parts : len(guilty) * (i + 1) // parts] for i in range(parts)]
            rests = [tuple(name for name in guilty if name not in piece) for piece in pieces]
            if (piece := self._first_bad(pieces)) is not None:
                guilty, parts = piece, 2
            elif (rest := self._first_bad(rests)) is not None:
                guilty, parts = rest, max(parts - 1, 2)
            elif parts == len(guilty):
                break
            else:
                parts = min(2 * parts, len(guilty))
        return guilty

    def _first_bad(self, sets: list[tuple[str, ...]]) -> tuple[str, ...] | None:
        return next((each for each in sets if not self.good(each)), None)

    def good(self, chosen: tuple[str, ...]) -> bool:
        """Whether the run passes with these changes; each set is run once, or `repeat` times."""
        key = frozenset(chosen)
        if key not in self.known:
            seen = {self._once(chosen) for _ in range(self.repeat)}
            if len(seen) > 1:
                raise self._not_deterministic(chosen)
            self.known[key] = seen.pop()
            self._compare(chosen)
        return self.known[key]

    def _compare(self, chosen: tuple[str, ...]) -> None:
        """More changes do no good: a set that passes beside a part of it that fails is looked at again."""
        key, good = frozenset(chosen), self.known[frozenset(chosen)]
        for other, known in [*self.known.items()]:
            if known != good and (other < key if good else key < other):
                for each in (chosen, tuple(name for name in self.names if name in other)):
                    if self._once(each) != self.known[frozenset(each)]:
                        raise self._not_deterministic(each)
                bad, passed = (other, key) if good else (key, other)
                self.notes.append(f"{_listed(bad)} fails, but not together with {_listed(passed - bad)}")

    def _not_deterministic(self, chosen: tuple[str, ...]) -> BisectError:
        return BisectError(
            f"bisect: the run is not deterministic: with {_listed(chosen)} it has passed and failed; "
            f"fix its seed, or let run() decide over several tries"
        )

    def _once(self, chosen: tuple[str, ...]) -> bool:
        entered = finished = good = False
        error, started = "", time.perf_counter()
        try:
            with ExitStack() as stack:
                for name in self.names:
                    if name in chosen:
                        self.changes[name](stack)
                entered = True
                result = self.run()
                finished = True
        except Exception as raised:
            if finished or not entered:
                raise  # a change that is not made or undone is no verdict
            error = f"{type(raised).__name__}: {raised}"
        else:
            good = _verdict(result)
        ordered = tuple(name for name in self.names if name in chosen)
        self.runs.append(Run(ordered, good, time.perf_counter() - started, error))
        return good

    def _raised(self) -> str:
        error = self.runs[-1].error
        return f": {error}" if error else ""


def _verdict(result: Any) -> bool:
    if not isinstance(result, (bool, np.bool_)):
        raise ops.OpError(f"bisect: run() gave {result!r}, expected True when it passes, False when it fails")
    return bool(result)


def _applier(name: str, change: Any) -> Callable[[ExitStack], None]:
    """What makes a change and leaves its undoing on a stack."""
    if isinstance(change, tuple) and len(change) == 2 and all(map(callable, change)):
        apply, undo = change

        def pair(stack: ExitStack) -> None:
            apply()
            stack.callback(undo)

        return pair
    if hasattr(change, "__enter__"):
        if hasattr(change, "remove") or hasattr(change, "gen"):  # a kernel in use; a function under @contextmanager
            raise ops.OpError(
                f"bisect: change {name} can be made only once; pass a function that makes it: lambda: ..."
            )
        manager: Any = change
        return lambda stack: stack.enter_context(manager)
    if callable(change):
        return lambda stack: _made(name, change(), stack)
    raise ops.OpError(
        f"bisect: change {name} is {change!r}, expected a context manager, a pair (apply, undo), or a function that "
        f"gives a handle with remove() or a context manager"
    )


def _made(name: str, made: Any, stack: ExitStack) -> None:
    if hasattr(made, "remove"):
        stack.callback(made.remove)
    elif hasattr(made, "__enter__"):
        stack.enter_context(made)
    else:
        raise ops.OpError(f"bisect: change {name} gave {made!r}, expected a handle with remove() or a context manager")


def _listed(names: Iterable[str], most: int = 8) -> str:
    names = [*names]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) + more) if names else "no change"
