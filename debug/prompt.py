"""The debugger's prompt, opened in a frame of the model's code while a call is under way there.

Which debugger: the one that runs or steps through the program already; under pytest its own, which sets capturing
aside; IPython's in an IPython shell or a Jupyter kernel; else ipdb's where that is installed, or pdb. PYTHONBREAKPOINT
is honoured: 0 stops nowhere, a debugger named there is taken, any other hook is called with the frame if it takes one.
"""

from __future__ import annotations

import bdb
import contextlib
import ctypes
import importlib
import importlib.util
import inspect
import os
import pdb
import sys
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self

Command = Callable[[pdb.Pdb, str], bool]  # gets the debugger and what was typed after the name; True leaves the prompt

_DEBUGGERS = {  # hooks that open a debugger which can open at the line itself
    "pdb.set_trace": "pdb:Pdb",
    "ipdb.set_trace": "IPython.terminal.debugger:TerminalPdb",
    "IPython.terminal.debugger.set_trace": "IPython.terminal.debugger:TerminalPdb",
    "IPython.core.debugger.set_trace": "IPython.core.debugger:Pdb",
}
_HERE = os.path.dirname(os.path.abspath(__file__)) + os.sep
_RUNS = {
    each.__code__ for each in (bdb.Bdb.run, bdb.Bdb.runeval, bdb.Bdb.runcall)
}  # frames in which a debugger runs code
_one = threading.RLock()  # there is one terminal
_open = threading.local()


def enabled() -> bool:
    """Whether a stop stops at all: not with PYTHONBREAKPOINT=0."""
    return os.environ.get("PYTHONBREAKPOINT") != "0"


def is_open() -> bool:
    """Whether this thread is at a prompt: what is typed there does not stop again."""
    return getattr(_open, "depth", 0) > 0


def is_runtime(frame: FrameType) -> bool:
    """Whether a frame is of the runtime's: ops, debug, or where a module only passes a call on."""
    package = frame.f_globals.get("__name__", "").partition(".")[0]
    return package in ("ops", "debug") or frame.f_globals.get("__limpid_plumbing__", False)


class Names:
    """Names at hand in a frame, beside its own variables, inside `with`: `names["call"]` is what "call" stands for now.

    A name that the function uses itself keeps its meaning; the one at hand is then called `_call`.
    """

    def __init__(self, frame: FrameType, given: dict[str, Any]):
        code = frame.f_code
        # One mapping as long as the frame lives. Until Python 3.13 a second look would undo what was assigned.
        self._frame, self._values = frame, frame.f_locals
        taken = {*code.co_varnames, *code.co_cellvars, *code.co_freevars, *self._values}
        self.shown = {name: f"_{name}" if name in taken else name for name in given}
        self._given = given

    def __getitem__(self, name: str) -> Any:
        return self._given[name] if self.shown[name] not in self._values else self._values[self.shown[name]]

    def __setitem__(self, name: str, value: Any) -> None:
        self._values[self.shown[name]] = value

    def __enter__(self) -> Self:
        for name, value in self._given.items():
            self[name] = value
        return self

    def __exit__(self, *_: object) -> None:
        for name, shown in self.shown.items():
            self._given[name] = self[name]
            with contextlib.suppress(AttributeError):  # Python 3.13 keeps what was added until the frame ends
                self._values.pop(shown)
        if sys.version_info < (3, 13):  # variables assigned at the prompt: pdb's own stops do this when they end
            ctypes.pythonapi.PyFrame_LocalsToFast(ctypes.py_object(self._frame), ctypes.c_int(0))


def ask(frame: FrameType, text: str, names: Names, commands: dict[str, Command]) -> None:
    """Open the prompt in `frame`, below `text`, with `names` and `commands` at hand, until the program is to go on.

    Raises bdb.BdbQuit when it is to end. What a command raises that is no Exception unwinds the program.
    """
    hook, remark = _hook()
    moved = [f"{shown} is what else would be called {name}" for name, shown in names.shown.items() if shown != name]
    with _one, names, _Depth():
        if hook is not None:
            hook(frame=frame)
            return
        debugger = _debugger(frame)
        _attach(debugger, commands)
        try:
            debugger.message("\n".join([*remark, text, *moved]))
            debugger.interaction(frame, None)
        except BaseException:
            sys.settrace(None)
            debugger.forget()
            raise
        if debugger.quitting:
            raise bdb.BdbQuit
        if debugger.stoplineno != -1 or debugger.breaks:  # not simply "continue"
            _follow(debugger, frame)


class _Depth:
    def __enter__(self) -> None:
        _open.depth = getattr(_open, "depth", 0) + 1

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        _open.depth -= 1


def _follow(debugger: pdb.Pdb, frame: FrameType) -> None:
    """Have the debugger see the lines of `frame` and of those that called it, as `Bdb.set_trace` does."""
    each: FrameType | None = frame
    while each is not None:
        each.f_trace = debugger.trace_dispatch
        each = None if each is debugger.botframe else each.f_back
    sys.settrace(debugger.trace_dispatch)


def _hook() -> tuple[Callable[..., Any] | None, list[str]]:
    """The function that PYTHONBREAKPOINT names when it is to be called, and what is to be said of it."""
    name = os.environ.get("PYTHONBREAKPOINT", "")
    if not name or name in _DEBUGGERS:
        return None, []
    module, _, attribute = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module or "builtins"), attribute)
        takes = inspect.signature(found).parameters
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        return None, [f"PYTHONBREAKPOINT={name} is no function that can be called ({error}): this is pdb instead"]
    if "frame" in takes:
        return found, []
    return None, [
        f"PYTHONBREAKPOINT={name} takes no frame, so it would stop in the runtime and not in the model: this is pdb "
        f"instead. A hook that stops in the model has a parameter `frame`."
    ]


def _debugger(frame: FrameType) -> pdb.Pdb:
    """The debugger that is at work already, or a new one that stands at the bottom of the stack."""
    tracing = getattr(sys.gettrace(), "__self__", None)
    if isinstance(tracing, pdb.Pdb):
        return tracing
    bottom: FrameType = frame
    while True:
        running = bottom.f_locals.get("self") if bottom.f_code in _RUNS else None
        if isinstance(running, pdb.Pdb):
            return running
        if bottom.f_back is None:
            break
        bottom = bottom.f_back
    made = new()
    made.reset()
    made.botframe = bottom
    return made


def new() -> pdb.Pdb:
    """A debugger of the front end that the program runs in."""
    testing = sys.modules.get("_pytest.debugging")
    if testing is not None and testing.pytestPDB._pluginmanager is not None:
        return testing.pytestPDB._init_pdb("stop")
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is not None:
        return shell.debugger_cls()
    hook = os.environ.get("PYTHONBREAKPOINT", "")
    if hook not in _DEBUGGERS:
        hook = "ipdb.set_trace" if importlib.util.find_spec("ipdb") else "pdb.set_trace"
    module, _, name = _DEBUGGERS[hook].partition(":")
    return getattr(importlib.import_module(module), name)()


def _attach(debugger: pdb.Pdb, commands: dict[str, Command]) -> None:
    """Give a debugger, of whatever class, our commands, and have it step over the runtime and look past it."""
    for name, command in commands.items():
        setattr(debugger, f"do_{name}", _run(debugger, command))
    if "get_stack" in vars(debugger):  # done before
        return
    stop_here, get_stack = debugger.stop_here, debugger.get_stack

    def looking_past(
        frame: FrameType | None, traceback: TracebackType | None
    ) -> tuple[list[tuple[FrameType, int]], int]:
        stack, index = get_stack(frame, traceback)
        here = stack[index]
        shown = [each for each in stack if each is here or not is_runtime(each[0])]
        return (stack, index) if is_runtime(here[0]) else (shown, shown.index(here))

    debugger.get_stack = looking_past  # pyright: ignore[reportAttributeAccessIssue]
    debugger.stop_here = lambda frame: (frame is debugger.stopframe or not _below_runtime(frame)) and stop_here(frame)


def _run(debugger: pdb.Pdb, command: Command) -> Callable[[str], bool]:
    def run(argument: str) -> bool:
        try:
            leave = command(debugger, argument.strip())
        except Exception as error:
            debugger.error(f"{type(error).__name__}: {error}" if not str(error) else str(error))
            return False
        if leave:
            debugger.set_continue()
        return leave

    run.__doc__ = inspect.getdoc(command)
    return run


def _below_runtime(frame: FrameType) -> bool:
    """Whether a frame is the runtime's or a library's that it calls: `step` goes on to the model, or to a kernel."""
    if is_runtime(frame):
        return True
    caller = frame.f_back
    while caller is not None and not is_runtime(caller):
        caller = caller.f_back
    # A module call enters `forward` from ops.scope; a kernel in Python is called from ops.call.
    return caller is not None and caller.f_globals.get("__name__") not in ("ops.scope", "ops.call")
