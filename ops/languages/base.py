"""What every language of kernels has in common: source text, its parameters, how it is launched, the compiled program.

A language turns source text into a `Program`, which runs on NumPy arrays and numbers; `ops.swap` does all the rest.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ..errors import KernelError

Value = np.ndarray | int | float | bool


class SourceError(KernelError):
    """Source text that does not compile, or is not understood: the user's own file and line, and what is wrong."""


class LaunchError(KernelError):
    """A program that did wrong while it ran, and was stopped: out of bounds, a race, a crash, no end."""


@dataclass(frozen=True)
class Source:
    """Source text of a kernel: `entry` is the name of its function, `file` and `line` where the text begins."""

    text: str
    entry: str
    file: str
    line: int

    @property
    def located(self) -> str:
        """The text with a directive that has compilers speak of the user's own file and line."""
        file = self.file.replace("\\", "\\\\").replace('"', '\\"')
        return f'#line {self.line} "{file}"\n{self.text}'

    def complaint(self, offset: int, message: str) -> SourceError:
        """An error about what stands at `offset` of the text: file, line, the line itself and a caret below it."""
        start = self.text.rfind("\n", 0, offset) + 1
        line = self.text[start:].split("\n", 1)[0]
        number = self.line + self.text.count("\n", 0, offset)
        caret = "".join(c if c == "\t" else " " for c in line[: offset - start]) + "^"
        return SourceError(f"{self.file}:{number}: error: {message}\n    {line}\n    {caret}")

    def with_constants(self, values: Mapping[str, Any]) -> Source:
        """`{width}` and the like replaced by numbers; braces around anything else stay."""

        def number(match: re.Match[str]) -> str:
            return str(values[match[1]]) if match[1] in values else match[0]

        return replace(self, text=re.sub(r"\{([A-Za-z_]\w*)\}", number, self.text))

    def constants(self, known: Sequence[str]) -> set[str]:
        """Which of the `known` names the text has in braces."""
        return {*known} & {*re.findall(r"\{([A-Za-z_]\w*)\}", self.text)}


@dataclass(frozen=True)
class Parameter:
    """A parameter of a kernel. `type` is as written, without const and the like; `dtype` what Limpid calls it.

    `dtype` is None where the type means none of Limpid's. `pointer`: an array, else a number; `const`: read only.
    A language without types, as Python, leaves `type` empty: the parameter is what it is bound to.
    """

    name: str
    type: str
    dtype: str | None
    pointer: bool
    const: bool

    def __str__(self) -> str:
        return f"{'const ' * self.const}{self.type}{'*' * self.pointer} {self.name}".strip()


@dataclass(frozen=True)
class Launch:
    """How many blocks (`grid`), of how many threads (`block`), with how many bytes of dynamic shared memory."""

    grid: tuple[int, int, int] = (1, 1, 1)
    block: tuple[int, int, int] = (1, 1, 1)
    shared: int = 0


@dataclass(frozen=True)
class Options:
    """What a swap may ask of a language, beside the text. `device`: "emulate" on the CPU, or a device; None: any.

    `flags` are the compiler's; without `sandbox` a kernel is trusted at once.
    """

    device: str | None = None
    flags: tuple[str, ...] = ()
    sandbox: bool = True


class Program:
    """Compiled source. `run` computes; `emulated` says whether another machine than the kernel's own does, `device`
    which one, by the name that its driver gives it.

    `library`, where there is one, is a shared object with

        int limpid_launch(const uint32_t launch[7], void* const* values, const uint64_t* sizes)

    launch: grid x y z, block x y z, shared bytes. values: of an array its data, of a number where it is kept (in the
    parameter's type). sizes: of an array its bytes, of a number 0. It gives 0, or 1 and a text in `char
    limpid_error[4096]`. `checked` is the same with every access watched, which a sandbox runs until the kernel is
    trusted; where there is none it runs `library`. `note`: what a person should know of how it was compiled.
    """

    emulated = False
    note = ""
    parameters: tuple[Parameter, ...] = ()
    device = "cpu"
    library: Path | None = None

    @property
    def checked(self) -> Path | None:
        return None

    def run(self, values: Sequence[Value], launch: Launch) -> None:
        """Compute, on arrays in place and numbers, in the order of the parameters. Raises LaunchError."""
        raise NotImplementedError

    def sources(self) -> dict[str, str]:
        """What was made of the source, by the name of the language: "asm", "ptx", "sass"."""
        return {}


@dataclass
class Language:
    """A language that kernels are written in: a subclass each. `types` says which spellings mean which dtype."""

    name: ClassVar[str]
    types: ClassVar[dict[str, str]]  # spelling -> dtype
    needs_grid: ClassVar[bool] = True
    untrusted: ClassVar[bool] = True  # may take the process with it: runs in the sandbox until it is proven
    remote: ClassVar[bool] = False  # its programs are no shared objects: another Python compiles and runs them there

    options: Options = field(default_factory=Options)

    def parse(self, source: Source) -> tuple[Parameter, ...] | None:
        """The parameters of the function `source.entry`; None where the text holds none: it is only the body."""
        raise NotImplementedError

    def with_signature(self, source: Source, parameters: Sequence[Parameter]) -> Source:
        """A body with the signature around it that has these parameters; lines keep their numbers."""
        raise NotImplementedError

    def spelling(self, dtype: str) -> str:
        """The type that means `dtype`. Raises SourceError where the language has none."""
        for spelled, known in self.types.items():
            if known == dtype:
                return spelled
        raise SourceError(f"{self.name} has no {dtype}; it has {', '.join(dict.fromkeys(self.types.values()))}")

    def compile(self, source: Source, parameters: Sequence[Parameter]) -> Program:
        """The program. Raises SourceError with the user's file and line, or what is missing on this machine."""
        raise NotImplementedError
