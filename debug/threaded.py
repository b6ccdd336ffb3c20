"""A model run in processes of other numbers of threads: a process has its threads from its start."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import ops
from ops import Call
from ops.difference import results


@dataclass
class Result:
    """One result of one call, made while the tokens from `first` on, `count` of them, ran.

    `changed` tells of what was written which elements the call has changed.
    """

    address: str
    source: str
    result: str
    first: int
    count: int
    values: np.ndarray
    changed: np.ndarray | None


@dataclass
class Different:
    """The first result that differs: `actual` on the second number of threads, `expected` on the first."""

    address: str
    source: str
    result: str
    first: int
    count: int
    actual: np.ndarray
    expected: np.ndarray

    def token(self, row: int) -> int:
        """Which token a row of the result is of."""
        return self.first + row * self.count // len(self.actual) if self.actual.ndim else self.first


class _Record(ops.Interceptor):
    def __init__(self) -> None:
        self.first, self.count = 0, 0
        self.found: list[Result] = []

    def call(self, call: Call, launch: Callable[[Call], Any]) -> Any:
        before = {name: tensor.numpy().copy() for name, tensor in call.written.items()}
        output = launch(call)
        for name, tensor in results(call, output).items():
            values, tokens, changed = tensor.numpy().copy(), (self.first, self.count), None
            if name in before:  # row p of a cache is that of token p
                tokens, changed = (0, len(values)), _bits(values) != _bits(before[name])
            self.found.append(Result(call.address, call.source, name, *tokens, values, changed))
        return output


def first_difference(model: Any, ids: list[int], threads: tuple[int, ...]) -> Different | None:
    """Run a prompt and a decode step on each number of threads; None when all bits agree.

    Raises OpError when the model cannot be pickled, or a process fails.
    """
    try:
        pickled = pickle.dumps((model, ids))
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise ops.OpError(
            f"the model cannot be sent to a process with other threads: {error}; pass threads=() to leave them out"
        ) from error
    with tempfile.TemporaryDirectory(prefix="limpid-threads-") as folder:
        given = Path(folder) / "given"
        given.write_bytes(pickled)
        started = [_started(given, number, Path(folder) / str(i)) for i, number in enumerate(threads)]
        first, second = (_finished(process, number, out) for process, number, out in started)
    if [each.address for each in first] != [each.address for each in second]:
        raise ops.OpError(f"the model makes other calls on {threads[1]} threads than on {threads[0]}")
    for expected, actual in zip(first, second, strict=True):
        if expected.changed is not None and actual.changed is not None:
            # What neither has changed may be anything; what one has may have been in the other's memory by chance.
            untouched = ~(expected.changed | actual.changed)
            expected.values[untouched] = actual.values[untouched] = 0
        if (_bits(expected.values) != _bits(actual.values)).any():
            same = expected.address, expected.source, expected.result, expected.first, expected.count
            return Different(*same, actual.values, expected.values)
    return None


def _started(given: Path, number: int, out: Path) -> tuple[subprocess.Popen[str], int, Path]:
    code = f"import sys; sys.path[:0] = {sys.path!r}; from debug import threaded; threaded.child()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(given), str(out)], env=os.environ | {"LIMPID_THREADS": str(number)},
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    return process, number, out


def _finished(process: subprocess.Popen[str], number: int, out: Path) -> list[Result]:
    errors = process.communicate()[1]
    if process.returncode:
        raise ops.OpError(f"the run on {number} threads failed in its process: {errors.strip()[-2000:]}")
    return pickle.loads(out.read_bytes())


def child() -> None:
    """What such a process does: all ids but the last in one piece, then the last one."""
    given, out = map(Path, sys.argv[1:])
    model, ids = pickle.loads(given.read_bytes())
    record, cache = _Record(), model.new_cache()
    with ops.intercepted(record):
        for piece in (ids[:-1], ids[-1:]):
            record.first, record.count = record.first + record.count, len(piece)
            model(piece, cache)
    out.write_bytes(pickle.dumps(record.found))


def _bits(values: np.ndarray) -> np.ndarray:
    return values.view(f"u{values.dtype.itemsize}")
