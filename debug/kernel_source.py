"""The source of a Python kernel that is in use, with what it refers to, as a file that stands on its own."""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from ops import Kernel

_INSTALLED = {"site-packages", "dist-packages"}


@dataclass(frozen=True)
class KernelSource:
    """`text` is Python that defines `function`; None where there is no source, and `note` says why.

    With a text, `note` names what it refers to that could not be written down; empty where nothing is missing.
    """

    text: str | None = None
    function: str | None = None
    note: str = ""


def kernel_source(kernel: Kernel) -> KernelSource:
    """The source of `Kernel.from_python(function)`; of another kernel there is none."""
    function = inspect.getclosurevars(kernel.launch).nonlocals.get("function")
    if kernel.origin != "python" or not isinstance(function, FunctionType):
        return KernelSource(note=f"{kernel.name} is no Python function, its source is not known")
    parts: dict[str, str] = {}
    missing: list[str] = []
    try:
        _add_function(function, parts, missing)
    except (OSError, SyntaxError, TypeError) as error:  # typed at a prompt, or in the middle of an expression
        return KernelSource(note=f"the source of {kernel.name} is not to be had: {error}")
    note = f"it refers to {', '.join(missing)}, which could not be written down" if missing else ""
    text = "\n\n".join(["from __future__ import annotations", *parts.values()]) + "\n"
    return KernelSource(text, function.__name__, note)


def _add_function(function: FunctionType, parts: dict[str, str], missing: list[str]) -> None:
    """Put a function's text into `parts`, after what it refers to."""
    text = textwrap.dedent(inspect.getsource(function))
    node = ast.parse(text).body[0]
    if not isinstance(node, ast.FunctionDef):
        raise TypeError("a lambda has none of its own; write it as a def")
    parts[function.__name__] = ""  # it may refer to itself
    known = function.__globals__ | _closure(function)
    used = dict.fromkeys(each.id for each in ast.walk(node) if isinstance(each, ast.Name))
    for name in used:
        if name in known and name not in parts:
            _add(name, known[name], parts, missing)
    lines = text.splitlines()[node.lineno - 1 : node.end_lineno]  # without decorators
    del parts[function.__name__]
    parts[function.__name__] = "\n".join(lines)


def _closure(function: FunctionType) -> dict[str, Any]:
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    return {name: cell.cell_contents for name, cell in cells if cell != type(cell)()}


def _add(name: str, value: Any, parts: dict[str, str], missing: list[str]) -> None:
    """Put a definition of `name` into `parts`."""
    module = sys.modules.get(getattr(value, "__module__", None) or "")
    if isinstance(value, ModuleType):
        parts[name] = f"import {value.__name__} as {name}"
    elif isinstance(value, FunctionType) and value.__name__ == name and not _is_installed(value.__code__.co_filename):
        _add_function(value, parts, missing)
    elif module is not None and getattr(module, getattr(value, "__name__", ""), None) is value:
        parts[name] = f"from {module.__name__} import {value.__name__} as {name}"
    elif _is_plain(value):
        parts[name] = f"{name} = {value!r}"
    else:
        missing.append(name)


def _is_installed(file: str) -> bool:
    path = Path(file)
    return not _INSTALLED.isdisjoint(path.parts) or path.is_relative_to(Path(inspect.__file__).parent)


def _is_plain(value: Any) -> bool:
    """Whether the value's repr gives it back."""
    try:
        return ast.literal_eval(repr(value)) == value
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return False
