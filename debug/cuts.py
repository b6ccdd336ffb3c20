"""invariance: which op's result changes with how the same work is cut.

    found = debug.invariance(model, ids)
    found                                          # a table of what changes; nothing, where nothing does
    found.culprit                                  # the first op of the model that does: where, by how much

The prompt is run in one piece, and the outputs of all calls are kept. Then it is run again, cut otherwise. There each
call gives what the whole run gave for its tokens, after what it computed has been compared with that: so all calls
compute from the same inputs, to the bit, and a difference is the call's own and not an earlier one's. Calls are matched
by address, rows by the position of their tokens.

The cuts: in chunks, of one token too (decode against prefill); a row alone (each call again, with one of its rows);
again (the whole once more, in memory full of NaN: run to run); and on other numbers of threads. These a process has
from its start, so that two processes are started, and compared with each other. They know nothing of kernels in use
and tools in this one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import ops
from ops import Call, Spec, Tensor
from ops.difference import difference, differs, results
from ops.spec import FLOATS
from ops.tolerance import KERNEL

from . import storage, threaded
from .evidence import row_inputs
from .poison import poison
from .record import Held, Keeper

_ROWS = 60
_ALONE = "a row alone"
_QUIET = np.errstate(all="ignore")  # memory that nothing was written to may hold anything
_LIMIT = 2 * 2**30  # bytes of results in memory; more are kept in a file


@dataclass(frozen=True)
class Change:
    """An op whose result changes with the cut, at its worst: `actual` in the cut run, `expected` in the whole one.

    `error` is relative to the largest value of the whole run's result; `bound` is what it may be, 0 where the bits must
    agree. `token` is the position whose row it is, `index` the place in the row. `note` says when inputs differ too.
    """

    cut: str
    address: str
    source: str
    result: str
    token: int
    index: tuple[int, ...]
    actual: float
    expected: float
    error: float
    bound: float
    order: int
    note: str = ""

    @property
    def layer(self) -> str:
        """The path of the module that makes the call."""
        return self.address.partition("/")[0]

    def __str__(self) -> str:
        return (
            f"{self.address}  {self.source}  {self.cut}: {self.result} of token {self.token} at {[*self.index]} is "
            f"{self.actual:.6g} instead of {self.expected:.6g}, "
            f"error {self.error:.3g}, bound {self.bound:.3g}{self.note}"
        )


class Invariance:
    """What `invariance` found: `changes`, in the order of the model's calls; `cuts` that were made; `notes`."""

    def __init__(self, changes: Sequence[Change], cuts: Sequence[str], notes: Sequence[str]):
        self.changes = sorted(changes, key=lambda each: each.order)
        self.cuts, self.notes = [*cuts], [*notes]

    @property
    def culprit(self) -> Change | None:
        """The first call of the model that changes; None when none does."""
        return self.changes[0] if self.changes else None

    def __repr__(self) -> str:
        head = [f"culprit: {self.culprit}" if self.culprit else "no result changes with the cut"]
        lines = [*head, f"cuts: {', '.join(self.cuts)}", *self.notes]
        if not self.changes:
            return "\n".join(lines)
        rows = [
            {"call": each.address, "cut": each.cut, "error": f"{each.error:.2e}", "bound": f"{each.bound:.0e}"}
            | {"at": f"{each.result}, token {each.token} {[*each.index]}{each.note}", "line": each.source}
            for each in self.changes
        ]
        return "\n".join([*lines, storage.table(rows, _ROWS).rpartition("\n")[0]])


@dataclass
class _Whole:
    """What one call of the whole run got, of what has a row a token, and gave; of what it wrote the tokens' rows."""

    order: int
    tokens: int
    inputs: dict[str, Held]
    results: dict[str, Held]
    scales: dict[str, float]

    def rows(self, name: str) -> np.ndarray:
        """A result, [tokens, ...]."""
        return _per_token(self.results[name].tensor.numpy(), self.tokens)


class _Recorder(ops.Interceptor):
    """The whole run: keeps what every call gives, and runs some of its rows alone."""

    def __init__(self, tokens: int, alone: int, compare: _Compare):
        self.tokens, self.alone, self.compare = tokens, alone, compare
        self.calls: dict[tuple[str, int], _Whole] = {}
        self.unaligned: set[str] = set()
        self.written: list[Spec] = []
        self._keeper = Keeper(_LIMIT)
        self._seen: dict[str, int] = {}

    def call(self, call: Call, launch: Callable[[Call], Any]) -> Any:
        for tensor in call.written.values():
            self._keeper.before_writing(tensor)
            self.written.append(tensor.spec)
        output = launch(call)
        key, found = _key(call, self._seen), _by_token(call, output, 0, self.tokens)
        if found is None:
            self.unaligned.add(call.address)
            return output
        kept = {
            name: Held(ops.tensor(found[name].copy(), device=tensor.device))
            if name in call.written
            else self._keeper.keep(tensor, made=True)
            for name, tensor in results(call, output).items()
        }
        inputs = {name: self._keeper.keep(call.inputs[name], made=False) for name in row_inputs(call)}
        scales = {name: _scale(rows) for name, rows in found.items()}
        self.calls[key] = _Whole(len(self.calls), self.tokens, inputs, kept, scales)
        if self.alone:
            self._rows_alone(call, self.calls[key], launch)
        return output

    def _rows_alone(self, call: Call, whole: _Whole, launch: Callable[[Call], Any]) -> None:
        rows = row_inputs(call)
        count = len(call.inputs[rows[0]]) if rows else 0
        if count < 2:
            return
        for i in sorted({round(each) for each in np.linspace(0, count - 1, min(self.alone, count))}):
            args = tuple(each[i : i + 1] if name in rows else each for name, each in call.inputs.items())
            for name, tensor in results(call, launch(call.replace(args))).items():
                expected = whole.results[name].tensor.numpy()[i : i + 1]
                self.compare(_ALONE, call, whole, name, tensor.numpy(), expected, i * self.tokens // count, False)


class _Compare:
    """Collects what changes; of each cut and address the worst."""

    def __init__(self, tolerance: float | None):
        self.tolerance = tolerance
        self.found: dict[tuple[str, str], Change] = {}

    @_QUIET
    def __call__(
        self, cut: str, call: Call, whole: _Whole, name: str, actual: np.ndarray, expected: np.ndarray, first: int,
        exact: bool,
    ) -> None:  # fmt: skip
        """Rows of the tokens from `first` on, of the result `name`; `exact` when the bits must agree."""
        if not differs(actual.astype("float64"), expected.astype("float64")).any():
            return
        bound = 0.0 if exact or promises_bits(call.op) else self._allowed(actual.dtype.name)
        worst = difference(actual, expected)
        scale = whole.scales[name]
        error = abs(worst.actual - worst.expected) / scale if np.isfinite(worst.error) and scale else float("inf")
        known = self.found.get((cut, call.address))
        if error <= bound or (known and error <= known.error):
            return
        self.found[cut, call.address] = Change(
            cut, call.address, call.source, name, first + worst.index[0], worst.index[1:], worst.actual,
            worst.expected, error, bound, whole.order, "" if cut == _ALONE else _inputs_note(call, whole, first),
        )  # fmt: skip

    def _allowed(self, dtype: str) -> float:
        return KERNEL.get(dtype, 0.0) if self.tolerance is None or dtype not in FLOATS else self.tolerance


class _Cut(ops.Interceptor):
    """A run that is cut otherwise: compares each call with the whole run's and gives what that gave."""

    def __init__(self, name: str, recorder: _Recorder, exact: bool):
        self.cut, self.recorder, self.exact = name, recorder, exact
        self.first, self.count = 0, 0  # the tokens of the piece that runs
        self.unknown: set[str] = set()
        self._seen: dict[str, int] = {}

    def piece(self, first: int, count: int) -> None:
        """The next forward is of these tokens."""
        self.first, self.count = first, count
        self._seen = {}

    def call(self, call: Call, launch: Callable[[Call], Any]) -> Any:
        if self.exact:
            poison(*call.outputs)
        output = launch(call)
        whole = self.recorder.calls.get(_key(call, self._seen))
        if whole is None:
            if call.address not in self.recorder.unaligned:
                self.unknown.add(call.address)
            return output
        found = _by_token(call, output, self.first, self.count)
        if found is None or any(rows.shape[1:] != whole.rows(name).shape[1:] for name, rows in found.items()):
            self.unknown.add(call.address)
            return output
        given = {name: whole.rows(name)[self.first : self.first + self.count] for name in found}
        for name, rows in found.items():
            self.recorder.compare(self.cut, call, whole, name, rows, given[name], self.first, self.exact)
        for name, tensor in call.written.items():
            tensor.numpy()[self.first : self.first + self.count] = given[name]
        names = [name for name in found if name not in call.written]
        fresh = [
            ops.tensor(given[name].reshape(spec.shape).copy(), device=spec.device)
            for name, spec in zip(names, call.outputs, strict=True)
        ]  # fmt: skip
        return fresh[0] if len(fresh) == 1 else tuple(fresh) or None


def _key(call: Call, seen: dict[str, int]) -> tuple[str, int]:
    """The address, and how often it has been called in this forward: a module may run twice."""
    seen[call.address] = seen.get(call.address, -1) + 1
    return call.address, seen[call.address]


def _by_token(call: Call, output: Any, first: int, count: int) -> dict[str, np.ndarray] | None:
    """Results by name, [count, ...] each: rows of the tokens from `first` on. None when they are not rows of tokens.

    What is written is a cache when the call has int `positions` of these tokens: row p belongs to position p.
    """
    found = {}
    for name, tensor in results(call, output).items():
        array = tensor.numpy()
        if name in call.written:
            positions = call.inputs.get("positions")
            if not isinstance(positions, Tensor) or positions.shape != (count,) or len(array) < first + count:
                return None
            found[name] = array[first : first + count]
        elif not array.ndim or not count or len(array) % count:
            return None
        else:
            found[name] = _per_token(array, count)
    return found


def _per_token(array: np.ndarray, tokens: int) -> np.ndarray:
    """[tokens, ...]: rows as they are where each token has one, else several of a token together."""
    return array if len(array) == tokens else array.reshape(tokens, -1, *array.shape[1:])


@_QUIET
def _scale(rows: np.ndarray) -> float:
    sizes = np.abs(rows.astype("float64"))
    return float(sizes[np.isfinite(sizes)].max(initial=0.0))


@_QUIET
def _inputs_note(call: Call, whole: _Whole, first: int) -> str:
    """Which inputs that hold a row a token are others than in the whole run: then it is not the op that differs."""
    for name, held in whole.inputs.items():
        given, before = (each.numpy().astype("float64") for each in (call.inputs[name], held.tensor))
        start = first * (len(before) // whole.tokens)
        if not np.array_equal(given, before[start : start + len(given)], equal_nan=True):
            return f"; its input {name} differs too"
    return ""


def promises_bits(op: Any) -> bool:
    """Whether the op's docstring promises that a row's result does not depend on the others, "to the bit"."""
    return "to the bit" in " ".join((op.__doc__ or "").split())


def invariance(
    model: Any, ids: Sequence[int], chunks: Sequence[int] = (1, 3, 17), rows: int = 8, again: int = 1,
    threads: Sequence[int] = (1, 2), tolerance: float | None = None,
) -> Invariance:  # fmt: skip
    """Compare a prompt in one piece with the same work cut otherwise; see the module for how.

    `model(ids, cache)` runs tokens over `model.new_cache()`. `chunks` are sizes of pieces, 1 is token by token; those
    that are not below the number of ids are left out. `rows` of each call are run alone, spread evenly; 0 for none.
    `again` times the whole is run once more. `threads` are two numbers of threads, () for none: then nothing has to be
    pickled, as the model must be for another process.

    Bits must agree from run to run and between numbers of threads; between cuts for ops whose docstrings promise it.
    Else the bound is that of a kernel, or `tolerance`.
    """
    ids = [int(each) for each in ids]
    if len(ids) < 2:
        raise ops.OpError(f"invariance: {len(ids)} ids cannot be cut; give 2 or more")
    if len(threads) not in (0, 2):
        raise ops.OpError(f"invariance: threads is {tuple(threads)}, expected two numbers, or () for none")
    compare = _Compare(tolerance)
    recorder = _Recorder(len(ids), rows, compare)
    with ops.intercepted(recorder):
        model(ids, model.new_cache())
    if not recorder.calls:
        raise ops.OpError("invariance: no call of the model gives rows that belong to its tokens")
    cuts = [_ALONE] * bool(rows)
    notes = [f"not compared, as their results are no rows of tokens: {_some(recorder.unaligned)}"]
    notes = notes * bool(recorder.unaligned)
    for cut, sizes, exact in _planned(len(ids), chunks, again):
        tool = _Cut(cut, recorder, exact)
        if exact:
            poison(*recorder.written)
        with ops.intercepted(tool):
            cache = model.new_cache()
            for first, count in sizes:
                tool.piece(first, count)
                model(ids[first : first + count], cache)
        cuts.append(cut)
        notes += [f"{cut}: not matched with a call of the whole run: {_some(tool.unknown)}"] * bool(tool.unknown)
    found = [*compare.found.values()]
    if threads:
        cuts.append(f"{threads[1]} threads against {threads[0]}, in processes of their own")
        found += _of_threads(model, ids, threads, recorder)
    return Invariance(found, cuts, notes)


def _planned(tokens: int, chunks: Sequence[int], again: int) -> Iterator[tuple[str, list[tuple[int, int]], bool]]:
    """Cuts: a name, the first token and the size of each piece, and whether the bits must agree."""
    for size in chunks:
        if size < tokens:
            name = "token by token" if size == 1 else f"chunks of {size}"
            yield name, [(first, min(size, tokens - first)) for first in range(0, tokens, size)], False
    for _ in range(again):
        yield "again", [(0, tokens)], True


@_QUIET
def _of_threads(model: Any, ids: list[int], threads: Sequence[int], recorder: _Recorder) -> list[Change]:
    """The first call that gives other bits on another number of threads: those before it agree, so it is its own."""
    found = threaded.first_difference(model, ids, tuple(threads))
    if found is None:
        return []
    whole, worst = recorder.calls.get((found.address, 0)), difference(found.actual, found.expected)
    scale, index = _scale(found.expected), worst.index or (0,)
    error = abs(worst.actual - worst.expected) / scale if np.isfinite(worst.error) and scale else float("inf")
    return [
        Change(
            f"{threads[1]} threads", found.address, found.source, found.result, found.token(index[0]), index[1:],
            worst.actual, worst.expected, error, 0.0, whole.order if whole else len(recorder.calls),
        )
    ]  # fmt: skip


def _some(addresses: set[str]) -> str:
    shown = sorted(addresses)[:5]
    return ", ".join(shown) + (f" and {len(addresses) - len(shown)} more" if len(addresses) > len(shown) else "")
