"""What a child said when it died, boiled down to one sentence: what the kernel did, to which argument, and where."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

from ..languages.native import FOLDER
from .arena import Layout

_ERROR = re.compile(
    r"ERROR: AddressSanitizer: (?P<kind>.+?)(?: on (?:unknown )?address (?P<address>0x[0-9a-f]+)|[ :]0x|$)",
    re.MULTILINE,
)
_FRAME = re.compile(
    r"^ *#\d+ 0x[0-9a-f]+ in (?P<function>\S.*?) (?P<file>/[^:\n]*):(?P<line>\d+)(?::\d+)?$", re.MULTILINE
)
_ACCESS = re.compile(r"^(READ|WRITE) of size |caused by a (READ|WRITE) memory access", re.MULTILINE)
_GUARD = re.compile(r"^limpid: signal (\d+) address (0x[0-9a-f]+) stack ([01])$", re.MULTILINE)
_GUARD_FRAME = re.compile(r"^limpid: frame (?P<offset>0x[0-9a-f]+) of (?P<library>.+)$", re.MULTILINE)
_MEMORY = re.compile(r"requested allocation size (0x[0-9a-f]+)|trying to allocate (0x[0-9a-f]+) bytes")
_NULL = 1 << 16  # addresses below it are a null pointer and an index
_WORDS = {
    "use-after-poison": "{did} memory far from all its arrays",
    "heap-use-after-free": "{did} memory that was freed",
    "stack-use-after-scope": "{did} a local variable that is gone",
    "stack-use-after-return": "{did} a local variable of a function that has returned",
    "attempting double-free": "freed memory twice",
    "attempting free": "freed memory that was not allocated",
    "bad-free": "freed memory that was not allocated",
    "calloc-overflow": "asked for more memory than there can be",
    "negative-size-param": "copied a negative number of bytes",
    "stack-overflow": "overflowed the stack: recursion without an end, or a local array that is too large",
}
_SIGNALS = {
    "FPE": "divided an integer by zero (SIGFPE)",
    "ILL": "ran into an instruction that is none, or that this processor lacks (SIGILL)",
    "TRAP": "stopped at a trap (SIGTRAP)",
}


def printed(said: str) -> str:
    """What a kernel printed before anybody told of its death, without what the sanitizer remarks by the way."""
    own = re.split(r"^(?:=+\n==\d+==ERROR: |AddressSanitizer:|limpid: signal )", said, maxsplit=1, flags=re.MULTILINE)[
        0
    ]
    return re.sub(r"^==\d+==WARNING: .*\n", "", own, flags=re.MULTILINE)


@dataclass(frozen=True)
class Death:
    """How a child ended: what it printed, its exit status (a signal is negative), and what is known of the run."""

    said: str
    status: int
    base: int  # the address of the arena in the child
    layout: Layout
    library: str
    late: float | None = None  # the limit in seconds, when the parent ended it
    memory: int = 0  # bytes that it was allowed

    @property
    def sentence(self) -> str:
        if (error := _ERROR.search(self.said)) is not None:
            return f"the kernel {self._sanitized(error)}{self._where()}"
        if (guard := _GUARD.search(self.said)) is not None:
            stack = _WORDS["stack-overflow"] if guard[3] == "1" else ""
            return f"the kernel {stack or self._signalled(int(guard[1]), int(guard[2], 16), '')}{self._where()}"
        if (failed := re.search(r"AddressSanitizer: CHECK failed.*", self.said)) is not None:
            return f"the kernel could not be watched: {failed[0]}"
        if self.late is not None:
            return f"the kernel did not end within {self.late:g} s"
        if self.status >= 0:
            return f"the kernel called exit({self.status})"
        name = signal.Signals(-self.status).name
        reason = ": for want of memory, or by another program" if name == "SIGKILL" else ""
        return f"the kernel was ended by {name}{reason}"

    def _sanitized(self, error: re.Match[str]) -> str:
        kind, address = error["kind"].split(" on ", 1)[0], int(error["address"] or "-1", 16)
        access = _ACCESS.search(self.said)
        did = {"READ": "read", "WRITE": "wrote"}[access[1] or access[2]] if access else ""
        if (asked := _MEMORY.search(self.said)) is not None:
            size = int(asked[1] or asked[2], 16)
            return f"asked for {size} bytes of memory more; the sandbox gives {self.memory >> 20} MiB in all"
        if kind in ("SEGV", "BUS", "ABRT", "FPE", "ILL", "TRAP"):
            return self._signalled(signal.Signals[f"SIG{kind}"], address, did)
        if (slot := self.layout.nearest(address - self.base)) is not None:
            return slot.told(address - self.base, did or "touched")
        for name, words in _WORDS.items():
            if kind.startswith(name):
                return words.format(did=did)
        if "param-overlap" in kind:
            return f"copied between ranges that overlap, by {kind.split('-', 1)[0]}"
        return f"{did or 'went'} {self._beside()}" if kind.endswith(("overflow", "underflow")) else kind

    def _signalled(self, number: int, address: int, did: str) -> str:
        name = signal.Signals(number).name
        if name == "SIGABRT":
            if self.late is not None:
                return f"did not end within {self.late:g} s, and was stopped"
            failed = re.search(r"Assertion .* failed", self.said)
            return f"called abort(): {failed[0]}" if failed else "called abort()"
        if name[3:] in _SIGNALS:
            return _SIGNALS[name[3:]]
        if (slot := self.layout.nearest(address - self.base)) is not None:
            return slot.told(address - self.base, did or ("wrote" if slot.kept else "touched"))
        if address < 0:  # the processor tells nothing of an address that can be none
            return f"touched memory at an address that is none ({name})"
        if address < _NULL:
            return f"{did or 'went'} through a null pointer ({name})"
        return f"{did or 'touched'} memory that is not there, at {address:#x} ({name})"

    def _beside(self) -> str:
        """Beside which variable of the kernel's own an access went."""
        local = re.search(r"'(\S+?)'( \(line \d+\))? <== Memory access at offset \d+ (\w+)", self.said)
        if local is not None:
            end = "before the beginning" if local[3].startswith("underflow") else "past the end"
            return f"{end} of the local array {local[1]}{local[2] or ''}"
        shared = re.search(r"(left|right|before|after)(?: of)? global variable '(\S+?)'", self.said)
        if shared is not None:
            return f"{'past the end' if shared[1] in ('right', 'after') else 'before the beginning'} of {shared[2]}"
        heap = re.search(r"(left|right|before|after)(?: of)? (\d+)-byte region", self.said)
        if heap is not None:
            end = "past the end" if heap[1] in ("right", "after") else "before the beginning"
            return f"{end} of {heap[2]} bytes that it allocated"
        return "beside a variable of its own"

    def _where(self) -> str:
        """The user's own line: the innermost frame that has one."""
        for frame in _FRAME.finditer(self.said):
            if frame["function"].startswith("limpid_launch"):
                break  # what is further out is none of the kernel's
            if not re.search(r"<generated>$|/libsanitizer/|/compiler-rt/|/libgomp/", frame["file"]):
                return f", at {_short(frame['file'])}:{frame['line']} in {_bare(frame['function'])}"
        for frame in _GUARD_FRAME.finditer(self.said):
            if os.path.realpath(frame["library"]) == os.path.realpath(self.library):
                found = _line(self.library, int(frame["offset"], 16))
                if found:
                    return f", at {found}"
        return ""


def _line(library: str, offset: int) -> str:
    """The user's line at an offset of a library, by addr2line; "" where that is not to be had."""
    tool = shutil.which("addr2line") or shutil.which("llvm-addr2line")
    if tool is None:
        return ""
    command = [tool, "-C", "-f", "-i", "-e", library, hex(offset)]
    lines = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.split("\n")
    for function, place in zip(lines[::2], lines[1::2], strict=False):
        path, _, line = place.partition(" ")[0].rpartition(":")
        if not path.endswith("<generated>") and line.isdigit() and line != "0":
            return f"{_short(path)}:{line} in {_bare(function)}"
    return ""


def _bare(function: str) -> str:
    """A function's name without its parameters and what a compiler appends: `f._omp_fn.0`, `f.part.0`."""
    return re.split(r"[(.]", function, maxsplit=1)[0]


def _short(path: str) -> str:
    """As a person would write it: from the working directory, where the file is below that."""
    if path.startswith(f"{FOLDER}/"):
        return path.removeprefix(f"{FOLDER}/")
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else path
