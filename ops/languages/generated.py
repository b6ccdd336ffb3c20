"""Kernels that TVM generates as WGSL or OpenCL C, run on NumPy arrays: the source of every op can be put to the test.

TVM splits a scheduled function into kernels and a host part, which says what each is given and how it is launched. The
host part is a few statements on sizes, and is carried out here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from tvm import tirx
from tvm.ir.instrument import pass_instrument

from ..errors import KernelError
from ..spec import DTYPES
from .base import Language, Launch, LaunchError, Parameter, Program, Source, SourceError
from .opencl import OpenCL
from .wgsl import Wgsl

TARGETS = {"wgsl": {"kind": "webgpu"}, "opencl": {"kind": "opencl"}}  # of TVM, by the name of the language
_LANGUAGES: dict[str, type[Language]] = {"wgsl": Wgsl, "opencl": OpenCL}
_PACKED = "packGridDimX"  # WGSL of TVM's: the last workgroup along x, of a grid that may be spread over z
_WORKGROUPS = 65535  # along an axis, that every device of WebGPU has
_POISON = 0xFF  # bytes of a NaN


class Launches:
    """Launches generated kernels by their text, in "wgsl" or "opencl", as `hosted` asks for it; programs are kept."""

    def __init__(self, language: str):
        self._language = _LANGUAGES[language]()
        self._programs: dict[tuple[str, str], tuple[tuple[Parameter, ...], Program]] = {}

    def __call__(self, name: str, args: Sequence[Any], grid: Sequence[int], block: Sequence[int], text: str) -> None:
        """Launch the function `name` of a text on arrays and numbers. Raises SourceError or LaunchError."""
        parameters, program = self.program(name, text)
        packed = {_PACKED: grid[0] - 1}
        if any(each.name == _PACKED for each in parameters):
            grid = _spread(*grid)
        own = [each for each in parameters if each.name not in packed]
        given = {each.name: _value(each, value) for each, value in zip(own, args, strict=True)} | packed
        program.run([given[each.name] for each in parameters], Launch(_three(grid), _three(block)))

    def program(self, name: str, text: str) -> tuple[tuple[Parameter, ...], Program]:
        """A kernel's parameters and its compiled program."""
        if (name, text) not in self._programs:
            right = mended(text) if self._language.name == "wgsl" else text
            source = Source(right, name, f"<{self._language.name} of {name}>", 1)
            parameters = self._language.parse(source)
            if parameters is None:
                raise KernelError(f"the generated source has no kernel {name}")
            self._programs[name, text] = parameters, self._language.compile(source, parameters)
        return self._programs[name, text]


def mended(text: str) -> str:
    """WGSL as TVM writes it, less what WGSL has not: the least int32 as a literal (its sign is an operator), `inff`."""
    text = text.replace("-2147483648i", "(-2147483647i - 1i)")
    infinite = re.sub(r"\binff\b", "infinity_()", text)
    if infinite == text:
        return text
    # No constant may be infinite, so it is made when the kernel runs.
    return infinite.rstrip() + "\n\nfn infinity_() -> f32 { var bits = 0x7f800000u; return bitcast<f32>(bits); }\n"


def launcher(lowered: Any) -> Launches:
    """What launches the functions of a kernel that was lowered for a GPU (`cross.Lowered`), for `hosted`."""
    return Launches(lowered.gpu.language)


def _value(parameter: Parameter, value: Any) -> Any:
    if parameter.pointer and not (parameter.const or value.flags.writeable):
        return value.copy()  # OpenCL of TVM's says of no array that it is only read
    return value


def _three(sizes: Sequence[int]) -> tuple[int, int, int]:
    x, y, z = sizes
    return x, y, z


def _spread(x: int, y: int, z: int) -> tuple[int, int, int]:
    """A grid whose x is too long, spread over z, as TVM's kernels take it."""
    while x > _WORKGROUPS:
        x, z = -(-x // 2), z * 2
    return x, y, z


@dataclass
class Generated:
    """Kernels of one function. `language` is "wgsl" or "opencl", `source` their text, `host` TVM's function that
    launches them, as TVM's pass SplitHostDevice leaves it: a body of `call_ffi_kernel` over the function's parameters.
    """

    language: str
    source: str
    host: Any

    def __post_init__(self) -> None:
        self.launch = Launches(self.language)

    def run(self, *values: np.ndarray | int | float) -> None:
        """Compute, on arrays in place: the inputs, then the outputs. Raises LaunchError, SourceError or KernelError."""
        host = _Host(self, values)
        for statement in _statements(self.host.body):
            host.carry_out(statement)

    def text(self, name: str) -> str:
        """The text of one kernel: in WGSL each is a text of its own, and their bindings have the same places."""
        if self.language != "wgsl":
            return self.source
        parts = re.split(r"^// Function: (\w+)\n(?=//-+$)", self.source, flags=re.MULTILINE)
        return dict(zip(parts[1::2], parts[2::2], strict=True)).get(name, self.source)


def generate(function: Any, language: str, target: Any = None) -> Generated:
    """The kernels of a scheduled PrimFunc, its loops bound to blockIdx and threadIdx, in "wgsl" or "opencl".

    Raises SourceError where TVM generates none: of a dtype that the language lacks, or an unbound loop.
    """
    known = {*_LANGUAGES[language].types.values()}
    for parameter in function.params:
        dtype = str(parameter.dtype) if hasattr(parameter, "shape") else ""
        if dtype in DTYPES and dtype not in known:
            raise SourceError(f"{language} has no {dtype}, of {parameter.name}; it has {', '.join(sorted(known))}")
    hosts: list[Any] = []

    @pass_instrument
    class Split:
        def run_after_pass(self, mod: Any, info: Any) -> None:
            if info.name == "tirx.SplitHostDevice":
                hosts.extend(each for each in mod.functions.values() if "tirx.is_entry_func" in (each.attrs or {}))

    whole = tvm.target.Target(target or TARGETS[language], host="llvm")
    name = function.attrs["global_symbol"]
    try:
        with tvm.transform.PassContext(instruments=[Split()]):
            compiled = tvm.compile(tvm.IRModule({name: function}), target=whole)
    except Exception as error:
        raise SourceError(f"TVM generates no {language} for {name}: {str(error).strip().splitlines()[-1]}") from error
    if len(hosts) != 1 or not compiled.mod.imports:
        raise SourceError(f"{name} has no loop that is bound to blockIdx or threadIdx")
    if strange := {type(each).__name__ for each in _statements(hosts[0].body)} - _CARRIED_OUT:
        raise SourceError(
            f"{name} has a loop that is not bound to blockIdx or threadIdx: {', '.join(strange)} on the host"
        )
    return Generated(language, compiled.mod.imports[0].inspect_source(), hosts[0])


_CARRIED_OUT = {"Bind", "AllocBuffer", "DeclBuffer", "Evaluate"}


def _statements(body: Any) -> list[Any]:
    """The statements of a host part, in order."""
    if type(body).__name__ != "SeqStmt":
        return [body]
    return [each for part in body.seq for each in _statements(part)]


class _Host:
    """The host part of one call: sizes by variables, arrays by buffers."""

    def __init__(self, generated: Generated, values: Sequence[Any]):
        self.generated = generated
        self.analyzer = tvm.sym.Analyzer()  # knows the sizes
        self.known: set[Any] = set()
        self.arrays: dict[Any, np.ndarray] = {}
        parameters = generated.host.params
        if len(values) != len(parameters):
            raise LaunchError(f"{len(values)} values for {', '.join(each.name for each in parameters)}")
        for parameter, value in zip(parameters, values, strict=True):
            if isinstance(value, np.ndarray):
                self._bind(parameter, value)
            else:
                self._know(parameter, value)

    def _bind(self, parameter: Any, array: np.ndarray) -> None:
        """An array to a buffer: sizes that are open are the array's, others must be."""
        shape = tuple(parameter.shape)
        said = f"{parameter.name} is {parameter.dtype}{list(shape)}, got {array.dtype}{list(array.shape)}"
        if len(shape) != array.ndim or str(parameter.dtype) != array.dtype.name:
            raise LaunchError(said)
        for size, given in zip(shape, array.shape, strict=True):
            if isinstance(size, tirx.Var):
                self._know(size, given)
            if (known := self.number(size)) != given:
                raise LaunchError(f"{said}, where {size} is {known}" if isinstance(size, tirx.Var) else said)
        self.arrays[parameter] = array

    def _know(self, variable: Any, value: int | float) -> None:
        if variable not in self.known:
            self.known.add(variable)
            self.analyzer.bind(variable, tirx.const(value, str(variable.ty.dtype)))

    def number(self, expression: Any) -> int | float:
        """What an expression on sizes comes to."""
        found = self.analyzer.simplify(expression)
        if not isinstance(found, (tirx.IntImm, tirx.FloatImm)):
            raise KernelError(f"the host part asks for {expression}, which is no number")
        return found.value

    def carry_out(self, statement: Any) -> None:
        match type(statement).__name__:
            case "Bind":
                self._know(statement.var, self.number(statement.value))
            case "AllocBuffer":
                shape = [int(self.number(each)) for each in statement.buffer.shape]
                dtype = DTYPES[str(statement.buffer.dtype)]
                room = np.full(math.prod(shape) * dtype.itemsize, _POISON, "uint8")
                self.arrays[statement.buffer] = room.view(dtype).reshape(shape)
            case "DeclBuffer":
                self.arrays[statement.buffer] = self._array(statement.data)
            case "Evaluate" if getattr(statement.value, "op", None) == _LAUNCH:
                self._launch(statement.value)
            case _:
                raise KernelError(f"the host part has a statement that is not carried out here: {statement}")

    def _array(self, data: Any) -> np.ndarray:
        """The array behind `buffer.data`."""
        return self.arrays[data.args[0] if hasattr(data, "args") else data]

    def _launch(self, call: Any) -> None:
        tags = tuple(str(each) for each in call.attrs.launch_params)
        name, arguments = str(call.args[0].value), call.args[1 : len(call.args) - len(tags)]
        sizes = {tag: int(self.number(each)) for tag, each in zip(tags, call.args[-len(tags) :], strict=True)}
        grid, block = ([sizes.get(f"{of}.{axis}", 1) for axis in "xyz"] for of in ("blockIdx", "threadIdx"))
        given = [self.number(each) if _is_number(each) else self._array(each) for each in arguments]
        self.generated.launch(name, given, grid, block, self.generated.text(name))


def _is_number(argument: Any) -> bool:
    return getattr(getattr(argument, "op", None), "name", "") != "tirx.buffer_data"


_LAUNCH = tvm.ir.Op.get("tirx.call_ffi_kernel")
