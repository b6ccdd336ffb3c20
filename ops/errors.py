"""What an op says when it cannot do what was asked. Each message repeats what the caller wrote."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .call import Call


class OpError(ValueError):
    """The base: an op call that cannot be carried out."""

    announced = False  # to `on_error`


class ShapeError(OpError):
    """Shapes that do not fit the op, or an array that is not contiguous."""


class DTypeError(OpError):
    """Dtypes that the op does not take."""


class SelectorError(OpError):
    """A selector that is not understood, or that can mean no call."""


class KernelError(RuntimeError):
    """A kernel that does not compile, cannot be loaded, or failed while it ran."""

    announced = False


class SwapRefused(KernelError):
    """A kernel that was to replace an op's own, and does not fit it, does not compile or computes something else."""


class SwapWarning(UserWarning):
    """A kernel in use that was found wrong, and for which the op's own computes again."""


def place(function: Callable) -> str:
    """A function of the user's as errors name it: what it is called, and where it stands."""
    code = getattr(function, "__code__", None)
    at = f" ({code.co_filename}:{code.co_firstlineno})" if code is not None else ""
    return f"{getattr(function, '__name__', type(function).__name__)}{at}"


on_error: Callable[[Exception, Call], None] | None = None  # gets an op's error where it is raised, before it goes on


def announce(error: OpError | KernelError, call: Call) -> None:
    """Hand an op's error to `on_error`; once, however many ops it passes through."""
    if error.announced:
        return
    error.announced = True
    if on_error is not None:
        on_error(error, call)
    elif os.environ.get("LIMPID_ON_ERROR"):
        error.add_note("LIMPID_ON_ERROR is heard by the debugging tools, which were not loaded: import debug")
