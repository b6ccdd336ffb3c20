"""What languages have in common beside `base`: packages that may be missing, the user's own line, values that fit."""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from dataclasses import replace
from types import ModuleType

import numpy as np

from .base import Launch, LaunchError, Parameter, Source, SourceError, Value

_BODY = "/* body */ "  # between a signature that was written for the user and the user's own text, on one line
_COMMENT_OR_STRING = re.compile(r'("(?:\\.|[^"\\\n])*")|//[^\n]*|/\*.*?\*/', re.DOTALL)
_WHOLE = {"uint8": (0, 2**8), "int8": (-(2**7), 2**7), "int32": (-(2**31), 2**31), "int64": (-(2**63), 2**63)}
_UNSIGNED = {"int32": (0, 2**32), "int64": (0, 2**64)}


def load(package: str, extra: str) -> ModuleType:
    """An optional package. Raises SourceError that names the extra to install."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise SourceError(f"{extra} kernels need {package}: pip install 'limpid[{extra}]' ({error})") from error


def without_comments(text: str) -> str:
    """The text with spaces for comments: every other character keeps its place."""
    return _COMMENT_OR_STRING.sub(lambda found: found[1] or re.sub(r"[^\n]", " ", found[0]), text)


def around(source: Source, before: str, after: str) -> Source:
    """A body between what is written for the user; lines keep their numbers."""
    return replace(source, text=f"{before} {_BODY}{source.text}\n{after}")


def located(source: Source, line: int, message: str) -> str:
    """`message` with file, line and text of a line of `source`. `line` counts from where the file begins."""
    lines = source.text.split("\n")
    at = line - source.line
    said = f"{source.file}:{line}: error: {message}"
    return f"{said}\n    {lines[at].rpartition(_BODY)[2].strip()}" if 0 <= at < len(lines) else said


def line_of(source: Source, offset: int) -> int:
    """The line of the file on which a character of `source.text` stands."""
    return source.line + source.text.count("\n", 0, offset)


def check_values(parameters: Sequence[Parameter], values: Sequence[Value]) -> None:
    """Raise LaunchError where a value is not what its parameter says."""
    if len(parameters) != len(values):
        raise LaunchError(f"{len(values)} values for {len(parameters)} parameters: {', '.join(map(str, parameters))}")
    for parameter, value in zip(parameters, values, strict=True):
        if parameter.pointer:
            _check_array(parameter, value)
        else:
            _check_number(parameter, value)


def _check_array(parameter: Parameter, value: Value) -> None:
    if not isinstance(value, np.ndarray):
        raise LaunchError(f"{parameter} takes an array, got {value!r}")
    if value.dtype.name != parameter.dtype:
        raise LaunchError(f"{parameter} takes an array of {parameter.dtype}, got {value.dtype.name}")
    if not value.flags.c_contiguous:
        raise LaunchError(f"{parameter} takes a contiguous array, got strides {value.strides}")
    if not (parameter.const or value.flags.writeable):
        raise LaunchError(f"{parameter} may be written, and its array is read only: declare it read only")


def _check_number(parameter: Parameter, value: Value) -> None:
    if isinstance(value, np.ndarray) or not isinstance(value, (int, float, np.number)):
        raise LaunchError(f"{parameter} takes a number, got {type(value).__name__}")
    if parameter.dtype not in _WHOLE:
        return
    if not isinstance(value, (int, np.integer)):
        raise LaunchError(f"{parameter} takes a whole number, got {value!r}")
    unsigned = parameter.type.startswith("u") and parameter.dtype in _UNSIGNED
    least, beyond = _UNSIGNED[parameter.dtype] if unsigned else _WHOLE[parameter.dtype]
    if not least <= value < beyond:
        raise LaunchError(f"{parameter} holds {least} to {beyond - 1}, got {value}")


def check_launch(launch: Launch, shared: str) -> None:
    """Raise LaunchError for a launch that is no launch; `shared` says how shared memory is declared instead."""
    if min(*launch.grid, *launch.block) < 0:
        raise LaunchError(f"grid {launch.grid} and block {launch.block}: sizes are not negative")
    if launch.shared:
        raise LaunchError(f"shared={launch.shared}: this language has no dynamic shared memory; {shared}")
