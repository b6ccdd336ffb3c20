"""Where the text of a kernel stands: in a function's docstring or what it returns, in a file, or in a notebook's cell.

An `Origin` finds the text again after it was edited, by the function's name in its file, and runs nothing of that file.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import linecache
import os
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, FunctionType
from typing import Any

from ..call import cell_of
from .base import Source, SourceError


@dataclass(frozen=True)
class Origin:
    """`function` as it was decorated, or None; `file` where the text is apart from it; `text` where it was given.

    `ordinal` is which of the functions of that name in the file it is; None for one that stands in no file.
    """

    entry: str
    function: Callable | None = None
    file: Path | None = None
    text: str | None = None
    where: tuple[str, int] = field(default=("<text>", 1))
    ordinal: int | None = None

    @classmethod
    def of(cls, entry: str, function: Callable | None, file: Path | None) -> Origin:
        """The origin of a function, found in its file as it is now."""
        ordinal = None
        if function is not None:
            line = function.__code__.co_firstlineno
            lines = [_first_line(node) for node in _definitions(function)[0]]
            ordinal = lines.index(line) if line in lines else 0 if lines else None
        return cls(entry, function, file, ordinal=ordinal)

    def read(self) -> Source:
        """The text as it is now. Raises SourceError where it is gone."""
        if self.text is not None:
            return Source(self.text, self.entry, *self.where)
        if self.file is not None:
            try:
                return Source(self.file.read_text("utf-8"), self.entry, shown(self.file), 1)
            except (OSError, UnicodeDecodeError) as error:
                raise SourceError(f"{self.file}, which holds {self.entry}: {error}") from None
        return _of_function(self.function, self.entry, self.ordinal)

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


def definition(function: Callable, ordinal: int | None) -> tuple[ast.FunctionDef, str]:
    """The function as its file has it now: its node, with the file's line numbers, and the file."""
    found, path = _definitions(function)
    if ordinal is None or ordinal >= len(found):
        raise SourceError(f"{shown(path)} has no function {function.__code__.co_name} any more")
    return found[ordinal], path


def _definitions(function: Callable) -> tuple[list[ast.FunctionDef], str]:
    """All functions of that name in its file, in their order, and the file."""
    path, name = function.__code__.co_filename, function.__code__.co_name
    linecache.checkcache(path)
    try:
        tree = ast.parse("".join(linecache.getlines(path)))
    except SyntaxError as error:
        raise SourceError(f"{shown(path)}:{error.lineno}: {error.msg}") from None
    found = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == name]
    return sorted(found, key=_first_line), path


def _first_line(node: ast.FunctionDef) -> int:
    return min([node.lineno, *(each.lineno for each in node.decorator_list)])


def _of_function(function: Callable | None, entry: str, ordinal: int | None) -> Source:
    """The text in a function: the string that it returns, or its docstring."""
    assert function is not None
    if ordinal is None:  # of exec, or typed at a prompt that keeps no source
        return Source(_text_without_file(function), entry, function.__code__.co_filename, 1)
    node, path = definition(function, ordinal)
    returns = [each for each in ast.walk(node) if isinstance(each, ast.Return) and each.value is not None]
    values = [each.value for each in (returns or node.body[:1]) if isinstance(each, (ast.Return, ast.Expr))]
    if len(values) == 1 and isinstance(values[0], ast.Constant) and isinstance(values[0].value, str):
        return Source(values[0].value, entry, shown(path), values[0].lineno)
    if not returns:
        raise SourceError(
            f"{shown(path)}:{node.lineno}: {entry} holds no text: it is its docstring, or what it returns"
        )
    return Source(_returned(_in_its_scope(function, node, path)), entry, shown(path), node.lineno)


def _returned(function: Callable) -> str:
    if inspect.signature(function).parameters and any(
        each.default is each.empty for each in inspect.signature(function).parameters.values()
    ):
        raise SourceError(f"{function.__name__} has parameters; what gives the text of a kernel is called without any")
    text = function()
    if not isinstance(text, str):
        raise SourceError(f"{function.__name__} gave {type(text).__name__}: source text is its docstring, or a string")
    return text


def _text_without_file(function: Callable) -> str:
    return textwrap.dedent(function.__doc__) if function.__doc__ else _returned(function)


def redefined(function: Callable, ordinal: int | None) -> Callable:
    """The function as its file has it now, without its decorators, in the globals that it had."""
    node, path = definition(function, ordinal)
    return _in_its_scope(function, node, path)


def written_in(frame: FrameType, name: str) -> Callable | None:
    """The plain function that a line of this frame decorates, where what was made of it is none, as a PrimFunc.

    None where the text is not found.
    """
    path, line = frame.f_code.co_filename, frame.f_lineno
    linecache.checkcache(path)
    with contextlib.suppress(SyntaxError):
        for node in ast.walk(ast.parse("".join(linecache.getlines(path)))):
            if isinstance(node, ast.FunctionDef) and node.name == name and _first_line(node) <= line <= node.lineno:
                first, used = _first_line(node), {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}
                code = _made(node, [], path, frame.f_globals | frame.f_locals).__code__
                made = FunctionType(code.replace(co_firstlineno=first), frame.f_globals)  # as of a decorated function
                if frame.f_locals is not frame.f_globals:
                    made.__dict__.update({each: frame.f_locals[each] for each in used & {*frame.f_locals}})
                return made
    return None


def decorated_again(function: Callable, ordinal: int | None) -> Any:
    """What the innermost decorator makes of the function as its file has it now. Raises SourceError."""
    node, path = definition(function, ordinal)
    try:
        return _made(node, node.decorator_list[-1:], path, function.__globals__ | function.__dict__)
    except SourceError:
        raise
    except Exception as error:  # the decorator's own, about a text that it does not understand
        raise SourceError(f"{shown(path)}:{node.lineno}: {error}") from None


def _in_its_scope(function: Callable, node: ast.FunctionDef, path: str) -> Callable:
    """What the definition makes, without decorators, in the globals and the closure that `function` has."""
    names = dict(function.__globals__)
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        names[name] = cell.cell_contents
    made = _made(node, [], path, names)
    made.__defaults__, made.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
    return made


def _made(node: ast.FunctionDef, decorators: list[ast.expr], path: str, names: Mapping[str, Any]) -> Any:
    """What a definition makes with these decorators among these names. Raises SourceError."""
    node.decorator_list, names = decorators, dict(names)
    try:
        exec(compile(ast.Module([node], []), path, "exec"), names)
    except SyntaxError as error:
        raise SourceError(f"{shown(path)}:{error.lineno}: {error.msg}") from None
    return names[node.name]


def plain_function(value: Any) -> Callable | None:
    """The Python function in what was decorated, a Triton function too; None where there is none."""
    value = getattr(value, "fn", value)
    return value if inspect.isfunction(value) else None
