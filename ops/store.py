"""The disk cache of compiled kernels: files with their digests, shared by processes, bounded in size.

`LIMPID_CACHE` names the folder (default: `limpid` in the user's cache folder; "off" switches it off) and
`LIMPID_CACHE_LIMIT` its size in MiB (default 1024).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .errors import OpError


@dataclass(frozen=True)
class Entry:
    """One cached kernel."""

    key: str
    what: str
    bytes: int
    used: float  # seconds since the epoch


def directory() -> Path | None:
    """The folder of the kernels, or None when the cache is off."""
    named = os.environ.get("LIMPID_CACHE", "")
    if named.lower() == "off":
        return None
    base = Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "limpid"
    return base / "kernels"


def limit() -> int:
    """How many bytes the kernels may take."""
    given = os.environ.get("LIMPID_CACHE_LIMIT", "1024")
    try:
        return int(float(given) * 2**20)
    except ValueError:
        raise OpError(f"LIMPID_CACHE_LIMIT is {given!r}, expected a number of MiB") from None


@contextlib.contextmanager
def locked(key: str) -> Iterator[None]:
    """Only one process at a time works on `key`; without a writable cache there is nothing to lock."""
    folder = _writable()
    if folder is None:
        yield
        return
    with open(folder / f"{key[:2]}.lock", "a") as file:
        with contextlib.suppress(OSError):  # a file system without locks: the work is done twice, nothing worse
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _writable() -> Path | None:
    folder = directory()
    if folder is None:
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK) else None


def has(key: str) -> bool:
    """True when `key` seems to be there; `find` makes sure."""
    folder = directory()
    return folder is not None and (folder / f"{key}.json").exists()


def find(key: str) -> tuple[Path | None, str]:
    """The file of `key`, checked against its digest, or None and the reason why there is none."""
    folder = directory()
    if folder is None:
        return None, "the disk cache is off"
    record = folder / f"{key}.json"
    try:
        kept = json.loads(record.read_text())
        path = folder / (key + kept["suffix"])
        if hashlib.sha256(path.read_bytes()).hexdigest() != kept["digest"]:
            raise ValueError("digest")
    except (FileNotFoundError, NotADirectoryError):
        return None, "not in the disk cache"
    except (OSError, ValueError, KeyError, TypeError):
        _remove(folder, key)
        return None, "the cache entry was damaged"
    with contextlib.suppress(OSError):  # somebody else's cache serves, but keeps no record of it
        os.utime(record)
    return path, ""


def put(key: str, what: str, write: Callable[[Path], Path]) -> None:
    """Keep the file that `write(folder)` writes there. Atomic; a full or read-only disk only means no cache."""
    folder = _writable()
    if folder is None:
        return
    try:
        with tempfile.TemporaryDirectory(dir=folder) as work:
            path = write(Path(work))
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            record = Path(work) / "kernel.json"
            record.write_text(json.dumps({"what": what, "digest": digest, "suffix": path.suffix}))
            path.replace(folder / f"{key}{path.suffix}")
            record.replace(folder / f"{key}.json")  # last: an entry without its record does not exist
    except OSError:
        _remove(folder, key)
        return
    _trim(folder, keep=key)


def _remove(folder: Path, key: str) -> None:
    for path in (folder / f"{key}.json", *folder.glob(f"{key}.*")):  # the record goes first
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def entries() -> list[Entry]:
    """What is cached, the latest used first."""
    folder = directory()
    found = []
    for record in folder.glob("*.json") if folder else ():
        try:
            kept, status = json.loads(record.read_text()), record.stat()
            size = status.st_size + record.with_suffix(kept["suffix"]).stat().st_size
            found.append(Entry(record.stem, kept["what"], size, status.st_mtime))
        except (OSError, ValueError, KeyError, TypeError):
            continue  # another process is removing it, or `find` will
    return sorted(found, key=lambda entry: -entry.used)


def _trim(folder: Path, keep: str) -> None:
    """Remove the least recently used kernels above the limit."""
    total = 0
    for entry in entries():
        total += entry.bytes
        if total > limit() and entry.key != keep:
            _remove(folder, entry.key)


def clear() -> int:
    """Remove every cached kernel; gives how many there were. Running processes keep theirs in memory."""
    folder, count = directory(), len(entries())
    for path in folder.iterdir() if folder and folder.exists() else ():
        if path.suffix in (".so", ".ll", ".json", ".lock"):
            path.unlink(missing_ok=True)
        elif path.is_dir():  # left behind by a process that was killed
            shutil.rmtree(path, ignore_errors=True)
    return count
