"""The command line, run in the process of the tests."""

from __future__ import annotations

import io
import sys
from typing import Any

import pytest

from llm import bench, cli


@pytest.fixture
def limpid(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run a command in this process; gives its exit code, stdout and stderr."""

    def run(*arguments: str, stdin: str | bytes = "") -> tuple[Any, str, str]:
        raw = stdin.encode() if isinstance(stdin, str) else stdin
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw), "utf-8"))
        with pytest.raises(SystemExit) as exit:
            cli.main(list(arguments))
        out, err = capsys.readouterr()
        return exit.value.code, out, err

    return run


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Benchmarks that measure next to nothing: only what they print matters here."""
    measure = bench.interleaved
    monkeypatch.setattr(bench, "interleaved", lambda sides, *_, **more: measure(sides, 0.01, **more))
    monkeypatch.setattr(bench.ceilings, "read_bandwidth", lambda: 1e10)
    monkeypatch.setattr(bench.ceilings, "fma_peak", lambda: 1e11)
    monkeypatch.setattr(bench, "_COLD", 2**20)
