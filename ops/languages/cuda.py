"""CUDA C++: compiled by NVRTC for a real architecture where its wheels are installed, run on a GPU where there is one.

Without a GPU, or with `device="emulate"`, the same text runs on the CPU (`ops.languages.emulator`). A text sees half,
bfloat16 and the integers of fixed size without including anything.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from . import cuda_driver, emulator, native, nvrtc, signature
from .base import Language, Parameter, Program, Source, SourceError

TYPES = {
    "float": "float32",
    "half": "float16",
    "__half": "float16",
    "__nv_bfloat16": "bfloat16",
    "nv_bfloat16": "bfloat16",
    "int": "int32",
    "int32_t": "int32",
    "int64_t": "int64",
    "long long": "int64",
    "long": "int64",
    "int8_t": "int8",
    "signed char": "int8",
    "char": "int8",
    "uint8_t": "uint8",
    "unsigned char": "uint8",
}
VECTORS = {  # several elements at a time; an array only
    **dict.fromkeys(("float2", "float3", "float4"), "float32"),
    **dict.fromkeys(("half2", "__half2"), "float16"),
    **dict.fromkeys(("__nv_bfloat162", "nv_bfloat162"), "bfloat16"),
    **dict.fromkeys(("int2", "int4"), "int32"),
    **dict.fromkeys(("char4",), "int8"),
    **dict.fromkeys(("uchar4",), "uint8"),
}
DIALECT = signature.Dialect(
    "CUDA",
    TYPES | VECTORS,
    frozenset(native.NUMBERS),
    signature.Dialect("", {}).qualifiers | {"__grid_constant__"},
    kernel="__global__",
)
ARCHITECTURE = "sm_90"  # what is compiled for where no GPU and no flag says otherwise
_ARCHITECTURE = re.compile(r"--?(?:gpu-architecture|arch)=(\w+)")


class Cuda(Language):
    """CUDA C++. `Options.flags` go to NVRTC: `--gpu-architecture=sm_80`, `--use_fast_math`.

    `Options.device`: "emulate" for the CPU, "cuda" for a GPU or an error; else a GPU where there is one.
    """

    name: ClassVar[str] = "cuda"
    types: ClassVar[dict[str, str]] = TYPES

    def parse(self, source: Source) -> tuple[Parameter, ...] | None:
        parameters = signature.parse(source, DIALECT)
        for each in parameters or ():
            if each.type in VECTORS and not each.pointer:
                raise source.complaint(source.text.find(each.type), f"{each}: a number has one element; pass a float")
        return parameters

    def with_signature(self, source: Source, parameters: Sequence[Parameter]) -> Source:
        return signature.enclosed(source, parameters, 'extern "C" __global__ ')

    def compile(self, source: Source, parameters: Sequence[Parameter]) -> Program:
        device = None if self.options.device == "emulate" else cuda_driver.device()
        if device is None and self.options.device not in (None, "emulate"):
            raise SourceError(f'device={self.options.device!r}: {cuda_driver.absent()}; "emulate" runs on the CPU')
        arch = next((m[1] for m in map(_ARCHITECTURE.match, self.options.flags) if m), None)
        if device is not None:
            compiled = self._compiled(source, arch or device.architecture)
            return cuda_driver.CudaProgram(parameters, compiled, source.entry, device)
        arch = arch or ARCHITECTURE
        compiling = emulator.compiling.submit(self._compiled, source, arch)  # beside the emulator's compiler
        made = failed = None
        try:
            made = emulated(source, parameters, self.options.flags)
        except SourceError as error:
            failed = error
        try:
            compiled, note = compiling.result(), f"emulated on the CPU; NVRTC compiles it for {arch}"
        except nvrtc.Missing as error:
            compiled, note = None, f"emulated on the CPU; no CUDA compiler has seen it: {error}"
        if made is None:
            at = "" if compiled is None else "this compiles for a GPU, but the emulator cannot run it:\n"
            raise SourceError(f"{at}{failed}")
        return EmulatedCuda(made, compiled, note)

    def _compiled(self, source: Source, arch: str) -> nvrtc.Compiled:
        options = [flag for flag in self.options.flags if not _ARCHITECTURE.match(flag)]
        try:
            return nvrtc.compile(prelude(source.text) + exported(source).located, arch, options)
        except SourceError as error:
            raise SourceError(told(str(error), source)) from None


class EmulatedCuda(emulator.EmulatedProgram):
    """CUDA on the CPU. `compiled` is what NVRTC made of the same text, None where NVRTC is missing."""

    def __init__(self, made: emulator.EmulatedProgram, compiled: nvrtc.Compiled | None, note: str):
        library: Path = made.library or Path()
        super().__init__(made.parameters, library, lambda: made.checked, made.text)
        self.compiled, self.note = compiled, note

    def sources(self) -> dict[str, str]:
        return cuda_driver.listings(self.compiled) if self.compiled else {}


def emulated(source: Source, parameters: Sequence[Parameter], flags: Sequence[str] = ()) -> emulator.EmulatedProgram:
    """A text as a program of the CPU, whether or not NVRTC compiles it. Of NVRTC's flags, macros are heard."""
    macros = [flag for flag in flags if flag.startswith(("-D", "-U"))]
    try:
        return emulator.program("cuda.h", with_dynamic(source), parameters, options=macros)
    except SourceError as error:
        assembly = re.search(r"\b(asm|__asm__)\b", signature.blanked(source.text))
        if assembly and "Assembler messages" in str(error):
            raise source.complaint(assembly.start(), "PTX runs on a GPU only") from None
        raise


def prelude(text: str) -> str:
    """What NVRTC includes before a text that uses it: half, bfloat16, integers of fixed size."""
    wanted = ""
    if re.search(r"\b(__)?half2?\b", text):
        wanted += "#include <cuda_fp16.h>\n"
    if "bfloat16" in text:
        wanted += "#include <cuda_bf16.h>\n"
    if re.search(r"\bu?int(8|16|32|64)_t\b", text) and "cstdint" not in text and "stdint.h" not in text:
        wanted += "".join(f"typedef {kind} {name};\n" for name, kind in _INTEGERS.items())
    return wanted


_INTEGERS = {
    f"{prefix}int{bits}_t": f"{sign} {kind}"
    for prefix, sign in (("", "signed"), ("u", "unsigned"))
    for bits, kind in ((8, "char"), (16, "short"), (32, "int"), (64, "long long"))
}


def exported(source: Source) -> Source:
    """The entry with its plain name in the machine code, whether or not the text says `extern "C"`."""
    blank = signature.blanked(source.text)
    before = [each.before for each in signature.functions(source) if each.name == source.entry]
    if any("extern" in each for each in before) or re.search(r'\bextern\s*"[^"]*"\s*\{', blank):
        return source
    declared = re.compile(rf"\b__global__\b(?=[^;{{}}]*\b{source.entry}\s*\()")
    text, done = "", 0
    for match in declared.finditer(blank):
        text, done = f'{text}{source.text[done : match.start()]}extern "C" ', match.start()
    return replace(source, text=text + source.text[done:])


_DYNAMIC = re.compile(
    r"\bextern\s+__shared__\s+(?P<align>__align__\s*\([^)]*\)\s*|alignas\s*\([^)]*\)\s*)?(?P<type>[\w:]+(?:\s+[\w:]+)*?)"
    r"(?P<gap>\s+)(?P<name>\w+)\s*\[\s*\](?P<rest>[^;]*);"
)


def with_dynamic(source: Source) -> Source:
    """`extern __shared__ T name[];` as a pointer to where the emulator keeps the dynamic shared memory."""

    def pointer(match: re.Match[str]) -> str:
        kind, rest = match["type"], match["rest"]
        made = f"static {kind} (* const {match['name']}){rest} = reinterpret_cast<{kind} (*){rest}>(limpid_dynamic);"
        return made + "\n" * match[0].count("\n")

    blank = signature.blanked(source.text)
    text, done = "", 0
    for match in _DYNAMIC.finditer(blank):
        text, done = text + source.text[done : match.start()] + pointer(match), match.end()
    return replace(source, text=text + source.text[done:])


_SHOWN = 3  # errors; what follows is mostly their consequence
_COMPLAINT = re.compile(r"(?P<file>.+)\((?P<line>\d+)\): (?P<kind>[\w ]*error|warning)(?: #\S+)?: (?P<what>.*)")


def told(said: str, source: Source) -> str:
    """NVRTC's errors in the form of the other compilers: `file:line: error: what`, the line, a caret below it."""
    shown: list[str] = []
    errors, kept = 0, False
    for line in said.split("\n"):
        match = _COMPLAINT.fullmatch(line)
        if match:
            kept = match["kind"] != "warning"
            errors += kept
            if errors > _SHOWN:
                return "\n".join([*shown, "and more"])
            if kept:
                shown.append(f"{match['file']}:{match['line']}: error: {match['what']}")
        elif line.startswith("ptxas"):
            shown.append(f"{source.file}:{source.line}: error: {' '.join(line.split())}")
            kept = False
        elif kept and line.startswith("  "):
            shown.append("  " + line)
        elif line.strip():
            kept = False
    return "\n".join(shown) or said
