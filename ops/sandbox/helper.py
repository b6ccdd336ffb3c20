"""The parent's side of a sandbox: one child process, and what goes over its pipes."""

from __future__ import annotations

import contextlib
import functools
import marshal
import os
import select
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

from ..languages import native
from ..languages.base import LaunchError
from .arena import Arena, Layout
from .report import Death, printed

MEMORY = 1 << 30  # bytes that a kernel may allocate
PRINTED = 1 << 20  # bytes that a kernel may print in one run
_START = 60.0  # seconds for a child to start
_REPORT = 5.0  # seconds for a child that was interrupted to say where it was
_SANITIZER = (
    "detect_leaks=0:handle_abort=1:handle_sigill=1:allocator_may_return_null=0:print_legend=0:color=never:"
    "quarantine_size_mb=16:malloc_context_size=5:abort_on_error=0:exitcode=1"
)


class Helper:
    """A child process and the memory shared with it. One run at a time; `ended` once the child is gone."""

    def __init__(self) -> None:
        """Start it; it gets ready by itself."""
        runtime = native.sanitizer("c")
        guard = None if runtime else _guard()
        self.ended = False
        self.arena = Arena()
        requests, self._requests = os.pipe()
        self._answers, answers = os.pipe()
        self._output, output = os.pipe()
        self._ours = (self._requests, self._answers, self._output)
        for end in (self._answers, self._output):
            os.set_blocking(end, False)
        try:
            self._process = subprocess.Popen(
                _command(requests, answers, self.arena, guard),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=_environment(runtime),
                pass_fds=(requests, answers, self.arena.file),
                start_new_session=True,  # no signals from a terminal, and a group to end it with all that it started
            )
        except BaseException:
            self._close()
            raise
        finally:
            for end in (requests, answers, output):
                os.close(end)
        self._base: int | None = None  # of the arena, in the child; None until the child has told
        self._received = self._said = b""

    @property
    def alive(self) -> bool:
        return not self.ended and self._process.poll() is None

    def run(self, library: Path, launch: tuple[int, ...], layout: Layout, seconds: float) -> None:
        """Run on what is in the arena. Whatever else happens than an answer ends the child."""
        request = ("run", str(library), launch, layout.offsets, layout.sizes, layout.regions, seconds)
        self._said = b""
        try:
            answer = self._ask(request, seconds)
        except _NoAnswerError as error:
            status, said = self.end(), self._said.decode(errors="replace")
            if len(self._said) > PRINTED:
                self._said = self._said[:80] + b" ...\n"
                raise LaunchError(f"the kernel printed more than {PRINTED >> 10} KiB, and was stopped") from None
            late = seconds if error.late else None
            death = Death(said, status, self._base or 0, layout, str(library), late, MEMORY)
            raise LaunchError(death.sentence) from None
        except BaseException:  # Ctrl-C: the kernel may still be running
            self.end()
            raise
        what, _, text = answer.partition(" ")
        if what != "done":
            raise LaunchError(f"the kernel {text}" if text.startswith("cannot be loaded") else text)

    @property
    def printed(self) -> str:
        """What the kernel printed in the last run."""
        return printed(self._said.decode(errors="replace"))

    def make_room(self, size: int) -> None:
        """Wait until the child is ready, and have at least `size` bytes of shared memory."""
        try:
            if self._base is None:
                self._base = int(self._answer(_START).removeprefix("mapped "))
            if size > self.arena.size:
                self.arena.grow(size)
                self._base = int(self._ask(("map", self.arena.size), _START).removeprefix("mapped "))
        except (_NoAnswerError, ValueError):
            status, said = self.end(), self._said.decode(errors="replace").strip()
            raise LaunchError(f"the sandbox's child did not start (exit status {status}): {said[-2000:]}") from None
        except BaseException:
            self.end()
            raise

    def _ask(self, request: tuple, seconds: float) -> str:
        with contextlib.suppress(BrokenPipeError):  # it is dead, which the answer tells
            os.write(self._requests, marshal.dumps(request))
        return self._answer(seconds)

    def _answer(self, seconds: float) -> str:
        """The next answer. Raises _NoAnswerError when the child died, prints too much, or is late."""
        poll, deadline, late = select.poll(), time.monotonic() + seconds, False
        poll.register(self._answers, select.POLLIN)
        poll.register(self._output, select.POLLIN)
        while True:
            ready = [end for end, _ in poll.poll(max(0, deadline - time.monotonic()) * 1000)]
            if self._output in ready and not self._listen():
                poll.unregister(self._output)
            if len(self._said) > PRINTED:
                raise _NoAnswerError(late)
            if self._answers in ready:
                answer = self._read(late)
                if answer is not None and not late:
                    self._listen()  # printed before the answer was given
                    return answer
            elif time.monotonic() > deadline:
                if late:
                    raise _NoAnswerError(late)
                late, deadline = True, time.monotonic() + _REPORT
                self._process.send_signal(signal.SIGABRT)  # has it say where it is, and end

    def _read(self, late: bool) -> str | None:
        """An answer, or None while it is not whole. Raises _NoAnswerError when the child has closed its end."""
        data = os.read(self._answers, 65536)
        if not data:
            raise _NoAnswerError(late)
        self._received += data
        size = 4 + struct.unpack("<I", self._received[:4])[0] if len(self._received) >= 4 else 4
        if len(self._received) < max(size, 5):
            return None
        answer, self._received = self._received[4:size], self._received[size:]
        return answer.decode(errors="replace")

    def _listen(self) -> bool:
        """Take what was printed; False when nothing more can come."""
        with contextlib.suppress(BlockingIOError):
            while len(self._said) <= PRINTED:
                data = os.read(self._output, 65536)
                if not data:
                    return False
                self._said += data
        return True

    def end(self) -> int:
        """End the child and what it started; gives its exit status, which is its own when it ended by itself."""
        self.kill()
        status = self._process.wait()
        if not self.ended:
            self._listen()
            self._close()
        return status

    def kill(self) -> None:
        """End the child and what it started, without waiting; the run under way fails."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def forget(self) -> None:
        """In a fork of this process: leave the child alone, which is not this process's."""
        self._process.returncode = 0
        if not self.ended:
            self._close()

    def _close(self) -> None:
        self.ended = True
        for end in self._ours:
            os.close(end)
        self.arena.close()


class _NoAnswerError(Exception):
    """The child is dead, or has to be ended. `late`: it had not answered in time."""

    def __init__(self, late: bool):
        self.late = late


def _command(requests: int, answers: int, arena: Arena, guard: Path | None) -> list[str]:
    if not sys.executable:
        raise LaunchError("this Python has no executable (sys.executable) that a sandbox could start")
    numbers = map(str, (requests, answers, arena.file, os.getpid(), MEMORY, arena.size))
    child = Path(__file__).with_name("child.py")
    return [sys.executable, "-I", "-S", str(child), *numbers, *([str(guard)] if guard else [])]


def _environment(runtime: Path | None) -> dict[str, str]:
    """This process's, with the sanitizer before all libraries, then C++'s, whose exceptions it looks for at once."""
    own = {key: value for key, value in os.environ.items() if key not in ("LD_PRELOAD", "ASAN_OPTIONS")}
    if runtime is None:
        return own
    libraries = [str(path) for path in (runtime, native.found("c", "libstdc++.so.6")) if path]
    return own | {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": _SANITIZER}


@functools.cache
def _guard() -> Path:
    """What tells of a crash where there is no sanitizer."""
    return native.build(Path(__file__).with_name("guard.c").read_text(), "c", ("-O1",))
