"""The GGUF container, read by memory map: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>.

The library `gguf` reads it too, and writes it in the tests. It takes counts and sizes on trust, and makes array objects
of each element of a list: 4 s for GPT-2's vocabulary of 1.8 MB, which takes 0.1 s here. So the library is left what is
hard: the types, and what their blocks stand for. Here every claim is checked before anything is made of it.
"""

from __future__ import annotations

import os
import re
import struct
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import ml_dtypes
import numpy as np

from llm.errors import CheckpointError
from llm.weights.blocks import QUANTIZED, Blocks, Kind, nbytes
from llm.weights.safetensors import map_file

_MAGIC = b"GGUF"
_SCALARS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
_BOOL, _STRING, _LIST = 7, 8, 9
_LEAST_VALUE, _LEAST_TENSOR = 8 + 4 + 1, 8 + 4 + 8 + 4 + 8  # bytes that one takes at least
_MOST_DIMS = 4
_PLAIN: dict[Kind, np.dtype[Any]] = {
    Kind.F32: np.dtype("<f4"),
    Kind.F16: np.dtype("<f2"),
    Kind.BF16: np.dtype(ml_dtypes.bfloat16),
    Kind.F64: np.dtype("<f8"),
    Kind.I8: np.dtype("i1"),
    Kind.I16: np.dtype("<i2"),
    Kind.I32: np.dtype("<i4"),
    Kind.I64: np.dtype("<i8"),
}
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
_AGAIN = "the file is damaged or incomplete: download it again"


class Container(NamedTuple):
    """What a model's file, or files, hold. Tensors are writable copy-on-write views, or `Blocks` of them."""

    files: list[Path]
    metadata: dict[str, Any]
    tensors: dict[str, Any]


def read_gguf(path: str | os.PathLike[str]) -> Container:
    """The metadata and tensors of a GGUF file, or of all parts where it is the first of several. Nothing is unpacked.

    Strings are str, lists of numbers NumPy arrays. Shapes are NumPy's, the contiguous dimension last.
    Raises CheckpointError for whatever the format does not allow, for types that cannot be unpacked, missing parts.
    """
    path = Path(path)
    metadata, tensors = _read(path)
    files = [path]
    count = metadata.get("split.count", 1)
    if type(count) is not int or not 1 <= count <= 99999:
        _bad(path, f"split.count is {count!r}, expected a number of files")
    for place in range(1, count):
        part = _sibling(path, place, count)
        more, found = _read(part)
        if more.get("split.no") != place or more.get("split.count") != count:
            _bad(
                part, f"it is part {more.get('split.no')!r} of {more.get('split.count')!r}, expected {place} of {count}"
            )
        if twice := sorted(found.keys() & tensors.keys()):
            _bad(part, f"tensor {twice[0]!r} is in another part too")
        tensors |= found
        files.append(part)
    return Container(files, metadata, tensors)


def _sibling(path: Path, place: int, count: int) -> Path:
    """Part `place` of `count`, beside the first."""
    named = _PART.fullmatch(path.name)
    if not named or int(named[2]) != 1 or int(named[3]) != count:
        raise CheckpointError(
            f"{path} is one of {count} parts: give the first, with its name as it was, ...-00001-of-{count:05}.gguf"
        )
    part = path.with_name(f"{named[1]}-{place + 1:05}-of-{count:05}.gguf")
    if not part.is_file():
        raise CheckpointError(f"{path} has {count} parts, and {part.name} is not beside it: download it")
    return part


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    data = map_file(path)
    cursor = _Cursor(path, data)
    if bytes(cursor.take(4, "its magic")) != _MAGIC:
        _bad(path, "it does not begin with 'GGUF' (is it a GGUF file?)")
    version = cursor.number("<I", "its version")
    if version not in (2, 3):
        swapped = int.from_bytes(version.to_bytes(4, "big"), "little")
        if swapped in (2, 3):
            raise CheckpointError(f"{path} is big-endian, which is not supported: convert it to little-endian")
        raise CheckpointError(f"{path}: GGUF version {version} is not supported, 2 and 3 are: convert the model again")
    tensors, values = cursor.number("<Q", "its number of tensors"), cursor.number("<Q", "its number of values")
    if values * _LEAST_VALUE + tensors * _LEAST_TENSOR > len(data):
        _bad(path, f"it claims {values} values and {tensors} tensors, more than its {len(data)} bytes can hold")
    metadata: dict[str, Any] = {}
    for _ in range(values):
        key = cursor.text("a key")
        if key in metadata:
            _bad(path, f"the key {_short(key)} is there twice")
        metadata[key] = cursor.value(cursor.number("<I", "a type"), key)
    claims = [_claim(cursor) for _ in range(tensors)]
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1) or alignment > 2**20:
        _bad(path, f"general.alignment is {_short(alignment)}, expected a power of two, at most 2**20")
    return metadata, _tensors(path, data, claims, -(-cursor.at // alignment) * alignment, alignment)


class _Cursor:
    """Goes through the header; `at` never passes the end."""

    def __init__(self, path: Path, data: np.ndarray):
        self.path, self.data, self.at = path, memoryview(data.data), 0

    def take(self, count: int, what: str) -> memoryview:
        if count > len(self.data) - self.at:
            _bad(
                self.path,
                f"it ends at byte {len(self.data)}, within {_short(what)}, which takes {count} from {self.at}",
            )
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, form: str, what: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form), what))[0]

    def text(self, what: str) -> str:
        try:
            return str(self.take(self.number("<Q", what), what), "utf-8")
        except UnicodeDecodeError as error:
            _bad(self.path, f"{_short(what)} is not UTF-8: {error.reason}")

    def value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self.text(key)
        if kind == _LIST:
            return self._list(key)
        return self._numbers(kind, 1, key)[0].item()

    def _list(self, key: str) -> Any:
        kind, count = self.number("<I", key), self.number("<Q", key)
        if kind != _STRING:
            return self._numbers(kind, count, key)
        if count > (len(self.data) - self.at) // 8:
            _bad(self.path, f"{_short(key)} claims {count} strings, more than the file can hold")
        return [self.text(key) for _ in range(count)]

    def _numbers(self, kind: int, count: int, key: str) -> np.ndarray:
        if kind not in _SCALARS:
            known = "lists of lists are not supported" if kind == _LIST else "it is unknown"
            _bad(self.path, f"{_short(key)} is of type {kind}: {known}")
        dtype = np.dtype(_SCALARS[kind])
        raw = self.take(count * dtype.itemsize, key)
        if kind == _BOOL and raw and max(raw) > 1:
            _bad(self.path, f"{_short(key)} holds a BOOL byte that is neither 0 nor 1")
        return np.frombuffer(raw, dtype).copy()


class _Claim(NamedTuple):
    """What the header says of a tensor: `start` counts from where the data begin."""

    name: str
    kind: Kind
    shape: tuple[int, ...]
    start: int
    nbytes: int


def _claim(cursor: _Cursor) -> _Claim:
    path, name = cursor.path, cursor.text("the name of a tensor")
    what = f"tensor {_short(name)}"
    dims = cursor.number("<I", what)
    if not 1 <= dims <= _MOST_DIMS:
        _bad(path, f"{what} has {dims} dimensions, expected 1 to {_MOST_DIMS}")
    shape = struct.unpack(f"<{dims}Q", cursor.take(8 * dims, what))[::-1]
    if prod(shape) == 0 or prod(shape) >= 2**60:
        _bad(path, f"{what} has the impossible shape {list(shape)}")
    number, start = cursor.number("<I", what), cursor.number("<Q", what)
    try:
        kind = Kind(number)
    except ValueError:
        raise CheckpointError(
            f"{path}: {what} is of type {number}, which is unknown; convert the model again"
        ) from None
    if kind not in _PLAIN and kind not in QUANTIZED:
        known = ", ".join(each.name for each in sorted((*_PLAIN, *QUANTIZED)))
        raise CheckpointError(f"{path}: {what} is {kind.name}, which is not supported; supported are {known}")
    try:
        return _Claim(name, kind, shape, start, nbytes(kind, shape))
    except ValueError as error:
        _bad(path, f"{what}: {error}")


def _tensors(path: Path, data: np.ndarray, claims: list[_Claim], begin: int, alignment: int) -> dict[str, Any]:
    reached, previous = 0, "the header"
    for each in sorted(claims, key=lambda claim: claim.start):
        what = f"tensor {_short(each.name)}"
        if each.start % alignment:
            _bad(path, f"{what} begins at byte {each.start} of the data, no multiple of {alignment}")
        if each.start < reached:
            _bad(
                path, f"{what} begins at byte {each.start} of the data and overlaps {previous}, which ends at {reached}"
            )
        reached, previous = each.start + each.nbytes, what
        if begin + reached > len(data):
            _bad(path, f"{what} ends at byte {begin + reached}, and the file at {len(data)}")
    found: dict[str, Any] = {}
    for each in claims:
        if each.name in found:
            _bad(path, f"tensor {_short(each.name)} is there twice")
        found[each.name] = _array(each, data[begin + each.start : begin + each.start + each.nbytes])
    return found


def _array(claim: _Claim, raw: np.ndarray) -> Any:
    if claim.kind in QUANTIZED:
        return Blocks(claim.kind, raw.reshape(*claim.shape[:-1], -1))
    dtype = _PLAIN[claim.kind]
    aligned = raw if raw.ctypes.data % dtype.itemsize == 0 else raw.copy()
    return aligned.view(dtype).reshape(claim.shape)


def _bad(path: Path, what: str) -> NoReturn:
    raise CheckpointError(f"{path}: {what}; {_AGAIN}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
