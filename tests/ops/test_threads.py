"""How many threads there are, where they run, and what they cost when there is nothing to do."""

import json
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import ops
from ops import threads

CPUS = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
needs_cores = pytest.mark.skipif(len(threads.cores()) < 2, reason="takes two cores and a system that pins threads")
LAUNCH = """
import json, os, subprocess, sys, threading
import numpy as np
import ops

weight, x = ops.tensor(np.ones((2048, 2048), "float32")), ops.tensor(np.ones((1, 2048), "float32"))

def launch():
    assert (ops.linear(x, weight).numpy() == 2048).all()

def tell(**facts):
    print(json.dumps(facts), flush=True)
"""


def child(code: str, cpus: list[int] | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `code` after `LAUNCH` in a process of its own, on some CPUs only."""
    if cpus is not None:
        code = f"import os\nos.sched_setaffinity(0, {cpus})\n{LAUNCH}{code}"
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("TVM_", "LIMPID_THREADS"))}
    command = [sys.executable, "-c", code if cpus is not None else LAUNCH + code]
    return subprocess.run(command, env=kept | environment, capture_output=True, text=True, timeout=120, check=False)


def told(code: str, cpus: list[int] | None = None, **environment: str) -> dict:
    done = child(code, cpus, **environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A made-up machine: gives what its files say of each logical CPU's siblings, and of its control groups."""

    def make(siblings: dict[int, str], allowed: set[int] | None = None, cgroup: str = "", **limits: str) -> None:
        for cpu, listed in siblings.items():
            folder = tmp_path / "cpus" / f"cpu{cpu}" / "topology"
            folder.mkdir(parents=True)
            (folder / "thread_siblings_list").write_text(listed + "\n")
        (tmp_path / "cgroup").write_text(f"1:cpu:/old\n0::/{cgroup}\n" if cgroup else "1:cpu:/old\n")
        for folder, limit in limits.items():
            path = tmp_path / "groups" / folder.replace("_", "/").strip("/")
            path.mkdir(parents=True, exist_ok=True)
            (path / "cpu.max").write_text(limit + "\n")
        monkeypatch.setattr(threads, "_CPUS", tmp_path / "cpus")
        monkeypatch.setattr(threads, "_CGROUP", tmp_path / "cgroup")
        monkeypatch.setattr(threads, "_CGROUPS", tmp_path / "groups")
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: allowed or set(siblings), raising=False)

    return make


def test_hyper_threads_of_a_core_count_once(machine):
    machine({0: "0,4", 4: "0,4", 1: "1,5", 5: "1,5", 2: "2,6", 6: "2,6"}, {0, 4, 5, 6})
    assert threads.cores() == [{0, 4}, {5}, {6}]
    assert threads.available() == 3


def test_siblings_written_as_a_range(machine):
    machine({0: "0-1", 1: "0-1", 2: "2-3", 3: "2-3"})
    assert threads.cores() == [{0, 1}, {2, 3}]


def test_a_system_that_tells_of_no_siblings(machine, monkeypatch):
    machine({}, {3, 7})
    assert threads.cores() == [{3}, {7}]
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    assert (threads.cores(), threads.available()) == ([], 5)


@pytest.mark.parametrize(
    ("limits", "wanted"),
    [
        ({"a_b": "max 100000"}, 6),
        ({"a_b": "250000 100000"}, 2),  # half a core is no core
        ({"a_b": "50000 100000"}, 1),
        ({"a_b": "400000 100000", "a": "300000 100000"}, 3),
        ({"_": "400000 100000"}, 4),
        ({"a_b": "900000 100000"}, 6),
        ({"a_b": "nonsense"}, 6),
        ({"other": "100000 100000"}, 6),
    ],
)
def test_the_quota_of_a_control_group(machine, limits, wanted):
    machine({cpu: str(cpu) for cpu in range(6)}, None, "a/b", **limits)
    assert threads.available() == wanted


@pytest.mark.parametrize(
    ("quotas", "wanted"), [({}, 6), ({"a/b": 250000}, 2), ({"a/b": -1, "a": 300000}, 3), ({"": -1}, 6)]
)
@pytest.mark.parametrize("controllers", ["cpu", "cpu,cpuacct"])
def test_the_quota_of_a_control_group_of_version_1(machine, tmp_path, controllers, quotas, wanted):
    machine({cpu: str(cpu) for cpu in range(6)})
    (tmp_path / "cgroup").write_text(f"4:memory:/m\n1:{controllers}:/a/b\n0::/\n")
    for path, quota in quotas.items():
        folder = tmp_path / "groups" / controllers / path
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "cpu.cfs_quota_us").write_text(f"{quota}\n")
        (folder / "cpu.cfs_period_us").write_text("100000\n")
    assert threads.available() == wanted


def test_without_control_groups(machine):
    machine({0: "0", 1: "1"}, _="100000 100000")
    assert threads.available() == 2


@pytest.mark.parametrize("given", ["x", "0", "-1", "2.5"])
def test_a_wrong_number_is_one_clear_error(monkeypatch, given):
    monkeypatch.setenv("TVM_NUM_THREADS", given)
    with pytest.raises(ops.OpError, match=f"LIMPID_THREADS is '{given}', expected a number of threads, 1 or more"):
        ops.target.threads()


def test_a_wrong_number_in_the_environment():
    done = child("launch()", LIMPID_THREADS="x")
    assert done.returncode == 1
    assert "LIMPID_THREADS is 'x', expected a number of threads, 1 or more" in done.stderr.splitlines()[-1]


@pytest.mark.skipif(not CPUS, reason="the system has no affinities")
def test_the_number_of_threads():
    code = 'tell(count=ops.target.threads(), tvm=os.environ["TVM_NUM_THREADS"])'
    assert told(code, LIMPID_THREADS="3") == {"count": 3, "tvm": "3"}
    assert told(code, CPUS[-1:], TVM_NUM_THREADS="7") == {"count": 1, "tvm": "1"}  # as a parent process leaves it
    cores = threads.available()
    assert told(code, LIMPID_THREADS="") == {"count": cores, "tvm": str(cores)}


AFFINITIES = """
def affinity(thread="self"):
    return sorted(os.sched_getaffinity(0 if thread == "self" else int(thread)))

def others():
    return {int(thread) for thread in os.listdir("/proc/self/task")}

before, threads = affinity(), others()
launch()
workers = [affinity(thread) for thread in others() - threads]
python = []
thread = threading.Thread(target=lambda: (launch(), python.append(affinity())))
thread.start(), thread.join()
code = "import os, json; print(json.dumps(sorted(os.sched_getaffinity(0))))"
started = json.loads(subprocess.check_output([sys.executable, "-c", code]))
tell(before=before, workers=workers, caller=affinity(), thread=python[0], started=started)
"""


@needs_cores
def test_workers_have_a_core_each_and_the_caller_keeps_them_all():
    cores = threads.cores()
    facts = told(AFFINITIES, LIMPID_THREADS=str(len(cores)))
    assert sorted(facts["workers"]) == [sorted(core) for core in cores[1:]]
    assert facts["before"] == facts["caller"] == facts["thread"] == facts["started"] == CPUS


@needs_cores
def test_fewer_threads_than_cores_go_where_there_is_room():
    cores = threads.cores()
    facts = told(AFFINITIES, sorted(cores[0] | cores[1]), LIMPID_THREADS="3")
    assert facts["workers"] == [sorted(cores[0] | cores[1])] * 2  # nor are there cores for all of these


@needs_cores
def test_a_thread_that_wakes_up_on_a_workers_core_leaves_it():
    facts = told(
        """
launch()
home, all_of_them, found = ops.threads.cores()[0], os.sched_getaffinity(0), []
for _ in range(20):
    os.sched_setaffinity(0, ops.threads.cores()[-1])
    os.sched_setaffinity(0, all_of_them)
    ops.threads._pool.seen = 0.0
    ops.threads.settle()
    found.append(ops.threads._cpu() in home)
tell(found=sum(found), kept=os.sched_getaffinity(0) == all_of_them)
""",
        LIMPID_THREADS=str(len(threads.cores())),
    )
    assert facts["found"] > 10  # a scheduler is free to move it on at once
    assert facts["kept"]


@needs_cores
def test_workers_sleep_when_there_is_nothing_to_do():
    code = """
import time
def idle():
    launch()
    started = time.process_time()
    time.sleep(1)
    return time.process_time() - started

times = [idle() for _ in range(3)]
tell(least=min(times), most=max(times))
"""
    workers = len(threads.cores()) - 1
    assert told(code)["least"] < 0.05 * workers
    assert told(code, TVM_THREAD_POOL_SPIN_COUNT="2000000")["most"] > 0.1  # what the measure can see


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system does not fork")
def test_a_forked_child_runs_on_one_thread():
    code = """
launch()
child = os.fork()
if child == 0:
    launch()
    os._exit(7)
tell(status=os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
launch()
"""
    assert told(code, LIMPID_THREADS="2") == {"status": 7}


def test_threads_that_come_and_go(rng):
    """Each has a pool, which ends with it."""
    weight, x = (ops.tensor(rng.standard_normal(shape).astype("float32")) for shape in ((512, 256), (1, 256)))
    wanted, given = ops.linear(x, weight).numpy(), []
    before = len(os.listdir("/proc/self/task")) if CPUS else 0
    for _ in range(20):
        made = [threading.Thread(target=lambda: given.append(ops.linear(x, weight).numpy().copy())) for _ in range(3)]
        for each in made:
            each.start()
        for each in made:
            each.join()
    assert len(given) == 60
    assert all(np.array_equal(each, wanted) for each in given)
    until = time.monotonic() + 30
    while CPUS and len(os.listdir("/proc/self/task")) >= before + ops.target.threads():  # the caller's own may be new
        assert time.monotonic() < until, "the workers of threads that ended are still there"
        time.sleep(0.01)
