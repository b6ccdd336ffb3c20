"""Runs kernels that are no shared objects, of WGSL and OpenCL C, in another Python: what they do there harms nobody.

The child compiles a kernel as this process did, and gets copies of the arrays; what it wrote comes back. It is started
ahead, since it imports what a driver needs; `run` waits for it.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Collection, Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from ..languages.base import Language, Launch, LaunchError, Options, Parameter, Program, Source, SourceError, Value

_START = 120.0  # seconds for a child to start, and for a compiler
_GRACE = 5.0  # seconds after the time limit, at which the child ends itself if nobody does
_POISON = 0xFF  # bytes of a NaN
_CODE = "import sys; sys.path[:] = {path!r}; from ops.sandbox import remote; remote.serve({end})"

_Key = tuple[type[Language], Options, Source, tuple[Parameter, ...]]


class _Child:
    """A process that compiles and runs; `known` are the kernels that it has compiled."""

    def __init__(self) -> None:
        if not sys.executable:
            raise LaunchError("this Python has no executable (sys.executable) that a sandbox could start")
        ours, theirs = socket.socketpair()
        with theirs:
            code = _CODE.format(path=sys.path, end=theirs.fileno())
            self._process = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,  # Ctrl-C is the parent's
            )
        self._connection = Connection(ours.detach())
        self._started = False
        self.known: dict[_Key, int] = {}

    def ask(self, request: tuple, seconds: float) -> Any:
        """The answer. Raises what the child raised, or LaunchError when it died or is late: then it is ended."""
        try:
            if not self._started:
                self._receive(_START)
                self._started = True
            self._connection.send(request)
            kind, answer = self._receive(seconds)
        except (EOFError, OSError):
            code = self.end()
            how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit status {code}"
            raise LaunchError(f"the kernel ended its process {how}") from None
        except BaseException:  # late, or Ctrl-C: the kernel may still be running
            self.end()
            raise
        if kind is not None:
            raise kind(answer)
        return answer

    def _receive(self, seconds: float) -> Any:
        if not self._connection.poll(seconds):
            raise LaunchError(f"the kernel did not end within {seconds:g} s, and was stopped")
        return self._connection.recv()

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def end(self) -> int:
        """End it; gives its exit status, which is its own when it ended by itself."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(0.2)  # its connection is gone a little earlier than it is
        self._process.kill()
        self._connection.close()
        return self._process.wait()

    def forget(self) -> None:
        """In a fork of this process: leave the child alone, which is not this process's."""
        self._process.returncode = 0
        self._connection.close()


_child: _Child | None = None
_lock = threading.Lock()


def start() -> None:
    """Start the child, if there is none, without waiting until it is ready."""
    global _child
    with _lock:
        if _child is None or not _child.alive:
            _child = _Child()


def stop() -> None:
    """End the child."""
    global _child
    with _lock:
        if _child is not None:
            _child.end()
        _child = None


def run(
    language: Language, source: Source, parameters: Sequence[Parameter], values: Sequence[Value], launch: Launch,
    seconds: float, *, inputs: Collection[str] = (), outputs: Collection[str] = ("out",),
) -> None:  # fmt: skip
    """Compile and run a kernel in the child; results are copied back.

    An array named in `inputs` may not be written. One named in `outputs` holds no values of use before: the kernel
    sees NaNs, or -1. Raises LaunchError, with the arrays as they were, for a crash, for no end within `seconds`, and
    for what the program itself reports.
    """
    global _child
    key = type(language), language.options, source, tuple(parameters)
    with _lock:
        if _child is None or not _child.alive:
            _child = _Child()
        if key not in _child.known:
            _child.ask(("compile", key), _START)
            _child.known[key] = len(_child.known)
        request = ("run", _child.known[key], values, launch, seconds, tuple(inputs), tuple(outputs))
        for index, array in _child.ask(request, seconds):
            np.copyto(np.asarray(values[index]), array)


def serve(end: int) -> None:
    """The child's life."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    programs: list[tuple[tuple[Parameter, ...], Program]] = []
    with Connection(end) as connection, contextlib.suppress(EOFError, ConnectionError):  # the parent is gone
        connection.send("ready")
        while True:
            what, *request = connection.recv()
            try:
                if what == "compile":
                    programs.append(_compiled(*request))
                    answer: Any = None
                else:
                    answer = _run(*programs[request[0]], *request[1:])
            except (LaunchError, SourceError) as error:
                connection.send((type(error), str(error)))
            except Exception as error:
                connection.send((LaunchError, f"{type(error).__name__}: {error}"))
            else:
                connection.send((None, answer))


def _compiled(key: _Key) -> tuple[tuple[Parameter, ...], Program]:
    kind, options, source, parameters = key
    return parameters, kind(options).compile(source, parameters)


def _run(
    parameters: tuple[Parameter, ...], program: Program, values: Sequence[Value], launch: Launch, seconds: float,
    inputs: tuple[str, ...], outputs: tuple[str, ...],
) -> list[tuple[int, np.ndarray]]:  # fmt: skip
    """The arrays that the kernel may have written, by their places."""
    pairs = enumerate(zip(parameters, values, strict=True))
    arrays = [(i, p.name, v) for i, (p, v) in pairs if isinstance(v, np.ndarray) and not p.const]
    before = {name: array.copy() for _, name, array in arrays if name in inputs}
    for _, name, array in arrays:
        if name in outputs:
            array.view("uint8")[...] = _POISON
    signal.setitimer(signal.ITIMER_REAL, seconds + _GRACE)
    program.run(values, launch)
    signal.setitimer(signal.ITIMER_REAL, 0)
    for _, name, array in arrays:
        if name in before and array.tobytes() != before[name].tobytes():
            raise LaunchError(f"the kernel writes {name}, which is read only")
    return [(index, array) for index, name, array in arrays if name not in before]


def _forget() -> None:
    """After a fork: the child is the parent's."""
    global _child, _lock
    _lock = threading.Lock()
    if _child is not None:
        _child.forget()
    _child = None


atexit.register(stop)
os.register_at_fork(after_in_child=_forget)
