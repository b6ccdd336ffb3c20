"""Interceptors: how every tool sees and changes what a model computes, without the model knowing.

An interceptor wraps each op call and each module call, like middleware:

    class Scale(ops.Interceptor):
        def call(self, call, launch):
            output = launch(call)                    # see: look at call.args and output
            return ops.scale(output, 2.0)            # replace the output

`launch(call.replace(args))` replaces inputs; returning without launching supplies the output; raising unwinds to
whoever catches it, often the `scope` method of the same interceptor, which may run the module again.
Ops that an interceptor itself calls are not intercepted by it again, and do not count as the model's: they are made in
a scope of their own, `layers.3.Scale`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .call import Call
    from .scope import Scope


class Interceptor:
    """Override either method; the defaults pass everything on."""

    @property
    def name(self) -> str:
        """What its own op calls are filed under, and what errors call it."""
        return type(self).__name__

    def call(self, call: Call, launch: Callable[[Call], Any]) -> Any:
        """One op call. `launch(call)` runs the rest of the chain and then the kernel, and gives the output."""
        return launch(call)

    def scope(self, scope: Scope, run: Callable[..., Any]) -> Any:
        """One module call. `run(*scope.args, **scope.constants)` runs it, and can run it again."""
        return run(*scope.args, **scope.constants)


_lock = threading.Lock()
_handles: tuple[Handle, ...] = ()
_installed: tuple[Interceptor, ...] = ()
_local: ContextVar[tuple[Interceptor, ...]] = ContextVar("limpid_interceptors", default=())


def chain() -> tuple[Interceptor, ...]:
    """What is switched on here: interceptors of the process first (outermost), then those of `with`."""
    return _installed + _local.get() if _installed else _local.get()


@contextmanager
def intercepted(*interceptors: Interceptor) -> Iterator[None]:
    """`with ops.intercepted(interceptor):` switches interceptors on for the calls made inside, in this context."""
    token = _local.set(_local.get() + interceptors)
    try:
        yield
    finally:
        _local.reset(token)


class Handle:
    """What `install` gives; `remove()` undoes that installation, once or more often."""

    def __init__(self, interceptor: Interceptor):
        self.interceptor = interceptor

    def remove(self) -> None:
        with _lock:
            _set(tuple(each for each in _handles if each is not self))


def install(interceptor: Interceptor) -> Handle:
    """Switch an interceptor on for the whole process, all threads, until its handle is removed."""
    handle = Handle(interceptor)
    with _lock:
        _set((*_handles, handle))
    return handle


def _set(handles: tuple[Handle, ...]) -> None:
    global _handles, _installed
    _handles, _installed = handles, tuple(each.interceptor for each in handles)
