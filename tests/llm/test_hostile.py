"""Files that nobody vouches for: random bytes, truncations, mutated headers. A clear error, no crash, little memory."""

from __future__ import annotations

import json
import math
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm.config import parse_config
from llm.errors import CheckpointError, ConfigError, TokenizerError, UserError
from llm.gguf_tokenizer import from_metadata
from llm.load import build, load
from llm.models.llama import Config
from llm.weights import read_directory, read_file, write_file
from llm.weights.blocks import Kind
from llm.weights.gguf import read_gguf
from llm.weights.gguf_model import translate
from tests.llm import gguf_files, small

SETTINGS = settings(
    max_examples=150,
    deadline=3000,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
FREE = 2**22  # bytes that any file may take; beyond that it is 64 for each of its own


def kept_small(size, read):
    """What `read` gives, or the clear error it raises; the memory it takes is bounded by the size of the file."""
    tracemalloc.start()
    try:
        return read()
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000
        return None
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak <= FREE + 64 * size, f"{peak} bytes for a file of {size}"


def whole(path):
    """All that is done of a file before its weights are used."""
    found = read_gguf(path)
    for array in found.tensors.values():
        np.asarray(array)
    if isinstance(found.metadata.get("tokenizer.ggml.model"), str):
        try:
            from_metadata(found.metadata, path)
        except TokenizerError as error:
            assert "\n" not in str(error)
    raw, tensors = translate(found)
    build(raw)
    return tensors


@pytest.fixture(scope="module")
def valid(tmp_path_factory) -> bytes:
    """A small model's file, with a vocabulary."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("valid")
    kinds = {"token_embd": Kind.Q8_0, "attn_q": Kind.Q4_K, "ffn_down": Kind.Q6_K}
    tensors = {}
    for name, shape in gguf_files.shapes(1, 256, 256).items():
        kind = next((each for part, each in kinds.items() if part in name), Kind.Q4_0 if len(shape) == 2 else Kind.F32)
        raw = np.ones(shape, "float32").view("uint8") if len(shape) == 1 else gguf_files.random_raw(rng, kind, shape)
        tensors[name] = kind, raw
    values = gguf_files.SIZES | {"block_count": 1, "feed_forward_length": 256}
    return gguf_files.write(folder / "m.gguf", tensors, values, metadata=gguf_files.byte_level()).read_bytes()


def header_size(data: bytes) -> int:
    return data.index(b"blk.0.ffn_down.weight") + 64


def test_the_valid_file_is_valid(valid, tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(valid)
    assert "model.layers.0.mlp.up_proj.weight" in whole(path)


@SETTINGS
@given(data=st.binary(max_size=400), magic=st.booleans(), version=st.sampled_from([2, 3, 1, 0]))
def test_random_bytes(tmp_path, data, magic, version):
    content = b"GGUF" + struct.pack("<I", version) + data if magic else data
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    kept_small(len(content), lambda: whole(path))


@SETTINGS
@given(data=st.data())
def test_truncations(tmp_path, valid, data):
    length = data.draw(st.one_of(st.integers(0, header_size(valid)), st.integers(0, len(valid) - 1)))
    path = tmp_path / "m.gguf"
    path.write_bytes(valid[:length])
    with pytest.raises(CheckpointError):
        read_gguf(path)


ODD = [0, 1, 7, 8, 9, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1]


@SETTINGS
@given(data=st.data())
def test_mutated_headers(tmp_path, valid, data):
    """Some numbers in the header are replaced by odd ones, some bytes by others, some parts are doubled or removed."""
    content = bytearray(valid)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(4, header_size(valid)))
        match data.draw(st.sampled_from(["long", "short", "byte", "double", "remove"])):
            case "long":
                content[at : at + 8] = struct.pack("<Q", data.draw(st.sampled_from(ODD)))
            case "short":
                content[at : at + 4] = struct.pack("<I", data.draw(st.sampled_from(ODD)) % 2**32)
            case "byte":
                content[at] = data.draw(st.integers(0, 255))
            case "double":
                content[at:at] = content[at : at + data.draw(st.integers(1, 64))]
            case "remove":
                del content[at : at + data.draw(st.integers(1, 64))]
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with np.errstate(all="ignore"):
        kept_small(len(content), lambda: whole(path))


def container(*values: bytes, tensors: list[bytes] = [], data: bytes = b"", counts=None, version: int = 3) -> bytes:  # noqa: B006
    """A file by hand."""
    claimed = counts or (len(tensors), len(values))
    head = b"GGUF" + struct.pack("<IQQ", version, *claimed) + b"".join(values) + b"".join(tensors)
    return head + b"\0" * (-len(head) % 32) + data


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def tensor(name: bytes = b"t", shape=(32,), kind: int = 0, start: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, start)


LONG = struct.pack("<Q", 2**62)


def value(kind: int, rest: bytes, key: bytes = b"k") -> bytes:
    return text(key) + struct.pack("<I", kind) + rest


def word(number: int) -> bytes:
    return struct.pack("<I", number)


ALIGNMENT, ZEROS = b"general.alignment", b"\0" * 128
HOSTILE = {
    "empty": (b"", "is empty"),
    "another file": (b"PK\3\4" + ZEROS, "does not begin with 'GGUF'"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "is big-endian"),
    "version 1": (container(version=1), "GGUF version 1 is not supported"),
    "more values than bytes": (container(counts=(0, 2**63)), "claims 9223372036854775808 values and 0 tensors"),
    "more tensors than bytes": (container(counts=(2**40, 0)), "claims 0 values and 1099511627776 tensors"),
    "a key beyond the end": (container(LONG + ZEROS), f"within 'a key', which takes {2**62} from"),
    "a key of bytes": (container(text(b"\xff\xfe") + ZEROS), "'a key' is not UTF-8"),
    "a key twice": (container(value(0, b"1"), value(0, b"1")), "the key 'k' is there twice"),
    "an unknown type": (container(value(13, ZEROS)), "'k' is of type 13: it is unknown"),
    "a bool of two": (container(value(7, b"\2")), "a BOOL byte that is neither 0 nor 1"),
    "a list of lists": (container(value(9, word(9) + ZEROS)), "lists of lists are not supported"),
    "a list of 2**62 bytes": (container(value(9, word(0) + LONG)), f"within 'k', which takes {2**62}"),
    "a list of 2**62 numbers": (container(value(9, word(12) + LONG)), "within 'k', which takes"),
    "a list of 2**62 strings": (container(value(9, word(8) + LONG)), f"claims {2**62} strings"),
    "an alignment of 3": (container(value(4, word(3), ALIGNMENT)), "alignment is 3, expected a power of two"),
    "an alignment of 0": (container(value(4, word(0), ALIGNMENT)), "general.alignment is 0"),
    "an alignment of text": (container(value(8, text(b"x"), ALIGNMENT)), "general.alignment is 'x'"),
    "no dimension": (container(tensors=[tensor(shape=())], data=ZEROS), "tensor 't' has 0 dimensions"),
    "five dimensions": (container(tensors=[tensor(shape=(1,) * 5)], data=ZEROS), "has 5 dimensions, expected 1"),
    "2**32 dimensions": (container(tensors=[text(b"t") + word(2**32 - 1) + ZEROS]), "has 4294967295 dimensions"),
    "an empty shape": (container(tensors=[tensor(shape=(0, 4))]), r"impossible shape \[4, 0\]"),
    "a shape that overflows": (container(tensors=[tensor(shape=(2**32, 2**32))]), "the impossible shape"),
    "half a block": (container(tensors=[tensor(shape=(33,), kind=2)], data=ZEROS), "no multiple of Q4_0's blocks"),
    "an unknown kind": (container(tensors=[tensor(kind=4)], data=ZEROS), "is of type 4, which is unknown"),
    "Q8_K": (container(tensors=[tensor(shape=(256,), kind=15)], data=ZEROS), "is Q8_K, which is not supported"),
    "beyond the end": (container(tensors=[tensor(start=32)], data=ZEROS), "ends at byte 224, and the file at 192"),
    "far beyond the end": (container(tensors=[tensor(start=2**63)], data=ZEROS), "and the file at"),
    "not aligned": (container(tensors=[tensor(start=4)], data=2 * ZEROS), "begins at byte 4 of the data, no multiple"),
    "overlapping": (
        container(tensors=[tensor(), tensor(b"u", start=64)], data=2 * ZEROS),
        "overlaps tensor 't', which",
    ),
    "one place": (container(tensors=[tensor(), tensor(b"u")], data=2 * ZEROS), "overlaps tensor"),
    "a tensor twice": (container(tensors=[tensor(), tensor(start=128)], data=2 * ZEROS), "tensor 't' is there twice"),
    "parts": (container(value(4, word(2**31), b"split.count")), "split.count is 2147483648"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_each_lie_has_its_error(tmp_path, what):
    content, reason = HOSTILE[what]
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=reason) as caught:
            read_gguf(path)
        assert tracemalloc.get_traced_memory()[1] < FREE
    finally:
        tracemalloc.stop()
    assert str(path) in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 600


@SETTINGS
@given(data=st.data())
def test_safetensors(tmp_path, data):
    """A valid file with some of its header replaced, or none at all."""
    path = tmp_path / "m.safetensors"
    write_file(path, {"a": np.ones((3, 4), "float32"), "b": np.zeros(7, "uint8"), "c": np.ones((2, 2), "float16")})
    content = bytearray(path.read_bytes())
    match data.draw(st.sampled_from(["random", "cut", "header", "size"])):
        case "random":
            content = bytearray(data.draw(st.binary(max_size=200)))
        case "cut":
            del content[data.draw(st.integers(0, len(content) - 1)) :]
        case "size":
            content[:8] = struct.pack("<Q", data.draw(st.sampled_from(ODD)))
        case "header":
            for _ in range(data.draw(st.integers(1, 4))):
                at = data.draw(st.integers(8, len(content) - 60))
                content[at : at + 1] = data.draw(
                    st.sampled_from([b"9", b"-", b'"', b"}", b"[", b"\xff", b"null", b"1e99"])
                )
    path.write_bytes(content)
    kept_small(len(content), lambda: read_file(path))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=8,
)
KEYS = st.sampled_from(
    [*small.CONFIG, "rope_scaling", "rope_parameters", "sliding_window", "head_dim", "quantization_config"]
)


@SETTINGS
@given(changes=st.dictionaries(KEYS | st.text(max_size=12), JSON | st.sampled_from(ODD), max_size=4))
def test_configs(changes):
    """Any value at any key: a config, or one clear error."""
    try:
        parsed = parse_config(Config, small.CONFIG | changes)
    except ConfigError as error:
        assert "\n" not in str(error) and len(str(error)) < 4000
    else:
        assert math.isfinite(parsed.rms_norm_eps) and parsed.hidden_size > 0


@pytest.mark.parametrize("count", [10**9, 2**63])
@pytest.mark.parametrize("key", ["num_hidden_layers", "num_local_experts"])
def test_more_layers_than_tensors(rng, tmp_path, key, count):
    folder = small.model(rng).save(tmp_path / "m")
    values = json.loads((folder / "config.json").read_text()) | {key: count}
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=f"{key} is {count}, and the checkpoint has"):
        load(folder)


@pytest.mark.parametrize(
    "content", ["[" * 10**5, "{" * 10**5, "", "\0", "[1]", '{"a": 1e999}', '{"model_type": "llama"']
)
def test_configs_that_are_none(rng, tmp_path, content):
    folder: Path = small.model(rng).save(tmp_path / "m")
    (folder / "config.json").write_text(content)
    with pytest.raises(UserError) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    (folder / "model.safetensors").rename(folder / "model-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError):
        read_directory(folder)
