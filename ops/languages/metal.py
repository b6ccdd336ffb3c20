"""Metal Shading Language, run on the CPU (`ops.languages.emulator`): what a text declares, and what its kernel gets.

    #include <metal_stdlib>
    using namespace metal;
    kernel void norm(device const float* x [[buffer(0)]], device float* out [[buffer(1)]],
                     constant int& width [[buffer(2)]], uint row [[threadgroup_position_in_grid]]) { ... }

Arrays are `device` and `constant` pointers, numbers `constant` references. Positions, such as `row` here, come from the
launch: its grid counts threadgroups, its block threads. `threadgroup float* tile [[threadgroup(0)]]` is the launch's
shared memory. TVM's generated form is known as well: its numbers are the members of one struct.

A body alone sees the names of `POSITIONS` too: `threadgroup_position_in_grid.x`, `thread_index_in_simdgroup`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from . import emulator, signature
from .base import Language, Parameter, Program, Source, SourceError

TYPES = {
    "float": "float32",
    "half": "float16",
    "bfloat": "bfloat16",
    "int": "int32",
    "int32_t": "int32",
    "long": "int64",
    "int64_t": "int64",
    "char": "int8",
    "int8_t": "int8",
    "uchar": "uint8",
    "uint8_t": "uint8",
    "unsigned char": "uint8",
}
_VECTORS = {
    f"{packed}{kind}{size}": TYPES[kind]
    for kind in ("float", "half", "bfloat", "int", "long", "char", "uchar")
    for packed in ("", "packed_")
    for size in (2, 3, 4)
}
_BITS = {"ushort": "bfloat16", "uint16_t": "bfloat16"}  # how TVM passes arrays of bfloat16
_ATOMICS = {"atomic_int": "int32", "atomic_float": "float32"}
_ARRAYS_ONLY = {*_VECTORS, *_ATOMICS, *_BITS}
_UNSIGNED = {"uint": "unsigned int", "uint32_t": "unsigned int", "ulong": "unsigned long", "uint64_t": "unsigned long"}
_UNSIGNED |= {each: each for each in _UNSIGNED.values()}
DIALECT = signature.Dialect(
    "Metal",
    TYPES | _VECTORS | _ATOMICS | _BITS,
    frozenset(("bool", *_UNSIGNED)),
    frozenset(("device", "threadgroup", "thread", "restrict", "__restrict", "volatile")),
    frozenset(("const", "constant")),
    "kernel",
)

POSITIONS = {  # three numbers each, of which a parameter may take fewer
    "thread_position_in_grid": "metal::Positions::thread_in_grid()",
    "thread_position_in_threadgroup": "metal::Positions::thread_in_group()",
    "threadgroup_position_in_grid": "metal::Positions::group()",
    "threads_per_grid": "metal::Positions::grid_threads()",
    "threads_per_threadgroup": "metal::Positions::of(simt::here.block_size)",
    "threadgroups_per_grid": "metal::Positions::of(simt::here.grid)",
}
INDICES = {  # one number each
    "thread_index_in_threadgroup": "simt::here.linear",
    "thread_index_in_simdgroup": "simt::lane()",
    "simdgroup_index_in_threadgroup": "simt::here.linear / simt::warp_size",
    "thread_index_in_quadgroup": "simt::lane() % 4",
    "quadgroup_index_in_threadgroup": "simt::here.linear / 4",
    "threads_per_simdgroup": "simt::warp_size",
    "simdgroups_per_threadgroup": "metal::Positions::simdgroups()",
    "quadgroups_per_threadgroup": "(metal::Positions::threads() + 3) / 4",
}
_OTHER_NAMES = {
    "dispatch_threads_per_threadgroup": "threads_per_threadgroup",
    "thread_execution_width": "threads_per_simdgroup",
    "dispatch_simdgroups_per_threadgroup": "simdgroups_per_threadgroup",
}
_WORDS = {  # what messages of the emulator say, and what Metal calls it
    "shared memory": "threadgroup memory",
    "global memory": "device memory",
    "blocks": "threadgroups",
    "block": "threadgroup",
    "a warp": "a simdgroup",
    "warp": "simdgroup",
}
_SHARED = 32 << 10  # bytes of threadgroup memory, on all of Apple's GPUs
_OPTIONS = ("-fsingle-precision-constant", "-fsigned-char")  # Metal has no double; its char has a sign
_ATTRIBUTE = re.compile(r"\[\[(.*?)\]\]", re.DOTALL)
_ELSEWHERE = re.compile(
    r"\b(simdgroup_(?:matrix|(?:float|half|bfloat)\d\w*|load|store|multiply\w*)|texture\w*|sampler)\b"
)


@dataclass(frozen=True)
class _Argument:
    """What the kernel gets in one place: `given` is the C++ for it, `before` what has to stand before the call;
    `parameters` are what a caller gives for it."""

    given: str
    parameters: tuple[Parameter, ...] = ()
    before: str = ""
    shared: str = ""  # its name, where it is threadgroup memory


class Metal(Language):
    """Metal on the CPU, emulated: on no machine does Limpid hand a text to Apple's compiler yet.

    `Options.flags` are the C++ compiler's. The emulator's simdgroups are of 32 lanes, all of which must come to what
    they do together. Matrices and textures are not there, nor functions that differ in their address spaces only;
    `c ? h : 0.0f` of a half and a float wants a float(h).
    """

    name: ClassVar[str] = "metal"
    types: ClassVar[dict[str, str]] = TYPES

    def parse(self, source: Source) -> tuple[Parameter, ...] | None:
        source = _section(source)
        if self._entry(source) is None:
            return None
        return tuple(each for argument in self._arguments(source) for each in argument.parameters)

    def with_signature(self, source: Source, parameters: Sequence[Parameter]) -> Source:
        """The body as a kernel, with all of POSITIONS and INDICES as parameters of these names."""
        given = [f"{_spelled(p)} [[buffer({i})]]" for i, p in enumerate(parameters)]
        given += [f"uint3 {name} [[{name}]]" for name in POSITIONS]
        given += [f"uint {name} [[{name}]]" for name in INDICES]
        before = f"using namespace metal; kernel void {source.entry}({', '.join(given)}) {{"
        return replace(source, text=f"{before}{source.text}\n}}")

    def compile(self, source: Source, parameters: Sequence[Parameter]) -> Program:
        if self.options.device not in (None, "emulate"):
            raise SourceError(
                f"device={self.options.device!r}: Metal on a GPU is not built here, as it was never tried on one; "
                'leave device= out, or say "emulate", to run it on the CPU'
            )
        source = _section(source)
        arguments = self._arguments(source)
        before = "".join(each.before for each in arguments)
        given = ", ".join(each.given for each in arguments)
        shared = next((each.shared for each in arguments if each.shared), "shared=")
        made = emulator.program(
            "metal.h",
            _translated(source),
            parameters,
            f"{before}{source.entry}({given});",
            _SHARED,
            _SHARED,
            "threadgroup_barrier()",
            {"dynamic shared memory": shared} | _WORDS,
            (*_OPTIONS, *self.options.flags),
        )
        made.note = "emulated on the CPU; no Metal compiler has seen it"
        return made

    def _entry(self, source: Source) -> signature.Function | None:
        marked = source.text.replace("[[kernel]]", "kernel    ")
        return signature.entry_of(replace(source, text=marked), "kernel")

    def _arguments(self, source: Source) -> list[_Argument]:
        """What the kernel gets, in its order. Raises SourceError for what nothing can be given to."""
        entry = self._entry(source)
        assert entry is not None
        text, arguments, buffers = signature.blanked(source.text), list[_Argument](), dict[int, str]()
        for offset, piece in signature.pieces(entry):
            raw = text[offset : offset + len(piece)]  # with its attributes
            start = offset + len(raw) - len(raw.lstrip())
            count = sum(len(each.parameters) for each in arguments)
            declared = _Declared(source, start, piece, _attributes(source, start, raw))
            made = declared.argument(text, entry.name, count)
            arguments.append(made)
            if made.parameters:
                declared.number_buffer(buffers)
        return arguments


@dataclass(frozen=True)
class _Declared:
    """A parameter as a text declares it: `piece` is without its attributes."""

    source: Source
    offset: int
    piece: str
    attributes: dict[str, str]

    def argument(self, text: str, entry: str, at: int) -> _Argument:
        """What the kernel gets for it; its first value is number `at` of those that a caller gives."""
        words = re.findall(r"\w+", self.piece)
        position = next((name for name in self.attributes if name not in ("buffer", "threadgroup")), None)
        if position is not None:
            return self._position(position)
        if "threadgroup" in words:
            return self._threadgroup()
        if "&" in self.piece:
            return self._reference(text, entry, at, words)
        p = signature.parameter(self.source, self.piece, self.offset, DIALECT)
        if not p.pointer:
            hint = f"constant {p.type}& {p.name} [[buffer(n)]], or of a position with its attribute"
            raise self.complaint(f"a number is passed as {hint}; there is no such thing as {p} alone")
        if not {"device", "constant"} & {*words}:
            raise self.complaint(f"{' '.join(self.piece.split())!r} is in no address space: write device before it")
        return _Argument(f"static_cast<{'const ' * p.const}{p.type}*>(values[{at}])", (p,))

    def _position(self, name: str) -> _Argument:
        name = _OTHER_NAMES.get(name, name)
        match = re.fullmatch(
            r"\s*(?:const\s+)?(uint|ushort|unsigned|unsigned\s+int|uint32_t)([23]?)\s+\w+\s*", self.piece
        )
        if match is None or (match[2] and name in INDICES):
            many = "" if name in INDICES else ", uint2 or uint3"
            raise self.complaint(f"{' '.join(self.piece.split())!r}: [[{name}]] is a uint{many}")
        if name in INDICES:
            return _Argument(f"static_cast<{match[1]}>({INDICES[name]})")
        return _Argument(f"metal::positioned<{match[1]}{match[2]}>({POSITIONS[name]})")

    def _threadgroup(self) -> _Argument:
        if self.attributes.get("threadgroup", "0") != "0":
            raise self.complaint("one [[threadgroup(0)]] is given, shared= bytes large; divide it in the kernel")
        match = re.fullmatch(
            r"\s*(?:(?:threadgroup|const|volatile)\s+)*([\w:<>, ]+?)\s*\*\s*(?:__restrict\s+)?\w+\s*", self.piece
        )
        kind = match and match[1].replace("threadgroup", "").strip()
        if not kind:
            raise self.complaint(f"{' '.join(self.piece.split())!r}: threadgroup memory is passed as a pointer")
        return _Argument(f"reinterpret_cast<{kind}*>(limpid_dynamic)", shared=re.findall(r"\w+", self.piece)[-1])

    def _reference(self, text: str, entry: str, at: int, words: list[str]) -> _Argument:
        if words[0:2] == ["constant", f"{entry}_args_t"]:
            members = tuple(self._members(text, words[1]))
            name = f"limpid_{words[-1]}"
            before = f"{words[1]} {name}; "
            for i, (p, slot) in enumerate(members, at):
                before += f"{name}.{p.name}{slot} = *static_cast<const {p.type}*>(values[{i}]); "
            return _Argument(name, tuple(p for p, _ in members), before)
        if re.search(rf"\bstruct\s+{words[-2]}\b", text):
            raise self.complaint(
                f"a struct is not passed: pass each of its numbers as constant float& {words[-1]} or the like"
            )
        p = signature.parameter(self.source, self.piece.replace("&", " "), self.offset, DIALECT)
        if p.pointer or p.type in _ARRAYS_ONLY or not {"constant", "const"} & {*words}:
            raise self.complaint(
                f"{' '.join(self.piece.split())!r} is not understood: arrays are passed as device {p.type}* {p.name}, "
                f"numbers as constant float& {p.name}"
            )
        p = _signed(p)
        return _Argument(f"*static_cast<const {p.type}*>(values[{at}])", (p,))

    def _members(self, text: str, name: str) -> Iterator[tuple[Parameter, str]]:
        """The numbers of the struct that TVM passes: each has 8 bytes."""
        match = re.search(rf"\bstruct\s+{name}\s*\{{([^}}]*)\}}", text)
        for declared in match[1].split(";")[:-1] if match else ():
            member = re.fullmatch(r"\s*([\w ]+?)\s+(\w+)\s*(\[2\])?\s*", declared)
            if member is None:
                raise self.complaint(f"{' '.join(declared.split())!r} of {name} is not understood: TVM writes int n[2]")
            p = signature.parameter(self.source, f"{member[1]} {member[2]}", self.offset, DIALECT)
            yield _signed(p), "[0]" if member[3] else ""

    def number_buffer(self, taken: dict[int, str]) -> None:
        """Note the number of its buffer. Those that say none get one that is free, as Metal does it."""
        name, given = re.findall(r"\w+", self.piece)[-1], self.attributes.get("buffer")
        if given is None:
            return
        if not given or int(given) > 30:
            raise self.complaint(f"{name} has [[buffer({given})]]; Metal has buffers 0 to 30")
        if int(given) in taken:
            raise self.complaint(f"{name} has the same [[buffer({given})]] as {taken[int(given)]}")
        taken[int(given)] = name

    def complaint(self, message: str) -> SourceError:
        return self.source.complaint(self.offset, message)


def _attributes(source: Source, offset: int, raw: str) -> dict[str, str]:
    """The attributes of a parameter: their names and what stands in their parentheses."""
    found = {}
    for inside in _ATTRIBUTE.findall(raw):
        for name, number in re.findall(r"(\w+)\s*(?:\(\s*(\d+)\s*\))?", inside):
            if name not in ("buffer", "threadgroup") and _OTHER_NAMES.get(name, name) not in POSITIONS | INDICES:
                known = ", ".join(("buffer", "threadgroup", *POSITIONS, *INDICES))
                raise source.complaint(offset, f"[[{name}]] is not known here; known are {known}")
            found[name] = number
    return found


def _signed(p: Parameter) -> Parameter:
    """A number of a type that no tensor has as the type that C knows; it takes what whole numbers of that size do."""
    if p.type not in _UNSIGNED:
        return p
    kind = _UNSIGNED[p.type]
    return replace(p, type=kind, dtype="int32" if kind.endswith("int") else "int64")


def _spelled(p: Parameter) -> str:
    if p.pointer:
        return f"device {'const ' * p.const}{p.type}* {p.name}"
    return f"constant {p.type}& {p.name}"


def _section(source: Source) -> Source:
    """Of TVM's text of several kernels, which repeats itself for each, the entry's part; lines keep their numbers."""
    parts = re.split(r"^(?=// Function: \w+$)", source.text, flags=re.MULTILINE)
    for i, part in enumerate(parts):
        if re.match(rf"// Function: {source.entry}\n", part):
            lines = "\n" * sum(each.count("\n") for each in parts[:i])
            return replace(source, text=lines + part)
    return source


_INCLUDE = re.compile(r"^[ \t]*#[ \t]*(?:include|import)[ \t]*(.*)$", re.MULTILINE)
_CONST_TWICE = re.compile(r"\b(const)\s+constant\b|\bconstant\s+(?:[\w:]+\s+)?(const)\b")
_DECLARED = re.compile(r"\bthreadgroup(?=\s[^;(){}*&=\[]*(?:\[[^\]]*\][^;(){}*&=\[]*)*;)")


def _translated(source: Source) -> Source:
    """The text for a C++ compiler: every letter stays in its place.

    Attributes and includes become blanks, and the declaration of an array of the threadgroup is told from a pointer.
    """
    blank = signature.blanked(source.text)
    text = [*source.text]

    def put(start: int, end: int, new: str) -> None:
        kept = [c if c == "\n" else " " for c in text[start:end]]
        kept[: len(new)] = new
        text[start:end] = kept

    for match in _ELSEWHERE.finditer(blank):
        raise source.complaint(
            match.start(), f"{match[1]} is not there: the emulator has no simdgroup matrices or textures"
        )
    for match in _INCLUDE.finditer(source.text):
        if not re.match(r"<(metal_\w+|simd/simd\.h)>", match[1]):
            raise source.complaint(match.start(), f"{match[1]} cannot be included; a kernel has Metal's own headers")
        put(match.start(), match.end(), "")
    for match in _ATTRIBUTE.finditer(blank):
        put(match.start(), match.end(), "kernel" if match[1].strip() == "kernel" else "")
    for match in _CONST_TWICE.finditer(blank):
        put(*match.span(match.lastindex or 0), "")
    for match in _DECLARED.finditer(blank):
        put(match.start(), match.end(), "SIMT_SHARED")
    return replace(source, text="".join(text))
