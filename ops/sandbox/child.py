"""The child of a sandbox: loads shared objects and runs their `limpid_launch`, on memory that the parent shares.

Started as a script, with no more of Python than it names here: no NumPy, no TVM, nothing of this package. A request is
a marshalled tuple; an answer is its length and text. See `helper.py` for the other side.
"""

import _thread
import contextlib
import ctypes
import marshal
import mmap
import os
import resource
import select
import signal
import struct
import sys

_HIDDEN, _READ, _WRITE = 0, 1, 3  # PROT_NONE, PROT_READ, PROT_READ | PROT_WRITE
_LINES = 1  # _IOLBF
_STACK = 64 << 20
_GRACE = 5.0  # seconds after the time limit, at which the parent would have ended this process


class Memory:
    """The shared memory. All of it is hidden, from the processor and from the sanitizer, but what a run shows."""

    def __init__(self, file: int, process: ctypes.CDLL):
        self.file, self.process = file, process
        self.shown: tuple = ()
        self.base = 0
        poison = getattr(process, "__asan_poison_memory_region", None)
        unpoison = getattr(process, "__asan_unpoison_memory_region", None)
        self.poison, self.unpoison = (poison, unpoison) if poison and unpoison else (_nothing, _nothing)
        process.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        for function in (poison, unpoison):
            if function is not None:
                function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_size_t), None

    def map(self, size: int) -> str:
        """Map the file, which has grown; gives the address."""
        self.shown = ()
        self.map_ = mmap.mmap(self.file, size)
        self.view = (ctypes.c_char * size).from_buffer(self.map_)
        self.base = ctypes.addressof(self.view)
        self.poison(self.base, size)
        self.protect(self.base, size, _HIDDEN)
        return f"mapped {self.base}"

    def show(self, regions: tuple) -> None:
        """Hide what was shown before, show the regions: (start, bytes, read only)."""
        if regions == self.shown:
            return
        for start, size, _ in self.shown:
            self.poison(self.base + start, size)
            self.protect(self.base + start, size, _HIDDEN)
        self.shown = regions
        for start, size, readonly in regions:
            self.protect(self.base + start, size, _READ if readonly else _WRITE)
            self.unpoison(self.base + start, size)

    def protect(self, start: int, size: int, how: int) -> None:
        if size:
            first = start // mmap.PAGESIZE * mmap.PAGESIZE
            if self.process.mprotect(first, start + size - first, how):
                raise OSError(ctypes.get_errno(), "mprotect")


def _nothing(start: int, size: int) -> None:
    """Instead of the sanitizer, where there is none."""


class Libraries:
    """The shared objects that were loaded, by path."""

    def __init__(self) -> None:
        self.loaded: dict[str, ctypes.CDLL] = {}

    def launch(self, path: str, launch: tuple, addresses: list, sizes: tuple) -> str:
        """Run one; gives "done", or what is wrong."""
        try:
            library = self.loaded[path]
        except KeyError:
            try:
                library = self.loaded[path] = ctypes.CDLL(path)
            except OSError as error:
                return f"failed cannot be loaded: {error}"
        count = len(addresses)
        status = library.limpid_launch(
            (ctypes.c_uint32 * 7)(*launch), (ctypes.c_void_p * count)(*addresses), (ctypes.c_uint64 * count)(*sizes)
        )
        if not status:
            return "done"
        text = ctypes.string_at(ctypes.addressof(ctypes.c_char.in_dll(library, "limpid_error")))
        return "failed " + text.decode(errors="replace")


def limit(memory: int) -> None:
    """Bound what a kernel may allocate beyond what this process has, its stack, and its core file."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    soft, hard = resource.getrlimit(resource.RLIMIT_STACK)
    if soft == resource.RLIM_INFINITY or soft > _STACK:
        resource.setrlimit(resource.RLIMIT_STACK, (_STACK, hard))
    if memory and sys.platform == "linux":
        with open("/proc/self/status") as status:
            has = next(int(line.split()[1]) << 10 for line in status if line.startswith("VmData"))
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        wanted = has + memory
        resource.setrlimit(resource.RLIMIT_DATA, (wanted if hard < 0 else min(wanted, hard), hard))


def end_with(parent: int, requests: int) -> None:
    """In a thread: end this process when the parent does, also while a kernel runs."""
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    poll = select.poll()
    poll.register(requests, 0)  # no event but that the other end is closed
    if hasattr(os, "pidfd_open"):  # a fork of the parent may hold the other end open
        with contextlib.suppress(OSError):  # gone already, which the next line sees, or forbidden
            poll.register(os.pidfd_open(parent), select.POLLIN)
        if os.getppid() != parent:
            os._exit(0)
    poll.poll()
    os._exit(0)


def main() -> None:
    requests, responses, arena, parent, memory, size = map(int, sys.argv[1:7])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    _thread.start_new_thread(end_with, (parent, requests))
    process = ctypes.CDLL(None, use_errno=True)
    if len(sys.argv) > 7:  # without a sanitizer, what tells of a crash
        ctypes.CDLL(sys.argv[7]).limpid_guard()
    with contextlib.suppress(ValueError):  # lines leave at once: what was printed before a crash is not lost
        process.setvbuf(ctypes.c_void_p.in_dll(process, "stdout"), None, _LINES, 4096)
    shared, libraries = Memory(arena, process), Libraries()
    answer = shared.map(size)
    limit(memory)
    with open(requests, "rb", closefd=False) as read:
        while True:
            data = answer.encode(errors="replace")
            os.write(responses, struct.pack("<I", len(data)) + data)
            try:
                request = marshal.load(read)
            except EOFError:
                return
            if request[0] == "map":
                answer = shared.map(request[1])
                continue
            _, path, launch, offsets, sizes, regions, seconds = request
            shared.show(regions)
            signal.setitimer(signal.ITIMER_REAL, seconds + _GRACE)
            answer = libraries.launch(path, launch, [shared.base + each for each in offsets], sizes)
            signal.setitimer(signal.ITIMER_REAL, 0)
            process.fflush(None)


if __name__ == "__main__":
    main()
