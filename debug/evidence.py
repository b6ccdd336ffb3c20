"""Evidence: why a call gave a NaN or an infinity, by its reference in float64 on the real inputs and on finite ones."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

import ops
from ops import Call, Tensor
from ops.difference import referred
from ops.spec import FLOATS

_LARGEST = float(np.finfo("float32").max)
_SHOWN = 3  # products of a dot product


class Operand(NamedTuple):
    """What took part: `value` is a number, or in words what a row or a whole tensor holds."""

    name: str
    value: Any

    def __str__(self) -> str:
        return f"{self.name} = {self.value:.6g}" if isinstance(self.value, float) else f"{self.name}: {self.value}"


@dataclass(frozen=True)
class Birth:
    """The first non-finite element of the call that one was born in.

    `value` is at `index` of `result` ("output" or a written argument), one of `count`; `exact` is what the reference
    gives there in float64, None when there is none. `parameter` names a weight that is itself not finite.
    """

    address: str
    source: str
    kernel: str
    result: str
    dtype: str
    index: tuple[int, ...]
    value: float
    exact: float | None
    count: int
    reason: str
    operands: tuple[Operand, ...]
    parameter: str | None = None

    def __str__(self) -> str:
        more = f", one of {self.count} such elements" if self.count > 1 else ""
        lines = [
            f"{_word(self.value)} born in {self.address}  {self.source}  kernel {self.kernel}",
            f"{self.result}{[*self.index]} = {self.value:g} ({self.dtype}){more}",
            self.reason,
            *map(str, self.operands),
        ]
        return "\n  ".join(lines)


class Evidence:
    """One call, `given` its inputs as arrays by name, of which `makers` says which calls made infinities on purpose."""

    def __init__(self, call: Call, given: dict[str, Any], makers: dict[str, str]):
        self.call, self.given, self.makers = call, given, makers
        self.strange = [name for name, value in given.items() if _is_float(value) and not np.isfinite(value).all()]
        self.foreign = [name for name in self.strange if name not in makers]  # no call that was seen made them so

    def results(self, mended: list[str], narrow: dict[str, Any] | None = None) -> tuple[np.ndarray, ...]:
        """What the reference gives in float64, non-finite values of the inputs `mended` replaced by finite ones."""
        given = self.given if narrow is None else narrow
        return referred(self.call, {n: _mended(v) if n in mended else v for n, v in given.items()}, True)

    @cached_property
    def exact(self) -> tuple[np.ndarray, ...]:
        return self.results([])

    @cached_property
    def mended(self) -> tuple[np.ndarray, ...]:
        return self.results(self.strange) if self.strange else self.exact

    @cached_property
    def moved(self) -> tuple[np.ndarray, ...]:
        """What the reference gives for other finite inputs."""
        rng = np.random.default_rng(0)
        given = {name: _mended(value) for name, value in self.given.items()}
        for name, value in given.items():
            if _is_float(value):
                wide = value.astype("float64")
                given[name] = wide + (1 + np.abs(wide)) * rng.uniform(0.1, 0.2, wide.shape)
        return referred(self.call, given, True)

    def birth(self, name: str, which: int, actual: np.ndarray, before: np.ndarray | None) -> tuple[Birth | None, bool]:
        """What was born in the result number `which`, called `name`; and whether it has infinities on purpose."""
        dtype, actual = actual.dtype.name, actual.astype("float64")
        bad = ~np.isfinite(actual)
        if self.call.op._reference is None:
            return self._without_reference(name, dtype, actual, bad)
        if before is not None:
            bad &= self._written(which, before)
        explained = bad & _fits(self.mended[which], dtype) & ~_fits(self.exact[which], dtype)
        purposely = bad & np.isinf(self.mended[which])
        if purposely.any():
            purposely &= (self.mended[which] == actual) & (self.moved[which] == actual)
        own = bad & ~explained & ~purposely
        brought, met = np.zeros_like(bad), np.zeros_like(bad)
        if explained.any():
            brought = explained & _fits(self.results(self.foreign)[which], dtype)
            if all((value[~np.isfinite(value)] == -np.inf).all() for value in (self.given[n] for n in self.foreign)):
                brought &= actual != -np.inf  # a mask that came in as a tensor
            met = explained & ~brought & np.isnan(actual)
        born = own | brought | met
        if not born.any():
            return None, bool(bad.any())
        index = tuple(int(i) for i in np.argwhere(born)[0])
        explain = self._own if own[index] else self._brought if brought[index] else self._met
        reason, operands, parameter = explain(which, index, dtype)
        exact = float(self.exact[which][index])
        return self._birth(name, dtype, index, actual, exact, born, reason, operands, parameter), False

    def _birth(
        self, name: str, dtype: str, index: tuple[int, ...], actual: np.ndarray, exact: float | None,
        born: np.ndarray, reason: str, operands: tuple[Operand, ...], parameter: str | None,
    ) -> Birth:  # fmt: skip
        call, use = self.call, self.call.op.used_for(self.call)
        return Birth(
            call.full_address, call.source, use.kernel.name if use else "tvm", name, dtype, index,
            float(actual[index]), exact, int(born.sum()), reason, operands, parameter,
        )  # fmt: skip

    def _without_reference(
        self, name: str, dtype: str, actual: np.ndarray, bad: np.ndarray
    ) -> tuple[Birth | None, bool]:
        """An op that says nowhere what it should give: non-finite inputs explain all it gives."""
        if self.strange and not self.foreign:
            return None, True
        index = tuple(int(i) for i in np.argwhere(bad)[0])
        reason = f"{self.call.op.name} has no reference that could tell why"
        parameter = None
        if self.foreign:
            what, parameter, value = self._source(self.foreign[0], ())
            reason = f"{what} is itself {_word(value)}"
        operands = self._operands(index, actual.shape)
        return self._birth(name, dtype, index, actual, None, bad, reason, operands, parameter), False

    def _written(self, which: int, before: np.ndarray) -> np.ndarray:
        """The elements of a written argument that the call writes: what they were before does not show, or changes."""
        name = self.call.op.writes[which - len(self.call.outputs)]
        zeros, ones = (
            referred(self.call, self.given | {name: np.full_like(before, value)}, True)[which] for value in (0, 1)
        )
        same = (zeros == ones) | (np.isnan(zeros) & np.isnan(ones))
        old, new = before.astype("float64"), self.exact[which]
        return same | ~((old == new) | (np.isnan(old) & np.isnan(new)))

    def _own(self, which: int, index: tuple[int, ...], dtype: str) -> tuple[str, tuple[Operand, ...], str | None]:
        """Born of finite operands."""
        exact, operands = float(self.mended[which][index]), self._operands(index, self.exact[which].shape)
        numbers = [each.value for each in operands if isinstance(each.value, float)]
        if np.isfinite(exact) and not _fits(np.asarray(exact), dtype):
            limit = float(ml_dtypes.finfo(dtype).max)
            reason = f"overflow: {exact:.6g} is beyond {dtype}'s largest number, {limit:.6g}"
        elif not np.isfinite(exact) and 0.0 in numbers:
            reason = f"{'0/0' if np.isnan(exact) else 'division by zero'}: {self.call.op.name} of these operands"
        elif not np.isfinite(exact):
            reason = f"the definition of {self.call.op.name} gives {exact:g} for these operands"
        elif self._overflows_inside(index):
            reason = f"overflow on the way to {exact:.6g}: products of these operands, or their sum, exceed float32"
        else:
            reason = f"the kernel is wrong: its reference gives {exact:.6g} for the same operands"
        return reason, operands, None

    def _overflows_inside(self, index: tuple[int, ...]) -> bool:
        """Whether products of the operands, added up, can exceed float32."""
        arrays = [np.abs(v.astype("float64")) for v in map(_mended, self._narrow(index)[0].values()) if _is_float(v)]
        largest = max((float(each.max()) for each in arrays if each.size), default=0.0)
        return largest**2 * max((each.shape[-1] for each in arrays if each.ndim), default=1) > _LARGEST

    def _brought(self, which: int, index: tuple[int, ...], dtype: str) -> tuple[str, tuple[Operand, ...], str | None]:
        """An input that no call made is not finite by itself."""
        narrow, at, moves = self._narrow(index)
        if _fits(referred(self.call, narrow, True)[which][at], dtype):  # it takes more than its own row
            narrow, at, moves = self.given, index, {}

        def holds(name: str, mended: Any) -> bool:
            """Whether the element stays bad with the input `name` in the place of what it is, the others mended."""
            given = {n: _mended(v) if n in self.strange else v for n, v in narrow.items()} | {name: mended}
            return not _fits(referred(self.call, given, True)[which][at], dtype)

        name = next((each for each in self.foreign if holds(each, narrow[each])), self.foreign[0])
        wrong = np.argwhere(~np.isfinite(narrow[name].astype("float64")))
        while len(wrong) > 1:
            some = wrong[: len(wrong) // 2]
            trial = _mended(narrow[name])
            trial[tuple(some.T)] = narrow[name][tuple(some.T)]
            wrong = some if holds(name, trial) else wrong[len(some) :]
        place = tuple(int(i) + moves.get(name, 0) * (axis == 0) for axis, i in enumerate(wrong[0]))
        what, parameter, value = self._source(name, place)
        reason = f"{what} is itself {_word(value)}" + ("" if parameter else ", and no call made it so")
        return reason, (Operand(f"{name}{[*place]}", value),), parameter

    def _met(self, which: int, index: tuple[int, ...], dtype: str) -> tuple[str, tuple[Operand, ...], str | None]:
        """A NaN of infinities that were there on purpose."""
        operands, narrow = self._operands(index, self.exact[which].shape), self._narrow(index)[0]
        made = ", ".join(f"{name} by {address}" for name, address in self.makers.items() if name in self.strange)
        for name in self.strange:
            row = narrow[name]
            row = row[(0, *index[1 : row.ndim - 1])] if row.ndim > 1 and row.shape[0] == 1 else row
            if row.size and (row.astype("float64") == -np.inf).all():
                return f"a masked row: {name} is -inf all along; {made or 'it came in so'}", operands, None
        return (
            f"inf - inf, 0 * inf or the like: the infinities are on purpose, {made or 'they came in'}",
            operands,
            None,
        )

    def _source(self, name: str, place: tuple[int, ...]) -> tuple[str, str | None, float]:
        """What to call an input that is wrong at `place`: the parameter, where a module knows it, else the argument."""
        values = self.given[name].astype("float64")
        place = place or tuple(int(i) for i in np.argwhere(~np.isfinite(values))[0])
        parameter = parameter_of(self.call, self.call.inputs[name])
        return f"{parameter or name}{[*place]}", parameter, float(values[place])

    def _narrow(self, index: tuple[int, ...]) -> tuple[dict[str, Any], tuple[int, ...], dict[str, int]]:
        """The inputs that the element at `index` needs, its index among them, and where their first axis begins."""
        given, call = self.given, self.call
        if call.op is ops.linear:
            i, j = index
            starts, at = {"x": i, "weight": j} | ({"bias": j} if given.get("bias") is not None else {}), (0, 0)
        else:
            starts = dict.fromkeys(row_inputs(call), index[0]) if index else {}
            at = (0, *index[1:]) if starts else index
        return given | {name: given[name][start : start + 1] for name, start in starts.items()}, at, starts

    def _operands(self, index: tuple[int, ...], shape: tuple[int, ...]) -> tuple[Operand, ...]:
        """The numbers that the element is made of, or what the rows hold that they stand in."""
        given = {name: value for name, value in self.given.items() if value is not None}
        if self.call.op is ops.linear:
            return _products(given, *index)
        single = {name: _element(value, index, shape) for name, value in given.items()}
        if all(each is not None for each in single.values()) and self._is_elementwise(single, index):
            return tuple(_operand(name, each, index) for name, each in single.items())
        rows = dict.fromkeys(row_inputs(self.call), index[0])
        return tuple(
            Operand(f"{name}[{rows[name]}]", _described(value[rows[name]]))
            if name in rows
            else Operand(name, _described(value))
            for name, value in given.items()
            if isinstance(value, np.ndarray)
        )

    def _is_elementwise(self, single: dict[str, Any], index: tuple[int, ...]) -> bool:
        """Whether the reference gives this element from its own operands alone."""
        if self.call.op._reference is None:
            return False
        try:
            alone = referred(self.call, single, True)[0]
        except (ValueError, IndexError, TypeError):  # not a shape that the op knows
            return False
        return alone.size == 1 and np.array_equal(alone.reshape(()), self.exact[0][index], equal_nan=True)


def row_inputs(call: Call) -> list[str]:
    """The inputs whose first axis is that of the results: row i of these is computed from row i of those."""
    first = next((sizes[0] for sizes in call.op.symbolic.values() if sizes and sizes[0]), None)
    aligned = [
        name
        for name, sizes in call.op.symbolic.items()
        if first is not None and sizes[0] == first and isinstance(call.inputs.get(name), Tensor)
    ]
    rows = {call.inputs[name].shape[:1] for name in aligned} | {spec.shape[:1] for spec in call.outputs}
    return aligned if len(rows) == 1 and call.outputs else []


def parameter_of(call: Call, tensor: Tensor) -> str | None:
    """The path of the parameter that a tensor is, in the modules that the call is made in."""
    scope: Any = call.scope
    while scope is not None:
        parameters = getattr(scope.module, "parameters", None)
        for name, value in parameters() if parameters else ():
            if value is tensor:
                return scope.below(name)
        scope = scope.parent
    return None


def _is_float(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.name in FLOATS


def _fits(values: np.ndarray, dtype: str) -> np.ndarray:
    """Where values are finite in this dtype."""
    return np.abs(values) <= float(ml_dtypes.finfo(dtype).max)


def _mended(value: Any) -> Any:
    """A copy with finite values, drawn from the others, in the place of those that are not."""
    if not _is_float(value) or np.isfinite(value).all():
        return value
    finite, wrong = value[np.isfinite(value)], ~np.isfinite(value)
    drawn = np.random.default_rng(0).choice(finite if finite.size else np.ones(1, value.dtype), int(wrong.sum()))
    mended = value.copy()
    mended[wrong] = drawn
    return mended


def _element(value: Any, index: tuple[int, ...], shape: tuple[int, ...]) -> Any:
    """The one element of an operand that stands at `index` of the result, with as many axes; None for another shape."""
    if not isinstance(value, np.ndarray):
        return value
    if value.shape != shape[len(shape) - value.ndim :]:
        return None
    return value[tuple(slice(i, i + 1) for i in index[len(index) - value.ndim :])]


def _operand(name: str, value: Any, index: tuple[int, ...]) -> Operand:
    """An element that `_element` took, or a scalar."""
    if isinstance(value, np.ndarray):
        return Operand(f"{name}{[*index[len(index) - value.ndim :]]}", float(value.reshape(())))
    return Operand(name, float(value))


def _products(given: dict[str, Any], i: int, j: int) -> tuple[Operand, ...]:
    """The largest products of row i of x and row j of weight."""
    x, w = given["x"][i].astype("float64"), np.asarray(given["weight"][j], "float64")
    with np.errstate(all="ignore"):
        products = x * w
    order = np.argsort(-np.where(np.isnan(products), np.inf, np.abs(products)))[:_SHOWN]
    found = [Operand(f"x[{i}, {k}] * weight[{j}, {k}] = {x[k]:.6g} * {w[k]:.6g}", float(products[k])) for k in order]
    bias = given.get("bias")
    return (*found, Operand(f"bias[{j}]", float(bias[j]))) if bias is not None else tuple(found)


def _described(values: np.ndarray) -> str:
    """What an array holds, in a line."""
    wide = values.astype("float64")
    finite = wide[np.isfinite(wide)]
    parts = [f"min {finite.min():.6g}, max {finite.max():.6g}"] if finite.size else []
    counts = {"NaN": np.isnan(wide).sum(), "inf": (wide == np.inf).sum(), "-inf": (wide == -np.inf).sum()}
    parts += [f"{count} of {wide.size} {name}" for name, count in counts.items() if count]
    return ", ".join(parts) or "empty"


def _word(value: float) -> str:
    return "NaN" if np.isnan(value) else "an infinity"
