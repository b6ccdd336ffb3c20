"""Compare: two runs beside each other, call by call, and what each call adds to their difference.

c = debug.compare(model, hf_model, ids)
c                     # a table; c.first is where they part, c.save_html("page.html") has it layer by position
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import ops
from ops import Call, Tensor
from ops.difference import Difference, difference, inputs_of, referred
from ops.spec import DTYPES, FLOATS
from ops.tolerance import KERNEL

from . import pages, storage
from .alignment import Alignment, Flow, Forced, Node
from .definitions import Definitions, begin
from .huggingface import HuggingFace, is_torch
from .values import Values

_ROWS = 80  # of a table that is longer, as many are shown


class Run:
    """A run of a model with something switched on: `Run(model, lambda: ops.rope.use(kernel), label="mine")`.

    `switches` are functions that give a context manager; the model runs inside all of them, each time anew.
    """

    def __init__(self, model: Any, *switches: Callable[[], AbstractContextManager], label: str = ""):
        self.model, self.switches = model, switches
        self.label = label or f"{type(model).__name__} {model.dtype}"

    def on(self) -> ExitStack:
        """Everything switched on, until it is closed."""
        with ExitStack() as stack:
            for each in self.switches:
                stack.enter_context(each())
            return stack.pop_all()


@dataclass
class Row:
    """A call of the first run. Errors are relative to max|reference|; None where the reference has no value for it.

    `introduced` is the difference when its inputs are the reference's; `inherited` is how far its inputs are from them
    in the run as it is, `total` how far its output is. `status` is "introduced" (above the bound), "inherited" (it
    takes what comes of a call that introduced an error), "agrees", or "unaligned".
    """

    address: str
    path: str
    op_name: str
    source: str
    introduced: Difference | None
    inherited: float
    total: float | None
    status: str
    by_position: np.ndarray | None = None  # float64 [tokens], of the total


@dataclass
class Module:
    """The calls of a module and below it: the largest errors, and the first call that introduced one."""

    path: str
    introduced: float
    inherited: float
    total: float
    status: str
    first: Row | None


@dataclass
class Comparison:
    """Two runs beside each other. `rows` are the calls of `a`, in order; `modules` what they come to by path."""

    a: str
    b: str
    tokens: int
    bound: float
    rows: list[Row] = field(default_factory=list)

    @property
    def first(self) -> Row | None:
        """The first call that introduces an error above the bound: where the runs part."""
        return next((row for row in self.rows if row.status == "introduced"), None)

    @property
    def modules(self) -> dict[str, Module]:
        """Every module that makes calls, or has one that does, by path."""
        below: dict[str, list[Row]] = {}
        for row in self.rows:
            parts = row.path.split(".") if row.path else []
            for end in range(len(parts) + 1):
                below.setdefault(".".join(parts[:end]), []).append(row)
        return {path: _module(path, rows) for path, rows in below.items()}

    def __getitem__(self, key: str) -> Row | Module:
        """A call by its address, or a module by its path."""
        found = next((row for row in self.rows if row.address == key), None) or self.modules.get(key)
        if found is None:
            near = ops.Selector(key).nearest(row.address for row in self.rows)
            raise KeyError(f"no call or module {key!r}; nearest: {', '.join(near) or 'nothing'}")
        return found

    def layers(self) -> tuple[list[str], np.ndarray]:
        """Names of layers, and of what stands beside them, and the largest total error of each at each position."""
        groups: dict[str, list[np.ndarray]] = {}
        for row in self.rows:
            if row.by_position is not None and len(row.by_position) == self.tokens:
                groups.setdefault(_layer(row.path), []).append(row.by_position)
        return [*groups], np.array([np.max(each, axis=0) for each in groups.values()]).reshape(len(groups), -1)

    def table(self) -> list[dict[str, str]]:
        """The table as text, a row a call."""
        return [
            {
                "call": row.address,
                "introduced": "-" if row.introduced is None else f"{row.introduced.error:.2g}",
                "inherited": f"{row.inherited:.2g}",
                "total": "-" if row.total is None else f"{row.total:.2g}",
                "status": row.status,
                "line": row.source,
            }
            for row in self.rows
        ]

    def summary(self) -> str:
        """In a sentence where the runs part."""
        if self.first is None:
            return f"{self.a} and the reference, {self.b}, agree: no call introduces an error above {self.bound:.2g}."
        later = sum(row.status == "inherited" for row in self.rows)
        return (
            f"{self.a} parts from the reference, {self.b}, at {self.first.address} ({self.first.source}), which "
            f"introduces an {self.first.introduced}; {later} later calls inherit it."
        )

    def __repr__(self) -> str:
        return f"{storage.table(self.table(), _ROWS)}\n{self.summary()}"

    def _repr_html_(self) -> str:
        names, errors = self.layers()
        heat = pages.heat_map(names, errors, "total error by layer and position", "position")
        modules = [
            {
                "module": path or "model",
                "introduced": f"{each.introduced:.2g}",
                "inherited": f"{each.inherited:.2g}",
                "total": f"{each.total:.2g}",
                "status": each.status,
            }
            for path, each in self.modules.items()
        ]
        return pages.box(
            pages.sentence(self.summary())
            + heat
            + pages.folded("modules", pages.table(modules, "status"), opened=self.first is not None)
            + pages.folded("calls", pages.table(self.table(), "status"), opened=False)
        )

    def save_html(self, path: str | Path) -> Path:
        """Write one page that needs nothing else."""
        return pages.save(Path(path), f"{self.a} against {self.b}", self._repr_html_())


def compare(a: Any, b: Any, ids: Sequence[int], tolerance: float | None = None) -> Comparison:
    """Run `a` and `b` on the same token ids, in one forward each, and tell where and by how much they differ.

    Each is a Limpid model, a `Run` of one with something switched on, the text "float64" (the other's model with every
    op by its NumPy definition), or a model of transformers. What is measured is `a` against `b`; at least one must be
    Limpid's, and when it is `b` alone the two change places. `tolerance` is the bound of what a call may introduce,
    relative to max|reference|; default: that of kernels in the coarser of both dtypes. What the rounding of a call's
    inputs to its dtype does by itself is no error of the call.
    """
    if not is_ours(a) and is_ours(b):
        a, b = b, a
    if not is_ours(a):
        raise ops.OpError(f"compare takes a Limpid model, a Run of one and what to compare it with, not {a!r}, {b!r}")
    run = a if isinstance(a, Run) else Run(a)
    ids = [int(each) for each in ids]
    values = values_of(b, run.model, ids)
    bound = tolerance if tolerance is not None else _bound(run.model.dtype, values.dtype)
    with run.on():
        flow = followed(run.model, ids)
        introduced = _introduced(run.model, ids, flow, values, bound)
    label = b.label if isinstance(b, Run) else label_of(b, run.model)
    comparison = Comparison(run.label, label, len(ids), bound)
    comparison.rows = _rows(introduced)
    return comparison


def is_ours(side: Any) -> bool:
    """True for a Limpid model, and a Run of one."""
    return isinstance(side, Run) or (hasattr(side, "new_cache") and hasattr(side, "parameters") and not is_torch(side))


def label_of(reference: Any, model: Any) -> str:
    """What a reference is called."""
    if isinstance(reference, str):
        return reference
    if is_torch(reference):
        return HuggingFace(reference, model.base).label
    return f"{type(reference).__name__} {reference.dtype}"


def values_of(reference: Any, model: Any, ids: Sequence[int]) -> Values:
    """What a reference gives for the ids. Raises OpError for what is no reference."""
    if isinstance(reference, str) and reference == "float64":
        return definition_values(model, ids)
    if is_torch(reference):
        return HuggingFace(reference, model.base).run(ids)
    if not is_ours(reference):
        raise ops.OpError(f"{reference!r} is no reference: give 'float64', a model of transformers, a Limpid model")
    run = reference if isinstance(reference, Run) else Run(reference)
    with run.on():
        return followed(run.model, ids).values(len(ids), run.model.dtype)


def definition_values(model: Any, ids: Sequence[int]) -> Values:
    """What a model gives when every op is computed by its definition."""
    definitions = Definitions()
    flow = Flow(definitions.array)
    with ops.intercepted(flow, definitions):
        model(ids, model.new_cache("float32"))
    return flow.values(len(ids), "float64")


def followed(model: Any, ids: Sequence[int]) -> Flow:
    """The flow of a forward by its kernels, with its results."""
    flow = Flow(_array)
    with ops.intercepted(flow):
        model(ids, model.new_cache())
    return flow


def _array(tensor: Tensor) -> np.ndarray:
    """Floats as float32, which holds every value of the narrower dtypes."""
    with np.errstate(invalid="ignore"):  # what nobody wrote yet may be anything
        return tensor.numpy().astype("float32") if tensor.dtype in FLOATS else tensor.numpy().copy()


def _put(tensor: Tensor, values: np.ndarray) -> None:
    with np.errstate(over="ignore", invalid="ignore"):  # what nobody wrote yet may be anything
        tensor.numpy()[...] = values.reshape(tensor.shape).astype(DTYPES[tensor.dtype])


class _Introduced(Forced):
    """Notes what each call introduces beyond `bound`, and beyond what the rounding of its inputs does by itself."""

    def __init__(self, nodes: list[Node], alignment: Alignment, bound: float):
        super().__init__(nodes, alignment, _array, self._round)
        self.bound = bound
        self.found: dict[int, Difference] = {}
        self.wrong: set[int] = set()
        self._exact: dict[int, np.ndarray] = {}  # the reference's values, by where memory begins

    def after(self, node: Node, call: Call, value: np.ndarray, wanted: list[np.ndarray]) -> None:
        dtype = call.outputs[0].dtype if call.outputs else next(iter(call.written.values())).dtype
        for each in wanted:
            found = difference(value, each, dtype)
            if node.index not in self.found or found.error > self.found[node.index].error:
                self.found[node.index] = found
        worst = self.found.get(node.index)
        if worst is not None and worst.error > self.bound and worst.error > self.bound + self._rounding(call):
            self.wrong.add(node.index)

    def _round(self, tensor: Tensor, values: np.ndarray) -> None:
        _put(tensor, values)
        self._exact[begin(tensor)] = values

    def _rounding(self, call: Call) -> float:
        """How far the call's definition is moved by the rounding of the reference's values to the inputs' dtypes."""
        if call.op._reference is None or call.op.writes:
            return 0.0
        rounded = inputs_of(call)
        exact = rounded | {n: self._unrounded(x) for n, x in call.inputs.items() if isinstance(x, Tensor)}
        moved, right = (referred(call, each, wide=True) for each in (rounded, exact))
        return max((difference(a, b).error for a, b in zip(moved, right, strict=True)), default=0.0)

    def _unrounded(self, tensor: Tensor) -> np.ndarray:
        found = self._exact.get(begin(tensor))
        if found is None or found.size < tensor.size or tensor.dtype not in FLOATS:
            return tensor.numpy()
        exact = found.reshape(-1)[: tensor.size].reshape(tensor.shape).astype("float64")
        own = _array(tensor).astype("float64")
        with np.errstate(invalid="ignore"):
            return np.where(np.abs(own - exact) <= 2.0**-7 * np.abs(exact), exact, own)  # else it is another's by now


def _introduced(model: Any, ids: Sequence[int], flow: Flow, values: Values, bound: float) -> _Introduced:
    forced = _Introduced(flow.nodes, Alignment(flow.nodes, values, 0, len(ids)), bound)
    with ops.intercepted(forced):
        model(ids, model.new_cache())
    return forced


def _bound(*dtypes: str) -> float:
    return max(KERNEL.get(each, KERNEL["float32"]) for each in dtypes)


def _rows(introduced: _Introduced) -> list[Row]:
    rows: list[Row] = []
    for node in introduced.nodes:
        makers = [rows[index] for index in node.makers.values()]
        inherited = max((each.inherited if each.total is None else each.total for each in makers), default=0.0)
        total, by_position = _total(node, introduced.alignment)
        found = introduced.found.get(node.index)
        if node.index in introduced.wrong:
            status = "introduced"
        elif any(each.status in ("introduced", "inherited") for each in makers):
            status = "inherited"
        elif not node.makers and (total or 0.0) > introduced.bound:
            status = "inherited"  # by a way that is not seen, such as NumPy
        else:
            status = "unaligned" if total is None else "agrees"
        rows.append(
            Row(node.address, node.path, node.op_name, node.source, found, inherited, total, status, by_position)
        )
    return rows


def _total(node: Node, alignment: Alignment) -> tuple[float | None, np.ndarray | None]:
    """How far a call's result is from the reference's, in all and by its first axis."""
    if len(node.results) != 1:
        return None, None
    value = node.results[0]
    if node.writes:
        wanted = alignment.cached(node, value)
        value = value[: alignment.stop]
    else:
        given = alignment.given(node, value.shape)
        wanted = given[0] if given else alignment.taken(node, value)
    if wanted is None:
        return None, None
    largest = float(np.abs(wanted[np.isfinite(wanted)]).max(initial=0.0)) or 1.0
    with np.errstate(invalid="ignore"):
        off = np.abs(value.astype("float64") - wanted).reshape(len(value), -1)
    off[np.isnan(off)] = np.inf
    return difference(value, wanted).error, off.max(axis=1, initial=0.0) / largest


def _module(path: str, rows: list[Row]) -> Module:
    statuses = {row.status for row in rows}
    status = next(each for each in ("introduced", "inherited", "agrees", "unaligned") if each in statuses)
    return Module(
        path,
        max((row.introduced.error for row in rows if row.introduced), default=0.0),
        rows[0].inherited,
        max((row.total for row in rows if row.total is not None), default=0.0),
        status,
        next((row for row in rows if row.status == "introduced"), None),
    )


def _layer(path: str) -> str:
    """The layer that a module is in, or its own name where it is in none."""
    found = re.match(r".*?\.\d+", path)
    return found[0] if found else path.partition(".")[0] or "model"
