"""Progress of long work, on standard error, and only where a person watches."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable
from typing import TypeVar

T = TypeVar("T")


def tracked(items: Iterable[T], what: str, total: int | None = None, shown: bool = True) -> Iterable[T]:
    """`items`, with a bar labelled `what` as they are gone through, if `shown` and standard error is a terminal."""
    if not shown or not sys.stderr.isatty():
        return items
    from rich.console import Console
    from rich.progress import track

    count = len(items) if total is None and isinstance(items, Collection) else total
    return track(items, what, count, console=Console(stderr=True), transient=True)
