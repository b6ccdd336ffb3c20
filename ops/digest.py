"""A digest of what kernels are written in: it changes when a kernel could.

Files alone do not tell: one factory makes several ops, and a factor may come from another module.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import secrets
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
from tvm import tirx

from .spec import Dim, Spec

_HERE, _PYTHONS = Path(__file__).parent, Path(functools.__file__).parent
_SHARED_SOURCES = ("build.py", "cross.py", "packed.py", "quantize.py", "target.py", "tir.py", "schedule/*.py")
_PLAIN = (int, float, complex, str, bytes, type(None), np.dtype, np.generic, np.ufunc, Spec, Dim)
_INSTALLED = {"site-packages", "dist-packages"}
_lock = threading.Lock()


def source_digest(builders: tuple[Callable, ...]) -> str:
    """Of the functions that make a kernel: their files, and all that they refer to.

    A value that cannot be told apart from others, and what is written in a notebook, is new for every process.
    """
    with _lock:  # two threads that ask at once must be told the same
        return _digest(builders)


@functools.cache
def _digest(builders: tuple[Callable, ...]) -> str:
    result, seen = hashlib.sha256(_shared()), set[int]()
    for builder in builders:
        for part in _parts(builder, frozenset(), seen):
            result.update(part + b"\0")
    return result.hexdigest()


@functools.cache
def _shared() -> bytes:
    """The runtime's own files, of which any kernel may be made."""
    files = [path for pattern in _SHARED_SOURCES for path in sorted(_HERE.glob(pattern))]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).digest()


def _parts(value: Any, names: frozenset[str], seen: set[int]) -> Iterator[bytes]:
    """What code that uses `names` may read from `value`, each thing once."""
    if isinstance(value, _PLAIN) or type(value).__module__ == "typing":
        yield repr(value).encode()
    elif id(value) not in seen:
        seen.add(id(value))
        head, inner, names = _opened(value, names)
        yield b"%d " % len(inner) + head
        for each in inner:
            yield from _parts(each, names, seen)


def _opened(value: Any, names: frozenset[str]) -> tuple[bytes, list[Any], frozenset[str]]:
    """What identifies `value` itself, the values in it, and the names that are used of them."""
    from .op import Op

    kind = type(value).__name__.encode()
    if isinstance(value, FunctionType):
        return _opened_function(value)
    if isinstance(value, ModuleType):
        file = _file_of(value.__name__)
        followed = {} if _is_library(value.__name__, file) else vars(value)
        head = _file(value.__name__, file) if file else value.__name__.encode()
        return head, [followed[name] for name in sorted(names & followed.keys())], names
    if isinstance(value, (type, BuiltinFunctionType)) and "<locals>" not in value.__qualname__:
        module = value.__module__ or "builtins"
        return value.__qualname__.encode() + _file(module, _file_of(module)), [], names
    if isinstance(value, (tuple, list)):
        return kind, [*value], names
    if isinstance(value, (set, frozenset)):
        return kind, sorted(value, key=repr), names
    if isinstance(value, dict):
        return kind, [each for pair in value.items() for each in pair], names
    if isinstance(value, functools.partial):
        return kind, [value.func, value.args, value.keywords], names
    if isinstance(value, MethodType):
        return kind, [value.__func__, value.__self__], names
    if isinstance(value, Op):
        return value.name.encode(), [*value.builders], names
    if isinstance(value, tirx.PrimFunc):
        return value.script().encode(), [], names  # pyright: ignore[reportAttributeAccessIssue]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return kind, [type(value), *[getattr(value, each.name) for each in dataclasses.fields(value)]], names
    return secrets.token_bytes(16), [], names


def _opened_function(function: FunctionType) -> tuple[bytes, list[Any], frozenset[str]]:
    """A function by its place, not its name alone: two lambdas may share a line."""
    code, module = function.__code__, function.__globals__.get("__name__", "")
    names = frozenset(name for each in _codes(code) for name in each.co_names)
    inner = [cell.cell_contents for cell in function.__closure__ or ()]
    inner += [function.__defaults__, function.__kwdefaults__]
    if not _is_library(module, code.co_filename):
        inner += [function.__globals__[name] for name in sorted(names & function.__globals__.keys())]
    return _file(module, code.co_filename) + f"{code.co_qualname} {[*code.co_positions()]}".encode(), inner, names


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for each in code.co_consts:
        if isinstance(each, CodeType):
            yield from _codes(each)


def _is_library(module: str, file: str) -> bool:
    """The runtime's, Python's or installed: known by its file, and not followed any further."""
    path = Path(file)
    return path.is_relative_to(_HERE) or not _INSTALLED.isdisjoint(path.parts) or _is_pythons(module, file)


def _is_pythons(module: str, file: str) -> bool:
    known = module.partition(".")[0] in sys.stdlib_module_names
    return known and (not file or file.startswith("<frozen ") or Path(file).is_relative_to(_PYTHONS))


def _file_of(module: str) -> str:
    """The path of a module's file; empty where it has none."""
    return getattr(sys.modules.get(module), "__file__", None) or ""


def _file(module: str, file: str) -> bytes:
    """The digest of a module's file; of one that is not there, such as a notebook's cell, something new each time."""
    if _is_pythons(module, file):
        return module.encode()
    path = Path(file)
    return hashlib.sha256(path.read_bytes()).digest() if path.is_file() else secrets.token_bytes(16)
