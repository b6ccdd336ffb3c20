"""A kernel of hand-written source: compiled for what a call has, and launched in the sandbox until it is trusted."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..call import Call, Kernel
from ..errors import SwapRefused
from ..op import Op
from ..tensor import Tensor
from . import native
from .base import Language, Launch, Parameter, Program, Source, Value
from .binding import Binding, asked, triple

_KINDS = 4096  # of calls that a kernel remembers, then it starts afresh: each number of tokens is one


@dataclass(frozen=True)
class Shape:
    """What a kernel is launched with: `grid` blocks of `block` threads, `shared` bytes; functions of the call's tensors
    where they depend on it."""

    grid: Any = None
    block: Any = None
    shared: Any = 0

    def of(self, call: Call) -> Launch:
        shared = asked(self.shared, "shared=", call.args)
        return Launch(triple(self.grid, call, "grid"), triple(self.block, call, "block"), int(shared))


@dataclass
class _Compiled:
    """A program and its parameters, for calls of one kind."""

    source: Source
    parameters: tuple[Parameter, ...]
    program: Program


class _Ready:
    """What calls of one kind need: their program, where each value comes from, and the launch where it is always one.

    Only what depends on functions that the user gave is computed anew in each call.
    """

    def __init__(self, compiled: _Compiled, binding: Binding, shape: Shape, call: Call, outputs: Sequence[Any]):
        self.compiled, self.program, self._shape = compiled, compiled.program, shape
        values = binding.values(compiled.source.entry, compiled.parameters, call, outputs)
        named = [*zip(compiled.parameters, values, strict=True)]
        self._picks: list[Callable[[tuple, Any], Any]] = [_pick(binding, each.name, value) for each, value in named]
        self._launch = None if any(map(callable, (shape.grid, shape.block, shape.shared))) else shape.of(call)
        self._at: _Addresses | None = None
        fixed = all(isinstance(value, Tensor) or _is_fixed(binding, each.name) for each, value in named)
        here = all(each.device == "cpu" for each in values if isinstance(each, Tensor))  # else somebody must wait first
        if here and fixed and self._launch is not None and isinstance(self.program, native.NativeProgram):
            tensors = [i for i, value in enumerate(values) if isinstance(value, Tensor)]
            self._at = _Addresses(self.program, self.values(call, tuple(outputs)), tensors, self._launch)

    def launch(self, call: Call) -> Launch:
        return self._launch or self._shape.of(call)

    def values(self, call: Call, outputs: tuple[Tensor, ...]) -> list[Value]:
        given = [pick(call.args, outputs) for pick in self._picks]
        return [memory(each) if type(each) is Tensor else each for each in given]

    def run(self, call: Call, outputs: tuple[Tensor, ...]) -> None:
        """Compute in this process."""
        if self._at is None:
            launch = self.launch(call)
            if 0 not in launch.grid:
                self.program.run(self.values(call, outputs), launch)
        else:
            self._at.run([self._picks[i](call.args, outputs) for i in self._at.tensors])


class _Addresses:
    """A native program's values as addresses, made once: in each call only those of the tensors are put in."""

    def __init__(self, program: native.NativeProgram, values: list[Value], tensors: list[int], launch: Launch):
        self._program, self.tensors, self._launch = program, tensors, native.launched(launch)
        self._numbers, pointers, self._sizes = native.marshalled(program.parameters, values)
        self._addresses, self._type = [*pointers], type(pointers)

    def run(self, tensors: Sequence[Tensor]) -> None:
        addresses = self._addresses.copy()
        for i, each in zip(self.tensors, tensors, strict=True):
            addresses[i] = each.buffer.data.data_ptr()
        self._program.run_at(self._launch, self._type(*addresses), self._sizes)


def _is_fixed(binding: Binding, name: str) -> bool:
    """Whether a number is the same in all calls of one kind: neither a run-time argument nor computed by the user."""
    return name not in binding.op.parameters and not callable(binding.dims.get(name))


def memory(tensor: Tensor) -> np.ndarray:
    """The tensor's memory; of a packed weight its bytes."""
    return tensor.numpy() if tensor.spec.format is None else np.from_dlpack(tensor.buffer.data)


def _pick(binding: Binding, name: str, value: Any) -> Callable[[tuple, Any], Any]:
    """What gives the value of a name from a call's arguments and outputs; `value` is what it is in one such call."""
    if name in binding.dims:
        given, what = binding.dims[name], f"dims={{{name!r}: ...}}"
        return (lambda args, outputs: asked(given, what, args)) if callable(given) else (lambda args, outputs: value)
    if name in binding.outputs:
        at = binding.outputs.index(name)
        return lambda args, outputs: outputs[at]
    if name in binding.op.parameters:
        at = binding.op.parameters.index(name)
        return lambda args, outputs: args[at]
    return lambda args, outputs: value


class SourceKernel(Kernel):
    """A kernel of an op in some language, from its source text. `launch` compiles for a kind of call it has not met.

    Raises SourceError for text that does not compile, SwapRefused for one that does not fit the op. `launch` runs
    languages that can take this process with them in the sandbox; `launch_here` is for what is proven.
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
        self._sandboxed = language.untrusted and language.options.sandbox
        if self._sandboxed:
            from .. import sandbox
            from ..sandbox import remote

            (remote if language.remote else sandbox).start()  # while the compiler works
        self._compiled: dict[tuple, _Compiled] = {}
        self._ready: dict[tuple, _Ready] = {}
        self._lock = threading.Lock()

    def prepare(self, call: Call, outputs: Sequence[Any]) -> _Compiled:
        """What computes this call, compiled where that is needed. `outputs` are tensors or specs."""
        constants = self.binding.constants(self.source, call)
        kind = (tuple(constants.items()), None if self.declared is not None else _types(call, outputs))
        with self._lock:
            found = self._compiled.get(kind)
            if found is None:
                found = self._compiled[kind] = self._compile(constants, call, outputs)
        self.binding.check_types(self.source.entry, found.parameters, call, outputs)
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
        if not self._sandboxed:
            self.launch_here(call, outputs)
            return
        ready = self._prepared(call, outputs)
        if 0 in ready.launch(call).grid or (ready.program.library is None and not self.language.remote):
            self.launch_here(call, outputs)
            return
        from .. import sandbox
        from ..sandbox import remote

        values, launch = ready.values(call, outputs), ready.launch(call)
        outs, seconds = self.binding.outputs, sandbox.SECONDS
        inputs = [name for name in self.binding.tensors if name not in (*outs, *call.op.writes)]
        if self.language.remote:
            what = self.language, ready.compiled.source, ready.compiled.parameters
            remote.run(*what, values, launch, seconds, inputs=inputs, outputs=outs)
        else:
            sandbox.run(ready.program, values, launch, seconds, inputs=inputs, outputs=outs)

    def launch_here(self, call: Call, outputs: tuple[Tensor, ...]) -> None:
        """Compute in this process, trusted or not."""
        self._prepared(call, outputs).run(call, outputs)

    def _prepared(self, call: Call, outputs: tuple[Tensor, ...]) -> _Ready:
        ready = self._ready.get(key := _kind(call))
        if ready is None:
            compiled = self.prepare(call, outputs)
            if len(self._ready) >= _KINDS:
                self._ready.clear()
            ready = self._ready[key] = _Ready(compiled, self.binding, self.shape, call, outputs)
        return ready

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


def _kind(call: Call) -> tuple:
    """What all but the values of a call's arguments depends on."""
    specs = [each.spec if type(each) is Tensor else type(each) for each in call.args]
    return (*specs, *call.constants.items())


def _types(call: Call, outputs: Sequence[Any]) -> tuple:
    """What the signature depends on that is written for a body."""
    types = tuple(each.dtype if isinstance(each, Tensor) else type(each) for each in call.args)
    return (*types, *(each.dtype for each in outputs), *((n, type(v)) for n, v in call.constants.items()))
