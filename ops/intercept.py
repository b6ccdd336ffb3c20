"""Interceptors: how every tool sees and changes what a model computes, without the model knowing.

An interceptor wraps each op call and each module call, like middleware:

    class Scale(ops.Interceptor):
        def call(self, call, launch):
            output = launch(call)                    # see: look at call.args and output
            return ops.scale(output, 2.0)            # replace the output

`launch(call.replace(args))` replaces inputs; returning without launching supplies the output; raising unwinds to
whoever catches it, often the `scope` method of the same interceptor, which may run the module again.
Ops that an interceptor itself calls are not intercepted by it again.
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

    def call(self, call: Call, launch: Callable[[Call], Any]) -> Any:
        """One op call. `launch(call)` runs the rest of the chain and then the kernel, and gives the output."""
        return launch(call)

    def scope(self, scope: Scope, run: Callable[..., Any]) -> Any:
        """One module call. `run(*scope.args, **scope.constants)` runs it, and can run it again."""
        return run(*scope.args, **scope.constants)


_lock = threading.Lock()
_installed: tuple[Interceptor, ...] = ()
_local: ContextVar[tuple[Interceptor, ...]] = ContextVar("limpid_interceptors", default=())
_inside: ContextVar[frozenset[int]] = ContextVar("limpid_inside", default=frozenset())


def active() -> tuple[Interceptor, ...]:
    """The interceptors that see calls made here: those of the process first (outermost), then those of `with`."""
    chain = _installed + _local.get() if _installed else _local.get()
    inside = _inside.get() if chain else None
    return tuple(each for each in chain if id(each) not in inside) if inside else chain


@contextmanager
def intercepted(*interceptors: Interceptor) -> Iterator[None]:
    """`with ops.intercepted(interceptor):` switches interceptors on for the calls made inside, in this context."""
    token = _local.set(_local.get() + interceptors)
    try:
        yield
    finally:
        _local.reset(token)


class Handle:
    """What `install` gives; `remove()` undoes it, once or more often."""

    def __init__(self, interceptor: Interceptor):
        self._interceptor = interceptor

    def remove(self) -> None:
        global _installed
        with _lock:
            _installed = tuple(each for each in _installed if each is not self._interceptor)


def install(interceptor: Interceptor) -> Handle:
    """Switch an interceptor on for the whole process, all threads, until its handle is removed."""
    global _installed
    with _lock:
        _installed = (*_installed, interceptor)
    return Handle(interceptor)


@contextmanager
def _within(interceptor: Interceptor) -> Iterator[None]:
    token = _inside.set(_inside.get() | {id(interceptor)})
    try:
        yield
    finally:
        _inside.reset(token)


def through_call(chain: tuple[Interceptor, ...], call: Call, launch: Callable[[Call], Any]) -> Any:
    """Run `call` through the chain, then `launch` it."""
    if not chain:
        return launch(call)
    first, rest = chain[0], chain[1:]

    def proceed(changed: Call) -> Any:
        # What runs below `first` is the model's own call again, so `first` is no longer at work.
        token = _inside.set(_inside.get() - {id(first)})
        try:
            return through_call(rest, changed, launch)
        finally:
            _inside.reset(token)

    with _within(first):
        return first.call(call, proceed)


def through_scope(chain: tuple[Interceptor, ...], scope: Scope, forward: Callable[..., Any]) -> Any:
    """Run a module's `forward` through the chain."""
    if not chain:
        return forward(*scope.args, **scope.constants)
    first, rest = chain[0], chain[1:]

    def proceed(*args: Any, **kwargs: Any) -> Any:
        token = _inside.set(_inside.get() - {id(first)})
        try:
            scope.counts.clear()  # a second run numbers its calls from 0 again
            scope.args, scope.constants = args, kwargs
            return through_scope(rest, scope, forward)
        finally:
            _inside.reset(token)

    with _within(first):
        return first.scope(scope, proceed)
