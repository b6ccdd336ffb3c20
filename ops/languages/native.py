"""Text of C and C++ to a shared object, by the machine's compiler, and a program that runs it in this process."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .. import store
from ..spec import DTYPES
from .base import Launch, LaunchError, Parameter, Program, SourceError, Value

_SECONDS = 120  # after which a compiler is given up
_COMPILERS = {"c": ("CC", ("cc", "gcc", "clang")), "c++": ("CXX", ("c++", "g++", "clang++"))}
_scratch: list[tempfile.TemporaryDirectory[str]] = []  # of what is built while the disk cache is off


def compiler(language: str) -> str:
    """The machine's compiler for "c" or "c++": `CC` or `CXX` of the environment, else the first that is there."""
    variable, known = _COMPILERS[language]
    for name in (os.environ.get(variable), *known):
        if name and (found := shutil.which(name)):
            return found
    raise SourceError(f"no compiler for {language}: install gcc and g++, or name one in {variable}")


@functools.cache
def _version(path: str) -> str:
    return subprocess.run([path, "--version"], capture_output=True, text=True, timeout=_SECONDS).stdout


def build(text: str, language: str, flags: Sequence[str] = (), files: Sequence[Path] = ()) -> Path:
    """A shared object of `text` and of other `files` (sources or objects), kept in the disk cache.

    Raises SourceError with what the compiler says; `#line` directives in the text decide of which file it speaks.
    """
    command = [compiler(language), *flags, "-shared", "-fPIC"]
    parts = [_version(command[0]), *command, text, *(path.read_bytes().hex() for path in files)]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
    with store.kernels.locked(key):
        found, _ = store.kernels.find(key)
        if found is not None:
            return found
        made: list[Path] = []

        def write(folder: Path) -> Path:
            made.append(_compile(text, language, command, files, folder))
            return made[0]

        store.kernels.put(key, f"{language} kernel", write)
        found, _ = store.kernels.find(key)
    if found is None:  # no disk cache: a folder that lives as long as the process
        _scratch.append(tempfile.TemporaryDirectory(prefix="limpid-"))
        found = _compile(text, language, command, files, Path(_scratch[-1].name))
    return found


def _compile(text: str, language: str, command: Sequence[str], files: Sequence[Path], folder: Path) -> Path:
    source = folder / ("kernel.c" if language == "c" else "kernel.cpp")
    library = folder / "kernel.so"
    source.write_text(text)
    whole = [*command, "-o", str(library), str(source), *map(str, files), "-lm"]
    try:
        done = subprocess.run(whole, capture_output=True, text=True, timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        raise SourceError(f"{command[0]} took more than {_SECONDS} s, and was stopped") from None
    if done.returncode:
        raise SourceError(done.stderr.strip().replace(str(source), "<generated>"))
    with contextlib.suppress(OSError):
        source.unlink()
    return library


class NativeProgram(Program):
    """A program in a shared object, run in this process; see `Program.library` for what it exports."""

    def __init__(self, parameters: Sequence[Parameter], library: Path, checked: Path | None, emulated: bool = False):
        self.parameters, self.library, self.checked, self.emulated = tuple(parameters), library, checked, emulated
        self._loaded: ctypes.CDLL | None = None

    def run(self, values: Sequence[Value], launch: Launch) -> None:
        if self._loaded is None:
            self._loaded = ctypes.CDLL(str(self.library))
        kept, pointers, sizes = marshalled(self.parameters, values)
        if self._loaded.limpid_launch(launched(launch), pointers, sizes):
            raise LaunchError(
                ctypes.string_at(ctypes.addressof(ctypes.c_char.in_dll(self._loaded, "limpid_error"))).decode()
            )
        del kept


def launched(launch: Launch) -> ctypes.Array:
    """The launch as `limpid_launch` takes it."""
    return (ctypes.c_uint32 * 7)(*launch.grid, *launch.block, launch.shared)


def marshalled(parameters: Sequence[Parameter], values: Sequence[Value]) -> tuple[list, ctypes.Array, ctypes.Array]:
    """What keeps the numbers alive, the pointers and the sizes that `limpid_launch` takes."""
    kept = [
        value if isinstance(value, np.ndarray) else number(p, value)
        for p, value in zip(parameters, values, strict=True)
    ]
    pointers = (ctypes.c_void_p * len(kept))(*[each.ctypes.data for each in kept])
    sizes = (ctypes.c_uint64 * len(kept))(
        *[each.nbytes if p.pointer else 0 for p, each in zip(parameters, kept, strict=True)]
    )
    return kept, pointers, sizes


_OTHER = {"bool": np.dtype("bool"), "double": np.dtype("float64")}  # numbers of types that no tensor has


def number(parameter: Parameter, value: Value) -> np.ndarray:
    """A number in memory, in the parameter's type."""
    dtype = _OTHER.get(parameter.type) or DTYPES.get(parameter.dtype or "")
    if dtype is None:
        raise SourceError(f"{parameter} is of a type that no number is passed in; use float, int or int64_t")
    return np.array([value], dtype)
