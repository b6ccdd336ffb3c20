"""llama2.c's checkpoints: the order of versions 0 and 1, the change of rotary order, and a trained model end to end."""

import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm.errors import CheckpointError
from llm.weights import read_llama2c

STORIES = Path(__file__).resolve().parents[2] / "../shared/data/stories260K"
SEED = random.SystemRandom().randrange(2**32)
Weights = dict[str, np.ndarray]

# dim, hidden, layers, heads, kv heads, vocabulary, length
HEADER = (24, 40, 3, 4, 2, 11, 7)
LAYER = {
    "attention_norm": "input_layernorm",
    "wv": "self_attn.v_proj",
    "wo": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "w1": "mlp.gate_proj",
    "w2": "mlp.down_proj",
    "w3": "mlp.up_proj",
}


def draw(seed: int) -> Weights:
    """Every weight of llama2.c's own names, those of the layers stacked."""
    dim, hidden, layers, heads, kv_heads, vocab, _ = HEADER
    kv = dim // heads * kv_heads
    shapes: dict[str, tuple[int, ...]] = {
        "tok": (vocab, dim),
        "attention_norm": (layers, dim),
        "wq": (layers, dim, dim),
        "wk": (layers, kv, dim),
        "wv": (layers, kv, dim),
        "wo": (layers, dim, dim),
        "ffn_norm": (layers, dim),
        "w1": (layers, hidden, dim),
        "w2": (layers, dim, hidden),
        "w3": (layers, hidden, dim),
        "norm": (dim,),
        "output": (vocab, dim),
    }
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def version0(weights: Weights, tied: bool) -> bytes:
    head: list[int] = list(HEADER)
    head[5] *= 1 if tied else -1
    order = ["tok", "attention_norm", "wq", "wk", "wv", "wo", "ffn_norm", "w1", "w2", "w3", "norm"]
    tables = bytes(4 * HEADER[6] * (HEADER[0] // HEADER[3]))  # cos and sin: [length, head size / 2] each
    tail = b"" if tied else weights["output"].tobytes()
    return struct.pack("<7i", *head) + b"".join(weights[name].tobytes() for name in order) + tables + tail


def version1(weights: Weights, tied: bool) -> bytes:
    head = struct.pack("<Ii7iB", 0x616B3432, 1, *HEADER, tied).ljust(256, b"\0")
    order = ["attention_norm", "ffn_norm", "norm", "tok", "wq", "wk", "wv", "wo", "w1", "w2", "w3"]
    return head + b"".join(weights[name].tobytes() for name in order + ([] if tied else ["output"]))


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("make", [version0, version1])
def test_both_versions_round_trip(tmp_path: Path, make: Any, tied: bool) -> None:
    weights = draw(SEED)
    path = write(tmp_path / "model.bin", make(weights, tied))
    config, tensors = read_llama2c(path)
    assert config == {
        "model_type": "llama",
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 11,
        "max_position_embeddings": 7,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    want = {"model.embed_tokens.weight": weights["tok"], "model.norm.weight": weights["norm"]}
    want |= {} if tied else {"lm_head.weight": weights["output"]}
    want |= {f"model.layers.{i}.{hf}.weight": weights[ours][i] for ours, hf in LAYER.items() for i in range(3)}
    turned = {f"model.layers.{i}.self_attn.{kind}_proj.weight" for i in range(3) for kind in "qk"}
    assert tensors.keys() == want.keys() | turned
    for name, tensor in want.items():
        np.testing.assert_array_equal(tensors[name], tensor, err_msg=f"{name}, seed {SEED}")
    before = path.read_bytes()
    for tensor in tensors.values():
        assert tensor.dtype == np.float32 and tensor.flags.writeable and tensor.flags.c_contiguous
        tensor[:] = 0
    assert path.read_bytes() == before


def test_rotary_order_keeps_the_scores(tmp_path: Path) -> None:
    """q.k after llama2.c's rotation of neighbours equals q.k after HF's rotation of halves of the permuted rows."""
    weights = draw(SEED)
    _, tensors = read_llama2c(write(tmp_path / "model.bin", version1(weights, True)))
    size, position, other = 6, 5, 2
    x, y = np.random.default_rng(SEED + 1).standard_normal((2, 24))
    frequency = 10000.0 ** -(np.arange(0, size, 2) / size)

    def neighbours(v: np.ndarray, pos: int) -> np.ndarray:
        turned = (v[:, 0::2] + 1j * v[:, 1::2]) * np.exp(1j * pos * frequency)
        return np.stack([turned.real, turned.imag], -1).reshape(v.shape)

    def halves(v: np.ndarray, pos: int) -> np.ndarray:
        turned = (v[:, : size // 2] + 1j * v[:, size // 2 :]) * np.exp(1j * pos * frequency)
        return np.concatenate([turned.real, turned.imag], -1)

    q, k = (weights[kind][1].astype(np.float64) for kind in ("wq", "wk"))
    hf_q, hf_k = (tensors[f"model.layers.1.self_attn.{kind}_proj.weight"].astype(np.float64) for kind in "qk")
    want = neighbours((q @ x).reshape(4, size), position)[:2] * neighbours((k @ y).reshape(2, size), other)
    got = halves((hf_q @ x).reshape(4, size), position)[:2] * halves((hf_k @ y).reshape(2, size), other)
    np.testing.assert_allclose(got.sum(-1), want.sum(-1), rtol=1e-9, atol=1e-12, err_msg=f"seed {SEED}")


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_llama2c(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    return message


@pytest.mark.parametrize("make", [version0, version1])
@pytest.mark.parametrize("change", [-4, -1, 1, 4])
def test_size_must_be_exact(tmp_path: Path, make: Any, change: int) -> None:
    content = make(draw(SEED), False)
    changed = content + b"\0" * change if change > 0 else content[:change]
    message = refused(write(tmp_path / "model.bin", changed))
    assert f"{len(changed)} bytes found, {len(content)} expected" in message and "untied" in message


@pytest.mark.parametrize(
    ("index", "value", "expected"),
    [
        (0, 0, "every value must be positive"),
        (1, -40, "every value must be positive"),
        (5, 0, "every value must be positive"),
        (3, 5, "dim must be n_heads times an even head size"),
        (3, 8, "dim must be n_heads times an even head size"),
        (4, 3, "n_heads must be a multiple of n_kv_heads"),
        (2, 2**31 - 1, "expected by its version 0 header"),
        (5, -(2**31), "expected by its version 0 header"),
    ],
)
def test_absurd_headers(tmp_path: Path, index: int, value: int, expected: str) -> None:
    head: list[int] = list(HEADER)
    head[index] = value
    content = struct.pack("<7i", *head) + version0(draw(SEED), True)[28:]
    message = refused(write(tmp_path / "model.bin", content))
    assert expected in message


def test_what_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    assert "No such file" in refused(path)
    assert "is empty" in refused(write(path, b""))
    assert "27 bytes found" in refused(write(path, bytes(27)))
    assert "version 2 (int8) is not supported" in refused(write(path, struct.pack("<Ii", 0x616B3432, 2).ljust(256)))
    assert "version 9 is unknown" in refused(write(path, struct.pack("<Ii", 0x616B3432, 9).ljust(256)))
    assert "a version 1 header alone takes 256" in refused(write(path, version1(draw(SEED), True)[:255]))
    broken = bytearray(version1(draw(SEED), True))
    broken[36] = 2
    assert "shared-classifier byte is 2" in refused(write(path, bytes(broken)))


def greedy(config: dict[str, Any], weights: Weights, steps: int) -> list[int]:
    """Llama with HF's rotary order in float64 NumPy, one token at a time from BOS."""
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    size = config["hidden_size"] // heads
    frequency = 10000.0 ** -(np.arange(0, size, 2) / size)
    cache: dict[tuple[int, str], list[np.ndarray]] = {}

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt(np.mean(x**2) + config["rms_norm_eps"]) * weights[f"{name}.weight"]

    def turn(v: np.ndarray, pos: int) -> np.ndarray:
        turned = (v[:, : size // 2] + 1j * v[:, size // 2 :]) * np.exp(1j * pos * frequency)
        return np.concatenate([turned.real, turned.imag], -1)

    ids = [config["bos_token_id"]]
    for pos in range(steps):
        x = weights["model.embed_tokens.weight"][ids[-1]].astype(np.float64)
        for i in range(config["num_hidden_layers"]):
            w = {kind: weights[f"model.layers.{i}.self_attn.{kind}_proj.weight"] for kind in "qkvo"}
            up, gate, down = (weights[f"model.layers.{i}.mlp.{kind}_proj.weight"] for kind in ("up", "gate", "down"))
            h = norm(x, f"model.layers.{i}.input_layernorm")
            cache.setdefault((i, "k"), []).append(turn((w["k"] @ h).reshape(kv_heads, size), pos))
            cache.setdefault((i, "v"), []).append((w["v"] @ h).reshape(kv_heads, size))
            k, v = (np.repeat(np.stack(cache[i, kind]), heads // kv_heads, 1) for kind in "kv")
            scores = np.exp(np.einsum("hd,thd->ht", turn((w["q"] @ h).reshape(heads, size), pos), k) / np.sqrt(size))
            x = x + w["o"] @ np.einsum("ht,thd->hd", scores / scores.sum(-1, keepdims=True), v).reshape(-1)
            h = norm(x, f"model.layers.{i}.post_attention_layernorm")
            x = x + down @ (gate @ h / (1 + np.exp(-(gate @ h))) * (up @ h))
        head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
        ids.append(int(np.argmax(head @ norm(x, "model.norm"))))
    return ids[1:]


def test_a_trained_model_tells_its_story() -> None:
    if not (STORIES / "stories260K.bin").is_file():
        pytest.skip(f"no {STORIES}: the trained model is not part of the repository")
    config, tensors = read_llama2c(STORIES / "stories260K.bin")
    assert (config["num_hidden_layers"], config["vocab_size"], config["tie_word_embeddings"]) == (5, 512, True)
    pieces, raw = [], (STORIES / "tok512.bin").read_bytes()[4:]
    while raw:  # a score, a length, the bytes
        (length,) = struct.unpack_from("<4xi", raw)
        pieces.append(raw[8 : 8 + length])
        raw = raw[8 + length :]
    text = b"".join(pieces[token] for token in greedy(config, tensors, 60)).decode().lstrip()
    assert len(text) > 100
    assert (STORIES / "greedy.txt").read_text().startswith(text)
