"""Progress bars: for a person at a terminal, on standard error, gone when the work is done."""

from __future__ import annotations

import io
import os
import re
import sys
from typing import Any

import pexpect
import pytest

from ops.progress import tracked


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("items", [range(5), iter(range(5))], ids=["of known length", "of told length"])
def test_a_bar_on_a_terminal(monkeypatch, items: Any):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    assert [*tracked(items, "Doing things", total=5)] == [0, 1, 2, 3, 4]
    shown = terminal.getvalue()
    assert "Doing things" in shown and "100%" in shown
    assert shown.rstrip("\r\n").endswith("\x1b[2K"), "the line is wiped"


@pytest.mark.parametrize(("kind", "shown"), [(Terminal, False), (io.StringIO, True)])
def test_no_bar_without_a_reader(monkeypatch, kind, shown):
    monkeypatch.setattr(sys, "stderr", stream := kind())
    items = [1, 2, 3]
    assert tracked(items, "Doing things", shown=shown) is items
    assert stream.getvalue() == ""


def test_compiling_kernels_shows_a_bar(tmp_path):
    """The first start, at a terminal: the bar comes, goes, and is no part of the text."""
    environment = os.environ | {"LIMPID_CACHE": str(tmp_path), "TERM": "xterm", "COLUMNS": "80"}
    command = ["-m", "llm", "generate", "Once upon a time", "--max-tokens", "3"]
    child = pexpect.spawn(sys.executable, command, env=environment, encoding="utf-8", timeout=120)
    child.expect("Compiling kernels")
    child.expect("100%")
    child.expect("Once upon a time[^\r\n]*\r\n")
    child.expect(r"3 generated, .*tokens/s")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0
    again = pexpect.run(
        f"{sys.executable} {' '.join(command[:3])} Once --max-tokens 3", env=environment, encoding="utf-8", timeout=120
    )
    assert re.search("3 generated", str(again)) and "Compiling kernels" not in str(again)
