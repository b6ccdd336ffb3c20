"""Hooks: functions that see, and may replace, what goes into one module and what comes out of it, as torch has them.

All hooks are one interceptor, there only while any is registered, and inside all tools: what a trace or a patch sees as
a module's output is what its hooks made of it. Ops that a hook calls are filed under `layers.3.hooks`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from .errors import OpError
from .intercept import Handle, Interceptor, install
from .scope import Scope

_lock = threading.Lock()
_hooks: dict[int, tuple[Hook, ...]] = {}  # by the id of the module, which its hooks keep alive
_installed: Handle | None = None


class Hook:
    """What registering gives: `remove()` takes the hook away, once or more often; so does the end of a `with`."""

    def __init__(self, module: Any, function: Callable, before: bool, with_kwargs: bool):
        self.module, self.function, self.before, self.with_kwargs = module, function, before, with_kwargs

    def remove(self) -> None:
        _set(self.module, lambda hooks: tuple(each for each in hooks if each is not self))

    def __enter__(self) -> Hook:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def arguments(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """What the module is to be called with."""
        if not self.with_kwargs:
            given = self.function(self.module, args)
            return (args if given is None else given if isinstance(given, tuple) else (given,)), kwargs
        given = self.function(self.module, args, kwargs)
        if given is None:
            return args, kwargs
        if isinstance(given, tuple) and len(given) == 2 and isinstance(given[0], tuple) and isinstance(given[1], dict):
            return given
        raise OpError(
            f"a pre hook with_kwargs gives None or (args, kwargs), a tuple and a dict; this one gave {given!r}"
        )

    def output(self, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """What the module is to give."""
        given = self.function(self.module, args, *([kwargs] if self.with_kwargs else []), output)
        return output if given is None else given


class _Hooks(Interceptor):
    @property
    def name(self) -> str:
        return "hooks"

    def scope(self, scope: Scope, run: Callable[..., Any]) -> Any:
        hooks = _hooks.get(id(scope.module), ())
        args, kwargs = scope.args, scope.constants
        for each in hooks:
            if each.before:
                args, kwargs = each.arguments(args, kwargs)
        output = run(*args, **kwargs)
        for each in hooks:
            if not each.before:
                output = each.output(args, kwargs, output)
        return output


def register(module: Any, function: Callable, before: bool, prepend: bool, with_kwargs: bool) -> Hook:
    """A hook on `module`, in all threads, until its handle is removed; `before` its forward or after it."""
    hook = Hook(module, function, before, with_kwargs)
    _set(module, lambda hooks: (hook, *hooks) if prepend else (*hooks, hook))
    return hook


def _set(module: Any, changed: Callable[[tuple[Hook, ...]], tuple[Hook, ...]]) -> None:
    """Change the hooks of a module; the interceptor is on while there are any."""
    global _installed
    with _lock:
        hooks = changed(_hooks.get(id(module), ()))
        if hooks:
            _hooks[id(module)] = hooks
        else:
            _hooks.pop(id(module), None)
        if _hooks and _installed is None:
            _installed = install(_Hooks(), innermost=True)
        elif not _hooks and _installed is not None:
            _installed.remove()
            _installed = None
