"""Text of C and C++ to a shared object, by the machine's compiler, and a program that runs it in this process."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from .. import store
from ..spec import DTYPES
from .base import Launch, LaunchError, Parameter, Program, SourceError, Value

FOLDER = "/.limpid"  # what stands in debug information for the folder that a kernel was compiled in
_SECONDS = 120  # after which a compiler is given up
_COMPILERS = {"c": ("CC", ("cc", "gcc", "clang")), "c++": ("CXX", ("c++", "g++", "clang++"))}
_UNSAFE = {"-ffast-math", "-Ofast", "-funsafe-math-optimizations"}
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


@functools.cache
def _processor() -> str:
    """What `-march=native` depends on: a cache may be shared by machines."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return line
    return platform.processor()


def build(text: str, language: str, flags: Sequence[str] = (), files: Sequence[Path] = ()) -> Path:
    """A shared object of `text` and of other `files` (sources or objects), kept in the disk cache.

    Raises SourceError with what the compiler says; `#line` directives in the text decide of which file it speaks.
    """
    command = [compiler(language), *flags, "-shared", "-fPIC"]
    parts = [_version(command[0]), _processor(), *command, text, *(path.read_bytes().hex() for path in files)]
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
    source.write_text(text)
    inputs, steps = [source, *files], []
    if not _UNSAFE.isdisjoint(command):
        # Linked with such a flag, a library would have the whole process round subnormal numbers to zero (GCC < 13).
        inputs = [folder / f"{index}.o" for index, _ in enumerate(inputs)]
        compiling = [flag for flag in command if flag != "-shared"]
        steps = [[*compiling, "-c", "-o", o, i] for o, i in zip(inputs, [source, *files], strict=True)]
        command = [flag for flag in command if flag not in _UNSAFE]
    library = folder / "kernel.so"
    here = f"-fdebug-prefix-map={folder}={FOLDER}"  # the library is kept, and used from other folders too
    for step in (*steps, [*command, "-o", library, *inputs, "-lm"]):
        _run([*map(_absolute, step), here], source)
    for path in {source, *inputs} - {*files}:
        with contextlib.suppress(OSError):
            path.unlink()
    return library


def _absolute(argument: str | Path) -> str:
    """A compiler's argument, said from the working folder, for one that works in another."""
    found = re.match(r"(-[IL])(?!/)(.+)", str(argument))
    return f"{found[1]}{os.path.abspath(found[2])}" if found else str(argument)


def _run(command: list[str], source: Path) -> str:
    """What a compiler prints; raises SourceError with its complaints."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, cwd=source.parent)
    except subprocess.TimeoutExpired:
        raise SourceError(f"{command[0]} took more than {_SECONDS} s, and was stopped") from None
    if done.returncode:
        raise SourceError(done.stderr.strip().replace(str(source), "<generated>"))
    return done.stdout


def assembly(text: str, language: str, flags: Sequence[str] = ()) -> str:
    """What the compiler makes of a text, in the machine's assembly."""
    with tempfile.TemporaryDirectory(prefix="limpid-") as folder:
        source = Path(folder) / ("kernel.c" if language == "c" else "kernel.cpp")
        source.write_text(text)
        return _run([compiler(language), *flags, "-fPIC", "-g0", "-S", "-o", "-", str(source)], source)


@functools.cache
def sanitizer(language: str) -> Path | None:
    """The run-time library of the compiler's AddressSanitizer, to be loaded before all others; None without one."""
    if sys.platform != "linux":
        return None
    names = ("libasan.so", f"libclang_rt.asan-{platform.machine()}.so", "libclang_rt.asan.so")
    return next(filter(None, (found(language, name) for name in names)), None)


@functools.cache
def found(language: str, name: str) -> Path | None:
    """A library that the compiler would link by this name; None where it has none."""
    command = [compiler(language), f"-print-file-name={name}"]
    path = Path(subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS).stdout.strip())
    return path.resolve() if path.is_absolute() and path.exists() else None


Checked = Path | Callable[[], Path | None] | None


class NativeProgram(Program):
    """A program in a shared object, run in this process; see `Program.library` for what it exports."""

    def __init__(self, parameters: Sequence[Parameter], library: Path, checked: Checked = None, emulated: bool = False):
        self.parameters, self.library, self.emulated = tuple(parameters), library, emulated
        self._checked = checked
        self._loaded: ctypes.CDLL | None = None

    @property
    def checked(self) -> Path | None:
        """The library with every access watched; what waits for its compiler is waited for when it is asked for."""
        if callable(self._checked):
            self._checked = self._checked()
        return self._checked

    def run(self, values: Sequence[Value], launch: Launch) -> None:
        kept, pointers, sizes = marshalled(self.parameters, values)
        self.run_at(launched(launch), pointers, sizes)
        del kept

    def run_at(self, launch: ctypes.Array, pointers: ctypes.Array, sizes: ctypes.Array) -> None:
        """`run`, of what `launched` and `marshalled` give: what is the same in many calls need not be made anew."""
        if self._loaded is None:
            self._loaded = ctypes.CDLL(str(self.library))
        if self._loaded.limpid_launch(launch, pointers, sizes):
            raise LaunchError(
                ctypes.string_at(ctypes.addressof(ctypes.c_char.in_dll(self._loaded, "limpid_error"))).decode()
            )


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


# Types that numbers have besides those of tensors.
NUMBERS: dict[str, np.dtype] = {
    "double": np.dtype("float64"),
    **dict.fromkeys(("bool", "_Bool"), np.dtype("bool")),
    **dict.fromkeys(("unsigned", "unsigned int", "uint32_t"), np.dtype("uint32")),
    **dict.fromkeys(("unsigned long", "unsigned long long", "uint64_t", "size_t"), np.dtype("uint64")),
}


def number(parameter: Parameter, value: Value) -> np.ndarray:
    """A number in memory, in the parameter's type. Raises SourceError when the type does not hold it."""
    dtype = NUMBERS.get(parameter.type) or DTYPES.get(parameter.dtype or "")
    if dtype is None:
        raise SourceError(f"{parameter} is of a type that no number is passed in; use float, int or int64_t")
    if dtype.kind in "iu" and not (isinstance(value, int | np.integer) and _holds(dtype, int(value))):
        raise SourceError(f"{parameter} was given {value}, which {parameter.type} does not hold")
    return np.array([value], dtype)


def _holds(dtype: np.dtype, value: int) -> bool:
    return np.iinfo(dtype).min <= value <= np.iinfo(dtype).max
