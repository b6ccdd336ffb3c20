"""From an op to a compiled function: what is compiled when, why, and what is told about it."""

import importlib.util
import json
import linecache
import os
import pydoc
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from tvm.script import tirx as T

import ops
from ops import Dim, KernelError, Spec, build, digest
from ops.store import kernels as store

ROOT = Path(__file__).resolve().parents[2]
SOURCE = (Path(__file__).parent / "temp_op.py").read_text()
DRIVER = """
import json, sys, time
import numpy as np
sys.path.insert(0, sys.argv[1])
import ops, temp_op
from ops import build

ready, go = sys.argv[2:4] if len(sys.argv) > 2 else (None, None)
if ready:
    import os
    open(ready, "w").close()
    while not os.path.exists(go):
        time.sleep(0.005)
results = [ops.tensor(np.ones((2, width), "float32")) for width in (3, 4, 5)]
results = [temp_op.temp_scale(x, by=2.5).numpy().sum().item() for x in results]
print(json.dumps({"log": [[each.op, each.specs, each.reason] for each in build.log], "results": results}))
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A disk cache and a memo of the test's own."""
    monkeypatch.setenv("LIMPID_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LIMPID_CACHE_LIMIT", raising=False)
    monkeypatch.setattr(build, "_memo", {})
    monkeypatch.setattr(build, "log", [])
    return tmp_path / "cache/kernels"


@pytest.fixture
def source(tmp_path) -> Path:
    path = tmp_path / "temp_op.py"
    path.write_text(SOURCE)
    return path


def load(source: Path):
    """The module as a process that has just started sees it: nothing in memory."""
    build._memo.clear()
    digest._digest.cache_clear()
    linecache.checkcache()
    spec = importlib.util.spec_from_file_location("temp_op", source)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(module, width: int = 3, by: float = 2.0, rows: int = 2) -> None:
    x = np.arange(rows * width, dtype="float32").reshape(rows, width)
    np.testing.assert_array_equal(module.temp_scale(ops.tensor(x), by=by).numpy(), x * np.float32(by))


def reasons() -> list[str]:
    return [each.reason for each in build.log]


def start(source: Path, *arguments: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(source.parent), *arguments],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(process: subprocess.Popen) -> dict:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return json.loads(out)


def test_memo_and_log(source):
    module = load(source)
    run(module)
    run(module, rows=9)
    (entry,) = build.log
    assert (entry.op, entry.specs, entry.reason) == (
        "temp_scale",
        "x=float32[n:2-, 3], by=2.0",
        "not in the disk cache",
    )
    assert 0 < entry.seconds < 60 and len(module.built) == 1
    run(module, rows=1)
    run(module, by=3.0)
    run(module, width=4)
    assert [each.specs for each in build.log[1:]] == [
        "x=float32[1, 3], by=2.0",
        "x=float32[n:2-, 3], by=3.0",
        "x=float32[n:2-, 4], by=2.0",
    ]
    plan = module.temp_scale.plan((ops.zeros((2, 3)),), {"by": 2.0})
    assert build.function(plan.request()) is build.function(plan.request())
    assert len(build.log) == 4


def test_a_warm_start_builds_nothing(source, monkeypatch):
    run(load(source))
    monkeypatch.setenv("NEVER_BUILD", "1")
    run(load(source))
    assert len(build.log) == 1
    with pytest.raises(KernelError, match=r"temp_scale\(x=float32\[n:2-, 4\], by=2.0\) does not compile: a kernel was"):
        run(load(source), width=4)


def test_processes_share_the_cache_and_compile_each_kernel_once(source, tmp_path):
    """Two processes that start together want the same kernels; a third one finds them all."""
    go = tmp_path / "go"
    ready = [tmp_path / f"ready{i}" for i in range(2)]
    racing = [start(source, str(each), str(go)) for each in ready]
    while not all(each.exists() for each in ready):
        assert all(each.poll() is None for each in racing), [each.communicate() for each in racing]
    go.touch()
    both = [finish(each) for each in racing]
    assert sorted(specs for each in both for _, specs, _ in each["log"]) == [
        f"x=float32[n:2-, {width}], by=2.5" for width in (3, 4, 5)
    ]
    third = finish(start(source, NEVER_BUILD="1"))
    assert third["log"] == [] and third["results"] == both[0]["results"] == both[1]["results"] == [15.0, 20.0, 25.0]
    assert {entry.what for entry in store.entries()} == {
        f"temp_scale(x=float32[n:2-, {width}], by=2.5)" for width in (3, 4, 5)
    }


def test_without_a_c_compiler(source, folder, monkeypatch):
    monkeypatch.setattr("tvm.support.cc.get_cc", lambda: None)
    module = load(source)
    build.prepare(module.temp_scale.plan((ops.zeros((2, w)),), {"by": 2.0}).request() for w in (3, 4, 5))
    assert len(build.log) == 3 and len([*folder.glob("*.ll")]) == 3 and not [*folder.glob("*.so")]
    monkeypatch.setenv("NEVER_BUILD", "1")
    for width in (3, 4, 5):
        run(load(source), width)
    assert len(build.log) == 3


def test_a_c_compiler_that_does_not_link(source, folder, monkeypatch):
    monkeypatch.setattr("tvm.support.cc.get_cc", lambda: "/bin/false")
    with pytest.warns(RuntimeWarning, match="/bin/false does not link kernels: Compilation error:"):
        run(load(source))
    run(load(source))
    assert len(build.log) == 1 and len([*folder.glob("*.ll")]) == 1


def test_a_folder_that_nothing_may_be_executed_from(source, folder, monkeypatch):
    def refused(path):
        raise RuntimeError(f"{path}: failed to map segment from shared object")

    monkeypatch.setattr(build.tvm.runtime, "load_module", refused)
    run(load(source))
    run(load(source))
    assert reasons()[0] == "not in the disk cache" and "failed to map" in reasons()[1]


@pytest.mark.parametrize("suffix", [".so", ".json"])
def test_a_damaged_entry_is_built_again(source, folder, suffix):
    run(load(source))
    (path,) = folder.glob(f"*{suffix}")
    damaged = path.with_suffix(".damaged")
    damaged.write_bytes(path.read_bytes()[:-20])
    damaged.replace(path)  # another file: this process runs what the first one holds
    run(load(source))
    run(load(source))
    assert reasons() == ["not in the disk cache", "the cache entry was damaged"]


def test_a_file_that_does_not_load_is_built_again(source, folder):
    run(load(source))
    (entry,) = store.entries()

    def write(folder: Path) -> Path:
        (folder / "kernel.so").write_bytes(b"no library")
        return folder / "kernel.so"

    store.put(entry.key, entry.what, write)
    run(load(source))
    run(load(source))
    assert len(build.log) == 2 and reasons()[1].startswith("the cached kernel does not load: ")


def test_cache_off(source, folder, monkeypatch):
    monkeypatch.setenv("LIMPID_CACHE", "off")
    run(load(source))
    run(load(source))
    assert reasons() == ["the disk cache is off"] * 2 and not folder.exists()


def test_a_read_only_cache_serves_and_is_left_alone(source, folder, monkeypatch):
    run(load(source))
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    access, utime = os.access, os.utime

    def refused(path, *more):
        if Path(path).is_relative_to(folder):
            raise PermissionError(13, "denied")
        return utime(path, *more)

    monkeypatch.setattr(os, "access", lambda path, mode: not Path(path).is_relative_to(folder) and access(path, mode))
    monkeypatch.setattr(os, "utime", refused)
    run(load(source))
    assert len(build.log) == 1, "what is there serves"
    run(load(source), width=4)
    run(load(source), width=4)
    assert len(build.log) == 3 and {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_the_size_limit(source, folder, monkeypatch):
    run(load(source), width=3)
    monkeypatch.setenv("LIMPID_CACHE_LIMIT", str(1.5 * store.entries()[0].bytes / 2**20))
    run(load(source), width=4)
    assert [entry.what for entry in store.entries()] == ["temp_scale(x=float32[n:2-, 4], by=2.0)"]
    run(load(source), width=3)
    assert len(build.log) == 3, "what was thrown away is built again"


def test_a_changed_source_file_is_another_kernel(source):
    run(load(source))
    source.write_text(SOURCE.replace("* T.float32(by)", "* T.float32(by + 1)"))
    changed = load(source)
    assert changed.temp_scale(ops.tensor([[1.0, 1, 1]] * 2), by=2.0).numpy()[0, 0] == 3
    source.write_text(SOURCE)
    run(load(source))
    assert len(build.log) == 2, "the old one is still there"


def test_threads_and_versions_are_part_of_the_key(source, monkeypatch):
    request = load(source).temp_scale.plan((ops.zeros((2, 3)),), {"by": 2.0}).request()
    key = request.key
    monkeypatch.setenv("TVM_NUM_THREADS", "77")
    assert request.key != key
    monkeypatch.undo()
    assert request.key == key
    monkeypatch.setattr(build, "_versions", lambda: "apache-tvm 99")
    assert request.key != key


def test_a_kernel_that_is_registered_anew_is_used(source):
    module = load(source)
    run(module)

    @module.temp_scale.kernel
    def _(x, out, *, by):
        width = x.shape[1]

        @T.prim_func(s_tir=True)
        def temp_scale(x_: T.handle, out_: T.handle):
            n = T.int64()
            X = T.match_buffer(x_, (n, width), "float32", align=4)
            Y = T.match_buffer(out_, (n, width), "float32", align=4)
            for i, k in T.grid(n, width):
                with T.sblock("scale"):
                    vi, vk = T.axis.remap("SS", [i, k])
                    Y[vi, vk] = X[vi, vk] + T.float32(by)

        return temp_scale

    assert module.temp_scale(ops.tensor([[1.0, 1, 1]] * 2), by=2.0).numpy()[0, 0] == 3
    module.temp_scale.template("cpu")(lambda x, out, *, by: None)
    assert module.temp_scale(ops.tensor([[1.0, 1, 1]] * 2), by=2.0).numpy()[0, 0] == 3, "a template that does not apply"


def test_a_kernel_of_a_notebook_cell_is_never_mistaken():
    def cell(factor: int):
        """What IPython does: code without a file, whose lines it can show. `factor` comes from another cell."""
        text = SOURCE.replace("T.float32(by)", "T.float32(factor)").replace("from __future__ import annotations", "")
        name = "<ipython-input-7-abc>"
        linecache.cache[name] = (len(text), None, [*text.splitlines(True)], name)
        namespace = {"__name__": "__main__", "factor": factor}
        exec(compile(text, name, "exec"), namespace)
        return namespace["temp_scale"]

    x = ops.tensor(np.ones((2, 3), "float32"))
    first, second = cell(4), cell(5)
    assert [each(x, by=1.0).numpy()[0, 0] for each in (first, second, first)] == [4, 5, 4]
    assert len(build.log) == 2


def test_prepare_builds_in_parallel(source):
    module = load(source)
    requests = [module.temp_scale.plan((ops.zeros((2, w)),), {"by": 2.0}).request() for w in (3, 4, 5, 6, 3)]
    assert build.prepare(requests, progress=False) == 4 and len(build.log) == 4
    if build.target.threads() > 1:
        assert len({*module.built}) > 1 and threading.get_ident() not in module.built
    assert build.prepare(requests, progress=False) == 0
    for width in (3, 4, 5, 6):
        run(module, width)
    assert len(build.log) == 4
    again = load(source)
    requests = [again.temp_scale.plan((ops.zeros((2, w)),), {"by": 2.0}).request() for w in (3, 4)]
    assert build.prepare(requests, progress=False) == 0 and not again.built, "loaded from the disk cache"


def test_prepare_reports_the_first_failure(source, monkeypatch):
    module = load(source)
    monkeypatch.setenv("NEVER_BUILD", "1")
    requests = [module.temp_scale.plan((ops.zeros((2, w)),), {"by": 2.0}).request() for w in range(3, 40)]
    with pytest.raises(KernelError, match=r"temp_scale\(x=float32\[n:2-, \d+\], by=2.0\) does not compile"):
        build.prepare(requests, progress=False)
    monkeypatch.delenv("NEVER_BUILD")
    run(module)


def test_threads_that_want_one_kernel_build_it_once(source):
    module = load(source)
    barrier = threading.Barrier(4)
    failures = []

    def work():
        barrier.wait()
        try:
            run(module)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert not failures and len(build.log) == 1 and len(module.built) == 1


def test_a_kernel_that_does_not_compile(source, folder):
    module = load(source)

    @module.temp_scale.kernel
    def _(x, out, *, by):
        raise NotImplementedError("no such kernel")

    message = r"^temp_scale\(x=float32\[n:2-, 3\], by=2.0\) does not compile: no such kernel$"
    for _ in range(2):
        with pytest.raises(KernelError, match=message) as caught:
            run(module)
        assert isinstance(caught.value.__cause__, NotImplementedError)
    assert not build.log and not store.entries()


def test_a_kernel_that_assumes_too_much_alignment(source):
    source.write_text(SOURCE.replace(', "float32", align=4)', ', "float32")'))
    with pytest.raises(KernelError, match="temp_scale: X assumes 64-byte alignment; pass align= its element size"):
        run(load(source))


def test_an_unaligned_view_runs(source):
    module = load(source)
    x = ops.tensor(np.arange(30, dtype="float32").reshape(10, 3))
    for start_row in range(4):
        part = x[start_row : start_row + 5]
        assert start_row == 0 or part.numpy().ctypes.data % 64
        np.testing.assert_array_equal(module.temp_scale(part, by=2.0).numpy(), 2 * part.numpy())


def test_what_an_op_shows(source):
    op = load(source).temp_scale
    n = Dim("n", 2, None)
    for argument in (ops.zeros((2, 3)), Spec((2, 3), "float32")):
        text = op.tir(argument, by=2.5)
        assert "T.sblock" in text and "T.float32(2.5)" in text and repr(text) == text
    assert "define " in op.source("llvm", Spec((2, 3), "float32"), by=2.5)
    assert ".text" in op.source("asm", Spec((2, 3), "float32"), by=2.5)
    assert "2.5" in op.source("c", Spec((2, 3), "float32"), by=2.5)
    with pytest.raises(KernelError, match="no source in 'rust'; known are 'llvm', 'asm', 'c', 'cuda'"):
        op.source("rust", Spec((2, 3), "float32"), by=2.5)
    assert op.plan((Spec((2, 3), "float32"),), {"by": 2.5}).request().specs == (Spec((n, 3), "float32"),)
    assert not build.log, "showing is not building"
    help_text = pydoc.plain(pydoc.render_doc(op))
    assert "temp_scale(x: Tensor, *, by: float) -> Tensor" in help_text and "x * by, for tests." in help_text
    assert op.signature == "temp_scale(x: Tensor, *, by: float) -> Tensor" and op.__name__ == "temp_scale"
    np.testing.assert_array_equal(op.reference(ops.zeros((2, 3)), by=2), np.zeros((2, 3)))
