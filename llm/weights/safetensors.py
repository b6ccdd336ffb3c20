"""The safetensors format, read by memory map and written by streaming: <https://github.com/huggingface/safetensors>.

A file is an 8-byte little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, and the data.
The file is untrusted, so every claim of the header is checked before an array is made from it.
"""

import contextlib
import json
import math
import mmap
import os
import secrets
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import ml_dtypes
import numpy as np

from llm.errors import CheckpointError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_MAX_HEADER = 100_000_000
_MAX_DIMS = 64
_ALIGN = 64
# Without it Linux refuses a writable private map that is larger than memory. Python names it from 3.13 on.
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
_AGAIN = "the file is damaged or incomplete: download it again"


def read_file(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Every tensor of one file, as writable copy-on-write views of one memory map, in the order of their data.

    DLPack refuses read-only arrays, hence writable; a write stays in memory and never reaches the file. A tensor
    whose offset in the file is not a multiple of its item size is copied. Raises CheckpointError, naming the file and
    the tensor, for anything the format does not allow; all tensors that a truncated file lacks are in one error.
    """
    path = Path(path)
    data = map_file(path)
    start, header = _header(path, data)
    entries = {name: _entry(path, name, entry) for name, entry in header.items()}
    spans = sorted((begin, end, name) for name, (_, _, begin, end) in entries.items())
    if beyond := [name for _, end, name in spans if start + end > len(data)]:
        last = start + spans[-1][1]
        _bad(path, None, f"its data end at byte {last}, but the file has {len(data)}: it lacks {_some(beyond)}")
    tensors = {
        name: _view(path, name, data[start + begin : start + end], dtype, shape, start + begin)
        for name, (dtype, shape, begin, end) in entries.items()
    }
    _contiguous(path, spans, len(data) - start)
    return {name: tensors[name] for _, _, name in spans}


def read_directory(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Every tensor of a checkpoint directory: `model.safetensors`, or the shards that the index lists. Lazy: mapped.

    Raises CheckpointError for a directory without safetensors weights, and when shards are missing, damaged, or
    disagree with the index in any way: one error that lists them. Pickles are never loaded.
    """
    path = Path(path)
    if (path / SINGLE).is_file():
        return read_file(path / SINGLE)
    if not (path / INDEX).is_file():
        _no_weights(path)
    weight_map = _weight_map(path / INDEX)
    shards = sorted(set(weight_map.values()))
    missing = [shard for shard in shards if not (path / shard).is_file()]
    problems = [f"{len(missing)} of {len(shards)} shards missing: {_some(missing)}"] if missing else []
    found: dict[str, np.ndarray] = {}
    for shard in sorted({*shards} - {*missing}):
        try:
            tensors = read_file(path / shard)
        except CheckpointError as error:
            problems.append(str(error).removeprefix(f"{path}{os.sep}").removesuffix(f"; {_AGAIN}"))
            continue
        placed = {name for name, place in weight_map.items() if place == shard}
        if lacking := sorted(placed - tensors.keys()):
            problems.append(f"{shard} lacks {_some(lacking)}")
        if stray := sorted(name for name in tensors.keys() - placed if name not in weight_map):
            problems.append(f"{shard} holds {_some(stray)}, which the index does not list")
        if twice := sorted(name for name in tensors.keys() - placed if name in weight_map):
            problems.append(f"{shard} holds {_some(twice)}, which the index places in another shard")
        found |= {name: tensors[name] for name in tensors if name in placed}
    if problems:
        more = f"; and {len(problems) - 10} more such faults" if len(problems) > 10 else ""
        raise CheckpointError(
            f"{path / INDEX} does not fit its shards: {'; '.join(problems[:10])}{more}; download them again"
        )
    return found


def checkpoint_files(path: Path) -> list[Path]:
    """The files that `read_directory` reads of a directory that it has read."""
    single = path / SINGLE
    return [single] if single.is_file() else [path / shard for shard in sorted({*_weight_map(path / INDEX).values()})]


def write_file(
    path: str | os.PathLike[str],
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] = {"format": "pt"},
) -> None:
    """Write `tensors` to one file, atomically: the old file stays until the new one is complete and on disk.

    Arrays are streamed, not collected: only one that is not C-contiguous is copied, while it is written. The data
    begin at a multiple of 64 bytes, wide items first, so every tensor is aligned to its item size.
    Raises CheckpointError for a dtype that the format lacks, and for a name or metadata that it cannot hold; OSError
    when the file system refuses.
    """
    path = Path(path)
    # A stable sort: the caller's order is kept among items of one width.
    order = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    if not all(isinstance(text, str) for pair in metadata.items() for text in pair):
        raise CheckpointError(f"{path}: metadata must map str to str, given {dict(metadata)!r}")
    offset = 0
    for name in order:
        array = tensors[name]
        if name == "__metadata__" or array.dtype not in _CODES:
            known = ", ".join(str(dtype) for dtype in _CODES)
            raise CheckpointError(
                f"{path}: tensor {name!r} of dtype {array.dtype} cannot be stored: the name must not be "
                f"'__metadata__', the dtype one of {known}"
            )
        end = offset + array.nbytes
        header[name] = {"dtype": _CODES[array.dtype], "shape": list(array.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGN)
    if len(text) > _MAX_HEADER:
        raise CheckpointError(
            f"{path}: the header takes {len(text)} bytes, the format allows {_MAX_HEADER}: use shards"
        )
    with _replacing(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(np.ascontiguousarray(tensors[name]).reshape(-1).view(np.uint8).data)


def write_directory(
    path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray], max_shard_bytes: int = 5 * 2**30
) -> None:
    """Write `tensors` as `model.safetensors`, or when they exceed `max_shard_bytes` as shards and their index.

    The directory is made if need be; an existing `model.safetensors` is replaced by another. Raises CheckpointError
    where other weights lie already, as old and new shards must not mix. On an error no new file is left.
    """
    path = Path(path)
    shards = _split(tensors, max_shard_bytes)
    path.mkdir(parents=True, exist_ok=True)
    present = {file.name for file in path.glob("model*.safetensors*")} - ({SINGLE} if len(shards) == 1 else set())
    if present:
        raise CheckpointError(f"{path} holds other weights already: {_some(sorted(present))}; remove them first")
    if len(shards) == 1:
        return write_file(path / SINGLE, tensors)
    weight_map: dict[str, str] = {}
    written: list[Path] = []
    try:
        for number, names in enumerate(shards, 1):
            shard = path / f"model-{number:05}-of-{len(shards):05}.safetensors"
            write_file(shard, {name: tensors[name] for name in names})
            written.append(shard)
            weight_map |= dict.fromkeys(names, shard.name)
        total = sum(array.nbytes for array in tensors.values())
        with _replacing(path / INDEX) as file:
            file.write(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2).encode())
    except BaseException:
        for shard in written:
            shard.unlink(missing_ok=True)
        raise


def map_file(path: str | os.PathLike[str]) -> np.ndarray:
    """The bytes of a file: uint8 [size], memory-mapped copy-on-write. Raises CheckpointError if it cannot be opened."""
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise CheckpointError(f"{path} is empty: download it again")
            flags = mmap.MAP_PRIVATE | _NO_RESERVE
            return np.frombuffer(mmap.mmap(file.fileno(), 0, flags, mmap.PROT_READ | mmap.PROT_WRITE), np.uint8)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error


def _header(path: Path, data: np.ndarray) -> tuple[int, dict[str, Any]]:
    """Where the data start, and the header without its metadata."""
    if len(data) < 8:
        _bad(path, None, f"{len(data)} bytes, a safetensors file has at least 8")
    length = int.from_bytes(data[:8].tobytes(), "little")
    if length > _MAX_HEADER or 8 + length > len(data):
        limit = min(_MAX_HEADER, len(data) - 8)
        _bad(path, None, f"its header claims {length} bytes, at most {limit} are possible (is it a safetensors file?)")
    try:
        header = json.loads(data[8 : 8 + length].tobytes().decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise CheckpointError(f"{path}: the header is not the JSON that was expected: {reason}; {_AGAIN}") from error
    if not isinstance(header, dict):
        _bad(path, None, f"the header is a JSON {type(header).__name__}, an object was expected")
    metadata = header.pop("__metadata__", {})
    if not (isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())):
        _bad(path, None, "__metadata__ does not map strings to strings")
    return 8 + length, header


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise ValueError(f"duplicate keys {_some(name for name, count in counts.items() if count > 1)}")
    return result


def _entry(path: Path, name: str, entry: Any) -> tuple[np.dtype[Any], list[int], int, int]:
    """One header entry, checked by itself: dtype, shape, begin, end."""
    if not (isinstance(entry, dict) and entry.keys() == {"dtype", "shape", "data_offsets"}):
        _bad(path, name, f"its entry is {_short(entry)}, an object of dtype, shape and data_offsets was expected")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        raise CheckpointError(f"{path}: tensor {name!r} has dtype {_short(code)}; known are {', '.join(DTYPES)}")
    if not (_naturals(shape) and len(shape) <= _MAX_DIMS):
        _bad(path, name, f"shape {_short(shape)} is not a list of at most {_MAX_DIMS} integers in [0, 2**63)")
    if not (_naturals(offsets) and len(offsets) == 2 and offsets[0] <= offsets[1]):
        _bad(path, name, f"data_offsets {_short(offsets)} are not [begin, end] with 0 <= begin <= end")
    begin, end = offsets
    want = math.prod(shape) * DTYPES[code].itemsize
    if end - begin != want:
        _bad(path, name, f"data_offsets span {end - begin} bytes, shape {_short(shape)} of {code} takes {_short(want)}")
    return DTYPES[code], shape, begin, end


def _view(path: Path, name: str, raw: np.ndarray, dtype: np.dtype[Any], shape: list[int], offset: int) -> np.ndarray:
    if dtype == np.bool_ and raw.size and raw.max() > 1:
        _bad(path, name, f"a BOOL byte is {raw.max()}, expected 0 or 1")
    # The map begins on a page, so the offset in the file decides the alignment.
    aligned = raw if offset % dtype.itemsize == 0 else raw.copy()
    try:
        return aligned.view(dtype).reshape(shape)
    except ValueError as error:  # only for an empty tensor, whose other dimensions can exceed what an index holds
        raise CheckpointError(f"{path}: tensor {name!r} has the impossible shape {_short(shape)}; {_AGAIN}") from error


def _contiguous(path: Path, spans: list[tuple[int, int, str]], size: int) -> None:
    """The sorted spans cover the data exactly: no overlap, no hole, nothing after the last."""
    reached, previous = 0, "the start"
    for begin, end, name in spans:
        if begin != reached:
            fault = "overlaps" if begin < reached else "leaves a hole after"
            _bad(path, name, f"begins at byte {begin} and {fault} {previous}, which ends at {reached}")
        reached, previous = end, repr(name)
    if reached != size:
        _bad(path, None, f"{size} bytes of data, the header accounts for {reached}")


def _weight_map(path: Path) -> dict[str, str]:
    """tensor -> shard: a plain file name. What it links to may lie elsewhere, as in the cache of the Hub."""
    try:
        index = json.loads(path.read_text("utf-8"), object_pairs_hook=_no_duplicates)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a readable JSON index: {_short(error)}; {_AGAIN}") from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        _bad(path, None, "no weight_map from tensor names to file names")
    if outside := sorted(
        {s for s in weight_map.values() if os.path.basename(s) != s or s in ("", ".", "..") or "\0" in s}
    ):
        raise CheckpointError(f"{path}: shards must be files beside the index, given {_some(outside)}; do not trust it")
    return weight_map


def _no_weights(path: Path) -> NoReturn:
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a directory: give the directory of {SINGLE} or {INDEX}")
    pickles = sorted(file.name for file in path.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickles:
        raise CheckpointError(
            f"{path} has only pickles ({_some(pickles)}), which can run code and are never loaded: "
            f"get the model's safetensors, or convert it with save_pretrained(..., safe_serialization=True)"
        )
    names = sorted(file.name for file in path.iterdir())
    raise CheckpointError(f"{path} has neither {SINGLE} nor {INDEX}; it holds {_some(names) or 'nothing'}")


def _split(tensors: Mapping[str, np.ndarray], limit: int) -> list[list[str]]:
    """The names in order, cut where the next tensor would exceed the limit; a larger tensor is alone in its shard."""
    shards: list[list[str]] = [[]]
    used = 0
    for name, array in tensors.items():
        if shards[-1] and used + array.nbytes > limit:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += array.nbytes
    return shards


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file beside `path` that takes its name once it is written and synced, and is removed on an error."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)  # the rename itself must survive a crash
    finally:
        os.close(directory)


def _bad(path: Path, name: str | None, what: str) -> NoReturn:
    raise CheckpointError(f"{path}: {f'tensor {name!r}: ' if name is not None else ''}{what}; {_AGAIN}")


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else str(value) if isinstance(value, Exception) else repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


def _some(names: Iterable[str]) -> str:
    """At most ten names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(repr(name) for name in names[:10]) + more
