"""C and C++: a function on pointers and numbers, by the machine's compiler.

A text sees `half` (`_Float16`, where the compiler has it) and `bfloat16` besides C's own types, the functions
`half_to_float`, `float_to_half`, `bfloat16_to_float` and `float_to_bfloat16`, and the headers of mathematics, integers,
memory and printing. `bfloat16` holds the bits and no arithmetic, so that none is done on bits by mistake; in C++ it
turns into a float, and back, by itself. `__bf16` means it where the compiler has no type of that name (GCC < 13).
What a kernel writes to `limpid_error`, a char[4096], becomes a LaunchError.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

from . import native, signature
from .base import Language, Parameter, Program, Source, SourceError

TYPES = {
    "float": "float32",
    "half": "float16",
    "_Float16": "float16",
    "bfloat16": "bfloat16",
    "__bf16": "bfloat16",
    "int": "int32",
    "int32_t": "int32",
    "int64_t": "int64",
    "long": "int64",
    "long long": "int64",
    "int8_t": "int8",
    "signed char": "int8",
    "uint8_t": "uint8",
    "unsigned char": "uint8",
}
DIALECT = signature.Dialect("C", TYPES, frozenset(native.NUMBERS))
# A library's names mean its own functions, whatever the process has by that name; elsewhere linkers see to it.
_OWN = ("-Wl,-Bsymbolic",) if sys.platform == "linux" else ()
_WHOLE = ("-Wl,-z,defs",) if sys.platform == "linux" else ()  # what is missing is told now, not when it is loaded
# DWARF 4: addr2line of binutils 2.40 takes the first file of DWARF 5 for another.
FLAGS = ("-O3", "-march=native", "-gdwarf-4", "-ftabstop=1", "-fvisibility=hidden", *_OWN)
# What a compiler may let pass in C, though it is never meant.
STRICT = ("implicit-function-declaration", "incompatible-pointer-types", "int-conversion", "implicit-int")
CHECKED = ("-O1", "-fsanitize=address", "-fno-omit-frame-pointer", "-fno-delete-null-pointer-checks")

_COMMON = r"""
#include <math.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#ifdef __cplusplus
extern "C" {
#endif
__attribute__((visibility("default"))) char limpid_error[4096];
#ifdef __cplusplus
}
#endif
static inline uint32_t limpid_bits(float value) { uint32_t bits; memcpy(&bits, &value, 4); return bits; }
static inline float limpid_widened(uint16_t half) {
  uint32_t bits = (uint32_t)half << 16; float value; memcpy(&value, &bits, 4); return value;
}
static inline uint16_t limpid_rounded(float value) {  /* to nearest, ties to even; a NaN stays one */
  uint32_t bits = limpid_bits(value);
  return (uint16_t)(value != value ? (bits >> 16) | 64 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
#ifdef __FLT16_MAX__
typedef _Float16 half;
static inline float half_to_float(half value) { return (float)value; }
static inline half float_to_half(float value) { return (half)value; }
#endif
"""
_BFLOAT16 = {
    "c": "typedef struct { uint16_t bits; } bfloat16;",
    "c++": """struct bfloat16 {
  uint16_t bits;
  bfloat16() = default;
  bfloat16(float value) : bits(limpid_rounded(value)) {}
  operator float() const { return limpid_widened(bits); }
};
#include <cmath>
#include <exception>
#define restrict __restrict""",
}
_CONVERSIONS = r"""
static inline float bfloat16_to_float(bfloat16 value) { return limpid_widened(value.bits); }
static inline bfloat16 float_to_bfloat16(float value) {
  bfloat16 result; result.bits = limpid_rounded(value); return result;
}
#if !defined(__BFLT16_MAX__) && !defined(__clang__)
#define __bf16 bfloat16
#endif
"""
_LAUNCH = {
    "c": """__attribute__((visibility("default")))
int limpid_launch(const uint32_t *launch, void *const *values, const uint64_t *sizes) {
  (void)launch, (void)values, (void)sizes;
  limpid_error[0] = 0;
  CALL;
  return limpid_error[0] != 0;
}
""",
    "c++": """extern "C" {
__attribute__((visibility("default")))
int limpid_launch(const uint32_t *launch, void *const *values, const uint64_t *sizes) {
  (void)launch, (void)values, (void)sizes;
  limpid_error[0] = 0;
  try {
    CALL;
  } catch (const std::exception &error) {
    snprintf(limpid_error, sizeof limpid_error, "ENTRY threw an exception: %s", error.what());
    return 1;
  } catch (...) {
    snprintf(limpid_error, sizeof limpid_error, "ENTRY threw an exception");
    return 1;
  }
  return limpid_error[0] != 0;
}
}
""",
}


class C(Language):
    """C11 with GNU extensions. `Options.flags` are the compiler's; `#pragma omp` in the text brings `-fopenmp`."""

    name: ClassVar[str] = "c"
    types: ClassVar[dict[str, str]] = TYPES
    needs_grid: ClassVar[bool] = False

    def parse(self, source: Source) -> tuple[Parameter, ...] | None:
        return signature.parse(source, DIALECT)

    def with_signature(self, source: Source, parameters: Sequence[Parameter]) -> Source:
        return signature.enclosed(source, parameters)

    def compile(self, source: Source, parameters: Sequence[Parameter]) -> Program:
        """The program; its checked twin is built beside it, and waited for only when it is asked for."""
        text = self.translated(source, parameters)
        flags = self._flags(source)
        beside = ThreadPoolExecutor(1, "limpid-c")
        checked = beside.submit(self._checked, text, flags)
        beside.shutdown(wait=False)  # its thread ends with its work
        try:
            library = native.build(text, self.name, (*flags, *_WHOLE))
        except SourceError as error:
            raise SourceError(complaints(str(error), source)) from None
        return CProgram(parameters, library, checked, text, self.name, flags)

    def translated(self, source: Source, parameters: Sequence[Parameter]) -> str:
        """The text as the compiler gets it: what it may use before it, `limpid_launch` after it."""
        values = ", ".join(_value(p, i) for i, p in enumerate(parameters))
        wrapper = _LAUNCH[self.name].replace("CALL", f"{source.entry}({values})").replace("ENTRY", source.entry)
        prelude = _COMMON + _BFLOAT16[self.name] + _CONVERSIONS
        return f'#line 1 "<generated>"\n{prelude}{source.located}\n#line 1 "<generated>"\n{wrapper}'

    def _flags(self, source: Source) -> tuple[str, ...]:
        parallel = bool(re.search(r"^[ \t]*#[ \t]*pragma[ \t]+omp\b", source.text, re.MULTILINE))
        strict = [f"-Werror={name}" for name in STRICT] if self.name == "c" else []
        return (*FLAGS, *strict, *["-fopenmp"] * parallel, *self.options.flags)

    def _checked(self, text: str, flags: Sequence[str]) -> Path | None:
        runtime = native.sanitizer(self.name)
        if runtime is None or runtime != native.sanitizer("c"):
            return None  # the sandbox has one sanitizer loaded
        shared = ["-shared-libasan"] if "clang" in runtime.name else []
        return native.build(text, self.name, (*flags, *CHECKED, *shared))


class CPlusPlus(C):
    """C++, of the compiler's own default standard; an exception that leaves the kernel becomes a LaunchError."""

    name: ClassVar[str] = "c++"


class CProgram(native.NativeProgram):
    """A program in C or C++."""

    def __init__(
        self,
        parameters: Sequence[Parameter],
        library: Path,
        checked: Future[Path | None],
        text: str,
        language: str,
        flags: Sequence[str],
    ):
        super().__init__(parameters, library, checked.result)
        self._made_of = (text, language, tuple(flags))

    def sources(self) -> dict[str, str]:
        return {"asm": native.assembly(*self._made_of)}


def _value(parameter: Parameter, index: int) -> str:
    """How `limpid_launch` hands on the value of a parameter."""
    if parameter.pointer:
        return f"({'const ' * parameter.const}{parameter.type} *)values[{index}]"
    return f"*(const {parameter.type} *)values[{index}]"


_SHOWN = 3  # errors; what follows is mostly their consequence
_COMPLAINT = re.compile(
    r"(?P<file>.+?):(?P<line>\d+):(?:(?P<column>\d+):)? (?P<kind>fatal error|error|note): (?P<what>.*)"
)
_ASKED = re.compile(r"(?P<file>.+?):(?P<line>\d+):(?:(?P<column>\d+):)?   required (?:from|by) .*")
_MISSING = re.compile(r"(?:\S*ld(?:\.\w+)?: )?(?P<file>/.+?):(?P<line>\d+): (?P<what>undefined reference to .*)")


def complaints(said: str, source: Source) -> str:
    """The errors among what a compiler said, each with its line of the source and a caret; GCC's and clang's form.

    Compilers quote the file, which a notebook's cell may not have, and which may have changed since.
    """
    shown, errors = [], 0
    used: re.Match[str] | None = None  # where the source asked for a template in which an error is
    for line in said.split("\n"):
        asked, match = _ASKED.fullmatch(line), _COMPLAINT.fullmatch(line)
        if asked and asked["file"] == source.file:
            used = asked
        if match is None or (match["kind"] == "note" and (not shown or "each undeclared" in match["what"])):
            continue
        errors += match["kind"] != "note"
        if errors > _SHOWN:
            shown.append("and more")
            break
        what = f"{match['kind'].removeprefix('fatal ')}: {match['what']}"
        at = used if used and match["kind"] != "note" and match["file"] != source.file else match
        shown.append(_placed(source, at["file"], int(at["line"]), int(at["column"] or 0), what))
        used = None
    for match in () if shown else map(_MISSING.fullmatch, said.split("\n")):
        if match is not None:  # the linker's
            own = match["file"].endswith(f"/{source.file.lstrip('/')}")  # the compiler made the path absolute
            file = source.file if own else match["file"]
            shown.append(_placed(source, file, int(match["line"]), 0, f"error: {match['what']}"))
    return "\n".join(dict.fromkeys(shown)) or said


def _placed(source: Source, file: str, number: int, column: int, what: str) -> str:
    """A complaint with the line that it is about, where that is the source's, and a caret below its column."""
    lines, at = source.text.split("\n"), number - source.line
    told = f"{file}:{number}: {what}"
    if file != source.file or not 0 <= at < len(lines):
        return told
    caret = re.sub(r"[^\t]", " ", lines[at][: column - 1]) + "^"
    return f"{told}\n    {lines[at]}" + (f"\n    {caret}" if column else "")
