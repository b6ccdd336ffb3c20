"""Finding: one thing that is wrong with a model, at the call where it first shows. Diagnosis: what the doctor found."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import ops
from ops import Call, Interceptor, intercept
from ops.scope import Scope

from . import pages, storage

Kind = Literal["weight", "kernel", "model", "cut"]


@dataclass(frozen=True)
class Finding:
    """What is wrong: a weight, a kernel, the model's code, or how it depends on how the work is cut.

    `address`, `op`, `path` and `source` are those of the first wrong call: `layers.3.self_attn/rope[1]`, `rope`,
    `layers.3.self_attn`, `llm/models/llama.py:54`; for a weight, of the first call that uses it, and `parameter` is the
    weight's path.
    """

    kind: Kind
    address: str
    op: str
    path: str
    source: str
    parameter: str | None
    message: str

    def __str__(self) -> str:
        if self.parameter:
            return f"The weight {self.parameter} is wrong: {self.message}. It is used by {self.address}, {self.source}."
        return f"{self.address} is wrong, called at {self.source}: {self.message}."


class Found(Exception):
    """Carries a finding out of the model."""

    def __init__(self, finding: Finding):
        super().__init__(str(finding))
        self.finding = finding


def at(call: Call, kind: Kind, message: str, parameter: str | None = None) -> Finding:
    """The finding at a call; only while the call runs."""
    return Finding(kind, call.address, call.op.name, call.path, call.source, parameter, message)


@dataclass(frozen=True)
class Check:
    """A thing that was looked into: what, how far, and how long it took."""

    name: str
    text: str
    seconds: float


@dataclass
class Diagnosis:
    """What the doctor found, the culprit first, and what was looked into. `ok` when nothing was found."""

    model: str
    reference: str
    findings: list[Finding] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.findings

    def rows(self) -> list[dict[str, str]]:
        """What was looked into, as a table of texts."""
        return [{"check": each.name, "what": each.text, "seconds": f"{each.seconds:.1f}"} for each in self.checks]

    def summary(self) -> str:
        """The culprit in a sentence."""
        return str(self.findings[0]) if self.findings else f"{self.model} is clean against {self.reference}."

    def __str__(self) -> str:
        table = storage.table(self.rows(), len(self.checks)).rpartition("\n")[0]
        return "\n".join([table, *map(str, self.findings or [self.summary()])])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        status = "clean" if self.ok else "wrong"
        listed = "".join(pages.sentence(str(each), "wrong") for each in self.findings)
        return pages.box((listed or pages.sentence(self.summary(), status)) + pages.table(self.rows()))

    def save_html(self, path: str | Path) -> Path:
        """Write one page that needs nothing else."""
        return pages.save(Path(path), f"{self.model} against {self.reference}", self._repr_html_())


class _OfThread(Interceptor):
    """A tool for the calls of one thread."""

    def __init__(self, tool: Interceptor):
        self.tool, self.thread = tool, threading.get_ident()

    @property
    def name(self) -> str:
        return self.tool.name

    def call(self, call: Call, launch: Callable[[Call], Any]) -> Any:
        return self.tool.call(call, launch) if threading.get_ident() == self.thread else launch(call)

    def scope(self, scope: Scope, run: Callable[..., Any]) -> Any:
        if threading.get_ident() == self.thread:
            return self.tool.scope(scope, run)
        return run(*scope.args, **scope.constants)


@contextmanager
def outermost(*tools: Interceptor) -> Iterator[None]:
    """Switch tools on around all that are on already: what those make of a call is judged with the call."""
    with ExitStack() as stack:
        for tool in reversed(tools):
            handle = intercept.Handle(_OfThread(tool))
            with intercept._lock:
                intercept._set((handle, *intercept._handles))
            stack.callback(handle.remove)
        yield


def launched(call: Call, launch: Callable[[Call], Any], kind: Kind) -> Any:
    """What a call gives; an error that it raises is a finding."""
    try:
        return launch(call)
    except (ops.OpError, ops.KernelError, IndexError) as error:
        raise Found(at(call, kind, f"it raises {type(error).__name__}: {error}")) from error
