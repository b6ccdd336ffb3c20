"""The sandbox's children: none is left behind, none outlives its parent, threads have one each, Ctrl-C is obeyed."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from ops import sandbox
from ops.languages import native
from ops.languages.base import LaunchError, SourceError
from tests.ops.test_sandbox import fault, kernel, run

ROOT = Path(__file__).resolve().parents[2]


def children():
    """The pids of this process's sandbox children, with their states."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(parent) == os.getpid():
            found[int(stat.parent.name)] = state
    return found


def test_nothing_is_left_behind():
    run(kernel("out[0] = 1;"))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        fault(kernel("abort();"))
        fault(kernel("exit(1);"))
    assert len(os.listdir("/proc/self/fd")) == before
    assert "Z" not in children().values()
    sandbox.stop()
    assert not set(children().values()) & {"Z"}
    run(kernel("out[0] = 1;"))


def test_a_child_that_died_idle_is_replaced():
    program = kernel("out[0] = getpid();", "#include <unistd.h>")
    pid = int(run(program)[0])
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # it is dead, and still to be found so
    assert int(run(program)[0]) != pid


def test_threads_run_side_by_side():
    program = kernel("usleep(300000); out[0] = getpid();", "#include <unistd.h>")
    pids = []
    threads = [threading.Thread(target=lambda: pids.append(int(run(program)[0]))) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(pids) == 5
    assert 2 <= len({*pids}) <= max(2, os.cpu_count() or 1)


def test_faults_and_results_of_threads_are_not_mixed_up():
    good, bad, said = kernel("for (int i = 0; i < n; i++) out[i] = x[i % 5];"), kernel("out[n] = 1;"), []

    def work(program):
        for _ in range(3):
            try:
                said.append(run(program).tolist() == [0, 1, 2, 3, 4, 0, 1, 2])
            except LaunchError as error:
                said.append("out[8]" in str(error) and program is bad)

    threads = [threading.Thread(target=work, args=(each,)) for each in (good, bad, good, bad)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert said == [True] * 12


@pytest.mark.skipif(signal.getsignal(signal.SIGINT) is not signal.default_int_handler, reason="Ctrl-C is not Python's")
def test_ctrl_c():
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        run(kernel("for (;;) usleep(1000);", "#include <unistd.h>"), 60)
    assert run(kernel("out[0] = 1;"))[0] == 1
    assert "Z" not in children().values()


def script(text):
    """A process of its own, from whose output lines can be read."""
    return subprocess.Popen(
        [sys.executable, "-c", IMPORTS + textwrap.dedent(text)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )


def ended(pid):
    """Whether a process ends within some seconds."""
    for _ in range(1000):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.01)
    return False


IMPORTS = """
import os, time
import numpy as np
from ops import sandbox
from ops.languages.base import Launch
from tests.ops.test_sandbox import kernel
"""
LOOP = """
program = kernel("out[0] = getpid(); while (n == 9) usleep(1000);", "#include <unistd.h>")
out, x = np.zeros(8, "float32"), np.zeros(5, "float32")
sandbox.run(program, [out, x, 8], Launch())
print(int(out[0]), flush=True)
"""


@pytest.mark.parametrize("busy", [False, True])
def test_children_end_when_the_parent_is_killed(busy):
    then = "sandbox.run(program, [out, x, 9], Launch(), 600)" if busy else "time.sleep(600)"
    with script(LOOP + then) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        time.sleep(0.5 * busy)
        process.kill()
        assert ended(pid)


def test_children_end_with_the_parent_though_its_fork_lives():
    with script(LOOP + "os.fork()\ntime.sleep(600)\n") as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        forked = 0
        while not forked:
            found = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            forked = next((int(each) for each in found if int(each) != pid), 0)
        process.kill()
        try:
            assert ended(pid)
        finally:
            os.kill(forked, signal.SIGKILL)


def test_a_fork_has_children_of_its_own():
    text = """
    if not os.fork():
        sandbox.run(program, [out, x, 8], Launch())
        print(int(out[0]), flush=True)
        sandbox.stop()
        os._exit(0)
    os.wait()
    sandbox.run(program, [out, x, 8], Launch())
    print(int(out[0]), flush=True)
    """
    with script(LOOP + textwrap.dedent(text)) as process:
        said, _ = process.communicate(timeout=120)
    parent, fork, again = map(int, said.split())
    assert parent == again != fork
    assert process.returncode == 0
    assert all(ended(pid) for pid in (parent, fork))


def test_starting_does_not_wait():
    sandbox.stop()
    start = time.perf_counter()
    sandbox.start()
    sandbox.start()
    assert time.perf_counter() - start < 2
    assert len(sandbox._all) == 1


def test_without_a_compiler_only_a_run_complains(monkeypatch):
    program = kernel("out[0] = 1;")
    sandbox.stop()

    def missing(language):
        raise SourceError("no compiler for c")

    monkeypatch.setattr(native, "sanitizer", missing)
    sandbox.start()
    with pytest.raises(SourceError, match="no compiler for c"):
        run(program)
    monkeypatch.undo()
    assert run(program)[0] == 1


def test_a_child_that_does_not_start(monkeypatch):
    program = kernel("out[0] = 1;")
    assert program.checked is not None
    sandbox.stop()
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(LaunchError, match=r"the sandbox's child did not start \(exit status 1\)"):
        run(program)
    monkeypatch.undo()
    sandbox.stop()
    assert run(program)[0] == 1
