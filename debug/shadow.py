"""Check: every call beside its NumPy reference; whose error it is.

    with debug.check() as c:
        model(ids)
    c                                              # a table; the culprit, where there is one, above it
    c.culprit                                      # the first call whose own error is beyond the tolerance

A call's *introduced* error is that of its result from the reference on the call's real inputs. Its *inherited* error is
how far those inputs are from a clean run's, its *total* error how far its result is: what a clean run gives is
computed alongside, each call's reference on clean inputs. So one wrong kernel is one culprit, and what follows from it
shows as inherited. Where weights are packed, activations are rounded to 8 bits: what differs in its last bit may come
out a step apart, and inherited errors of a right model are of the order of 1e-2 there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.table import Table

import ops
from ops import Call, Tensor
from ops.difference import Difference, Expected, bound, inputs_of, referred, results
from ops.spec import FLOATS
from ops.tolerance import relative_error

from . import storage
from .clean import Clean
from .tool import Tool

_ROWS = 60  # of a table that is longer, as many are shown
_AGAINST = ("reference", "float64")
_QUIET = np.errstate(all="ignore")  # memory that nothing was written to may hold anything


class CheckError(ops.OpError):
    """A call that is wrong; `culprit` tells more."""

    def __init__(self, message: str, culprit: Checked | None = None):
        super().__init__(message)
        self.culprit = culprit


@dataclass(frozen=True)
class Checked:
    """What a check found of the calls of one address: the worst of `count`.

    `introduced` is the error of `result` ("output", "output 1", ..., or a written argument) from the reference on the
    real inputs; more than `bound` is wrong. `inherited` and `total` are errors from the clean run, None without one.
    """

    address: str
    source: str
    kernel: str
    result: str
    introduced: Difference
    bound: float
    inherited: float | None
    total: float | None
    count: int = 1

    @property
    def wrong(self) -> bool:
        return self.introduced.error > self.bound

    @property
    def excess(self) -> float:
        """The introduced error as a multiple of the bound."""
        return _excess(self.introduced.error, self.bound)

    def __str__(self) -> str:
        more = "" if self.inherited is None else f"; inherited {self.inherited:.3g}, total {self.total:.3g}"
        return (
            f"{self.address}  {self.source}  kernel {self.kernel}\n"
            f"  {self.result}: introduced {self.introduced}, bound {self.bound:.3g}{more}"
        )


def _excess(error: float, allowed: float) -> float:
    return error / allowed if allowed else float("inf") if error else 0.0


class Check(Tool):
    """Shadows calls while it is on; see `check`. `records` has the worst call of each address, in order."""

    def __init__(
        self, where: Any, every: int, tolerance: float | None, against: str, inherited: bool, stop: bool
    ):  # fmt: skip
        super().__init__(where)
        if against not in _AGAINST:
            raise ops.OpError(f"against is {against!r}, expected one of {', '.join(map(repr, _AGAINST))}")
        if not isinstance(every, int) or every < 1:
            raise ops.OpError(f"every is {every!r}, expected an int, 1 or more")
        self.every, self.tolerance, self.against, self.stop = every, tolerance, against, stop
        self.culprit: Checked | None = None
        self.checked = 0
        self.without_reference: dict[str, int] = {}  # calls of ops that have none, by the op's name
        self._found: dict[str, Checked] = {}
        self._clean = Clean() if inherited else None
        self._pass, self._passes, self._index = -1, -1, -1

    @property
    def records(self) -> list[Checked]:
        return [*self._found.values()]

    @property
    def culprits(self) -> list[Checked]:
        """Of all addresses with a wrong call the worst one, in the order they were first called."""
        return [each for each in self._found.values() if each.wrong]

    def worst(self, count: int = 10) -> list[Checked]:
        """The records with the largest introduced errors, as multiples of their bounds, largest first."""
        return sorted(self._found.values(), key=lambda each: -each.excess)[:count]

    def __iter__(self) -> Iterator[Checked]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self._found)

    def call(self, call: Call, launch: Callable[[Call], Any]) -> Any:
        if call.scope.number != self._pass:
            self._begin_pass(call.scope.number)
        due = self.means(call) and self._is_due()
        if not due and self._clean is None:
            return launch(call)
        if call.op._reference is None:
            return self._unchecked(call, launch)
        given = inputs_of(call)
        wanted, cleaned, refusal = None, None, None
        try:
            wanted = Expected(call, given, wide=self.against == "float64") if due else None
            cleaned = self._clean and referred(call, self._cleaned(call, given), True)
        except Exception as error:  # told below, unless the kernel refuses as well and tells in its own words
            refusal = error
        inherited = self._inherited(call, given) if due and cleaned is not None else None
        output = launch(call)
        if refusal is not None:
            what = "what its reference refuses" if wanted is None else "inputs that its reference refuses as float64"
            hint = "" if wanted is None else "; check with inherited=False"
            told = f"{type(refusal).__name__}: {refusal}{hint}"
            raise CheckError(f"{call.full_address}, {call.source}: the kernel takes {what}: {told}") from refusal
        total = self._put(call, output, cleaned) if cleaned is not None else None
        if wanted is not None:
            self._judge(call, wanted, output, inherited, total)
        return output

    def _begin_pass(self, number: int) -> None:
        self._pass, self._index = number, -1
        self._passes += 1
        if self._clean is not None:
            self._clean.new_pass()

    def _is_due(self) -> bool:
        """Of pass p the calls i with i + p a multiple of `every`: as many passes look at every call."""
        self._index += 1
        return (self._index + self._passes) % self.every == 0

    def _unchecked(self, call: Call, launch: Callable[[Call], Any]) -> Any:
        """A call of an op without a reference: counted, and the clean run goes on from what it gives."""
        self.without_reference[call.op.name] = self.without_reference.get(call.op.name, 0) + 1
        output = launch(call)
        for tensor in call.written.values() if self._clean else ():
            self._clean.put(tensor, tensor.numpy())  # type: ignore[union-attr]
        return output

    def _cleaned(self, call: Call, given: dict[str, Any]) -> dict[str, Any]:
        """The clean inputs of a call: where there is no clean value, the real one."""
        assert self._clean is not None
        for tensor in call.written.values():
            self._clean.before_writing(tensor)
        values = {name: self._clean.value(each) for name, each in call.inputs.items() if isinstance(each, Tensor)}
        return given | {name: value[0] for name, value in values.items() if value is not None}

    @_QUIET
    def _inherited(self, call: Call, given: dict[str, Any]) -> float:
        """The largest error of the real inputs from the clean ones."""
        assert self._clean is not None
        errors = [0.0]
        for name, tensor in call.inputs.items():
            value = self._clean.value(tensor) if isinstance(tensor, Tensor) else None
            if value is not None:
                errors.append(_known_error(given[name], *value))
        return max(errors)

    @_QUIET
    def _put(self, call: Call, output: Any, cleaned: Sequence[np.ndarray]) -> float:
        """The clean run takes its step; gives the largest error of the real results from the clean ones."""
        assert self._clean is not None
        errors = [0.0]
        for tensor, clean in zip(results(call, output).values(), cleaned, strict=True):
            self._clean.put(tensor, clean)
            value = self._clean.value(tensor)
            if value is not None:
                errors.append(_known_error(tensor.numpy(), *value))
        return max(errors)

    @_QUIET
    def _judge(self, call: Call, wanted: Expected, output: Any, inherited: float | None, total: float | None) -> None:
        self.checked += 1
        found: list[tuple[float, str, Difference, float]] = []
        for name, tensor, error in wanted.differences(output):
            allowed = bound(tensor) if self.tolerance is None or tensor.dtype not in FLOATS else self.tolerance
            found.append((_excess(error.error, allowed), name, error, allowed))
        if not found:
            return
        excess, name, error, allowed = max(found, key=lambda each: each[0])
        known = self._found.get(call.address)
        count = known.count + 1 if known else 1
        if known and excess <= known.excess:
            self._found[call.address] = dataclasses.replace(known, count=count)
            return
        use = call.op.used_for(call)
        record = self._found[call.address] = Checked(
            call.full_address, call.source, use.kernel.name if use else "tvm", name, error, allowed,
            inherited, total, count,
        )  # fmt: skip
        if record.wrong and self.culprit is None:
            self.culprit = record
            if self.stop:
                raise CheckError(f"{record}", record)

    def rows(self) -> list[dict[str, str]]:
        """The table as text, a row an address."""
        clean = self._clean is not None
        return [
            {"call": each.address, "n": str(each.count), "introduced": f"{each.introduced.error:.2e}"}
            | {"bound": f"{each.bound:.0e}", "": "WRONG" if each.wrong else ""}
            | ({"inherited": f"{each.inherited:.2e}", "total": f"{each.total:.2e}"} if clean else {})
            | {"at": f"{each.result} {[*each.introduced.index]}", "line": each.source}
            for each in self._found.values()
        ]

    @property
    def summary(self) -> str:
        """The culprit, or that there is none; what was not checked."""
        lines = [f"culprit: {self.culprit}" if self.culprit else f"{self.checked} calls checked, none wrong"]
        missing = ", ".join(f"{name} ({count})" for name, count in self.without_reference.items())
        return "\n".join(lines + [f"not checked, without a reference: {missing}"] * bool(missing))

    def __repr__(self) -> str:
        return f"{self.summary}\n{storage.table(self.rows(), _ROWS)}"

    def __rich__(self) -> Table:
        rows = self.rows()
        table = Table(*(rows[0] if rows else ()), title=self.summary, box=None, pad_edge=False, title_justify="left")
        for row in rows:
            table.add_row(*row.values(), style="bold red" if row[""] else None)
        return table


def _known_error(actual: np.ndarray, clean: np.ndarray, known: np.ndarray | None) -> float:
    if known is not None:
        actual, clean = actual[known], clean[known]
    return relative_error(actual, clean) if actual.size else 0.0


def check(
    where: Any = None, every: int = 1, tolerance: float | None = None, against: str = "reference",
    inherited: bool = True, stop: bool = False,
) -> Check:  # fmt: skip
    """Compare the calls that the selector `where` means (all, when None) with their NumPy references, inside `with`.

    `every=k` checks one call in k, others in each pass: k passes check them all. `tolerance` replaces the table of
    `ops.tolerance` for floats; integers must agree. `against="float64"` widens the inputs of a reference first.
    `inherited=False` leaves out the clean run, which takes as long as the check again and float64 copies of what lives;
    it is on because without it an error that came in cannot be told from a right result. `stop=True` raises CheckError
    at the first culprit, in the model's own call; `debug.stop(when=debug.diverges())` opens a debugger there instead.

    A tool switched on inside this one, such as a patch, counts as part of the calls that it changes.
    """
    return Check(where, every, tolerance, against, inherited, stop)
