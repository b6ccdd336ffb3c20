"""Runs compiled kernels in a child process, over shared memory: what they do wrong is told, and harms nobody.

It is there for mistakes, not for malice: a kernel may do there what this process's user may do.

    sandbox.start()                               # ahead of the first run, in the background
    sandbox.run(program, values, launch)          # as program.run, but a LaunchError whatever goes wrong
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
from collections.abc import Collection, Iterator, Sequence

import numpy as np

from ..errors import KernelError, ShapeError
from ..languages.base import Launch, LaunchError, Parameter, Program, Value
from .arena import laid_out
from .helper import Helper

SECONDS = 10.0  # after which a run is given up

_condition = threading.Condition()
_all: set[Helper] = set()
_idle: list[Helper] = []


def start() -> None:
    """Start a child, if there is none, without waiting until it is ready. Where none can be had, `run` says why."""
    with _condition, contextlib.suppress(KernelError, OSError):
        if not _all:
            _idle.append(_new())


def stop() -> None:
    """End all children; a run that is under way fails."""
    with _condition:
        for helper in _all:
            helper.end() if helper in _idle else helper.kill()  # what a thread uses, that thread closes
        _all.clear()
        _idle.clear()


def run(
    program: Program,
    values: Sequence[Value],
    launch: Launch,
    seconds: float = SECONDS,
    *,
    inputs: Collection[str] = (),
    outputs: Collection[str] = ("out",),
) -> None:
    """Run `program.checked`, or `program.library` where there is no checked one, in a child; results are copied back.

    values: C-contiguous arrays and numbers in the order of `program.parameters`. An array that is `const`, or named in
    `inputs`, may not be written. One named in `outputs` holds no values of use before: the kernel sees NaNs, or -1.
    Raises LaunchError, with the arrays as they were, for an access out of bounds, a crash, no end within `seconds`,
    exit(), abort(), too much memory (1 GiB) or output (1 MiB), and for what the program itself reports. What a kernel
    prints is printed here, after it. Any thread may call; runs of several threads are side by side.
    """
    library = program.checked or program.library
    if library is None:
        raise LaunchError("this program has no library that a sandbox could run")
    for parameter, value in zip(program.parameters, values, strict=True):
        _fits(parameter, value, parameter.const or parameter.name in inputs)
    layout = laid_out(program.parameters, values, inputs, outputs)
    with _helper() as helper:
        helper.make_room(layout.used)
        helper.arena.fill(layout, program.parameters, values)
        try:
            helper.run(library, (*launch.grid, *launch.block, launch.shared), layout, seconds)
            helper.arena.collect(layout, program.parameters, values)
        finally:
            if helper.printed:
                sys.stdout.write(helper.printed)


def _fits(parameter: Parameter, value: Value, readonly: bool) -> None:
    """Raises ShapeError for what no pointer can be had to."""
    if parameter.pointer:
        if not isinstance(value, np.ndarray) or not value.flags.c_contiguous:
            raise ShapeError(f"{parameter} needs a C-contiguous array; given was {type(value).__name__}")
        if not readonly and not value.flags.writeable:
            raise ShapeError(f"{parameter} may be written, and the array may not: declare it const, or give a copy")
    elif isinstance(value, np.ndarray):
        raise ShapeError(f"{parameter} needs a number; given was an array of shape {value.shape}")


def _new() -> Helper:
    helper = Helper()
    _all.add(helper)
    return helper


@contextlib.contextmanager
def _helper() -> Iterator[Helper]:
    """A child for one run: an idle one, else a new one, else, with one a core at work, the first that gets idle."""
    with _condition:
        while True:
            while _idle and not _idle[-1].alive:
                _discard(_idle.pop())
            if _idle or len(_all) < max(2, os.cpu_count() or 1):
                helper = _idle.pop() if _idle else _new()
                break
            _condition.wait()
    try:
        yield helper
    finally:
        with _condition:
            if helper.ended or helper not in _all:  # by what the kernel did, or `stop`
                replace = helper in _all
                _discard(helper)
                if replace:
                    with contextlib.suppress(KernelError, OSError):  # the next run tries again, and tells
                        _idle.append(_new())
            else:
                _idle.append(helper)
            _condition.notify()


def _discard(helper: Helper) -> None:
    helper.end()
    _all.discard(helper)


def _forget() -> None:
    """After a fork: the children are the parent's."""
    global _condition
    _condition = threading.Condition()
    for helper in _all:
        helper.forget()
    _all.clear()
    _idle.clear()


atexit.register(stop)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
