"""Plan: what an op does for one combination of specs and constants."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from . import build, threads
from .spec import Spec

if TYPE_CHECKING:
    from .op import Op


class Plan:
    """What an op does for one combination of specs and constants: its outputs and its compiled kernel.

    `output` is the spec of the only output, None where there are several or none.
    """

    __slots__ = ("constants", "op", "output", "outputs", "run", "specs")

    def __init__(self, op: Op, specs: tuple, constants: dict[str, Any], outputs: tuple[Spec, ...]):
        self.op, self.specs, self.constants, self.outputs = op, specs, constants, outputs
        self.output = outputs[0] if len(outputs) == 1 else None
        nothing = bool(outputs) and all(spec.size == 0 for spec in outputs) and not op.writes
        self.run: Callable[..., Any] = (lambda *_: None) if nothing else self._build_and_run

    def request(self) -> build.Request:
        """What to compile: the op at symbolic sizes."""
        return build.Request(self.op, self.op.symbolic_specs(self.specs), self.constants)

    def _build_and_run(self, *data: Any) -> None:
        self.run = build.function(self.request())
        threads.settle()
        self.run(*data)
