"""WGSL, the language of WebGPU: what a text declares, and how a body is completed. `wgpu_program` runs it.

A kernel is idiomatic WGSL. Its parameters are its bindings by their names, numbers those of a struct's members:

    struct Numbers { width: u32, eps: f32 }
    @group(0) @binding(0) var<storage, read> x: array<f32>;
    @group(0) @binding(1) var<storage, read_write> out: array<f32>;
    @group(0) @binding(2) var<uniform> numbers: Numbers;
    @compute @workgroup_size(64) fn kernel(@builtin(workgroup_id) row: vec3<u32>) { ... }

Of a body alone the rest is written: `x[i]`, `width` and `eps` are then names, and `group_id`, `local_id`, `global_id`,
`group_count` and `block` are vec3<i32>. All whole numbers of a body are i32, so that they mix.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NoReturn

from .base import Language, Parameter, Program, Source, SourceError
from .shared import around, line_of, located, without_comments

SIZES = {"f32": 4, "i32": 4, "u32": 4, "f16": 2}  # bytes of what may stand in a buffer
_DTYPES = {"f32": "float32", "f16": "float16", "i32": "int32"}
_LACKING = {"bf16": "bfloat16", "bfloat16": "bfloat16", "i64": "int64", "u64": "uint64", "i8": "int8", "u8": "uint8"}
_ATTRIBUTES = r"((?:@\w+\s*(?:\([^()]*\)\s*)?)*)"
_VARIABLE = re.compile(rf"{_ATTRIBUTES}\bvar\s*<\s*(storage|uniform)\s*(?:,\s*(\w+)\s*)?>\s*(\w+)\s*:\s*([^;]+);")
_STRUCT = re.compile(r"\bstruct\s+(\w+)\s*\{([^}]*)\}")
_ALIAS = re.compile(r"\balias\s+(\w+)\s*=\s*([^;]+);")
_CONST = re.compile(r"\bconst\s+(\w+)\s*(?::\s*\w+\s*)?=\s*(\d+)[iu]?\s*;")
_ENTRY = re.compile(rf"{_ATTRIBUTES}\bfn\s+(\w+)\s*\(")
_ARRAY = re.compile(r"array\s*<\s*(.+?)\s*(?:,\s*([^,<>]+?)\s*)?>")
_VECTOR = re.compile(r"vec([234])(?:\s*<\s*(\w+)\s*>|([fiuh]))")
_SHORT = {"f": "f32", "i": "i32", "u": "u32", "h": "f16"}
_OVERRIDES = ("block_x", "block_y", "block_z")  # a body's workgroup size: known when it is launched


@dataclass(frozen=True)
class Member:
    """A number in a buffer: its name, type, and where it stands in bytes."""

    name: str
    type: str
    offset: int


@dataclass(frozen=True)
class Binding:
    """A variable of the text: where it is bound, and what it holds: elements of an array, or numbers.

    `lanes` is how many numbers an element has, `count` how many elements where the text says; `size` the bytes of
    the numbers.
    """

    name: str
    group: int
    index: int
    uniform: bool
    writes: bool
    element: str = ""
    lanes: int = 1
    count: int | None = None
    members: tuple[Member, ...] = ()
    size: int = 0

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        if not self.element:
            # A u32 is any whole number that is not negative: an int32 to those who ask.
            return tuple(Parameter(m.name, m.type, _DTYPES.get(m.type, "int32"), False, True) for m in self.members)
        spelled = self.element if self.lanes == 1 else f"vec{self.lanes}<{self.element}>"
        dtype = _DTYPES.get(self.element)
        return (Parameter(self.name, spelled, dtype, True, not self.writes),)


@dataclass(frozen=True)
class Declared:
    """What a text declares. `block` is its workgroup size; 0 where that is known at the launch only."""

    bindings: tuple[Binding, ...]
    block: tuple[int, ...]


class Wgsl(Language):
    """WGSL, run by wgpu on a GPU, or without one on Mesa's lavapipe (Debian: mesa-vulkan-drivers).

    Out of bounds, WebGPU reads some value of the array and drops what is written: nothing is harmed, or told.
    """

    name: ClassVar[str] = "wgsl"
    types: ClassVar[dict[str, str]] = _DTYPES
    remote: ClassVar[bool] = True

    def parse(self, source: Source) -> tuple[Parameter, ...] | None:
        found = declared(source)
        return found and tuple(each for binding in found.bindings for each in binding.parameters)

    def with_signature(self, source: Source, parameters: Sequence[Parameter]) -> Source:
        arrays = [each for each in parameters if each.pointer]
        numbers = [each for each in parameters if not each.pointer]
        spelled = {each.name: self._spelled(each) for each in parameters}
        parts = ["enable f16;"] if "f16" in spelled.values() else []
        for index, each in enumerate(arrays):
            access = "read" if each.const else "read_write"
            parts.append(
                f"@group(0) @binding({index}) var<storage, {access}> {each.name}: array<{spelled[each.name]}>;"
            )
        if numbers:
            members = ", ".join(f"{each.name}: {spelled[each.name]}" for each in numbers)
            parts += [
                f"struct Numbers_ {{ {members} }}",
                f"@group(0) @binding({len(arrays)}) var<uniform> numbers_: Numbers_;",
            ]
        parts += [f"override {name}: u32 = 1;" for name in _OVERRIDES]
        builtins = {
            "group_id": "workgroup_id", "local_id": "local_invocation_id", "global_id": "global_invocation_id",
            "group_count": "num_workgroups",
        }  # fmt: skip
        taken = ", ".join(f"@builtin({builtin}) {name}_: vec3<u32>" for name, builtin in builtins.items())
        parts.append(f"@compute @workgroup_size({', '.join(_OVERRIDES)}) fn {source.entry}({taken}) {{")
        parts += [f"let {name} = vec3<i32>({name}_);" for name in builtins]
        parts.append(f"let block = vec3<i32>(vec3<u32>({', '.join(_OVERRIDES)}));")
        parts += [f"let {each.name} = numbers_.{each.name};" for each in numbers]
        return around(source, " ".join(parts), "}")

    def _spelled(self, parameter: Parameter) -> str:
        """A number that is an int64 elsewhere is an int32 here, and is refused when it does not fit."""
        if not parameter.pointer and parameter.dtype == "int64":
            return "i32"
        return self.spelling(parameter.dtype or parameter.type)

    def compile(self, source: Source, parameters: Sequence[Parameter]) -> Program:
        from .wgpu_program import WgpuProgram, device

        if self.options.flags:
            raise SourceError(f"flags {self.options.flags}: the compiler of WGSL takes none")
        found = declared(source)
        if found is None:
            raise SourceError(f"{source.file}:{source.line}: error: no @compute fn {source.entry} in the text")
        return WgpuProgram(source, parameters, found, device(self.options.device))


def declared(source: Source) -> Declared | None:
    """What the text declares; None where it has no entry at all. Raises SourceError."""
    text = without_comments(source.text)
    entries = {found[2]: found for found in _ENTRY.finditer(text) if re.search(r"@compute\b", found[1])}
    if source.entry not in entries:
        if not entries and not _VARIABLE.search(text) and not _ENTRY.search(text):
            return None
        known = f"it has {', '.join(entries)}" if entries else "it has no @compute function"
        raise SourceError(f"{source.file}:{source.line}: error: no @compute fn {source.entry} in the text: {known}")
    return Declared(_Reader(source, text).bindings(), _block(source, text, entries[source.entry]))


def _block(source: Source, text: str, entry: re.Match[str]) -> tuple[int, ...]:
    known = _numbers(text) | dict.fromkeys(_OVERRIDES, 0)
    size = re.search(r"@workgroup_size\s*\(([^()]*)\)", entry[1])
    if not size:
        raise SourceError(located(source, line_of(source, entry.start(2)), "a kernel needs @workgroup_size(threads)"))
    block = []
    for each in (part.strip() for part in size[1].split(",") if part.strip()):
        if not (number := re.fullmatch(r"(\d+)[iu]?", each)) and each not in known:
            message = f"@workgroup_size({each}): expected a number, or a const of the text that is one"
            raise SourceError(located(source, line_of(source, entry.start(1)), message))
        block.append(int(number[1]) if number else known[each])
    return (*block, 1, 1)[:3]


def _numbers(text: str) -> dict[str, int]:
    """The whole numbers that a text names."""
    return {found[1]: int(found[2]) for found in _CONST.finditer(text)}


class _Reader:
    """Reads the bindings of a text: types are looked up through its aliases and structs."""

    def __init__(self, source: Source, text: str):
        self.source, self.text = source, text
        self.structs = {found[1]: found for found in _STRUCT.finditer(text)}
        self.aliases = {found[1]: found[2].strip() for found in _ALIAS.finditer(text)}
        self.numbers = _numbers(text)

    def bindings(self) -> tuple[Binding, ...]:
        found = tuple(self._binding(each) for each in _VARIABLE.finditer(self.text))
        names = [each.name for binding in found for each in binding.parameters]
        for binding in found:
            for each in binding.parameters:
                if names.count(each.name) > 1:
                    self._fail(self.text.index(binding.name), f"two parameters are named {each.name}")
        return found

    def _binding(self, found: re.Match[str]) -> Binding:
        attributes, space, access, name, spelled = found.groups()
        at = found.start(4)
        places = {key: re.search(rf"@{key}\s*\(\s*(\d+)[iu]?\s*,?\s*\)", attributes) for key in ("group", "binding")}
        group, index = places["group"], places["binding"]
        if group is None or index is None:
            self._fail(at, f"{name} needs @group(0) @binding(number)")
        uniform, writes = space == "uniform", access in ("read_write", "write")
        placed = Binding(name, int(group[1]), int(index[1]), uniform, writes)
        spelled = self._named(spelled.strip())
        if array := _ARRAY.fullmatch(spelled):
            return self._array(placed, array, at)
        if writes:
            self._fail(at, f"{name} is written and no array: an output is an array<...>")
        members, size = self._members(name, spelled, at)
        return Binding(name, placed.group, placed.index, uniform, False, members=members, size=size)

    def _array(self, placed: Binding, array: re.Match[str], at: int) -> Binding:
        if placed.uniform:
            self._fail(at, f"{placed.name} is an array: declare it var<storage, read>")
        inner = self._named(array[1])
        if atomic := re.fullmatch(r"atomic\s*<\s*(\w+)\s*>", inner):
            inner = atomic[1]
        lanes, element = self._vector(inner)
        if element not in SIZES or lanes == 3:
            self._fail(at, f"{placed.name} is {array[0]}: {self._lacks(element, lanes)}")
        count = self._count(array[2], at) if array[2] else None
        return Binding(placed.name, placed.group, placed.index, False, placed.writes, element, lanes, count)

    def _count(self, said: str, at: int) -> int:
        count = self.numbers.get(said) or (int(said.rstrip("iu")) if re.fullmatch(r"\d+[iu]?", said) else None)
        if count is None:
            self._fail(at, f"array<..., {said}>: expected a number, or a const of the text that is one")
        return count

    def _members(self, name: str, spelled: str, at: int) -> tuple[tuple[Member, ...], int]:
        """The numbers of a variable, laid out as WGSL says, and their bytes in all."""
        if spelled in SIZES:
            return (Member(name, spelled, 0),), SIZES[spelled]
        if spelled not in self.structs:
            lanes, element = self._vector(spelled)
            self._fail(at, f"{name} is {spelled}: {self._lacks(element, lanes)}")
        members, end, widest = [], 0, 1
        struct = self.structs[spelled]
        for part in filter(None, (each.strip() for each in struct[2].split(","))):
            found = re.fullmatch(rf"{_ATTRIBUTES}(\w+)\s*:\s*(.+)", part, re.DOTALL)
            kind = self._named(found[3].strip()) if found else ""
            if found is None or kind not in SIZES:
                self._fail(struct.start(2), f"{spelled} has {part!r}: {self._lacks(kind, 1)}")
            size, align = (
                int(said[1]) if (said := re.search(rf"@{key}\s*\(\s*(\d+)[iu]?\s*\)", found[1])) else SIZES[kind]
                for key in ("size", "align")
            )
            end += -end % align
            members.append(Member(found[2], kind, end))
            end, widest = end + size, max(widest, align)
        return tuple(members), end + -end % widest

    def _vector(self, spelled: str) -> tuple[int, str]:
        found = _VECTOR.fullmatch(spelled)
        return (int(found[1]), found[2] or _SHORT[found[3]]) if found else (1, spelled)

    def _named(self, spelled: str) -> str:
        """A type, seen through aliases."""
        seen: set[str] = set()
        while spelled in self.aliases and spelled not in seen:
            seen.add(spelled)
            spelled = self.aliases[spelled]
        return spelled

    def _lacks(self, element: str, lanes: int) -> str:
        if element in _LACKING:
            return f"wgsl has no {_LACKING[element]}; it has {', '.join(_DTYPES.values())}"
        if lanes == 3:
            return "a vec3 takes the room of a vec4; use the array of its numbers"
        return f"an array is of {', '.join(SIZES)} or their vec2 and vec4, a number one of {', '.join(SIZES)}"

    def _fail(self, offset: int, message: str) -> NoReturn:
        raise SourceError(located(self.source, line_of(self.source, offset), message))
