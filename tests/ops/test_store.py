"""The disk cache by itself: what is written, found, mistrusted, and thrown away."""

import json
import os
import time
from pathlib import Path

import pytest

from ops import OpError
from ops.store import kernels as store

KEY = "ab" + "0" * 30


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LIMPID_CACHE", str(tmp_path))
    monkeypatch.delenv("LIMPID_CACHE_LIMIT", raising=False)
    return tmp_path / "kernels"


def put(key: str = KEY, content: bytes = b"machine code", what: str = "double(x=float32[n])") -> None:
    def write(folder: Path) -> Path:
        (folder / "kernel.so").write_bytes(content)
        return folder / "kernel.so"

    store.put(key, what, write)


def test_put_and_find(folder):
    assert store.find(KEY) == (None, "not in the disk cache") and not store.has(KEY)
    put()
    assert store.find(KEY) == (folder / f"{KEY}.so", "") and store.has(KEY)
    assert (folder / f"{KEY}.so").read_bytes() == b"machine code"
    assert {each.name for each in folder.iterdir()} == {f"{KEY}.so", f"{KEY}.json"}, "no temporary files stay"
    (entry,) = store.entries()
    assert (entry.key, entry.what) == (KEY, "double(x=float32[n])") and entry.bytes > 12


@pytest.mark.parametrize(
    "damage",
    [
        lambda o, record: o.write_bytes(b"machine c0de"),
        lambda o, record: o.write_bytes(b""),
        lambda o, record: record.write_text(""),
        lambda o, record: record.write_text("{"),
        lambda o, record: record.write_text("[]"),
        lambda o, record: record.write_text("{}"),
        lambda o, record: record.write_bytes(b"\xff\xfe\x00"),
        lambda o, record: record.write_text(json.dumps({"digest": 3, "what": "x", "suffix": ".so"})),
    ],
)
def test_a_damaged_entry_is_found_out_and_removed(folder, damage):
    put()
    damage(folder / f"{KEY}.so", folder / f"{KEY}.json")
    assert store.find(KEY) == (None, "the cache entry was damaged")
    assert not list(folder.iterdir()) and store.find(KEY) == (None, "not in the disk cache")


def test_an_entry_without_its_object(folder):
    put()
    (folder / f"{KEY}.so").unlink()
    assert store.find(KEY) == (None, "not in the disk cache")
    put()
    assert store.find(KEY)[0] is not None


def test_off(monkeypatch):
    monkeypatch.setenv("LIMPID_CACHE", "Off")
    put()
    assert store.directory() is None and not store.has(KEY)
    assert store.find(KEY) == (None, "the disk cache is off")
    assert store.entries() == [] and store.clear() == 0
    with store.locked(KEY):
        pass


def test_where_it_is(monkeypatch, tmp_path):
    assert store.directory() == tmp_path / "kernels"
    monkeypatch.delenv("LIMPID_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert store.directory() == tmp_path / "xdg/limpid/kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert store.directory() == tmp_path / ".cache/limpid/kernels"


def test_the_least_recently_used_go_first(folder, monkeypatch):
    monkeypatch.setenv("LIMPID_CACHE_LIMIT", str(3.5 * 100_000 / 2**20))
    keys = [f"{i}" * 32 for i in range(5)]
    now = time.time()
    for age, key in enumerate(keys[:3]):
        put(key, bytes(100_000))
        os.utime(folder / f"{key}.json", (now - 100 + age, now - 100 + age))
    assert store.find(keys[0])[0], "found means used"
    put(keys[3], bytes(100_000))
    assert {entry.key for entry in store.entries()} == {keys[0], keys[2], keys[3]}
    put(keys[4], bytes(900_000))
    assert [entry.key for entry in store.entries()] == [keys[4]], "the new one stays even when it alone is too large"


def test_a_limit_that_is_no_number(monkeypatch):
    monkeypatch.setenv("LIMPID_CACHE_LIMIT", "lots")
    with pytest.raises(OpError, match="LIMPID_CACHE_LIMIT is 'lots', expected a number of MiB"):
        store.limit()


def test_clear(folder):
    put()
    put("cd" + "0" * 30)
    with store.locked(KEY):
        pass
    (folder / "tmpleft").mkdir()
    (folder / "tmpleft/kernel.so").write_bytes(b"half")
    (folder / "note.txt").write_text("not ours")
    assert store.clear() == 2
    assert [each.name for each in folder.iterdir()] == ["note.txt"]


def test_a_full_disk_means_no_cache(folder):
    def full(path):
        (path / "kernel.so").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    store.put(KEY, "double", full)
    assert store.find(KEY) == (None, "not in the disk cache") and not list(folder.iterdir())


def test_another_error_while_writing_is_not_hidden(folder):
    def broken(path):
        (path / "kernel.so").write_bytes(b"half")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        store.put(KEY, "double", broken)
    assert not list(folder.iterdir()), "nothing partial stays"


def test_a_folder_that_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LIMPID_CACHE", str(tmp_path / "file"))
    put()
    assert store.find(KEY) == (None, "not in the disk cache") and not store.has(KEY)
    with store.locked(KEY):
        pass


def test_a_cache_of_somebody_else_serves(folder, monkeypatch):
    put()

    def refused(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "utime", refused)
    assert store.find(KEY) == (folder / f"{KEY}.so", "")


def test_a_file_system_without_locks(folder, monkeypatch):
    def unsupported(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("ops.store.fcntl.flock", unsupported)
    with store.locked(KEY):
        put()
    assert store.find(KEY)[0] is not None
