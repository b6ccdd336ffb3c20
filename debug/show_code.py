"""`show`: a thing as its page in a notebook, as text elsewhere; of a call, the code that computes it."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import ops
from ops import Call, Op, html
from ops.table import Table

from .record import Record

_LINES = 80  # of each text that a terminal gets; the attributes have all
_TEXTS = {"python": "Python", "tir": "TIR", "llvm": "LLVM", "assembly": "assembly"}
_HIGHLIGHT = {"python": "python", "tir": "python", "llvm": "llvm", "assembly": "gas"}


class Code:
    """The code of an op, at the shapes of a call: `python` (rule and reference), `tir`, `llvm` and `assembly`.

    `what` is a `Call`, a recorded call, or an op with the arguments of a call, tensors or specs. In a notebook it is
    tabs. What is shown is the op's own kernel; which kernel computed a recorded call stands above it.
    """

    def __init__(self, what: Call | Record | Op, *args: Any, **constants: Any):
        if isinstance(what, (Call, Record)):
            if args or constants:
                raise ops.OpError(f"{what.full_address} has its arguments already; give an op with others")
            args, constants = tuple(what.args), what.constants
        if not isinstance(op := what if isinstance(what, Op) else what.op, Op):
            raise ops.OpError(f"this process has no op {what.full_address}: import what defines it")  # type: ignore[union-attr]
        self.op, self._args, self._constants = op, args, constants
        given = [*map(_brief, args), *(f"{name}={value!r}" for name, value in constants.items())]
        self.title = f"{op.name}({', '.join(given)})"
        if isinstance(what, Record):
            self.title = f"{what.full_address}, kernel {what.kernel}: {self.title}"

    @cached_property
    def python(self) -> str:
        """The rule and the NumPy reference."""
        return "\n\n".join(map(_source, filter(None, (self.op.rule, self.op._reference))))

    @cached_property
    def tir(self) -> str:
        """TVMScript of the block definition."""
        return self.op.tir(*self._args, **self._constants)

    @cached_property
    def llvm(self) -> str:
        """LLVM's intermediate code of the kernel."""
        return self.op.source("llvm", *self._args, **self._constants)

    @cached_property
    def assembly(self) -> str:
        """The kernel as this machine runs it."""
        return self.op.source("asm", *self._args, **self._constants)

    def texts(self) -> dict[str, str]:
        """All four by name; what cannot be made says why."""
        found = {}
        for name in _TEXTS:
            try:
                found[name] = str(getattr(self, name))
            except ops.KernelError as error:
                found[name] = str(error)
        return found

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.rule import Rule
        from rich.syntax import Syntax
        from rich.text import Text

        parts: list[Any] = [Text(self.title, style="bold")]
        for name, text in self.texts().items():
            lines = text.rstrip().splitlines()
            shown = "\n".join(lines[:_LINES])
            parts += [
                Rule(_TEXTS[name], align="left"),
                Syntax(shown, _HIGHLIGHT[name], theme="ansi_dark", word_wrap=False),
            ]
            if len(lines) > _LINES:
                parts.append(Text(f"... {len(lines) - _LINES} more lines: .{name} has all", style="italic"))
        return Group(*parts)

    def __repr__(self) -> str:
        from ops.plain import plain

        return plain(self, 120)

    def _repr_html_(self) -> str:
        return html.box(html.head(self.title), html.tabs({_TEXTS[name]: text for name, text in self.texts().items()}))


def _brief(value: Any) -> str:
    return str(getattr(value, "spec", value))


def _source(function: Callable[..., Any]) -> str:
    try:
        return inspect.getsource(function).rstrip()
    except (OSError, TypeError) as error:
        return f"# {function!r}: {error}"


def calls(records: Sequence[Record]) -> Table:
    """Recorded calls as a table that sorts."""
    columns = ["call", "output", "min", "mean", "max", "NaN", "Inf", "us", "line", "inputs"]
    rows = []
    for each in records:
        found = next(filter(None, each.statistics), None)
        values = [found.least, found.mean, found.most, found.nan, found.inf] if found else [None] * 5
        inputs = ", ".join(str(value) for value in each.inputs.values() if value is not None)
        took = None if each.seconds is None else each.seconds * 1e6
        rows.append([each.full_address, ", ".join(map(str, each.outputs)), *values, took, each.source, inputs])
    return Table(f"{len(rows)} calls", columns, rows)


def show(what: Any, *args: Any, **constants: Any) -> None:
    """Display `what`: a tensor, a model, a trace, a profile; of a call, a recorded call or an op, its code.

    An op takes the arguments of a call: `show(ops.rms_norm, x, weight, eps=1e-5)`.
    """
    if isinstance(what, (Call, Record, Op)):
        what = Code(what, *args, **constants)
    elif args or constants or not hasattr(what, "_repr_html_"):
        raise ops.OpError(
            f"show takes a tensor, a model, a trace, a profile, a call or an op with its arguments, not {what!r}"
        )
    if "IPython" in sys.modules and sys.modules["IPython"].get_ipython() is not None:
        from IPython.display import display

        display(what)
    elif isinstance(what, Code):
        from rich.console import Console

        Console().print(what)
    else:
        print(what)
