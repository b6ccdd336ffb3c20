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
_installed: tuple[Interceptor, ...] = ()  # all of the process
_innermost: tuple[Interceptor, ...] = ()  # those of them that stand inside those of `with`
_local: ContextVar[tuple[Interceptor, ...]] = ContextVar("limpid_interceptors", default=())


def chain() -> tuple[Interceptor, ...]:
    """What is switched on here, outermost first: of the process, of `with`, then what was installed `innermost`."""
    if not _installed:
        return _local.get()
    return _installed[: len(_installed) - len(_innermost)] + _local.get() + _innermost


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

    def __init__(self, interceptor: Interceptor, innermost: bool = False):
        self.interceptor, self.innermost = interceptor, innermost

    def remove(self) -> None:
        with _lock:
            _set(tuple(each for each in _handles if each is not self))


def install(interceptor: Interceptor, innermost: bool = False) -> Handle:
    """Switch an interceptor on for the whole process, all threads, until its handle is removed.

    It stands around those of `with`; with `innermost` inside them, so that they see what it makes of a call.
    """
    handle = Handle(interceptor, innermost)
    with _lock:
        _set((*_handles, handle))
    return handle


def _set(handles: tuple[Handle, ...]) -> None:
    global _handles, _installed, _innermost
    outer = tuple(each.interceptor for each in handles if not each.innermost)
    inner = tuple(each.interceptor for each in handles if each.innermost)
    _handles, _installed, _innermost = handles, outer + inner, inner
