"""Where a call is made from: the path of the module that runs, and which outermost forward this is.

The runtime keeps one `Scope` per running module call. A module call passes through `run`, which interceptors see.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from . import intercept

_passes = itertools.count(1)


class Scope:
    """One running module call: its path (`layers.3.self_attn`), its pass, and how often each op was called in it."""

    __slots__ = ("args", "constants", "counts", "module", "number", "parent", "path")

    def __init__(self, path: str, number: int, parent: Scope | None = None, module: Any = None, args=(), constants=None):
        self.path = path
        self.number = number  # of the pass: 1 for the first outermost forward of the process
        self.parent = parent
        self.module = module
        self.args: tuple = args
        self.constants: dict[str, Any] = constants or {}
        self.counts: dict[str, int] = {}

    def __repr__(self) -> str:
        return f"<{self.path or 'model'} in pass {self.number}>"


_root = Scope("", 0)
current: ContextVar[Scope] = ContextVar("limpid_scope", default=_root)


def run(module: Any, name: str, forward: Callable, args: tuple, kwargs: dict) -> Any:
    """Call `forward(*args, **kwargs)` in the scope of `module`, called `name` in the module around it."""
    outer = current.get()
    if outer is _root:
        scope = Scope("", next(_passes), outer, module, args, kwargs)
    else:
        path = f"{outer.path}.{name}" if outer.path else name
        scope = Scope(path, outer.number, outer, module, args, kwargs)
    token = current.set(scope)
    try:
        chain = intercept.active()
        return intercept.through_scope(chain, scope, forward) if chain else forward(*args, **kwargs)
    finally:
        current.reset(token)
