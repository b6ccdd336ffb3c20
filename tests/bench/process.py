"""The driver's end of the pipe: a worker process, asked one thing at a time, and what the machine does besides."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_QUIET = 3  # looks in a row, 20 ms apart, that must find every thread asleep
_PATIENCE = 20.0  # seconds until threads that still run are an error


class WorkerError(Exception):
    """A worker failed, ended, or did not answer in time."""


class Worker:
    """A long-lived process that runs `python -m <module>`, which serves; its stderr goes to `log`.

    `more` is added to its environment.
    """

    def __init__(self, python: str, module: str, threads: int, log: Path, more: dict[str, str] | None = None):
        names = ("LIMPID_THREADS", "TVM_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
        environment = os.environ | dict.fromkeys(names, str(threads)) | (more or {})
        self.name, self.log = module.rpartition(".")[2], log
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                [python, "-m", module], cwd=ROOT, env=environment, text=True, bufsize=1,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
            )  # fmt: skip

    def ask(self, timeout: float = 600.0, **request: Any) -> dict[str, Any]:
        """Send a request and wait for its answer. Raises WorkerError."""
        pipe, answers = self._process.stdin, self._process.stdout
        assert pipe is not None and answers is not None
        try:
            pipe.write(json.dumps(request) + "\n")
            pipe.flush()
        except (OSError, ValueError):  # nobody reads, or it was closed
            raise WorkerError(f"{self.name} has ended: {self._last_words()}") from None
        with selectors.DefaultSelector() as selector:
            selector.register(answers, selectors.EVENT_READ)
            if not selector.select(timeout):
                self.close()
                raise WorkerError(f"{self.name} did not answer {request} within {timeout:.0f} s")
        line = answers.readline()
        if not line:
            raise WorkerError(f"{self.name} ended at {request}: {self._last_words()}")
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(f"{self.name}: {answer['error']}\n{answer['trace']}")
        return answer

    def settle(self) -> None:
        """Wait until every thread of the worker sleeps: thread pools spin a while after their work. Raises
        WorkerError."""
        quiet, until = 0, time.monotonic() + _PATIENCE
        while quiet < _QUIET:
            quiet = quiet + 1 if all(state in "SI" for state in self._states()) else 0
            if time.monotonic() > until:
                raise WorkerError(f"{self.name} still computes {_PATIENCE:.0f} s after its answer")
            time.sleep(0.02)

    def _states(self) -> Iterator[str]:
        for task in Path(f"/proc/{self._process.pid}/task").iterdir():
            with contextlib.suppress(FileNotFoundError):  # a thread that ended meanwhile
                yield (task / "stat").read_text().rpartition(") ")[2][0]

    def cpu_seconds(self) -> float:
        """Processor time that the worker's threads have used so far."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(") ")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def peak_memory(self) -> int:
        """The most resident memory so far, in bytes."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024

    def close(self) -> None:
        """End the worker. Harmless the second time."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def _last_words(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        self.close()
        words = self.log.read_text(errors="replace").strip()[-1500:]
        return f"exit status {self._process.returncode}; {self.log} ends with\n{words}"

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass
class Load:
    """How much of the machine other processes used: `with load.beside(worker)`, then `load.share`."""

    share: float = 0.0

    @contextlib.contextmanager
    def beside(self, worker: Worker) -> Iterator[None]:
        """Watch while `worker`, and nothing else of ours, computes."""
        busy, own, started = _busy_seconds(), worker.cpu_seconds(), time.monotonic()
        yield
        capacity = (time.monotonic() - started) * (os.cpu_count() or 1)
        self.share = max(0.0, (_busy_seconds() - busy - (worker.cpu_seconds() - own)) / capacity)


def _busy_seconds() -> float:
    """Processor time that the machine spent on anything, stolen time of a virtual machine included."""
    fields = [int(each) for each in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    user, nice, system, _idle, _wait, irq, softirq, steal = fields
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def machine() -> dict[str, Any]:
    """Processor, cores, memory and kernel, as Linux names them."""
    cpu = Path("/proc/cpuinfo").read_text()
    model = next((line.split(":")[1].strip() for line in cpu.splitlines() if line.startswith("model name")), "unknown")
    uname = os.uname()
    return {
        "cpu": model,
        "architecture": uname.machine,
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{uname.sysname} {uname.release}",
    }


def available_memory() -> int:
    """Bytes that new processes can use without pushing others out."""
    return int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) * 1024
