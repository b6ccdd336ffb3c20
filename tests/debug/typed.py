"""A debugger that is typed to by a test: what it is told, and what it prints."""

from __future__ import annotations

import io
import pdb
from collections.abc import Iterable

import pytest

from debug import prompt


class Typed:
    """Lines for the prompt, which ends the program when there are none left; `said` is what it printed."""

    def __init__(self, lines: Iterable[str]):
        self._in, self._out = io.StringIO("".join(f"{line}\n" for line in lines)), io.StringIO()

    def new(self) -> pdb.Pdb:
        return pdb.Pdb(stdin=self._in, stdout=self._out, readrc=False, nosigint=True)

    @property
    def said(self) -> str:
        return self._out.getvalue()

    @property
    def left(self) -> str:
        """Lines that were not read."""
        return self._in.getvalue()[self._in.tell() :]


def typed(monkeypatch: pytest.MonkeyPatch, *lines: str) -> Typed:
    """Have the next stops read `lines`."""
    made = Typed(lines)
    monkeypatch.setattr(prompt, "new", made.new)
    monkeypatch.delenv("PYTHONBREAKPOINT", raising=False)
    return made
