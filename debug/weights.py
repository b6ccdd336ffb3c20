"""Weights against a reference's: exactly, as far as the coarser of both dtypes tells."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import ops
from ops import Call, Tensor
from ops.spec import DTYPES, FLOATS

from .definitions import begin
from .findings import Finding, at, outermost
from .values import Weights

_WIDTHS = {"float64": 3, "float32": 2, "float16": 1, "bfloat16": 1}


def check_weights(model: Any, reference: Weights | None) -> tuple[list[Finding], str]:
    """Findings in the order of the weights' first use, and what was looked into.

    Without a reference only what is not finite is found. Raises OpError where no name of the reference is ours.
    """
    wrong: dict[str, str] = {}
    absent, shapes = [], {}
    for name, weight in model.parameters():
        if not isinstance(weight, Tensor):
            raise ops.OpError(f"the weight {name} is not loaded")
        wanted = None if reference is None else reference.find(name, weight.shape)
        if reference is not None and wanted is None:
            absent.append(name)
        if wanted is not None and wanted.shape != weight.shape:
            wrong[name] = f"its shape is {list(weight.shape)}, the reference's {list(wanted.shape)}"
            shapes[name] = wanted
        elif problem := _problem(weight, wanted, reference):
            wrong[name] = problem
    wrong |= _left_behind(model, reference) if reference is not None else {}
    count = sum(1 for _ in model.parameters())
    if reference is not None and len(absent) == count:
        raise ops.OpError(
            f"no weight of the reference has a name of ours: it has {', '.join(list(reference)[:3])}, "
            f"expected {', '.join(absent[:3])}"
        )
    right = sum(name not in wrong and name not in absent for name, _ in model.parameters())
    text = f"{right} equal the reference's" if reference is not None else f"{right} hold finite numbers"
    text += f"; not in the reference: {', '.join(absent[:8])}" if absent else ""
    return _located(model, wrong, shapes) if wrong else [], text


def _left_behind(model: Any, reference: Weights) -> dict[str, str]:
    """The reference's weights, by the paths that they would have, of which a module of ours has others but not these.

    Zeros would change nothing; a module that is not ours, such as one that holds a rotary embedding's constants, has
    no part in it.
    """
    ours = dict(model.parameters())
    modules = {name.rpartition(".")[0]: weight.shape[:1] for name, weight in ours.items()}
    kinds = sorted({name.rpartition(".")[2] for name in reference})
    found = {}
    for path, width in modules.items():
        for name in (f"{path}.{kind}" if path else kind for kind in kinds):
            wanted = None if name in ours else reference.find(name, width)
            if wanted is not None and wanted.ndim and wanted.dtype.name in _WIDTHS and np.any(wanted):
                largest = float(np.abs(wanted.astype("float64")).max())
                found[name] = f"the model has none, the reference has {list(wanted.shape)}, up to {largest:.6g}"
    return found


def _problem(weight: Tensor, wanted: np.ndarray | None, reference: Weights | None) -> str | None:
    """How a weight differs from what it should be, or what in it is not finite; None when it is right."""
    if wanted is None:
        values = weight.numpy()
        return None if np.isfinite(values).all() else f"it holds {int((~np.isfinite(values)).sum())} NaN or infinities"
    ours, theirs = _same_kind(weight, wanted)
    off = ~((ours == theirs) | (np.isnan(ours) & np.isnan(theirs)))
    if _two_halves(weight, wanted):
        off &= ~(np.abs(ours - theirs) <= 2.0**-8 * np.abs(theirs) + 1e-7)
    return _described(ours, theirs, off, reference) if off.any() else None


def _two_halves(weight: Tensor, wanted: np.ndarray) -> bool:
    return {weight.dtype, wanted.dtype.name} == {"float16", "bfloat16"}


def _same_kind(weight: Tensor, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both as float64, the finer one rounded to what the coarser can hold."""
    ours, theirs = weight.numpy(), wanted
    form, their_form = getattr(ours, "format", None), getattr(theirs, "format", None)
    with np.errstate(over="ignore"):
        if form is not None and their_form is None:
            plain = np.ascontiguousarray(theirs, "float32")
            theirs = ops.tensor(plain, weight.dtype).numpy()
        elif their_form is not None and form is None:
            ours = ops.tensor(np.ascontiguousarray(ours, "float32"), their_form.name).numpy()
        elif form is None and weight.dtype in FLOATS:
            narrower = _WIDTHS.get(theirs.dtype.name, 3) < _WIDTHS[weight.dtype]
            ours = ours.astype(theirs.dtype) if narrower else ours
            if _WIDTHS.get(theirs.dtype.name, 3) > _WIDTHS[weight.dtype]:
                theirs = theirs.astype(DTYPES[weight.dtype])
    return np.asarray(ours, "float64"), np.asarray(theirs, "float64")


def _described(ours: np.ndarray, theirs: np.ndarray, off: np.ndarray, reference: Weights | None) -> str:
    with np.errstate(invalid="ignore"):
        distance = np.where(off, np.abs(ours - theirs), -1.0)
    distance[np.isnan(distance)] = np.inf
    index = np.unravel_index(int(distance.argmax()), off.shape)
    place = ", ".join(str(int(each)) for each in index)
    text = f"[{place}] is {ours[index]:.6g}, the reference has {theirs[index]:.6g}; "
    count = int(off.sum())
    text += "no other element differs" if count == 1 else f"{count} of {off.size} elements differ"
    if off.ndim == 2 and count > 1:
        rows, columns = np.flatnonzero(off.any(axis=1)), np.flatnonzero(off.any(axis=0))
        text += f", all in row {rows[0]}" if len(rows) == 1 else f", all in column {columns[0]}" * (len(columns) == 1)
        if len(rows) == 1 and columns[-1] - columns[0] < len(columns) + 31 and len(columns) <= 64:
            text += f", inputs {columns[0]} to {columns[-1]}"
    return text + _resemblance(ours, theirs, off, reference)


def _resemblance(ours: np.ndarray, theirs: np.ndarray, off: np.ndarray, reference: Weights | None) -> str:
    """What the wrong values look like, when they look like something."""
    if np.array_equal(ours[off], -theirs[off]):
        return ", with the opposite sign"
    if ours.ndim == 2 and ours.shape[0] == ours.shape[1] and np.array_equal(ours, theirs.T):
        return "; it is the transpose"
    for name in reference or ():
        other = reference[name] if reference else ours
        if other.shape == ours.shape and other is not theirs and np.array_equal(np.asarray(other, "float64"), ours):
            return f"; it holds the values of {name}"
    with np.errstate(all="ignore"):
        ratios = (ours[off] / theirs[off])[np.abs(theirs[off]) > 0.1 * np.abs(theirs[off]).max()]
    if ratios.size > 1 and np.isfinite(ratios).all() and np.ptp(ratios) < 1e-2 * abs(np.median(ratios)):
        return f", by a factor of {np.median(ratios):.4g}"
    return ""


class _Uses(ops.Interceptor):
    """The first call that takes each weight with a problem: in the module that it belongs to, else in any."""

    def __init__(self, model: Any, problems: dict[str, str]):
        self.problems = problems
        self.names: dict[int, list[str]] = {}  # by the address of their memory, which several may share
        self.lacking: dict[str, list[str]] = {}  # by the module's path
        self.own: dict[str, Finding] = {}
        self.other: dict[str, Finding] = {}
        held = dict(model.parameters())
        for name in problems:
            if name in held:
                self.names.setdefault(begin(held[name]), []).append(name)
            else:
                self.lacking.setdefault(name.rpartition(".")[0], []).append(name)

    def call(self, call: Call, launch: Callable[[Call], Any]) -> Any:
        taken = [name for each in call.args if isinstance(each, Tensor) for name in self.names.get(begin(each), ())]
        for name in [*taken, *self.lacking.get(call.path, ())]:
            found = self.own if name.rpartition(".")[0] == call.path else self.other
            if name not in found:
                found[name] = at(call, "weight", self.problems[name], name)
        return launch(call)

    @property
    def found(self) -> dict[str, Finding]:
        return self.own | {name: finding for name, finding in self.other.items() if name not in self.own}


def _located(model: Any, wrong: dict[str, str], shapes: dict[str, np.ndarray]) -> list[Finding]:
    """The findings, in the order in which the weights are used. A mis-shaped weight gives way to the right one."""
    given = dict(model.parameters())
    try:
        for name, wanted in shapes.items():
            model.set_parameter(
                name, ops.tensor(np.ascontiguousarray(wanted, DTYPES[model.dtype]), device=model.device)
            )
        uses = _Uses(model, wrong)
        with outermost(uses):
            model([0], model.new_cache())
    finally:
        for name in shapes:
            model.set_parameter(name, given[name])
    unused = [
        Finding("weight", "", "", name.rpartition(".")[0], "nowhere", name, problem)
        for name, problem in wrong.items()
        if name not in uses.found
    ]
    return [*uses.found.values(), *unused]
