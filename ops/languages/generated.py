"""Launches of kernels that TVM generates as WGSL or OpenCL C, on NumPy arrays, for TVM's own host code (`hosted`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import KernelError
from .base import Language, Launch, Parameter, Program, Source
from .opencl import OpenCL
from .wgsl import Wgsl

_LANGUAGES: dict[str, type[Language]] = {"wgsl": Wgsl, "opencl": OpenCL}
_PACKED = "packGridDimX"  # WGSL of TVM's: the last workgroup along x, of a grid that may be spread over z
_WORKGROUPS = 65535  # along an axis, that every device of WebGPU has


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
            source = Source(text, name, f"<{self._language.name} of {name}>", 1)
            parameters = self._language.parse(source)
            if parameters is None:
                raise KernelError(f"the generated source has no kernel {name}")
            self._programs[name, text] = parameters, self._language.compile(source, parameters)
        return self._programs[name, text]


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
