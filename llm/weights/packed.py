"""Packed weights on disk: made once from a checkpoint, kept beside the compiled kernels, mapped on the next start."""

from __future__ import annotations

import contextvars
import functools
import hashlib
import inspect
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

import ops
from llm.errors import CheckpointError
from llm.weights.lazy import Lazy
from llm.weights.safetensors import map_file, read_file, write_file
from ops import Spec, Tensor, memory, quantize, store, target
from ops.progress import tracked

_PIECE = 64 * 2**20  # bytes that a thread digests at a time
_SHOWN = 64 * 2**20  # elements above which packing shows its progress


def pack_all(
    wanted: Mapping[str, Spec], arrays: Mapping[str, np.ndarray], files: Sequence[Path], progress: bool = False
) -> dict[str, Tensor]:
    """The matrices `wanted` of a checkpoint's `arrays`, packed: mapped from the disk cache, else made and kept there.

    `files` are what the checkpoint consists of: their content is the cache's key, with the formats, this machine's
    layout and the source of what reads and packs. Raises CheckpointError for a weight that its format cannot hold.
    """
    key = _key(wanted, files)
    with store.weights.locked(key):
        path, _ = store.weights.find(key)
        found = _mapped(path, wanted) if path else None
        if found is None:
            found = _made(wanted, arrays, progress)
            formats = ", ".join(sorted({spec.dtype for spec in wanted.values()}))
            store.weights.put(key, f"{formats} of {files[0].parent.name}", functools.partial(_write, found))
    return {name: ops.tensor_from_packed(found[name], spec) for name, spec in wanted.items()}


def _mapped(path: Path, wanted: Mapping[str, Spec]) -> dict[str, np.ndarray] | None:
    """The bytes of all weights; None where the file does not hold them, which then is made again."""
    try:
        found = read_file(path)
    except CheckpointError:
        return None
    fits = all(name in found and found[name].shape == (spec.nbytes,) for name, spec in wanted.items())
    return found if fits else None


def _made(wanted: Mapping[str, Spec], arrays: Mapping[str, np.ndarray], progress: bool) -> dict[str, np.ndarray]:
    """Pack on all cores, the largest weights first."""
    order = sorted(wanted, key=lambda name: -wanted[name].nbytes)
    shown = progress and sum(spec.size for spec in wanted.values()) > _SHOWN

    def pack(name: str) -> np.ndarray:
        spec, array, out = wanted[name], arrays[name], memory.huge(wanted[name].nbytes)
        if isinstance(array, Lazy) and array.form == spec.dtype:
            return array.pack(spec.dtype, out)
        try:
            return quantize.pack(np.asarray(array), spec.dtype, out)
        except ops.DTypeError as error:
            raise CheckpointError(f"{name}: {error}; leave the weights as they are stored") from None

    here = [contextvars.copy_context() for _ in order]  # the machine to pack for is the caller's
    with ThreadPoolExecutor(target.threads()) as pool:
        packed = pool.map(lambda context, name: context.run(pack, name), here, order)
        results = tracked(packed, "Packing weights", total=len(order), shown=shown)
        return dict(zip(order, results, strict=True))


def _write(found: Mapping[str, np.ndarray], folder: Path) -> Path:
    path = folder / "packed.safetensors"
    write_file(path, found)
    return path


def _key(wanted: Mapping[str, Spec], files: Sequence[Path]) -> str:
    parts = [_digest(path) for path in files]
    parts += [f"{name} {spec.shape} {spec.format}" for name, spec in sorted(wanted.items())]
    parts += [f"lanes {target.lanes()}", inspect.getsource(quantize), *_readers()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


@functools.cache
def _readers() -> tuple[str, ...]:
    """The source of this package: what a file's numbers are taken to be."""
    return tuple(path.read_text("utf-8") for path in sorted(Path(__file__).parent.glob("*.py")))


def _digest(path: Path) -> str:
    """The digest of a file's content. It is kept by the file's place, size and time, and computed once."""
    status, folder = path.stat(), store.weights.directory()
    seen = f"{status.st_size} {status.st_mtime_ns} {status.st_ino}"
    place = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:32]
    kept = folder / f"{place}.digest" if folder else None
    try:
        known, digest = kept.read_text().split("\n") if kept else ("", "")
        if known == seen:
            return digest
    except (OSError, ValueError):
        pass  # not there, or not readable: it is computed
    data = map_file(path)
    with ThreadPoolExecutor(target.threads()) as pool:
        pieces = (data[start : start + _PIECE] for start in range(0, len(data), _PIECE))
        digests = pool.map(lambda piece: hashlib.sha256(piece).digest(), pieces)
        digest = hashlib.sha256(b"".join(digests)).hexdigest()
    store.weights.keep(f"{place}.digest", f"{seen}\n{digest}")
    return digest
