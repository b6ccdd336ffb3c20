"""What `limpid bench debug` measures: the tools, each of which makes a run slower."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from .profiler import profile
from .shadow import check
from .trace import trace

Tools = Mapping[str, Callable[[], AbstractContextManager[Any]]]


def tools() -> Tools:
    """By name what makes a tool, to be on in a `with`, for every call; "off" is none. The slowest come last."""
    return {
        "off": nullcontext,
        "trace, no statistics": lambda: trace(statistics=False),
        "trace": trace,
        "trace, keep=True": lambda: trace(keep=True),
        "profile": profile,
        "check, inherited=False": lambda: check(inherited=False),
        "check": check,
    }
