"""The file of a bundle: a zip archive of few known members, each read with a bound on its size, none ever extracted.

A tensor is a member of its own, in the format of safetensors, with one tensor in it; of a packed weight its bytes.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from ops import OpError, Spec

_NAMES = re.compile(r"manifest\.json|kernel\.(tir|py)|replay\.py|(inputs|results)/[A-Za-z_][\w-]*\.safetensors")
_MEMBERS = 256
_TEXT_LIMIT = 16 * 2**20
_SMALL = 64 * 2**20  # bytes that any archive may unpack to; beyond, at most so many times its own size:
_RATIO = 20
_KINDS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32", "int8": "I8", "uint8": "U8"}  # fmt: skip  # noqa: E501


def member(folder: str, name: str) -> str:
    """The member that holds a tensor."""
    return f"{folder}/{name.replace(' ', '-')}.safetensors"


def head(name: str, spec: Spec) -> bytes:
    """What stands before a tensor's bytes in a safetensors file."""
    kind, shape = ("U8", (spec.nbytes,)) if spec.format else (_KINDS[spec.dtype], spec.shape)
    described = {name: {"dtype": kind, "shape": shape, "data_offsets": [0, spec.nbytes]}}
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def write(path: Path, members: dict[str, list[Any]]) -> None:
    """Write an archive of members, each given in pieces, bytes or uint8 arrays; atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    work = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    try:
        with zipfile.ZipFile(work, "x", zipfile.ZIP_STORED) as archive:
            for name, pieces in members.items():
                info = zipfile.ZipInfo(name)
                with archive.open(info, "w", force_zip64=True) as file:
                    for piece in pieces:
                        file.write(piece)
        os.replace(work, path)
    finally:
        work.unlink(missing_ok=True)


def read(path: Path) -> dict[str, bytes]:
    """The members of an archive. Raises OpError for a file that is none, or that claims what a bundle does not."""
    try:
        with zipfile.ZipFile(path) as archive:
            _check(path, archive.infolist())
            found = {}
            for info in archive.infolist():
                with archive.open(info) as file:
                    found[info.filename] = file.read(info.file_size)
                    if len(found[info.filename]) != info.file_size or file.read(1):
                        raise OpError(f"{path}: {info.filename} is not as long as it claims")
            return found
    except (
        OSError,
        zipfile.BadZipFile,
        zlib.error,
        struct.error,
        EOFError,
        RuntimeError,
        NotImplementedError,
    ) as error:
        raise OpError(f"{path} is no bundle that can be read: {str(error) or type(error).__name__}") from error


def _check(path: Path, listed: list[zipfile.ZipInfo]) -> None:
    names = [info.filename for info in listed]
    strange = [name for name in names if not _NAMES.fullmatch(name)]
    if strange or len(set(names)) != len(names) or len(names) > _MEMBERS:
        raise OpError(f"{path} holds {strange[0]!r}, which is no part of a bundle" if strange else
                      f"{path} holds {len(names)} members, some of one name, or too many")  # fmt: skip
    for info in listed:
        if not info.filename.endswith(".safetensors") and info.file_size > _TEXT_LIMIT:
            raise OpError(f"{path}: {info.filename} claims {info.file_size} bytes, at most {_TEXT_LIMIT} are read")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or info.flag_bits & 1:
            raise OpError(f"{path}: {info.filename} is encrypted, or packed in a way that is not read")
    total, size = sum(info.file_size for info in listed), path.stat().st_size
    if total > max(_SMALL, _RATIO * size):
        raise OpError(
            f"{path} would unpack to {total} bytes, from {size}: more than {_RATIO} times as many are not read"
        )


def tensor_bytes(path: Path, name: str, data: bytes, spec: Spec) -> np.ndarray:
    """The bytes of the one tensor in a safetensors member, uint8 [spec.nbytes]."""
    try:
        ((_, found),) = safetensors.deserialize(data)
    except (safetensors.SafetensorError, ValueError) as error:
        raise OpError(f"{path}: {name} is no safetensors file of one tensor: {error}") from error
    if len(found["data"]) != spec.nbytes:
        raise OpError(f"{path}: {name} holds {len(found['data'])} bytes, {spec} has {spec.nbytes}")
    return np.frombuffer(bytearray(found["data"]), "uint8")
