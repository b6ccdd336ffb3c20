"""Kernels for a GPU run on the CPU: their source compiled as C++ against headers that know threads, blocks and warps.

A language adds a header in its own words over `simt.h` (`cuda.h`, say), and asks `program` for the rest. The checked
library of a program has every access to memory watched (`watch.cpp`): for its bounds, and for races.
"""

from __future__ import annotations

import functools
import hashlib
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from ...spec import DTYPES
from .. import native
from ..base import Launch, LaunchError, Parameter, Source, SourceError, Value
from ..c import complaints

FOLDER = Path(__file__).parent
_FLAGS = (
    "-std=c++17",
    "-fwrapv",
    "-fno-exceptions",
    "-fno-rtti",
    "-nostdinc++",
    "-fvisibility=hidden",
    "-ftabstop=1",
    "-Werror=frame-larger-than=65536",  # a thread's stack has 128 KiB
    f"-I{FOLDER}",
    f"-I{FOLDER / 'include'}",
)
_FAST = ("-O2",)
# The instrumentation alone: watch.cpp has the functions that it calls, so the sanitizers' libraries stay out.
_WATCHED = ("-O1", "-g", "-gdwarf-4", "-fsanitize=thread,bounds,alignment", "-fno-if-conversion", "-fno-if-conversion2")
_UNLINKED = ("-nodefaultlibs", "-Wl,--no-as-needed", "-lc")
compiling = ThreadPoolExecutor(4, "limpid-emulator")
_running = threading.Lock()  # a library keeps one launch's state in static memory


class EmulatedProgram(native.NativeProgram):
    """A program whose threads are fibers of one thread of the CPU; blocks run one after another."""

    def __init__(
        self,
        parameters: Sequence[Parameter],
        library: Path,
        checked: Callable[[], Path | None],
        text: str,
        options: Sequence[str] = (),
    ):
        super().__init__(parameters, library, checked, emulated=True)
        self.text, self.options = text, tuple(options)

    def run(self, values: Sequence[Value], launch: Launch) -> None:
        check_dtypes(self.parameters, values)
        with _running:
            super().run(values, launch)

    def watched(self) -> EmulatedProgram:
        """The same program with every access watched: many times slower, and it says what is wrong, and where."""
        checked = self.checked
        assert checked is not None
        return EmulatedProgram(self.parameters, checked, lambda: checked, self.text, self.options)

    def sources(self) -> dict[str, str]:
        return {"asm": native.assembly(self.text, "c++", (*_FLAGS, *_FAST, *self.options))}


def check_dtypes(parameters: Sequence[Parameter], values: Sequence[Value]) -> None:
    """Raises LaunchError for an array of another dtype than its parameter's, whose bytes would be misread."""
    for parameter, value in zip(parameters, values, strict=True):
        if parameter.pointer and parameter.dtype is None:
            continue  # of a type that no tensor has: the language knows what it is given
        given = value.dtype if isinstance(value, np.ndarray) else None
        wanted = DTYPES.get(parameter.dtype or "") if parameter.pointer else None
        if given != wanted:
            what = f"an array of {given}" if given is not None else "a number"
            raise LaunchError(
                f"{parameter} was given {what}, expected {f'an array of {wanted}' if wanted else 'a number'}"
            )


def program(
    header: str,
    source: Source,
    parameters: Sequence[Parameter],
    call: str | None = None,
    shared_limit: int = 48 << 10,
    whole_limit: int = 227 << 10,
    barrier: str = "__syncthreads()",
    words: Mapping[str, str] | None = None,
    options: Sequence[str] = (),
) -> EmulatedProgram:
    """The program of a text in the words of `header`, a file of this folder.

    `call` is the C++ statement that calls the kernel for the running thread, with `void* const* values`: of an array
    its data, of a number where it is kept; by default the kernel gets the parameters. `shared_limit`: bytes of shared
    memory that a block may declare, `whole_limit`: that it may have, with those of the launch.
    `words`: what the language calls what messages call "block", "warp" and the like;
    the first that fits is taken. `options` are the compiler's. Raises SourceError with the user's own file and line.
    """
    called = call or _call(source.entry, parameters)
    text = _translated(header, source, parameters, called, (shared_limit, whole_limit), barrier, words or {})
    flags = (*_FLAGS, *_WATCHED, *_UNLINKED, *options)
    checked: Future[Path] = compiling.submit(lambda: native.build(text, "c++", flags, [_runtime(True)]))
    try:
        library = native.build(text, "c++", (*_FLAGS, *_FAST, *options), [_runtime(False)])
    except SourceError as error:
        raise SourceError(complaints(str(error), source)) from None
    return EmulatedProgram(parameters, library, checked.result, text, options)


def _runtime(watched: bool) -> Path:
    """The object with fibers and launch, made once. Its name ends in .so, as all names in the cache of kernels do."""
    files = ("runtime.cpp", "messages.cpp", *(("watch.cpp", "places.cpp") if watched else ()))
    text = "#define SIMT_WATCHED\n" * watched + "".join(f'#include "{file}"\n' for file in files)
    return native.build(f"// {_digest()}\n{text}", "c++", (*_FLAGS, "-O2", "-c"))


@functools.cache
def _digest() -> str:
    """Of all files here that a compiler reads: what is in the cache was made of the same."""
    files = sorted(path for path in FOLDER.rglob("*") if path.is_file() and path.suffix in (".h", ".cpp", ""))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def _translated(
    header: str,
    source: Source,
    parameters: Sequence[Parameter],
    call: str,
    limits: tuple[int, int],
    barrier: str,
    words: Mapping[str, str],
) -> str:
    """The text as the compiler gets it. In a namespace without a name all of it is the text's own.

    Else the shared arrays of inline functions would not be where those of the others are.
    """
    table = ", ".join(f'{{"{p.name}", {_element(p)}, {str(not p.const).lower()}}}' for p in parameters)
    said = "".join(f'"{each}", ' for pair in words.items() for each in pair)
    return f"""// {_digest()}
#include "{header}"
namespace {{
SIMT_ALSO
{source.located}
}}
#line 1 "<generated>"
static const simt::Parameter limpid_parameters[] = {{{table}{", " * bool(table)}{{}}}};
static void limpid_entry(void* const* values) {{
  (void)values;
  {call}
}}
extern "C" __attribute__((visibility("default")))
int limpid_launch(const uint32_t* launch, void* const* values, const uint64_t* sizes) {{
  static const char* const words[] = {{{said}nullptr}};
  static const simt::Kernel limpid_kernel = {{
      "{source.entry}", limpid_entry, limpid_parameters, {len(parameters)},
      {limits[0]}, {limits[1]}, "{barrier}", words}};
  return simt::launch(launch, values, sizes, limpid_kernel);
}}
"""


def _element(parameter: Parameter) -> int:
    """Bytes of an element of an array; 0 of a number."""
    return DTYPES[parameter.dtype].itemsize if parameter.pointer and parameter.dtype else 0


def _call(entry: str, parameters: Sequence[Parameter]) -> str:
    def value(index: int, p: Parameter) -> str:
        if p.pointer:
            return f"static_cast<{'const ' * p.const}{p.type}*>(values[{index}])"
        return f"*static_cast<const {p.type}*>(values[{index}])"

    return f"{entry}({', '.join(value(i, p) for i, p in enumerate(parameters))});"
