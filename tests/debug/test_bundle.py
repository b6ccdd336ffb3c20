"""repro and replay: a call in a file gives the same hash in a fresh process; a hostile file gives an error."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors

import ops
from debug.archive import head
from debug.bundle import Bundle
from debug.kernel_source import kernel_source
from debug.reproduce import repro
from debug.trace import trace
from debug.verdict import replay
from llm.cli import main
from ops import Call, Kernel, OpError
from ops.scope import Scope
from tests.ops.harness import random

OFFSET = 0.25


def call(op: Any, *args: Any, **constants: Any) -> Call:
    tensors = [ops.tensor(each) if isinstance(each, np.ndarray) else each for each in args]
    bound, constants = op._bound(tuple(tensors), constants)
    return Call(op, bound, constants, Scope("layers.2", 4), 1)


def helper(x):
    return np.where(x < -8, x + OFFSET, x)


def shifted(x):
    """Not what neg does."""
    return helper(-x).astype("float32")


def limpid(*arguments: Any, cwd: Path | None = None) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "llm", *map(str, arguments)]
    root = str(Path(ops.__file__).parents[1])
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=os.environ | {"PYTHONPATH": root})


def exit_code(*arguments: str) -> int:
    """Of the command, which runs here."""
    with pytest.raises(SystemExit) as ended:
        main([*arguments])
    assert isinstance(ended.value.code, int)
    return ended.value.code


def rewritten(path: Path, changed: dict[str, bytes | None], compression: int = zipfile.ZIP_STORED) -> Path:
    """A copy with other members; None leaves one out."""
    with zipfile.ZipFile(path) as archive:
        members: dict[str, bytes | None] = {name: archive.read(name) for name in archive.namelist()}
    result = path.with_name("changed.zip")
    with zipfile.ZipFile(result, "w", compression) as archive:
        for name, data in (members | changed).items():
            if data is not None:
                archive.writestr(name, data)
    return result


def manifest(path: Path) -> dict[str, Any]:
    with zipfile.ZipFile(path) as archive:
        return json.loads(archive.read("manifest.json"))


def with_manifest(path: Path, **changes: Any) -> Path:
    return rewritten(path, {"manifest.json": json.dumps(manifest(path) | changes).encode()})


@pytest.fixture
def path(tmp_path, rng) -> Path:
    """A bundle of a small call."""
    return repro(call(ops.neg, random(rng, (3, 5), "float32")), tmp_path / "bug.zip")


def test_the_command_gives_the_same_hash_in_a_fresh_process(tmp_path, rng):
    x, weight = ops.tensor(random(rng, (3, 50), "bfloat16")), ops.tensor(random(rng, (20, 50), "float32"), "q4")
    with trace(keep=True) as t:
        ops.linear(x, weight)
    file = repro(t.records[0], tmp_path / "new" / "bug.zip")
    (tmp_path / "ops").mkdir()  # what lies in the working folder does not stand in the packages' way
    (tmp_path / "ops" / "__init__.py").write_text("raise SystemExit(7)")
    done = limpid("replay", file, cwd=tmp_path / "new")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"the same: hash {manifest(file)['outcome']['hash']}" in done.stdout
    assert "linear[" in done.stdout
    assert [each.name for each in file.parent.iterdir()] == ["bug.zip"]  # nothing unfinished beside it


def test_what_is_in_a_bundle(tmp_path, rng):
    cache, x = random(rng, (6, 2, 3), "float16"), random(rng, (2, 2, 3), "float32")
    made = call(ops.cache_write, cache.copy(), x, np.array([4, 1], "int32"))
    file = repro(made, tmp_path / "bug.zip")
    with zipfile.ZipFile(file) as archive:
        names = {"manifest.json", "kernel.tir", "replay.py", "results/cache.safetensors"}
        assert {*archive.namelist()} == names | {f"inputs/{name}.safetensors" for name in ("cache", "x", "positions")}
        assert archive.read("kernel.tir").decode() == ops.cache_write.tir(*made.args)
        ((name, found),) = safetensors.deserialize(archive.read("inputs/cache.safetensors"))
    assert (name, found["dtype"], found["shape"]) == ("cache", "F16", [6, 2, 3])
    assert bytes(found["data"]) == cache.tobytes()  # as it was before the call
    assert np.array_equal(made.args[0].numpy(), cache)
    said = manifest(file)
    assert (said["op"], said["address"], said["pass"]) == ("cache_write", "layers.2/cache_write[1]", 4)
    assert {"limpid", "apache-tvm", "numpy", "python", "machine"} <= said["versions"].keys()
    bundle = Bundle.read(file)
    assert np.array_equal(bundle.results["cache"].numpy()[[4, 1]], x.astype("float16"))
    assert replay(file).same


def test_scalars_constants_and_absent_arguments_come_back(tmp_path, rng):
    q, k, v = (random(rng, shape, "float32") for shape in ((2, 4, 8), (7, 2, 8), (7, 2, 8)))
    made = call(ops.attention, q, k, v, np.array([3, 6], "int32"), scale=0.25, window=3)
    found = Bundle.read(repro(made, tmp_path / "a.zip")).call
    assert (found.constants, found.address) == (made.constants, made.address)
    assert all(np.array_equal(a.numpy(), b.numpy()) for a, b in zip(found.args, made.args, strict=True))
    scaled = Bundle.read(repro(call(ops.scale, q, 1.1), tmp_path / "b.zip")).call
    assert scaled.args[1] == 1.1


def test_a_difference_is_said_with_its_element(tmp_path, rng, capsys):
    x = random(rng, (2, 3), "float32")
    x[1, 2] = 9
    with ops.neg.use(shifted):
        file = repro(call(ops.neg, x), tmp_path / "bug.zip")
    found = replay(file)
    assert (found.same, found.code, found.crash) == (False, 1, None)
    assert "the bundle's kernel was not run" in str(found)
    assert "-9 instead of -8.75 at [1, 2]" in str(found)
    assert (exit_code("replay", str(file)), capsys.readouterr().out) == (1, f"{found}\n")
    older = with_manifest(file, versions=manifest(file)["versions"] | {"numpy": "1.0"}, source="a\x1b[2J")
    trusted = replay(older, trust=True)
    assert trusted.same
    assert "the bundle's kernel ran" in str(trusted)
    assert f"numpy was 1.0, here {np.__version__}" in str(trusted)
    assert r"made at a\x1b[2J" in str(trusted)  # a file does not steer the terminal


def test_source_of_a_kernel_stands_on_its_own():
    bound = 3

    def clipped(x, *, least=-OFFSET):
        """Uses a module, a constant, a closure, a function and a default."""
        return np.clip(helper(x), least, bound)

    found = kernel_source(Kernel.from_python(clipped))
    assert (found.function, found.note) == ("clipped", "")
    assert found.text is not None
    namespace: dict[str, Any] = {}
    exec(found.text, namespace)
    assert namespace["clipped"](np.array([-9.0, 9.0])).tolist() == [-0.25, 3]
    assert kernel_source(Kernel.from_python(lambda x: x)).text is None
    table = {"a": object()}

    def looked_up(x):
        return table["a"]

    assert kernel_source(Kernel.from_python(looked_up)).note == "it refers to table, which could not be written down"


def test_an_error_is_an_outcome_too(tmp_path):
    made = call(ops.embedding, np.array([9], "int32"), np.zeros((3, 2), "float32"))
    file = repro(made, tmp_path / "bug.zip")
    assert "ids hold a value outside [0, 3)" in manifest(file)["outcome"]["error"]
    found = replay(file)
    assert found.same
    assert "it raised KernelError: embedding" in str(found)


def test_records_without_what_is_needed(tmp_path, rng):
    with trace() as t:
        ops.neg(ops.tensor(random(rng, (2, 3), "float32")))
    with pytest.raises(OpError, match="input x was not kept, and is needed; trace with keep=True"):
        repro(t.records[0], tmp_path / "bug.zip")
    assert not [*tmp_path.iterdir()]


BOMB = b"\0" * 2**20


@pytest.mark.parametrize(
    "changed, says",
    [
        ({"manifest.json": None}, "holds no manifest.json"),
        ({"inputs/x.safetensors": None}, "holds no inputs/x.safetensors"),
        ({"results/output.safetensors": None}, "holds no results/output.safetensors"),
        ({"manifest.json": b"{"}, "no bundle that can be read: JSONDecodeError"),
        ({"manifest.json": b"{\xff}"}, "no bundle that can be read: UnicodeDecodeError"),
        ({"manifest.json": b"[]"}, "a bundle of format 'list', expected 1"),
        ({"manifest.json": b"[" * 100_000}, "no bundle that can be read: RecursionError"),
        ({"manifest.json": b'{"format": 1}'}, "no bundle that can be read: KeyError: 'op'"),
        ({"../evil.py": b"1"}, r"holds '../evil.py', which is no part of a bundle"),
        ({"/etc/evil": b"1"}, r"holds '/etc/evil', which is no part of a bundle"),
        ({"inputs/../../x.safetensors": b"1"}, "which is no part of a bundle"),
        ({"inputs/x.pkl": b"1"}, "which is no part of a bundle"),
        ({"inputs/x.safetensors": b""}, "is no safetensors file of one tensor"),
        ({"inputs/x.safetensors": struct.pack("<Q", 2**60) + b"{}"}, "is no safetensors file of one tensor"),
        ({"kernel.py": BOMB * 17}, "kernel.py claims 17825792 bytes"),
    ],
)
def test_hostile_files_give_an_error(path, changed, says):
    with pytest.raises(OpError) as error:
        replay(rewritten(path, changed), trust=True)
    assert says in str(error.value)


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"op": "nothing"}, "is of the op 'nothing', which this process does not have"),
        ({"op": ["neg"]}, "TypeError"),
        ({"format": 2}, "is a bundle of format 2, expected 1"),
        ({"arguments": []}, "cannot be used: neg"),
        (
            {"arguments": [{"name": "y", "shape": [3, 5], "dtype": "float32"}]},
            "the arguments are ['y']; neg takes ['x']",
        ),
        (
            {"arguments": [{"name": "x", "shape": [3, 10**12], "dtype": "float32"}]},
            "float32[3, 1000000000000] has 12000000000000",
        ),
        ({"arguments": [{"name": "x", "shape": [3, -5], "dtype": "float32"}]}, "has the size -5"),
        ({"arguments": [{"name": "x", "shape": [3, 5], "dtype": "object"}]}, "unknown dtype 'object'"),
        ({"arguments": [{"name": "x", "value": "shape"}]}, "cannot be used: neg"),
        ({"arguments": 3}, "TypeError"),
        ({"constants": {"eps": 1}}, "cannot be used: neg"),
        ({"constants": {"eps": {"a": 1}}}, "a constant is a number, a string or a list, not dict"),
        ({"outputs": [{"shape": [1, 1], "dtype": "float32"}]}, "gives float32[3, 5], not float32[1, 1]"),
        ({"outcome": {"hash": "0"}}, "is damaged: its results do not have the hash that it gives"),
        ({"outcome": None}, "AttributeError"),
        ({"versions": []}, "TypeError"),
    ],
)
def test_manifests_that_do_not_fit_give_an_error(path, changes, says):
    with pytest.raises(OpError) as error:
        replay(with_manifest(path, **changes), trust=True)
    assert says in str(error.value)


def test_constants_of_a_wrong_kind_give_an_error(tmp_path, rng):
    x = random(rng, (2, 4), "float32")
    file = repro(call(ops.top_k, x, k=2), tmp_path / "bug.zip")
    with pytest.raises(OpError, match=r"top_k takes no \{'k': 'two'\}: TypeError"):
        replay(with_manifest(file, constants={"k": "two"}))


def test_archives_that_lie_give_an_error(path, tmp_path, rng):
    data = bytearray(path.read_bytes())
    data[data.rindex(b"PK\1\2") + 16] ^= 1  # the checksum of the last member
    (tmp_path / "damaged.zip").write_bytes(data)
    with pytest.raises(OpError, match="no bundle that can be read: Bad CRC-32"):
        Bundle.read(tmp_path / "damaged.zip")
    bomb = {f"inputs/x{i}.safetensors": bytes(8 * 2**20) for i in range(10)}
    with pytest.raises(OpError, match=r"would unpack to \d+ bytes, from \d+"):
        Bundle.read(rewritten(path, dict(bomb), zipfile.ZIP_DEFLATED))
    with pytest.raises(OpError, match="no bundle that can be read"):
        Bundle.read(tmp_path / "absent.zip")
    (tmp_path / "text.zip").write_text("no archive")
    with pytest.raises(OpError, match="no bundle that can be read: File is not a zip file"):
        Bundle.read(tmp_path / "text.zip")
    huge = call(ops.linear, random(rng, (70_000, 1), "float32"), random(rng, (70_000, 1), "float32"))
    file = repro(call(ops.linear, huge.args[0][:2], huge.args[1][:2]), tmp_path / "huge.zip")
    shapes = [{"name": name, "shape": [70_000, 1], "dtype": "float32"} for name in ("x", "weight")]
    wide = with_manifest(file, arguments=shapes, outputs=[{"shape": [70_000] * 2, "dtype": "float32"}], outcome={})
    large = {f"inputs/{n}.safetensors": head(n, x.spec) + x.numpy().tobytes() for n, x in huge.inputs.items()}
    with pytest.raises(OpError, match="the call would give 19600000000 bytes"):
        Bundle.read(rewritten(wide.rename(tmp_path / "wide.zip"), dict(large)))


def test_unusable_files_have_exit_code_2_and_one_line(tmp_path, capsys):
    (tmp_path / "text.zip").write_text("no archive")
    assert exit_code("replay", str(tmp_path / "text.zip")) == 2
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert "is no bundle that can be read" in said.err


def test_the_script_in_it_runs(path, tmp_path):
    with zipfile.ZipFile(path) as archive:
        archive.extract("replay.py", tmp_path)
    root = str(Path(ops.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, tmp_path / "replay.py", path], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": root},
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
