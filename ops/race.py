"""Race: all known kernels of an op on the same inputs: how long each takes, how far it is off, and who is alone.

    ops.rms_norm.race(x, weight, eps=1e-6)

TVM's kernel, every swap, the NumPy reference, and torch where it is installed and knows the op. They take turns; each
works on outputs of its own.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import ceilings, costs, device, races_torch
from .call import Call, Kernel
from .difference import Difference, Expected, bound
from .errors import OpError
from .interleave import interleaved
from .table import Table
from .tensor import Tensor, empty
from .tolerance import KERNEL, relative_error

_SECONDS = 1.0


@dataclass(frozen=True)
class Contender:
    """One kernel's result: seconds a call (None where it failed), its worst difference from the reference in float64,
    and `failed`, why it gave nothing."""

    name: str
    language: str
    seconds: float | None
    off: Difference | None
    bound: float
    failed: str = ""

    @property
    def right(self) -> bool:
        return self.off is not None and self.off.error <= self.bound


class Race(Table):
    """A race as a table, the fastest first. `contenders` has the figures, `alone` the names that the others outvote."""

    def __init__(self, call: Call, contenders: list[Contender], alone: list[str]):
        self.call, self.contenders, self.alone = call, contenders, alone
        self.cost = cost = costs.cost(call)
        inputs = ", ".join(f"{n}={getattr(v, 'spec', v)}" for n, v in (call.inputs | call.constants).items())
        note = f"{cost.bytes:,} bytes, {cost.flops:,} flops; of {' and '.join(ceilings.described(call.device))}"
        note += ", from caches also more than 100 %"
        vote = f"; outvoted by the others: {', '.join(alone)}" if alone else ""
        super().__init__(
            f"{call.op.name}({inputs})", _COLUMNS, [self._row(each) for each in self.contenders], note + vote,
            shares=("% bandwidth", "% peak"),
        )  # fmt: skip

    def _row(self, each: Contender) -> tuple:
        if each.seconds is None or each.off is None:
            return each.name, each.language, None, None, None, None, each.failed
        bandwidth, most = 100 * self.cost.bytes / each.seconds / ceilings.bandwidth(self.call.device), None
        if (peak := ceilings.peak(self.call.device)) is not None:
            most = 100 * self.cost.flops / each.seconds / peak
        verdict = "right" if each.right else f"WRONG: {each.off}"
        return each.name, each.language, each.seconds * 1e6, bandwidth, most, each.off.error, verdict

    @property
    def fastest(self) -> Contender:
        """Of those that are right. Raises OpError when none is."""
        right = [each for each in self.contenders if each.right]
        if not right:
            raise OpError(f"no kernel of {self.call.op.name} is right on these inputs")
        return min(right, key=lambda each: each.seconds or 0.0)


_UNKNOWN = Difference(0.0, (), 0.0, 0.0), float("inf")  # of an op that has no reference
_COLUMNS = ("kernel", "language", "us", "% bandwidth", "% peak", "error", "verdict")
Run = Callable[[Call, tuple[Tensor, ...]], Any]


def race(call: Call, seconds: float = _SECONDS) -> Race:
    """Race all kernels of the call's op on its arguments, which stay as they are."""
    sides = _sides(call)
    given: dict[str, list[np.ndarray]] = {}
    failed: dict[str, str] = {}
    worst: dict[str, tuple[Difference, float]] = {}
    runs: dict[str, Callable[[], Any]] = {}
    for name, (_, run, proven) in sides.items():
        mine, outputs = _own_copy(call), tuple(empty(spec) for spec in call.outputs)
        expected = Expected(mine, wide=True) if call.op._reference else None
        try:
            run(mine, outputs)
        except Exception as error:  # a contender's own: the others race without it
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        given[name] = [each.numpy().astype("float64") for each in (*outputs, *mine.written.values())]
        result = outputs[0] if len(outputs) == 1 else outputs
        offs = [(off, bound(each)) for _, each, off in expected.differences(result)] if expected else [_UNKNOWN]
        worst[name] = max(offs, key=lambda pair: pair[0].error)
        run = proven if all(off.error <= limit for off, limit in offs) else run
        runs[name] = functools.partial(_finished, run, mine, outputs)
    times = interleaved(runs, seconds) if runs else {}
    contenders = [
        Contender(name, language, times.get(name), *worst.get(name, (None, 0.0)), failed.get(name, ""))
        for name, (language, _, _) in sides.items()
    ]
    contenders.sort(key=lambda each: float("inf") if each.seconds is None else each.seconds)
    return Race(call, contenders, _outvoted(call, given))


def _finished(run: Run, call: Call, outputs: tuple[Tensor, ...]) -> None:
    """Run to the end, also on a device that only starts its kernels."""
    run(call, outputs)
    device.wait(call.device)


def _own_copy(call: Call) -> Call:
    """The call on copies of what it writes."""
    args = [
        copy.deepcopy(value) if name in call.op.writes and isinstance(value, Tensor) else value
        for name, value in call.inputs.items()
    ]
    return call.replace(tuple(args))


def _sides(call: Call) -> dict[str, tuple[str, Run, Run]]:
    """Names, languages and what runs them, at first and when they were right, of all that can compute the call."""
    from .swap import own

    op = call.op
    sides: dict[str, tuple[str, Run, Run]] = {"own": ("tvm", own, own)} if op._kernel or op._templates else {}
    for use in op._uses:
        kernel = use.kernel
        if use.where.fits(call) and kernel.fits(call):
            taken = {*sides, "reference", "torch"}
            name = kernel.name if kernel.name not in taken else f"{kernel.name} {len(sides)}"
            sides[name] = (kernel.label, kernel.launch, kernel.launch_here)
    if op._reference is not None:
        sides["reference"] = ("numpy", _reference, _reference)
    if importlib.util.find_spec("torch") is not None and races_torch.knows(call):
        sides["torch"] = ("torch", races_torch.run, races_torch.run)
    return sides


def _reference(call: Call, outputs: tuple[Tensor, ...]) -> None:
    Kernel.from_python(call.op.reference).launch(call, outputs)


def _outvoted(call: Call, given: dict[str, list[np.ndarray]]) -> list[str]:
    """Who differs from what most agree on; nobody where no group of those that agree is larger than all others."""
    dtypes = [spec.dtype for spec in call.outputs] + [each.dtype for each in call.written.values()]
    bounds = [KERNEL.get(dtype, 0.0) for dtype in dtypes]

    def agree(a: str, b: str) -> bool:
        pairs = zip(given[a], given[b], bounds, strict=True)
        return all(relative_error(x, y) <= 2 * limit for x, y, limit in pairs)

    groups: list[list[str]] = []
    for name in given:
        group = next((each for each in groups if agree(name, each[0])), None)
        if group is None:
            groups.append([name])
        else:
            group.append(name)
    groups.sort(key=len, reverse=True)
    if len(groups) < 2 or len(groups[0]) == len(groups[1]):
        return []
    return [name for group in groups[1:] for name in group]
