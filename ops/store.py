"""Disk caches: files with their digests, shared by processes, bounded in size.

`kernels` keeps compiled kernels, `weights` packed weights. `LIMPID_CACHE` names the folder of both (default: `limpid`
in the user's cache folder; "off" switches them off); `LIMPID_CACHE_LIMIT` and `LIMPID_WEIGHTS_LIMIT` are their sizes in
MiB.
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
    """One cached file."""

    key: str
    what: str
    bytes: int
    used: float  # seconds since the epoch


@dataclass(frozen=True)
class Store:
    """A cache in the folder `name`. `setting` names the environment's variable for its size, `default` is in MiB.

    A `whole` file is read and compared with its digest each time; of a mapped one only the size is compared.
    """

    name: str
    setting: str
    default: int
    whole: bool

    def directory(self) -> Path | None:
        """The folder of the files, or None when the cache is off."""
        named = os.environ.get("LIMPID_CACHE", "")
        if named.lower() == "off":
            return None
        base = Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "limpid"
        return base / self.name

    def limit(self) -> int:
        """How many bytes the files may take."""
        given = os.environ.get(self.setting, str(self.default))
        try:
            return int(float(given) * 2**20)
        except (ValueError, OverflowError):
            raise OpError(f"{self.setting} is {given!r}, expected a number of MiB") from None

    @contextlib.contextmanager
    def locked(self, key: str) -> Iterator[None]:
        """Only one process at a time works on `key`; without a writable cache there is nothing to lock."""
        folder = self._writable()
        if folder is None:
            yield
            return
        with open(folder / f"{key[:2]}.lock", "a") as file:
            with contextlib.suppress(OSError):  # a file system without locks: the work is done twice, nothing worse
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _writable(self) -> Path | None:
        folder = self.directory()
        if folder is None:
            return None
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            return None
        return folder if os.access(folder, os.W_OK) else None

    def has(self, key: str) -> bool:
        """True when `key` seems to be there; `find` makes sure."""
        folder = self.directory()
        return folder is not None and (folder / f"{key}.json").exists()

    def find(self, key: str) -> tuple[Path | None, str]:
        """The file of `key`, checked against its digest, or None and the reason why there is none."""
        folder = self.directory()
        if folder is None:
            return None, "the disk cache is off"
        record = folder / f"{key}.json"
        try:
            kept = json.loads(record.read_text())
            path = folder / (key + kept["suffix"])
            if self._digest(path) != kept["digest"]:
                raise ValueError("digest")
        except (FileNotFoundError, NotADirectoryError):
            return None, "not in the disk cache"
        except (OSError, ValueError, KeyError, TypeError):
            _remove(folder, key)
            return None, "the cache entry was damaged"
        with contextlib.suppress(OSError):  # somebody else's cache serves, but keeps no record of it
            os.utime(record)
        return path, ""

    def _digest(self, path: Path) -> str:
        return hashlib.sha256(path.read_bytes()).hexdigest() if self.whole else str(path.stat().st_size)

    def put(self, key: str, what: str, write: Callable[[Path], Path]) -> None:
        """Keep the file that `write(folder)` writes there. Atomic; a full or read-only disk only means no cache."""
        folder = self._writable()
        if folder is None:
            return
        try:
            with tempfile.TemporaryDirectory(dir=folder) as work:
                path = write(Path(work))
                record = Path(work) / "record.json"
                record.write_text(json.dumps({"what": what, "digest": self._digest(path), "suffix": path.suffix}))
                size = path.stat().st_size  # while nobody else can remove it
                path.replace(folder / f"{key}{path.suffix}")
                record.replace(folder / f"{key}.json")  # last: an entry without its record does not exist
        except OSError:
            _remove(folder, key)
            return
        limit = self.limit()
        _unchecked[folder] = _unchecked.get(folder, limit) + size  # nobody knows what was there before
        if _unchecked[folder] > limit // 64:
            _unchecked[folder] = 0
            self._trim(folder, keep=key)

    def keep(self, name: str, text: str) -> None:
        """Keep a short text under a name of its own, atomically, where the cache can be written."""
        folder = self._writable()
        with contextlib.suppress(OSError):
            if folder is not None:
                with tempfile.TemporaryDirectory(dir=folder) as work:
                    (Path(work) / name).write_text(text)
                    (Path(work) / name).replace(folder / name)

    def entries(self) -> list[Entry]:
        """What is cached, the latest used first."""
        folder = self.directory()
        found = []
        for record in folder.glob("*.json") if folder else ():
            try:
                kept, status = json.loads(record.read_text()), record.stat()
                size = status.st_size + record.with_suffix(kept["suffix"]).stat().st_size
                found.append(Entry(record.stem, kept["what"], size, status.st_mtime))
            except (OSError, ValueError, KeyError, TypeError):
                continue  # another process is removing it, or `find` will
        return sorted(found, key=lambda entry: -entry.used)

    def _trim(self, folder: Path, keep: str) -> None:
        """Remove the least recently used files above the limit."""
        total = 0
        for entry in self.entries():
            total += entry.bytes
            if total > self.limit() and entry.key != keep:
                _remove(folder, entry.key)

    def clear(self) -> int:
        """Remove every cached file; gives how many there were. Running processes keep theirs in memory."""
        folder, count = self.directory(), len(self.entries())
        for path in folder.iterdir() if folder and folder.exists() else ():
            if path.suffix in (".so", ".ll", ".safetensors", ".json", ".digest", ".lock"):
                path.unlink(missing_ok=True)
            elif path.is_dir():  # left behind by a process that was killed
                shutil.rmtree(path, ignore_errors=True)
        return count


_unchecked: dict[Path, int] = {}  # bytes that this process put into a folder since it last added up all that is there


def _remove(folder: Path, key: str) -> None:
    for path in (folder / f"{key}.json", *folder.glob(f"{key}.*")):  # the record goes first
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


kernels = Store("kernels", "LIMPID_CACHE_LIMIT", default=1024, whole=True)
weights = Store("weights", "LIMPID_WEIGHTS_LIMIT", default=65536, whole=False)
