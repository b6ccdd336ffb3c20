"""The threads that kernels run on: how many, on which cores, and how long they stay awake for more work.

TVM keeps a pool for every Python thread that launches kernels: the thread itself computes the first share of a kernel
and a worker each of the others. Imported before TVM, which takes its settings from the environment.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from .errors import OpError

_CPUS = Path("/sys/devices/system/cpu")
_CGROUP, _CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
_SPINS = "10000"  # looks for work before a worker sleeps, some 5 ms: longer than what lies between two kernels
_PAUSE = 0.5  # seconds without kernels after which a thread may have woken up on a worker's core
_SHARE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)  # TVM's FTVMParallelLambda


class _Pool(threading.local):
    """What is known of the calling thread's pool."""

    started = False
    home: frozenset[int] | None = None  # CPUs of the core that no worker is on; None when nothing is pinned
    seen = 0.0  # when kernels were last about to run, by the monotonic clock


_pool = _Pool()


def configure() -> None:
    """Tell TVM the number of threads, that it pins none, and how long its workers look for work before they sleep."""
    os.environ["TVM_NUM_THREADS"] = os.environ.get("LIMPID_THREADS") or str(available())
    os.environ["TVM_BIND_THREADS"] = "0"  # it would narrow the caller's affinity, and know no cgroup or `taskset`
    os.environ.setdefault("TVM_THREAD_POOL_SPIN_COUNT", _SPINS)


def count() -> int:
    """How many threads a kernel runs on. Raises OpError when LIMPID_THREADS is not a number, 1 or more."""
    given = os.environ["TVM_NUM_THREADS"]
    if not given.isdecimal() or int(given) < 1:
        raise OpError(f"LIMPID_THREADS is {given!r}, expected a number of threads, 1 or more")
    return int(given)


def available() -> int:
    """How many physical cores' worth of time this process may use: its affinity and its cgroup's quota allow."""
    return max(1, int(min(len(cores()) or os.cpu_count() or 1, _quota())))


def cores() -> list[frozenset[int]]:
    """The physical cores that this thread may run on, each as its logical CPUs. Empty where the system tells of none.

    Hyper-threads of one core are one core: they share its arithmetic units, so that a second one adds nothing.
    """
    if not hasattr(os, "sched_getaffinity"):
        return []
    allowed = os.sched_getaffinity(0)
    return sorted({_siblings(cpu) & allowed for cpu in allowed}, key=min)


def _siblings(cpu: int) -> frozenset[int]:
    """The logical CPUs of the core that `cpu` belongs to."""
    try:
        listed = (_CPUS / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text()
    except OSError:
        return frozenset({cpu})
    ends = [part.partition("-") for part in listed.strip().split(",")]
    return frozenset(each for low, _, high in ends for each in range(int(low), int(high or low) + 1)) | {cpu}


def _quota() -> float:
    """CPUs' worth of time that the control groups around this process, of either version, leave it, or infinity."""
    try:
        lines = [line.split(":", 2) for line in _CGROUP.read_text().splitlines()]
    except OSError:
        return float("inf")
    shares = [float("inf")]
    for _, controllers, path in lines:
        if controllers and "cpu" not in controllers.split(","):
            continue
        group = _CGROUPS / controllers / path.lstrip("/")  # of version 2, whose line names no controllers, the root
        for folder in (group, *group.parents):
            with contextlib.suppress(OSError, ValueError):  # the root has no such file, and "max" is no number
                quota, period = _limit(folder, version=1 if controllers else 2)
                shares += [quota / period] if quota > 0 else []
    return min(shares)


def _limit(group: Path, version: int) -> tuple[int, int]:
    """Microseconds of processor time that a control group has in a period of so many; -1 when it is not limited."""
    if version == 1:
        return tuple(int((group / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))  # type: ignore
    quota, period = (group / "cpu.max").read_text().split()
    return int(quota), int(period)


def settle() -> None:
    """Before kernels run: see that the calling thread and its workers are on cores of their own.

    Workers are pinned where a pool takes all the cores; where it takes fewer, as the scheduler has room. The calling
    thread keeps its affinity, for what else it does and starts: it is only moved off a worker's core.
    """
    if not _pool.started:
        _start()
    if _pool.home is not None:
        before, _pool.seen = _pool.seen, time.monotonic()
        if _pool.seen - before > _PAUSE and _cpu() not in _pool.home:
            _go_home(_pool.home)


def _start() -> None:
    _pool.started = True
    places = cores()
    if 1 < len(places) == count():
        _pin_workers(places)
        _pool.home = places[0]


def _pin_workers(places: list[frozenset[int]]) -> None:
    """Each worker of the calling thread's pool pins itself to its core."""

    @_SHARE
    def pin(share: int, _group: int, _data: int) -> int:
        with contextlib.suppress(OSError):  # the core was taken from this process just now: the worker stays free
            if share > 0:  # the first is the calling thread's own
                os.sched_setaffinity(0, places[share])
        return 0

    ctypes.CDLL(None).TVMBackendParallelLaunch(pin, None, len(places))


def _go_home(home: frozenset[int]) -> None:
    """Move the calling thread to its core and leave it its affinity."""
    allowed = os.sched_getaffinity(0)
    if allowed & home:
        try:
            os.sched_setaffinity(0, allowed & home)
        finally:
            os.sched_setaffinity(0, allowed)


def _cpu() -> int:
    """The logical CPU that the calling thread runs on."""
    return _sched_getcpu()()


@functools.cache
def _sched_getcpu() -> Callable[[], int]:
    return ctypes.PyDLL(None).sched_getcpu


def _after_fork() -> None:
    """A forked child has the pool but not its workers, and would wait for them for ever: it runs on one thread."""
    if _pool.started:
        from tvm import get_global_func

        get_global_func("runtime.config_threadpool")(-2, 1, ["0"])
        _pool.home = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
