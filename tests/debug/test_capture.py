"""Crash capture: a call that kills the process leaves a bundle of itself behind, any other nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest

import llm.nn
import ops
from debug.bundle import Bundle
from debug.reproduce import Repro
from debug.verdict import replay
from ops import OpError
from tests.llm import small

ROOT = Path(ops.__file__).parents[1]
CHILD = """
import ctypes, os, sys
import numpy as np
import ops
from debug.reproduce import repro
from tests.llm import small

def fatal(x, weight, *, eps, plus_one=False):
    {fatal}

model = small.model(np.random.default_rng(3))
repro.arm(sys.argv[1])
cache = model.new_cache()
for _ in range(3):
    model([5], cache)
with ops.rms_norm.use(fatal, where="layers.1.post_attention_layernorm"):
    model([7, 8], cache)
"""


def crashed(folder: Path, fatal: str) -> int:
    """The exit code of a process that has a fatal kernel in use in its fourth pass."""
    (folder.parent / "child.py").write_text(CHILD.format(fatal=fatal))  # where the kernel's source is found
    command = [sys.executable, folder.parent / "child.py", folder]
    return subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True).returncode


def test_a_crash_leaves_a_bundle_that_replays(tmp_path):
    folder = tmp_path / "crashes"
    assert crashed(folder, "return ctypes.string_at(0)") == -signal.SIGSEGV
    (left,) = folder.iterdir()
    bundle = Bundle.read(left)
    assert bundle.call.full_address == "layers.1.post_attention_layernorm/rms_norm[0]@4"
    assert [str(each.spec) for each in bundle.call.args] == ["float32[2, 32]", "float32[32]"]
    assert (bundle.hash, bundle.results, bundle.kernel["name"]) == (None, {}, "fatal")
    assert bundle.source.partition(":")[0].endswith("nn.py") or ".py:" in bundle.source
    weight = small.model(np.random.default_rng(3)).layers[1].post_attention_layernorm.weight
    assert np.array_equal(bundle.call.args[1].numpy(), weight.numpy())
    with zipfile.ZipFile(left) as archive:
        assert archive.testzip() is None
        assert {"kernel.py", "kernel.tir", "replay.py"} <= {*archive.namelist()}
    found = replay(left, trust=True)
    assert (found.same, found.crash) == (True, "SIGSEGV")
    assert "the same: it crashed, SIGSEGV; recorded: the call did not return" in str(found)
    lived = replay(left)
    assert (lived.same, lived.crash) == (False, None)
    assert "the bundle's kernel was not run" in str(lived)


def test_an_exit_in_a_kernel_leaves_a_bundle(tmp_path):
    folder = tmp_path / "crashes"
    assert crashed(folder, "os._exit(7)") == 7
    (left,) = folder.iterdir()
    assert Bundle.read(left).call.path == "layers.1.post_attention_layernorm"
    assert replay(left, trust=True).crash == "exit code 7 without returning"


def test_a_run_that_ends_well_leaves_nothing(tmp_path):
    folder = tmp_path / "crashes"
    assert crashed(folder, "return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight") == 0
    assert [*folder.iterdir()] == []


def test_while_a_call_runs_its_bundle_is_there(tmp_path, rng):
    model, seen = small.model(rng), []

    def looked(x, weight, *, eps, plus_one=False):
        (file,) = tmp_path.iterdir()
        bundle = Bundle.read(file)
        seen.append(bundle.call.full_address)
        assert np.array_equal(bundle.call.args[0].numpy(), x)
        assert np.array_equal(bundle.call.args[1].numpy(), weight)
        return (x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight).astype("float32")

    repro, cache = Repro(), model.new_cache()
    with ops.rms_norm.use(looked), repro.arm(tmp_path):
        for i in range(3):
            model([i, 9], cache)
        assert len(seen) == 3 * 7
        (file,) = tmp_path.iterdir()
        with pytest.raises(OpError, match="no bundle that can be read"):  # between two calls there is none in it
            Bundle.read(file)
    assert not [*tmp_path.iterdir()]


def test_weights_that_are_written_once_and_what_changes_are_both_right(tmp_path, rng):
    """Large tensors: weights are kept from the second pass on, caches and activations never."""
    weight, cache = (ops.tensor(rng.standard_normal(shape).astype("float32")) for shape in ((64, 64), (40, 2, 64)))
    failures, calls = [], []

    def check(*given, **constants):
        (file,) = tmp_path.iterdir()
        bundle = Bundle.read(file)
        calls.append(file.stat().st_size)
        failures.extend(
            f"{bundle.call.address} {i}"
            for i, (array, there) in enumerate(zip(given, bundle.call.args, strict=True))
            if not np.array_equal(array, there.numpy())
        )

    def product(x, weight):
        check(x, weight)
        return (x @ weight.T).astype("float32")

    def write(cache, x, positions):
        check(cache, x, positions)
        cache = cache.copy()
        cache[positions] = x
        return cache

    class Step(llm.nn.Module):
        def forward(self, x, positions):
            ops.cache_write(cache, x.reshape(2, 2, 64), positions)
            return ops.linear(ops.linear(cache[:1].reshape(2, 64), weight), weight)

    step = Step()
    with ops.linear.use(product), ops.cache_write.use(write), Repro().arm(tmp_path):
        for i in range(4):
            x = ops.tensor(rng.standard_normal((4, 64)).astype("float32"))
            step(x, ops.tensor(np.array([0, i + 1], "int32")))
    assert (failures, len(calls)) == ([], 12)


def test_calls_of_several_threads_have_files_of_their_own(tmp_path, rng):
    x, inside, both = ops.tensor(rng.standard_normal((2, 3)).astype("float32")), [], threading.Barrier(2)

    def slow(x):
        both.wait(20)
        inside.append(len([file for file in tmp_path.iterdir() if zipfile.is_zipfile(file)]))
        both.wait(20)
        return -x

    with ops.neg.use(slow), Repro().arm(tmp_path):
        threads = [threading.Thread(target=ops.neg, args=(x,)) for _ in range(2)]
        [each.start() for each in threads]
        [each.join() for each in threads]
    assert inside == [2, 2]


def test_a_call_within_a_kernel_is_the_one_that_is_in_flight(tmp_path, rng):
    x, inside = ops.tensor(rng.standard_normal((2, 3)).astype("float32")), []

    def there() -> list[str]:
        files = [file for file in tmp_path.iterdir() if zipfile.is_zipfile(file)]
        return [Bundle.read(file).call.op.name for file in files]

    def inner(x):
        inside.append(there())
        return np.abs(x)

    def outer(x):
        ops.tanh(ops.tensor(x))
        inside.append(there())
        return -x

    with ops.neg.use(outer), ops.tanh.use(inner), Repro().arm(tmp_path):
        ops.neg(x)
    assert inside == [["tanh"], ["neg"]]


def test_arm_and_disarm(tmp_path, rng):
    repro = Repro()
    armed = repro.arm(tmp_path / "a")
    with pytest.raises(OpError, match=r"crash capture is armed already, into .*; disarm it first"):
        repro.arm(tmp_path / "b")
    ops.neg(ops.tensor(rng.standard_normal(3).astype("float32")))
    assert [*armed.folder.iterdir()]
    repro.disarm()
    repro.disarm()
    assert not [*armed.folder.iterdir()]
    stale = tmp_path / "a" / "crash-999999999-0.zip"
    stale.write_bytes(b"between two calls")
    with repro.arm(tmp_path / "a"):
        assert not stale.exists()
