"""safetensors: round trips with the `safetensors` library, laziness, atomic writing, and hostile files."""

import json
import mmap
import os
import random
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

import llm.weights.safetensors as format_module
from llm.errors import CheckpointError
from llm.weights import read_directory, read_file, write_directory, write_file
from llm.weights.safetensors import DTYPES

SEED = random.SystemRandom().randrange(2**32)


def draw(seed: int) -> dict[str, np.ndarray]:
    """One tensor of each dtype, of a random shape, and the odd shapes."""
    rng = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {}
    for code, dtype in DTYPES.items():
        shape = tuple(rng.integers(1, 6, rng.integers(1, 4)))
        values = rng.integers(0, 2, shape) if code == "BOOL" else rng.uniform(0, 100, shape)
        tensors[f"layers.{code}"] = values.astype(dtype)
    tensors["scalar"] = np.array(2.5, np.float32)
    tensors["empty"] = np.zeros((0, 3), ml_dtypes.bfloat16)
    return tensors


def same(got: np.ndarray, want: np.ndarray, name: str) -> None:
    assert got.dtype == want.dtype and got.shape == want.shape, f"{name}, seed {SEED}"
    assert got.tobytes() == want.tobytes(), f"{name}, seed {SEED}"


def test_round_trip(tmp_path: Path) -> None:
    tensors = draw(SEED)
    write_file(tmp_path / "a.safetensors", tensors)
    got = read_file(tmp_path / "a.safetensors")
    assert got.keys() == tensors.keys()
    for name, tensor in tensors.items():
        same(got[name], tensor, name)
        assert got[name].flags.writeable and got[name].flags.aligned and type(got[name]) is np.ndarray
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_the_library_reads_what_we_write(tmp_path: Path) -> None:
    tensors = {name: t for name, t in draw(SEED).items() if not name.startswith("layers.F8")}
    write_file(tmp_path / "a.safetensors", tensors, {"format": "pt", "made by": "tëst"})
    with safetensors.safe_open(tmp_path / "a.safetensors", framework="np") as file:
        assert file.metadata() == {"format": "pt", "made by": "tëst"}
        assert set(file.keys()) == tensors.keys()
        for name, tensor in tensors.items():
            same(file.get_tensor(name), tensor, name)
    length = int.from_bytes((tmp_path / "a.safetensors").read_bytes()[:8], "little")
    assert (8 + length) % 64 == 0


def test_we_read_what_the_library_writes(tmp_path: Path) -> None:
    tensors = {name: t for name, t in draw(SEED).items() if not name.startswith("layers.F8")}
    safetensors.numpy.save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "np"})
    got = read_file(tmp_path / "a.safetensors")
    assert got.keys() == tensors.keys()
    for name, tensor in tensors.items():
        same(got[name], tensor, name)


def test_arrays_are_views_that_never_change_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_file(path, {"w": np.ones((4, 4), np.float32), "v": np.ones(3, np.float32)})
    before = path.read_bytes()
    got = read_file(path)
    assert np.shares_memory(got["w"], np.asarray(got["w"].base))
    got["w"][:] = 7
    assert path.read_bytes() == before
    assert (read_file(path)["w"] == 1).all() and (got["w"] == 7).all() and (got["v"] == 1).all()
    assert np.from_dlpack(got["w"])[0, 0] == 7


def test_reading_is_lazy_and_survives_replacement(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    size = 2**38
    text = json.dumps({"w": entry("F32", [size // 4], 0, size)}).encode().ljust(120)
    with open(path, "wb") as file:  # 256 GiB that take no room: more than memory, so it can be mapped but not read
        file.write(craft(text))
        file.truncate(file.tell() + size)
    huge = read_file(path)["w"]
    assert huge.shape == (2**36,) and huge[-1] == 0
    write_file(path, {"w": np.arange(4)})
    assert huge[2**33] == 0 and read_file(path)["w"].tolist() == [0, 1, 2, 3]


def test_an_unaligned_tensor_is_copied(tmp_path: Path) -> None:
    values = np.random.default_rng(SEED).standard_normal(5).astype(np.float32)
    header = {"b": entry("U8", [3], 0, 3), "w": entry("F32", [5], 3, 23)}
    (tmp_path / "a.safetensors").write_bytes(craft(header) + b"\1\2\3" + values.tobytes())
    got = read_file(tmp_path / "a.safetensors")
    same(got["w"], values, "w")
    assert got["w"].flags.aligned and got["w"].flags.writeable and got["b"].tolist() == [1, 2, 3]


def test_arrays_that_are_not_contiguous_are_written_in_order(tmp_path: Path) -> None:
    base = np.random.default_rng(SEED).standard_normal((6, 8))
    tensors = {"t": base.T, "s": base[::2, ::-1], "n": np.broadcast_to(np.int8(3), (2, 2))}
    write_file(tmp_path / "a.safetensors", tensors)
    for name, got in read_file(tmp_path / "a.safetensors").items():
        same(got, np.ascontiguousarray(tensors[name]), name)


@pytest.mark.parametrize(
    ("tensors", "metadata", "expected"),
    [
        ({"c": np.zeros(2, np.complex64)}, {}, "tensor 'c' of dtype complex64 cannot be stored"),
        ({"o": np.array([None])}, {}, "tensor 'o' of dtype object cannot be stored"),
        ({"e": np.zeros(2, ">f4")}, {}, "tensor 'e' of dtype >f4 cannot be stored"),
        ({"__metadata__": np.zeros(2)}, {}, "the name must not be '__metadata__'"),
        ({"w": np.zeros(2)}, {"step": 3}, "metadata must map str to str"),
    ],
)
def test_what_cannot_be_written(tmp_path: Path, tensors: Any, metadata: Any, expected: str) -> None:
    with pytest.raises(CheckpointError, match=expected):
        write_file(tmp_path / "a.safetensors", tensors, metadata)
    assert os.listdir(tmp_path) == []


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    write_file(path, {"w": np.arange(3)})

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            write_file(path, {"w": np.zeros(1000)})
        with pytest.raises(OSError, match="No space left"):
            write_directory(tmp_path / "new", {"a": np.zeros(9), "b": np.zeros(9)}, max_shard_bytes=80)
    assert os.listdir(tmp_path / "new") == []
    assert sorted(os.listdir(tmp_path)) == ["a.safetensors", "new"]
    assert read_file(path)["w"].tolist() == [0, 1, 2]


def test_file_mode_follows_the_umask(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    write_file(tmp_path / "a.safetensors", {"w": np.arange(3)})
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def entry(dtype: Any, shape: Any, begin: Any, end: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def craft(header: Any) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text


def refused(read: Callable[[Path], object], path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message and len(message) < 1200
    return message


GOOD = entry("F32", [2], 0, 8)
HOSTILE: list[tuple[bytes, str]] = [
    (b"", "is empty"),
    (b"1234567", "7 bytes, a safetensors file has at least 8"),
    ((2**63).to_bytes(8, "little") + b"{}", "claims 9223372036854775808 bytes, at most 2 are possible"),
    ((3).to_bytes(8, "little") + b"{}", "claims 3 bytes, at most 2 are possible"),
    (craft(b"{"), "not the JSON"),
    (craft(b"\xff{}"), "not the JSON"),
    (craft(b"[" * 100_000), "nested too deeply"),
    (craft(b'{"w": 1' + b"0" * 5000 + b"}"), "not the JSON"),
    (craft(b"[]"), "a JSON list, an object was expected"),
    (craft(b'{"w": {}, "w": {}}'), "duplicate keys 'w'"),
    (craft(b'{"w":{"dtype":"U8","dtype":"I8","shape":[0],"data_offsets":[0,0]}}'), "duplicate keys 'dtype'"),
    (craft({"__metadata__": {"a": 1}}), "__metadata__ does not map strings"),
    (craft({"__metadata__": []}), "__metadata__ does not map strings"),
    (craft({"w": [1]}), "tensor 'w': its entry is [1]"),
    (craft({"w": {"dtype": "F32", "shape": [2]}}), "tensor 'w': its entry is"),
    (craft({"w": {**GOOD, "extra": 1}}) + bytes(8), "tensor 'w': its entry is"),
    (craft({"w": entry("F33", [2], 0, 8)}) + bytes(8), "tensor 'w' has dtype F33; known are F64"),
    (craft({"w": entry(["F32"], [2], 0, 8)}) + bytes(8), "tensor 'w' has dtype ['F32']"),
    (craft({"w": entry("F32", [-2], 0, 8)}) + bytes(8), "shape [-2] is not a list"),
    (craft({"w": entry("F32", [2.0], 0, 8)}) + bytes(8), "shape [2.0] is not a list"),
    (craft({"w": entry("F32", [True, 2], 0, 8)}) + bytes(8), "shape [True, 2] is not a list"),
    (craft({"w": entry("F32", 2, 0, 8)}) + bytes(8), "shape 2 is not a list"),
    (craft({"w": entry("F32", [1] * 65, 0, 4)}) + bytes(4), "at most 64 integers"),
    (craft({"w": entry("U8", [2**62] * 64, 0, 8)}) + bytes(8), "data_offsets span 8 bytes"),
    (craft({"w": entry("F32", [0, 2**62, 2**62], 0, 0)}), "impossible shape"),
    (craft({"w": {**GOOD, "data_offsets": [0]}}) + bytes(8), "data_offsets [0] are not"),
    (craft({"w": entry("F32", [2], -8, 0)}) + bytes(8), "data_offsets [-8, 0] are not"),
    (craft({"w": entry("F32", [2], 8, 0)}) + bytes(8), "data_offsets [8, 0] are not"),
    (craft({"w": entry("F32", [2], 0, 10**400)}) + bytes(8), "are not [begin, end]"),
    (craft({"w": entry("F32", [2], 0, 12)}) + bytes(12), "span 12 bytes, shape [2] of F32 takes 8"),
    (craft({"w": GOOD}) + bytes(7), "but the file has"),
    (craft({"w": GOOD}) + bytes(9), "9 bytes of data, the header accounts for 8"),
    (craft({}) + bytes(1), "1 bytes of data, the header accounts for 0"),
    (craft({"w": entry("F32", [2], 4, 12)}) + bytes(12), "begins at byte 4 and leaves a hole after the start"),
    (craft({"v": GOOD, "w": entry("F32", [2], 12, 20)}) + bytes(20), "tensor 'w': begins at byte 12 and leaves a hole"),
    (craft({"v": GOOD, "w": entry("F32", [2], 4, 12)}) + bytes(12), "tensor 'w': begins at byte 4 and overlaps 'v'"),
    (craft({"v": GOOD, "w": GOOD}) + bytes(8), "overlaps 'v'"),
    (craft({"w": entry("BOOL", [2], 0, 2)}) + b"\1\2", "a BOOL byte is 2"),
    (craft({"\ud800" * 3: entry("F32", [2], 0, 4)}) + bytes(4), "\\ud800"),
]


@pytest.mark.parametrize(("content", "expected"), HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_files_are_refused(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    assert expected in refused(read_file, path)


def test_a_header_over_the_limit_is_not_even_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with open(path, "wb") as file:
        file.write((100_000_001).to_bytes(8, "little"))
        file.truncate(200_000_000)
    assert "claims 100000001 bytes, at most 100000000 are possible" in refused(read_file, path)


def test_any_flipped_or_missing_byte_is_an_error_or_harmless(tmp_path: Path) -> None:
    """Whatever happens to a file, the outcome is tensors or a CheckpointError: no other exception."""
    path = tmp_path / "a.safetensors"
    write_file(path, draw(SEED))
    content = path.read_bytes()
    rng = np.random.default_rng(SEED)
    outcomes = {True: 0, False: 0}
    for _ in range(400):
        damaged = bytearray(content)
        for _ in range(rng.integers(1, 4)):
            damaged[rng.integers(0, 1500)] = rng.integers(0, 256)
        path.write_bytes(damaged[: rng.integers(1, len(damaged))] if rng.random() < 0.2 else damaged)
        try:
            outcomes[bool(read_file(path))] += 1
        except CheckpointError:
            outcomes[False] += 1
    assert outcomes[False] > 100, f"seed {SEED}: {outcomes}"


def test_missing_files_and_directories(tmp_path: Path) -> None:
    assert "No such file" in refused(read_file, tmp_path / "none.safetensors")
    assert "Is a directory" in refused(read_file, tmp_path)
    assert "is not a directory" in refused(read_directory, tmp_path / "none")
    assert "holds nothing" in refused(read_directory, tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_never_loaded(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(b"\x80\x04.")
    message = refused(read_directory, tmp_path)
    assert name in message and "never loaded" in message and "safe_serialization" in message


def test_directories_round_trip(tmp_path: Path) -> None:
    tensors = draw(SEED)
    total = sum(t.nbytes for t in tensors.values())
    write_directory(tmp_path / "one", tensors)
    write_directory(tmp_path / "many", tensors, max_shard_bytes=max(total // 4, 1))
    assert os.listdir(tmp_path / "one") == ["model.safetensors"]
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == total and index["weight_map"].keys() == tensors.keys()
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 1 and shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    for folder in ("one", "many"):
        got = read_directory(tmp_path / folder)
        assert got.keys() == tensors.keys()
        for name, tensor in tensors.items():
            same(got[name], tensor, name)


def test_shards_respect_the_limit(tmp_path: Path) -> None:
    tensors = {name: np.zeros(size, np.int8) for name, size in {"a": 4, "b": 4, "c": 4, "huge": 50, "d": 1}.items()}
    write_directory(tmp_path, tensors, max_shard_bytes=8)
    shards = [sorted(read_file(path)) for path in sorted(tmp_path.glob("*.safetensors"))]
    assert shards == [["a", "b"], ["c"], ["huge"], ["d"]]


def test_old_and_new_weights_never_mix(tmp_path: Path) -> None:
    tensors = {"a": np.zeros(9), "b": np.ones(9)}
    write_directory(tmp_path / "one", tensors)
    write_directory(tmp_path / "one", {"a": np.ones(2)})
    assert read_directory(tmp_path / "one")["a"].tolist() == [1, 1]
    with pytest.raises(CheckpointError, match=r"holds other weights already: 'model.safetensors'"):
        write_directory(tmp_path / "one", tensors, max_shard_bytes=80)
    write_directory(tmp_path / "many", tensors, max_shard_bytes=80)
    for limit in (80, 2**30):
        with pytest.raises(CheckpointError, match="remove them first"):
            write_directory(tmp_path / "many", tensors, max_shard_bytes=limit)
    assert read_directory(tmp_path / "many").keys() == tensors.keys()


def sharded(path: Path, weight_map: Any, **shards: dict[str, np.ndarray]) -> Path:
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for name, tensors in shards.items():
        write_file(path / f"{name}.safetensors", tensors)
    return path


def test_index_and_shards_must_agree(tmp_path: Path) -> None:
    one = np.zeros(1)
    x, y = "x.safetensors", "y.safetensors"
    message = refused(read_directory, sharded(tmp_path, {"a": x, "b": y, "c": "z.safetensors"}, x={"a": one}))
    assert "2 of 3 shards missing: 'y.safetensors', 'z.safetensors'" in message
    message = refused(read_directory, sharded(tmp_path, {"a": x, "b": y}, x={"a": one, "b": one}, y={"c": one}))
    assert "x.safetensors holds 'b', which the index places in another shard" in message
    assert "y.safetensors lacks 'b'" in message
    assert "y.safetensors holds 'c', which the index does not list" in message


def test_all_that_truncated_files_lack_is_in_one_error(tmp_path: Path) -> None:
    tensors = {f"w{i:02}": np.zeros(2, np.float32) for i in range(30)}
    write_file(tmp_path / "model.safetensors", tensors)
    content = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[:-20])
    message = refused(read_directory, tmp_path)
    assert f"end at byte {len(content)}, but the file has {len(content) - 20}: it lacks 'w27', 'w28', 'w29';" in message
    (tmp_path / "model.safetensors").write_bytes(content[: -8 * 25])
    assert "it lacks 'w05'," in refused(read_directory, tmp_path)
    assert "'w14' and 15 more;" in refused(read_directory, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    shards = {f"s{i:02}": {f"w{i:02}": tensors[f"w{i:02}"]} for i in range(14)}
    placed = {name: f"{shard}.safetensors" for shard, each in shards.items() for name in each}
    sharded(tmp_path, {**placed, "v": "s99.safetensors"}, **shards)
    for shard in [*shards][1:3]:
        file = tmp_path / f"{shard}.safetensors"
        file.write_bytes(file.read_bytes()[:-1])
    message = refused(read_directory, tmp_path)
    for part in ("1 of 15 shards missing: 's99.safetensors'; s01.", "it lacks 'w01'; s02.", "it lacks 'w02'; "):
        assert part in message
    for shard in shards:
        (tmp_path / f"{shard}.safetensors").write_bytes(b"cut")
    assert "; and 5 more such faults; download them again" in refused(read_directory, tmp_path)


def test_the_flag_of_a_map_larger_than_memory_is_linuxs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(mmap, "MAP_NORESERVE", raising=False)
    for platform, flag in (("linux", 0x4000), ("darwin", 0)):
        monkeypatch.setattr(sys, "platform", platform)
        assert runpy.run_path(str(format_module.__file__))["_NO_RESERVE"] == flag


@pytest.mark.parametrize("shard", ["../x.safetensors", "/etc/passwd", "a/x.safetensors", "..", ".", "", "x\0y"])
def test_shards_must_not_leave_the_directory(tmp_path: Path, shard: str) -> None:
    assert "shards must be files beside the index" in refused(read_directory, sharded(tmp_path, {"w": shard}))


def test_shards_may_be_links(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    write_file(tmp_path / "blobs" / "0a1b", {"w": np.arange(2)})
    (tmp_path / "snapshot" / "x.safetensors").symlink_to("../blobs/0a1b")
    assert read_directory(sharded(tmp_path / "snapshot", {"w": "x.safetensors"}))["w"].tolist() == [0, 1]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "[" * 100_000])
def test_a_broken_index_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(text)
    assert "download it again" in refused(lambda _: read_directory(tmp_path), path)
