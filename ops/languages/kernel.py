"""A kernel of hand-written source: compiled for what a call has, and launched in the sandbox until it is trusted."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..call import Call, Kernel
from ..errors import SwapRefused
from ..op import Op
from ..tensor import Tensor
from .base import Language, Launch, Parameter, Program, Source
from .binding import Binding, arrays, triple


@dataclass(frozen=True)
class Shape:
    """What a kernel is launched with: `grid` blocks of `block` threads, `shared` bytes; functions of the call's tensors
    where they depend on it."""

    grid: Any = None
    block: Any = None
    shared: Any = 0

    def of(self, call: Call) -> Launch:
        shared = self.shared(*call.args) if callable(self.shared) else self.shared
        return Launch(triple(self.grid, call, "grid"), triple(self.block, call, "block"), int(shared))


@dataclass
class _Compiled:
    """A program and its parameters, for calls of one kind."""

    source: Source
    parameters: tuple[Parameter, ...]
    program: Program
    fitting: set[tuple] = field(default_factory=set)  # kinds of calls whose types were checked


class SourceKernel(Kernel):
    """A kernel of an op in some language, from its source text. `launch` compiles for a kind of call it has not met.

    Raises SourceError for text that does not compile, SwapRefused for one that does not fit the op. `trusted` kernels
    run in this process, others, of languages that can take it with them, in the sandbox.
    """

    def __init__(self, op: Op, language: Language, source: Source, shape: Shape, dims: Mapping[str, Any]):
        super().__init__(source.entry, language.name, self._launch)
        self.op, self.language, self.source, self.shape = op, language, source, shape
        self.binding = Binding(op, dims)
        self.declared = language.parse(source)
        if language.needs_grid and shape.grid is None:
            raise SwapRefused(f"{source.entry}: {language.name} asks for grid=, the number of blocks")
        if self.declared is not None:
            self.binding.check_names(source.entry, self.declared)
            self.dtypes = {each.name: each.dtype for each in self.declared if each.pointer and each.dtype}
        self.trusted = not language.untrusted
        self._compiled: dict[tuple, _Compiled] = {}
        self._lock = threading.Lock()

    def prepare(self, call: Call, outputs: Sequence[Any]) -> _Compiled:
        """What computes this call, compiled where that is needed. `outputs` are tensors or specs."""
        constants = self.binding.constants(self.source, call)
        kind = tuple(sorted(constants.items()))
        if self.declared is None:
            kind = (*kind, *_kind(call, outputs))
        with self._lock:
            found = self._compiled.get(kind)
            if found is None:
                found = self._compiled[kind] = self._compile(constants, call, outputs)
        signature = _kind(call, outputs)
        if signature not in found.fitting:
            self.binding.check_types(self.source.entry, found.parameters, call, outputs)
            found.fitting.add(signature)
        return found

    def _compile(self, constants: dict[str, Any], call: Call, outputs: Sequence[Any]) -> _Compiled:
        source, parameters = self.source.with_constants(constants), self.declared
        if parameters is None:
            parameters = self.binding.written_for(self.language, call, outputs)
            source = self.language.with_signature(source, parameters)
        else:
            self.binding.check_types(source.entry, parameters, call, outputs)
        return _Compiled(source, parameters, self.language.compile(source, parameters))

    def _launch(self, call: Call, outputs: tuple[Tensor, ...]) -> None:
        compiled = self.prepare(call, outputs)
        values = arrays(self.binding.values(self.source.entry, compiled.parameters, call, outputs))
        launch = self.shape.of(call)
        if self.trusted or compiled.program.library is None:
            compiled.program.run(values, launch)
            return
        from .. import sandbox

        sandbox.run(compiled.program, values, launch)

    @property
    def emulated(self) -> bool:
        """Whether what has run so far ran on another machine than the kernel is written for."""
        return any(each.program.emulated for each in self._compiled.values())

    def sources(self) -> dict[str, str]:
        """The source, and what was made of it, by language."""
        made = {self.language.name: self.source.text}
        for each in self._compiled.values():
            made |= each.program.sources()
        return made


def _kind(call: Call, outputs: Sequence[Any]) -> tuple:
    """What the types of a call's values depend on."""
    types = tuple(each.dtype if isinstance(each, Tensor) else type(each) for each in call.args)
    results = tuple(each.dtype for each in outputs)
    return (*types, None, *results, *((name, type(value)) for name, value in call.constants.items()))
