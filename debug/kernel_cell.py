"""`%%kernel`: a kernel's source in a notebook's cell, compiled, verified, swapped in and raced as the cell's output.

%%kernel c op=rms_norm layers=0-3 on=model(ids)
void rms_norm_cell(const float* x, const float* weight, float* out, int rows, int width, float eps) { ... }
"""

from __future__ import annotations

import ast
import re
import shlex
from typing import Any

from IPython.core.error import UsageError

import ops
from ops import Call, ceilings, examples, html
from ops.languages import NAMES, TEXTS
from ops.languages.binding import output_names
from ops.languages.source import Origin
from ops.op import Op, registry
from ops.race import Race, race
from ops.scope import Scope
from ops.swap import Swap

from . import roofline
from .profiler import Row
from .races import race as race_tool

USAGE = "%%kernel LANGUAGE op=NAME [layers=0-3] [where='layers.1.*'] [on=STATEMENT] [name=NAME] [grid=...] [block=...]"
_TEXT = ("op", "layers", "where", "name", "check", "device", "on")  # options that are taken as they are written
_ENTRY = re.compile(r"(?:\bvoid|\bfn|\bdef)\s+(\w+)\s*\(")


class KernelCell:
    """What `%%kernel` shows: the swap, and races of all kernels of its op, the op's own among them."""

    def __init__(self, swap: Swap, races: list[Race]):
        self.swap, self.races = swap, races

    def __repr__(self) -> str:
        return "\n\n".join([repr(self.swap), *map(repr, self.races)])

    def _repr_html_(self) -> str:
        parts = [html.note(repr(self.swap))]
        for each in self.races:
            rows = [
                Row(side.name, 1, side.seconds, each.cost.bytes, each.cost.flops, each.call.device)
                for side in each.contenders
                if side.seconds is not None
            ]
            parts.append(each.html())
            if (peak := ceilings.peak(each.call.device)) is not None:
                parts.append(roofline.plot(rows, ceilings.bandwidth(each.call.device), peak))
        return html.box(*parts)


def run(shell: Any, line: str, cell: str) -> KernelCell:
    """Swap in what the cell holds. Raises UsageError for a line that is not understood, and what is wrong with it."""
    language, op, options, on = _asked(shell, line)
    name = options.pop("name", None)
    if language in TEXTS:
        entry = name or _entry(op, cell)
        given: Any = Origin(entry, text=cell, where=(f"Cell In[{shell.execution_count}]", 2))
    else:
        given = _function(shell, cell)
    swap = op.swap(language, **options)(given)
    try:
        return KernelCell(swap, _races(shell, swap, on))
    except Exception:
        swap.discard("removed")
        raise


def _entry(op: Op, cell: str) -> str:
    """The kernel among the functions of a text: the last one whose parameters name the op's result."""
    found = [(match[1], cell[match.end() : cell.find("{", match.end())]) for match in _ENTRY.finditer(cell)]
    wanted = [name for name, rest in found if any(re.search(rf"\b{each}\b", rest) for each in results(op))]
    return wanted[-1] if wanted else found[-1][0] if found else f"{op.name}_cell"


def results(op: Op) -> tuple[str, ...]:
    """What a kernel of the op writes, by name."""
    return (*output_names(op), *op.writes)


def _asked(shell: Any, line: str) -> tuple[str, Op, dict[str, Any], str | None]:
    """Language, op, options of the swap and the statement to race on, of the magic's line."""
    words = shlex.split(line)
    if not words or words[0] not in NAMES:
        raise UsageError(f"{USAGE}; the languages are {', '.join(NAMES)}")
    options: dict[str, Any] = {}
    for word in words[1:]:
        key, equals, value = word.partition("=")
        if not equals:
            raise UsageError(f"{word!r} is not NAME=VALUE: {USAGE}")
        try:
            options[key] = value if key in _TEXT else eval(value, shell.user_ns)
        except Exception as error:
            raise UsageError(f"{word}: {type(error).__name__}: {error}") from None
    op = registry.get(options.pop("op", ""))
    if op is None:
        raise UsageError(f"op= names an op: {', '.join(sorted(registry))}")
    if layers := options.pop("layers", None):
        if "where" in options:
            raise UsageError("layers= and where= both say where: give one of them")
        options["where"] = ", ".join(f"layers.{each.strip()}" for each in layers.split(","))
    return words[0], op, options, options.pop("on", None)


def _function(shell: Any, cell: str) -> Any:
    """The function that the cell defines last, as a cell of its own defines it."""
    names = [node.name for node in ast.parse(cell).body if isinstance(node, ast.FunctionDef)]
    if not names:
        raise UsageError("the cell defines no function, which is what a kernel in Python is")
    result = shell.run_cell(cell, store_history=False)
    result.raise_error()
    return shell.user_ns[names[-1]]


def _races(shell: Any, swap: Swap, on: str | None) -> list[Race]:
    """On the inputs that the op has while `on` runs; without it, on the largest of the op's edge cases."""
    if on is not None:
        with race_tool(lambda call: swap.applies(call) and call.op is swap.op) as races:
            exec(compile(on, "<on>", "exec"), shell.user_ns)
        return [*races]
    calls = [Call(swap.op, args, constants, Scope("", 0), 0) for args, constants in examples.of(swap.op)]
    fitting = [call for call in calls if swap.where.fits(call) and swap.kernel.fits(call)]
    if not fitting:
        return []
    largest = max(fitting, key=lambda call: sum(each.nbytes for each in call.args if isinstance(each, ops.Tensor)))
    return [race(largest)]
