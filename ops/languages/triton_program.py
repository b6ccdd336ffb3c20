"""A Triton kernel on NumPy's memory, interpreted, every access watched; and what Triton's compiler makes of it."""

from __future__ import annotations

import functools
import inspect
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from .base import Launch, LaunchError, Parameter, Program, Source, SourceError, Value
from .shared import check_launch, load, located

CONSTANT = "tl.constexpr"  # the type of a parameter that the kernel is compiled for
_ACCESSES = ("create_masked_load", "create_masked_store", "create_atomic_cas", "create_atomic_rmw")
_lock = threading.Lock()  # the interpreter puts itself into triton.language while it runs
_POINTERS = {
    "float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "int64": "i64", "int32": "i32", "int8": "i8",
    "uint8": "u8",
}  # fmt: skip


class _Memory:
    """An array as the interpreter wants it: as little of a torch tensor as it asks for."""

    def __init__(self, array: np.ndarray):
        self.array, self.dtype = array, array.dtype.name

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def untyped_storage(self) -> _Memory:
        return self

    def cpu(self) -> _Memory:
        return self

    def new_empty(self, size: int, device: str) -> _Memory:
        return _Memory(self.array)

    def set_(self, storage: _Memory, offset: int, size: tuple, stride: tuple) -> None:
        self.array = storage.array

    def storage_offset(self) -> int:
        return 0

    def size(self) -> tuple[int, ...]:
        return self.array.shape

    def stride(self) -> tuple[int, ...]:
        return tuple(each // self.array.itemsize for each in self.array.strides)

    def copy_(self, other: _Memory) -> None:
        """Nothing to do: the kernel ran on the array itself."""


class TritonProgram(Program):
    """A Triton kernel. It runs interpreted; `ptx()` and `sources()` compile it, for the types of the last run."""

    emulated = True

    def __init__(self, function: types.FunctionType, parameters: Sequence[Parameter], source: Source):
        self.function, self.parameters, self.source = function, tuple(parameters), source
        self.device = "interpreted"
        self._names = tuple(inspect.signature(function).parameters)
        self._ran: tuple[dict[str, str], dict[str, Any]] | None = None
        self._compiles: set[tuple[str, ...]] = set()  # for arguments of which types
        self._interpreted = _interpreted(function)

    def run(self, values: Sequence[Value], launch: Launch) -> None:
        check_launch(launch, "Triton has none of it to declare")
        if launch.block != (1, 1, 1):
            raise LaunchError(f"block {launch.block}: Triton has no threads, only programs; leave block out")
        if len(values) != len(self._names):
            raise LaunchError(f"{len(values)} values for {len(self._names)} parameters: {', '.join(self._names)}")
        arrays: dict[str, np.ndarray] = {}
        given: dict[str, Any] = {}
        for name, parameter, value in zip(self._names, self.parameters, values, strict=True):
            if isinstance(value, np.ndarray):
                arrays[parameter.name] = _checked(parameter, value)
                given[name] = _Memory(value)
            else:
                given[name] = value.item() if isinstance(value, np.generic) else value
        self._ran = self._typed(given)
        if 0 in launch.grid:
            return
        with _lock, _interpreting(), _watched(arrays):
            try:
                self._interpreted[launch.grid](**given)
            except Exception as error:
                raise LaunchError(self._told(error)) from error

    @property
    def ran(self) -> bool:
        return self._ran is not None

    def check(self) -> None:
        """Compile for the types of the last run, unless that was done. Raises SourceError."""
        if self._ran is None or (types := tuple(self._ran[0].values())) in self._compiles:
            return
        self.compiled(*self._ran)
        self._compiles.add(types)

    def _told(self, error: BaseException) -> str:
        """The first cause, on the innermost line of the user's file."""
        line = line_in(self.function.__code__.co_filename, error) or self.source.line
        while error.__cause__ is not None:
            error = error.__cause__
        return located(self.source, line, str(error) if isinstance(error, LaunchError) else repr(error))

    def _typed(self, given: dict[str, Any]) -> tuple[dict[str, str], dict[str, Any]]:
        """The types that Triton's compiler asks for, and the constants."""
        signature, constants = {}, {}
        for name, parameter in zip(self._names, self.parameters, strict=True):
            value = given[name]
            if parameter.type == CONSTANT:
                signature[name], constants[name] = "constexpr", value
            elif isinstance(value, _Memory):
                signature[name] = f"*{_POINTERS[value.dtype]}"
            else:
                signature[name] = _number_type(value)
        return signature, constants

    def sources(self) -> dict[str, str]:
        """Triton's stages: "ttir", "ttgir", "llir", "ptx" for sm_90, for the types and constants of the last run.

        Raises SourceError with the user's line where Triton's compiler takes not what its interpreter took.
        """
        if self._ran is None:
            raise SourceError(f"{self.source.entry} is compiled for types and constants: run it once before")
        compiled = self.compiled(*self._ran)
        return {name: text for name, text in compiled.asm.items() if isinstance(text, str) and name != "source"}

    def compiled(self, signature: dict[str, str], constants: dict[str, Any], capability: int = 90) -> Any:
        """What triton.compile gives for an NVIDIA GPU; none is needed. Raises SourceError."""
        triton = load("triton", "triton")
        jit = triton.runtime.jit.JITFunction(self.function)
        source = load("triton.compiler", "triton").ASTSource(fn=jit, signature=signature, constexprs=constants)
        target = load("triton.backends.compiler", "triton").GPUTarget("cuda", capability, 32)
        try:
            return triton.compile(source, target=target, options={"enable_fp_fusion": True})
        except triton.CompilationError as error:
            raise SourceError(self._refused(jit, error)) from error

    def _refused(self, jit: Any, error: Any) -> str:
        """What the compiler says, on the line of the function that it says it of: the kernel, or one that it calls."""
        named = _names(self.function)
        texts = {each.src: each for each in named.values() if isinstance(each, type(jit))} | {jit.src: jit}
        while getattr(error.__cause__, "src", None) in texts:
            error = error.__cause__
        line = texts.get(error.src, jit).def_file_line_number + getattr(error.node, "lineno", 1) - 1
        return located(self.source, line, error.error_message or str(error.__cause__ or error).strip())


def _number_type(value: Any) -> str:
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return "fp32"


def _checked(parameter: Parameter, array: np.ndarray) -> np.ndarray:
    if array.dtype.name not in _POINTERS:
        raise LaunchError(f"{parameter.name} is {array.dtype.name}; triton has {', '.join(_POINTERS)}")
    if not array.flags.c_contiguous:
        raise LaunchError(f"{parameter.name} takes a contiguous array, got strides {array.strides}")
    return array


@functools.cache
def _interpreted(function: types.FunctionType) -> Any:
    """The function for the interpreter: on a copy of its globals, since the interpreter adds names of its own to them.

    What it closes over is put among them, and all of Triton's language that the interpreter is to take back afterwards.
    """
    language = load("triton.language", "triton")
    scope = _names(function)
    scope |= {"tl": scope.get("tl", language), "_language": language, "_core": language.core}
    copied = types.FunctionType(
        function.__code__, scope, function.__name__, function.__defaults__, function.__closure__
    )
    copied.__kwdefaults__, copied.__annotations__ = function.__kwdefaults__, function.__annotations__
    return load("triton.runtime.interpreter", "triton").InterpretedFunction(copied)


def _names(function: types.FunctionType) -> dict[str, Any]:
    """What the names in a function mean: its globals and what it closes over."""
    return {**function.__globals__, **inspect.getclosurevars(function).nonlocals}


@contextmanager
def _interpreting() -> Iterator[None]:
    """In the `with`, a call of a function of Triton's, such as tl.sum, is interpreted."""
    jit = load("triton.runtime.jit", "triton").JITFunction
    compiled = jit.__call__

    def interpreted(self: Any, *args: Any, **more: Any) -> Any:
        return _interpreted(self.fn)(*args, **more)

    jit.__call__ = interpreted
    try:
        yield
    finally:
        jit.__call__ = compiled


@contextmanager
def _watched(arrays: dict[str, np.ndarray]) -> Iterator[None]:
    """In the `with`, an access of the interpreter's outside `arrays` raises LaunchError, as does a forbidden write."""
    builder = load("triton.runtime.interpreter", "triton").interpreter_builder

    def watched(access: str) -> Callable:
        method = getattr(type(builder), access)
        names = list(inspect.signature(method).parameters)[1:]

        def checked(*args: Any, **more: Any) -> Any:
            bound = dict(zip(names, args, strict=False)) | more
            pointers = bound["ptrs" if "ptrs" in bound else "ptr"]
            mask = bound["mask"].data if bound.get("mask") is not None else True
            size = pointers.get_element_ty().primitive_bitwidth // 8
            _check(arrays, np.broadcast_arrays(pointers.data, mask), size, access != "create_masked_load")
            return method(builder, *args, **more)

        return checked

    try:
        for access in _ACCESSES:
            setattr(builder, access, watched(access))
        yield
    finally:
        for access in _ACCESSES:
            vars(builder).pop(access, None)


def _check(arrays: dict[str, np.ndarray], access: Sequence[np.ndarray], size: int, writes: bool) -> None:
    addresses = access[0][access[1].astype(bool)].astype(np.uint64).view(np.int64)
    left = addresses
    for name, array in arrays.items():
        start = array.ctypes.data
        inside = (left >= start) & (left + size <= start + array.nbytes)
        if writes and not array.flags.writeable and inside.any():
            raise LaunchError(f"writes {name}, which is read only")
        left = left[~inside]
    if not left.size:
        return
    address = int(left[0])
    beyond = {name: max(a.ctypes.data - address, address - a.ctypes.data - a.nbytes) for name, a in arrays.items()}
    if not beyond:
        raise LaunchError("an access to memory, and the kernel was given no array")
    name = min(beyond, key=beyond.__getitem__)
    array = arrays[name]
    index = (address - array.ctypes.data) // array.itemsize
    raise LaunchError(f"{'writes' if writes else 'reads'} {name}[{index}], of {array.size} elements")


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
