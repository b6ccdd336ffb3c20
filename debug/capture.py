"""Crash capture: what a call is given is in a file before it is launched, and void once it returns."""

from __future__ import annotations

import atexit
import itertools
import json
import os
import threading
import warnings
import weakref
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ops
from ops import Call, Spec, Tensor

from . import archive, bundle
from .slot import Slot

_KEPT = 1024  # bytes from which on a tensor that comes again is written once
_REMEMBERED = 8192  # kinds of calls
_NUMBER = "the pass"


class Known:
    """A tensor that was seen: when, and its members in the slot once it is kept there, by their names."""

    __slots__ = ("begin", "end", "entries", "number", "tensor")

    def __init__(self, tensor: Tensor, number: int):
        self.tensor, self.number = weakref.ref(tensor), number
        self.begin = tensor.buffer.data.data_ptr()
        self.end = self.begin + tensor.nbytes
        self.entries: dict[bytes, bytes] = {}


class Input(NamedTuple):
    """A tensor of a call: which argument, its member in the bundle, what stands before its bytes there."""

    at: int
    name: bytes
    head: bytes
    nbytes: int


class Shelf:
    """The slot of a thread, at one depth of calls within calls, and the tensors that are kept in it."""

    def __init__(self, path: Path, limit: int):
        self.slot, self._limit = Slot(path), limit
        self._full = False
        self._texts: dict[tuple[bytes, bytes], bytes] = {}
        self._known: dict[int, Known] = {}
        self._written: dict[int, int] = {}  # memory that ops write, by where it begins: where it ends

    def fill(self, call: Call, manifest: bytes, texts: list[tuple[bytes, bytes]], inputs: list[Input]) -> None:
        """Make the slot the bundle of a call. Raises OverflowError when it is too large for one."""
        for tensor in call.written.values():
            self._note_written(tensor)
        if self._full:
            self._forget()
        slot, number = self.slot, call.scope.number
        slot.begin()
        written = [self._texts.get(each) or self._kept_text(each) for each in texts]
        kept = [self._kept(call.args[each.at], number, each) for each in inputs]
        slot.begin()
        slot.add(b"manifest.json", manifest, 0, 0)
        for entry in written:
            slot.refer(entry)
        for each, entry in zip(inputs, kept, strict=True):
            if entry is not None:
                slot.refer(entry)
            else:
                slot.add(each.name, each.head, call.args[each.at].buffer.data.data_ptr(), each.nbytes)
        slot.close()

    def _kept_text(self, text: tuple[bytes, bytes]) -> bytes:
        """The entry of a text, which is written once."""
        self._texts[text] = self.slot.add(*text, 0, 0)
        self.slot.keep()
        return self._texts[text]

    def _kept(self, tensor: Tensor, number: int, given: Input) -> bytes | None:
        """The entry of a tensor that came in an earlier pass too, and that no op writes; None for others."""
        name, nbytes = given.name, given.nbytes
        if nbytes < _KEPT:
            return None
        known = self._known.get(id(tensor))
        if known is None or known.tensor() is not tensor:
            self._known[id(tensor)] = Known(tensor, number)
            if len(self._known) > _REMEMBERED:
                self._known = {at: each for at, each in self._known.items() if each.tensor() is not None}
            return None
        if name in known.entries:
            return known.entries[name]
        if known.number == number or self._overlaps(known) or nbytes > self._limit:
            return None
        if self.slot.kept + nbytes > self._limit:
            self._full = True
            return None
        known.entries[name] = self.slot.add(name, given.head, known.begin, nbytes)
        self.slot.keep()
        return known.entries[name]

    def _overlaps(self, known: Known) -> bool:
        return any(begin < known.end and known.begin < end for begin, end in self._written.items())

    def _note_written(self, tensor: Tensor) -> None:
        begin = tensor.buffer.data.data_ptr()
        end = begin + tensor.nbytes
        if self._written.get(begin, 0) < end:
            if len(self._written) > _REMEMBERED:
                self._written.clear()
            self._written[begin] = end
            for known in self._known.values():
                if begin < known.end and known.begin < end:
                    known.entries.clear()

    def _forget(self) -> None:
        """Begin afresh: some that are kept may be in use no more."""
        self.slot.kept, self._full = 0, False
        self._texts.clear()
        for known in self._known.values():
            known.entries.clear()


class Here:
    """How deep a thread is in calls within calls, and a shelf for each depth so far."""

    def __init__(self, process: int):
        self.process, self.depth = process, 0
        self.shelves: list[Shelf] = []


class Capture(ops.Interceptor):
    """What `repro.arm` gives: a handle, and a context manager that disarms."""

    def __init__(self, folder: Path, limit: int):
        self.folder, self.on = folder, True
        self._limit, self._counter = limit, itertools.count()
        self._prepared: dict[tuple, tuple] = {}
        self._tir: dict[tuple, str] = {}
        self._shelves: list[Shelf] = []
        self._thread = threading.local()
        folder.mkdir(parents=True, exist_ok=True)
        _clean(folder)
        self._handle = ops.install(self, innermost=True)
        atexit.register(self.remove)

    def call(self, call: Call, launch: Callable[[Call], Any]) -> Any:
        here = self._here()
        shelf, outer = here.shelves[here.depth], here.shelves[here.depth - 1] if here.depth else None
        ops.device.wait(call.device)  # its memory is copied
        try:
            shelf.fill(call, *self._members(call))
        except OverflowError:
            warnings.warn(f"{call.full_address} is too large for crash capture", RuntimeWarning, stacklevel=2)
            return launch(call)
        if outer is not None:
            outer.slot.clear()  # the innermost call is the one that would have killed the process
        here.depth += 1
        try:
            output = launch(call)
            ops.device.wait(call.device)  # a kernel that is only started may still fail
            return output
        finally:
            here.depth -= 1
            shelf.slot.clear()
            if outer is not None:
                outer.slot.close()

    def remove(self) -> None:
        """Switch it off, and remove the files. Once or more often."""
        self._handle.remove()
        atexit.unregister(self.remove)
        self.on = False
        shelves, self._shelves = self._shelves, []
        for shelf in shelves:
            if shelf.slot.path.name.startswith(f"crash-{os.getpid()}-"):  # not those of the process we come from
                shelf.slot.remove()

    def __enter__(self) -> Capture:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _here(self) -> Here:
        """Where this thread of this process is; there is a shelf for the call at hand."""
        here, process = getattr(self._thread, "here", None), os.getpid()
        if here is None or here.process != process:
            here = self._thread.here = Here(process)
        if len(here.shelves) <= here.depth:
            shelf = Shelf(self.folder / f"crash-{process}-{next(self._counter)}.zip", self._limit)
            here.shelves.append(shelf)
            self._shelves.append(shelf)
        return here

    def _members(self, call: Call) -> tuple[bytes, list[tuple[bytes, bytes]], list[Input]]:
        """The manifest of a call's bundle, the texts by member, and its tensors.

        But for the number of the pass, calls that differ in the values of tensors have them in common.
        """
        use = call.op.used_for(call)
        given = tuple(each.spec if type(each) is Tensor else each for each in call.args)
        key = (call.op, call.scope.path, call.ordinal, given, *call.constants.items(), use and use.kernel)
        found = self._prepared.get(key)
        if found is None:
            if len(self._prepared) > _REMEMBERED:
                self._prepared.clear()
            found = self._prepared[key] = self._prepare(call, given)
        before, after, texts, inputs = found
        return b"%b%d%b" % (before, call.scope.number, after), texts, inputs

    def _prepare(self, call: Call, given: tuple) -> tuple[bytes, bytes, list, list]:
        kernel, source = bundle.described_kernel(call)
        plain = bundle.manifest(call, call.source, kernel, {}) | {"pass": _NUMBER}
        before, after = json.dumps(plain).encode().split(f'"{_NUMBER}"'.encode())
        request = call.op.plan(call.args, call.constants).request()
        kind = (call.op, request.specs, *call.constants.items())
        texts = bundle.texts(call, source, self._tir.get(kind))
        self._tir[kind] = texts.get("kernel.tir", "")
        inputs = [
            Input(at, archive.member("inputs", name).encode(), archive.head(name, spec), spec.nbytes)
            for at, (name, spec) in enumerate(zip(call.op.parameters, given, strict=False))
            if isinstance(spec, Spec)
        ]
        return before, after, [(name.encode(), text.encode()) for name, text in texts.items()], inputs


def _clean(folder: Path) -> None:
    """Remove the files of processes that ended between two calls."""
    for path in folder.glob("crash-*-*.zip"):
        process = path.name.split("-")[1]
        if process.isdigit() and not zipfile.is_zipfile(path) and not _lives(int(process)):
            path.unlink(missing_ok=True)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
