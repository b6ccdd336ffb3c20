"""Triton: the kernel is a Python function of `tl` code, run by Triton's interpreter on NumPy's memory, without torch.

    @ops.rms_norm.swap("triton", grid=lambda x, *_: x.shape[0], dims={"BLOCK": 1024})
    @triton.jit
    def norm(x_ptr, weight_ptr, out_ptr, width, eps, BLOCK: tl.constexpr): ...

A parameter is bound by its name, less `_ptr`. Python says no types: each parameter has the type "", and takes what it
is given; only `tl.constexpr` is said. grid is in programs. `sources()` is what Triton's compiler makes of it for a GPU.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import linecache
import textwrap
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from ..call import Call, Kernel
from ..errors import SwapRefused
from ..op import Op
from ..tensor import Tensor
from .base import Language, Options, Parameter, Program, Source, SourceError
from .binding import Binding
from .kernel import Shape, memory
from .shared import load, located
from .source import shown
from .triton_program import CONSTANT, TritonProgram, line_in

_SUFFIX = "_ptr"  # by which Triton's users tell arrays


def kernel(op: Op, function: Any, shape: Shape, dims: Mapping[str, Any], options: Options) -> Kernel:
    """A kernel of a Triton function. Raises SwapRefused where its parameters are not the op's."""
    return TritonKernel(op, Triton(options), function, shape, dims)


class TritonKernel(Kernel):
    """A Triton function in the place of an op's kernel. What the op does not change it may not write.

    It computes interpreted; what Triton's compiler refuses for a GPU, once for all arguments of the same types, is an
    error all the same.
    """

    @property
    def emulated(self) -> bool:
        return True

    def __init__(self, op: Op, language: Triton, function: Any, shape: Shape, dims: Mapping[str, Any]):
        name = plain(function).__name__
        super().__init__(name, language.name, self._launch)
        if shape.grid is None:
            raise SwapRefused(f"{name}: triton asks for grid=, the number of programs")
        self.shape, self.binding = shape, Binding(op, dims)
        arrays = self.binding.tensors
        self.parameters = tuple(replace(p, pointer=p.name in arrays) for p in language.parse_function(function))
        self.binding.check_names(name, self.parameters)
        self.program = language.compile_function(function, self.parameters)

    def _launch(self, call: Call, outputs: tuple[Tensor, ...]) -> None:
        changes = (*self.binding.outputs, *call.op.writes)
        given = self.binding.values(self.name, self.parameters, call, outputs)
        values = []
        for each, value in zip(self.parameters, given, strict=True):
            if isinstance(value, Tensor):
                value = memory(value).view()
                value.flags.writeable = each.name in changes
            values.append(value)
        self.program.run(values, self.shape.of(call))
        self.program.check()

    def sources(self) -> dict[str, str]:
        """The Python source, and what Triton's compiler makes of it for the types of the last call."""
        return {"triton": self.program.source.text, **(self.program.sources() if self.program.ran else {})}


class Triton(Language):
    """Triton on the CPU by its interpreter, and compiled for NVIDIA GPUs (sm_90) as a check; 2.7 s the first time.

    An access beyond every array is an error that names array and line.
    """

    name: ClassVar[str] = "triton"
    types: ClassVar[dict[str, str]] = {
        "fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "i64": "int64", "i32": "int32", "i8": "int8",
        "u8": "uint8",
    }  # fmt: skip
    untrusted: ClassVar[bool] = False  # the interpreter is Python, and each access is checked

    def parse(self, source: Source) -> tuple[Parameter, ...] | None:
        if (definition := _definition(source)) is None:
            return None
        if source.entry != definition.name:
            where = f"{source.file}:{source.line + definition.lineno - 1}"
            raise SourceError(f"{where}: error: the function is {definition.name}, expected {source.entry}")
        return self.parse_function(_function(source))

    def parse_function(self, function: Callable) -> tuple[Parameter, ...]:
        """The parameters of a kernel that is given as a function, decorated with @triton.jit or not."""
        signature = inspect.signature(plain(function))
        return tuple(_parameter(each) for each in signature.parameters.values())

    def with_signature(self, source: Source, parameters: Sequence[Parameter]) -> Source:
        raise SourceError(
            f"{source.file}:{source.line}: error: a triton kernel is a function, and its body alone is none: "
            f"write def {source.entry}({', '.join(each.name for each in parameters)})"
        )

    def compile(self, source: Source, parameters: Sequence[Parameter]) -> Program:
        found = self.parse(source)
        if found is None:
            raise SourceError(f"{source.file}:{source.line}: error: no def {source.entry} in the text")
        return self.compile_function(_function(source), parameters, source)

    def compile_function(
        self, function: Callable, parameters: Sequence[Parameter], source: Source | None = None
    ) -> TritonProgram:
        """The program of a kernel that is given as a function. Its closure and globals are read now."""
        load("triton", "triton")
        if self.options.flags or self.options.device not in (None, "emulate"):
            given = f"flags {self.options.flags} and device {self.options.device!r}"
            raise SourceError(f'{given}: Triton is interpreted here, without flags, and with no device but "emulate"')
        return TritonProgram(plain(function), parameters, source or source_of(function))


def source_of(function: Callable) -> Source:
    """The text of a function and where it stands."""
    found = plain(function)
    try:
        lines, line = inspect.getsourcelines(found)
    except OSError as error:
        raise SourceError(f"the source of {found.__name__} is not to be had: {error}") from error
    return Source("".join(lines), found.__name__, shown(found.__code__.co_filename), line)


def plain(function: Callable) -> types.FunctionType:
    """The Python function, freed of @triton.jit and of the like."""
    while not isinstance(function, types.FunctionType) and hasattr(function, "fn"):
        function = getattr(function, "fn")  # noqa: B009 - of Triton's decorators, of which no type is known here
    if not isinstance(function, types.FunctionType):
        raise SourceError(f"{function!r} is no Python function")
    return function


def _parameter(given: inspect.Parameter) -> Parameter:
    if given.kind in (given.VAR_POSITIONAL, given.VAR_KEYWORD):
        raise SourceError(f"{given} takes any number of values; name each parameter")
    said = given.annotation
    name = getattr(said, "__name__", said)
    constant = isinstance(name, str) and name.rpartition(".")[2] == "constexpr"
    return Parameter(given.name.removesuffix(_SUFFIX), CONSTANT if constant else "", None, False, constant)


def _definition(source: Source) -> ast.FunctionDef | None:
    """The last function that the text defines; None where it defines none."""
    try:
        tree = ast.parse(textwrap.dedent(source.text))
    except SyntaxError as error:
        raise SourceError(located(source, source.line + (error.lineno or 1) - 1, error.msg)) from error
    functions = [each for each in tree.body if isinstance(each, ast.FunctionDef)]
    return functions[-1] if functions else None


def _function(source: Source) -> Callable:
    """The function that a text defines, with `tl` and `triton` at hand."""
    text = "\n" * (source.line - 1) + textwrap.dedent(source.text)
    file = f"<triton {hashlib.sha256(f'{source.file}:{text}'.encode()).hexdigest()[:16]}>"
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)  # where Triton reads it again
    scope: dict[str, Any] = {"triton": load("triton", "triton"), "tl": load("triton.language", "triton")}
    scope["__name__"] = file
    try:
        exec(compile(text, file, "exec"), scope)
    except Exception as error:
        raise SourceError(located(source, line_in(file, error) or source.line, repr(error))) from error
    return scope[source.entry]
