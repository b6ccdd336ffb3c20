"""Where the text of a kernel stands: in a function's docstring or what it returns, in a file, or in a notebook's cell.

An `Origin` finds the text again after it was edited, by the function's name in its file, and runs nothing of that file.
"""

from __future__ import annotations

import ast
import inspect
import linecache
import os
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..call import cell_of
from .base import Source, SourceError


@dataclass(frozen=True)
class Origin:
    """`function` as it was decorated, or None; `file` where the text is apart from it; `text` where it was given."""

    entry: str
    function: Callable | None = None
    file: Path | None = None
    text: str | None = None
    where: tuple[str, int] = field(default=("<text>", 1))

    def read(self) -> Source:
        """The text as it is now. Raises SourceError where it is gone."""
        if self.text is not None:
            return Source(self.text, self.entry, *self.where)
        if self.file is not None:
            try:
                return Source(self.file.read_text("utf-8"), self.entry, shown(self.file), 1)
            except (OSError, UnicodeDecodeError) as error:
                raise SourceError(f"{self.file}, which holds {self.entry}: {error}") from None
        return _of_function(self.function, self.entry)

    @property
    def path(self) -> str | None:
        """The file to watch; None for a notebook's cell or a text."""
        if self.file is not None:
            return str(self.file)
        if self.function is None:
            return None
        path = self.function.__code__.co_filename
        return path if os.path.exists(path) else None


def shown(path: str | Path) -> str:
    """A file as messages call it: from the working folder, when it lies below; a notebook's cell as `Cell In[3]`."""
    if named := cell_of(str(path)):
        return named
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def definition(function: Callable) -> tuple[ast.FunctionDef, str]:
    """The function as its file has it now: its node, with the file's line numbers, and the file."""
    path = function.__code__.co_filename
    linecache.checkcache(path)
    lines = linecache.getlines(path)
    name = function.__code__.co_name
    try:
        tree = ast.parse("".join(lines))
    except SyntaxError as error:
        raise SourceError(f"{shown(path)}:{error.lineno}: {error.msg}") from None
    found = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == name]
    if not found:
        raise SourceError(f"{shown(path)} has no function {name} any more" if lines else f"{name} has no source file")
    line = function.__code__.co_firstlineno  # of several with the same name, the nearest to where this one stood
    return min(found, key=lambda node: abs(_first_line(node) - line)), path


def _first_line(node: ast.FunctionDef) -> int:
    return min([node.lineno, *(each.lineno for each in node.decorator_list)])


def _of_function(function: Callable | None, entry: str) -> Source:
    """The text in a function: its docstring, or the string that it returns."""
    assert function is not None
    try:
        node, path = definition(function)
    except SourceError:
        if linecache.getlines(function.__code__.co_filename):
            raise
        return Source(_text_without_file(function), entry, function.__code__.co_filename, 1)  # of exec, or typed
    for statement in node.body:
        value = getattr(statement, "value", None)
        if not isinstance(statement, (ast.Expr, ast.Return)) or not isinstance(value, ast.Constant):
            continue
        if isinstance(value.value, str):
            return Source(value.value, entry, shown(path), value.lineno)
    return Source(_returned(function), entry, shown(path), node.lineno)


def _returned(function: Callable) -> str:
    text = function()
    if not isinstance(text, str):
        raise SourceError(f"{function.__name__} gave {type(text).__name__}: source text is its docstring, or a string")
    return text


def _text_without_file(function: Callable) -> str:
    return textwrap.dedent(function.__doc__) if function.__doc__ else _returned(function)


def redefined(function: Callable) -> Callable:
    """The function as its file has it now, without its decorators, in the globals that it had."""
    node, path = definition(function)
    node.decorator_list = []
    module = ast.Module([node], [])
    names = dict(function.__globals__)
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        names[name] = cell.cell_contents
    try:
        exec(compile(module, path, "exec"), names)
    except SyntaxError as error:
        raise SourceError(f"{shown(path)}:{error.lineno}: {error.msg}") from None
    return names[node.name]


def plain_function(value: Any) -> Callable | None:
    """The Python function in what was decorated, a Triton function too; None where there is none."""
    value = getattr(value, "fn", value)
    return value if inspect.isfunction(value) else None
