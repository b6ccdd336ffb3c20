"""OpenCL C: what a kernel's signature declares, and how a body is completed. `opencl_program` runs it.

    __kernel void silu(__global const float* x, __global float* out, int width, float eps) { ... }

grid is in work-groups, block in the work-items of one. Shared memory is declared in the kernel, `__local float s[64];`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import ClassVar

from .base import Language, Parameter, Program, Source, SourceError
from .shared import around, line_of, located, without_comments

_DTYPES = {
    "float": "float32", "half": "float16", "int": "int32", "long": "int64", "char": "int8", "uchar": "uint8",
}  # fmt: skip
_SPELLED = {
    "unsigned char": "uchar", "signed char": "char", "unsigned int": "uint", "unsigned": "uint", "signed int": "int",
    "signed": "int", "unsigned long": "ulong", "signed long": "long",
}  # fmt: skip
_NUMBERS = {"uint": "int32", "ulong": "int64"}  # what is no array's dtype here, and holds whole numbers of these
_LACKING = ("bfloat16", "__bf16", "bf16", "bfloat")
_KERNEL = re.compile(
    r"\b(?:__kernel|kernel)\b\s*(?:__attribute__\s*\(\(.*?\)\)\s*)*\bvoid\s+(?:__attribute__\s*\(\(.*?\)\)\s*)*"
    r"(\w+)\s*\(([^)]*)\)",
    re.DOTALL,
)
_QUALIFIERS = ("const", "__const", "volatile", "restrict", "__restrict", "__restrict__", "private", "__private")
_SPACES = ("global", "__global", "constant", "__constant")


class OpenCL(Language):
    """OpenCL C, run by pyopencl on a GPU or, without one, on the CPU by PoCL.

    float16 is `half`: where the device has no cl_khr_fp16, as PoCL's CPU, read it with vload_half(i, x) and write it
    with vstore_half(value, i, out). OpenCL checks no index. The first runs for a launch, shapes and numbers have poison
    around each array, and are an error when the kernel writes there; a write further off may end the process.
    """

    name: ClassVar[str] = "opencl"
    types: ClassVar[dict[str, str]] = _DTYPES
    remote: ClassVar[bool] = True

    def parse(self, source: Source) -> tuple[Parameter, ...] | None:
        text = without_comments(source.text)
        kernels = {found[1]: found for found in _KERNEL.finditer(text)}
        if source.entry not in kernels:
            if not kernels and not re.search(r"\b(?:__kernel|kernel)\b", text):
                return None
            known = f"it has {', '.join(kernels)}" if kernels else "no kernel of it is understood"
            where = f"{source.file}:{source.line}"
            raise SourceError(f"{where}: error: no __kernel void {source.entry} in the text: {known}")
        found = kernels[source.entry]
        parameters, at = [], found.start(2)
        for part in found[2].split(","):
            if part.strip() not in ("", "void"):
                parameters.append(_parameter(source, part, at + len(part) - len(part.lstrip())))
            at += len(part) + 1
        return tuple(parameters)

    def with_signature(self, source: Source, parameters: Sequence[Parameter]) -> Source:
        if source.entry == "kernel":
            raise SourceError(f"{source.file}:{source.line}: error: kernel is a word of OpenCL's; choose another name")
        written = []
        for each in parameters:
            spelled = self.spelling(each.dtype) if each.dtype else each.type
            qualified = f"__global {'const ' * each.const}{spelled}* restrict" if each.pointer else f"const {spelled}"
            written.append(f"{qualified} {each.name}")
        return around(source, f"__kernel void {source.entry}({', '.join(written)}) {{", "}")

    def compile(self, source: Source, parameters: Sequence[Parameter]) -> Program:
        from .opencl_program import OpenCLProgram, device

        declared = self.parse(source)
        if declared is None:
            raise SourceError(f"{source.file}:{source.line}: error: no __kernel void {source.entry} in the text")
        if [each.name for each in declared] != [each.name for each in parameters]:
            raise SourceError(
                f"{source.file}:{source.line}: error: {source.entry} takes {', '.join(map(str, declared))}; "
                f"asked for {', '.join(map(str, parameters))}"
            )
        return OpenCLProgram(source, declared, self.options.flags, device(self.options.device))


def _parameter(source: Source, text: str, offset: int) -> Parameter:
    """One parameter of a signature, as it is written."""

    def fail(message: str) -> SourceError:
        return SourceError(located(source, line_of(source, offset), message))

    *said, name = [each for each in re.findall(r"\w+|[*\[]", text) if each != "["] or [""]
    stars = said.count("*") + text.count("[")
    words = [each for each in said if each != "*"]
    spelled = " ".join(each for each in words if each not in (*_QUALIFIERS, *_SPACES))
    spelled = _SPELLED.get(spelled, spelled)
    if not spelled or re.search(r"[^\w\s*\[\]]", text):
        raise fail(f"{text.strip()!r} is not understood as a parameter")
    if {"local", "__local"} & {*words}:
        raise fail(f"{name} is __local: declare shared memory in the kernel, as in __local float {name}[64];")
    if stars > 1:
        raise fail(f"{name} is a pointer to pointers; an array is one pointer")
    if stars and not {*_SPACES} & {*words}:
        raise fail(f"{name} is a pointer without address space; write __global")
    if spelled in _LACKING:
        raise fail(f"{name} is {spelled}: opencl has no bfloat16; it has {', '.join(_DTYPES.values())}")
    element = re.sub(r"(?<=[a-z])(2|4|8|16)$", "", spelled)  # a float4* is an array of floats, by fours
    dtype = _DTYPES.get(element) if stars else (_DTYPES | _NUMBERS).get(spelled)
    if dtype is None and (stars or spelled != "double"):
        raise fail(f"{name} is {spelled}: no {'array' if stars else 'number'} of that; use {', '.join(_DTYPES)}")
    before = said[: said.index("*")] if "*" in said else said
    const = not stars or bool({"const", "__const", "constant", "__constant"} & {*before})
    return Parameter(name, spelled, dtype, bool(stars), const)
