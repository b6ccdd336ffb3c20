"""Triton: the kernel is a Python function of `tl` code, run by Triton's interpreter on NumPy's memory, without torch.

    def kernel(x_ptr, out_ptr, width, eps, BLOCK: tl.constexpr): ...

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
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from .base import Language, Parameter, Program, Source, SourceError
from .shared import load, located

CONSTANT = "tl.constexpr"  # the type of a parameter that the kernel is compiled for
_SUFFIX = "_ptr"  # by which Triton's users tell arrays


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
        signature = inspect.signature(_plain(function))
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
    ) -> Program:
        """The program of a kernel that is given as a function. Its closure and globals are read now."""
        from .triton_program import TritonProgram

        load("triton", "triton")
        if self.options.flags or self.options.device not in (None, "emulate"):
            given = f"flags {self.options.flags} and device {self.options.device!r}"
            raise SourceError(f'{given}: Triton is interpreted here, without flags, and with no device but "emulate"')
        return TritonProgram(_plain(function), parameters, source or source_of(function))


def source_of(function: Callable) -> Source:
    """The text of a function and where it stands."""
    plain = _plain(function)
    try:
        lines, line = inspect.getsourcelines(plain)
    except OSError as error:
        raise SourceError(f"the source of {plain.__name__} is not to be had: {error}") from error
    return Source("".join(lines), plain.__name__, inspect.getsourcefile(plain) or "<unknown>", line)


def _plain(function: Callable) -> types.FunctionType:
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


def line_in(file: str, error: BaseException) -> int | None:
    """The innermost line of a file that an error, or what caused it, passed through."""
    line, each = None, error
    while each is not None:
        at, found = each.__traceback__, None
        while at is not None:
            found = at.tb_lineno if at.tb_frame.f_code.co_filename == file else found
            at = at.tb_next
        line, each = found or line, each.__cause__
    return line
