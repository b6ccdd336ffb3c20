"""What all tools have in common: they are on inside a `with`, nest, undo themselves, and say when they saw nothing."""

from __future__ import annotations

from typing import Any, Self

import ops
from ops import Call, Selector, SelectorError

_REMEMBERED = 10_000  # addresses that were not meant, for the message when none was


class Tool(ops.Interceptor):
    """An interceptor that is on inside `with`, for the calls that a selector means.

    A selector that meant no call by the end of the `with` raises SelectorError with the nearest addresses that were
    seen, unless an exception ends it.
    """

    def __init__(self, where: Any = None):
        self.where = Selector(where)
        self.hits = 0
        self._others: dict[str, None] = {}
        self._on: Any = None

    def means(self, call: Call) -> bool:
        """Whether the selector means the call; counts it."""
        if self.where.matches(call):
            self.hits += 1
            return True
        if not self.hits and len(self._others) < _REMEMBERED:
            self._others[call.address] = None
        return False

    def check_hits(self) -> None:
        """Raises SelectorError when no call was meant."""
        if self.hits:
            return
        name = self.name.lower()
        if not self._others:
            raise SelectorError(f"{name}: no op was called in this `with`; call the model inside it")
        near = ", ".join(self.where.nearest(self._others)) or ", ".join([*self._others][:5])
        raise SelectorError(f"{name}: {self.where} meant none of the calls that were made; there were {near}")

    def __enter__(self) -> Self:
        if self._on is not None:
            raise ops.OpError(f"this {self.name.lower()} is on already; make another one")
        self._on = ops.intercepted(self)
        self._on.__enter__()
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        on, self._on = self._on, None
        on.__exit__(None, None, None)
        if kind is None:
            self.check_hits()
