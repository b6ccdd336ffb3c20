"""GGUF files for the tests, written with the library `gguf`: a random model of the family's sizes in one type."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from llm.weights.blocks import Kind, row_bytes

SIZES: dict[str, Any] = {
    "context_length": 400,
    "embedding_length": 256,
    "feed_forward_length": 512,
    "block_count": 2,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 10000.0,
    "rope.dimension_count": 64,
}
VOCABULARY = 263
# Where a block has its factors, and how large they are made here.
_FACTORS = {
    "Q2_K": ((80, 82), 0.004),
    "Q3_K": ((108,), 0.0007),
    "Q4_K": ((0, 2), 0.0001),
    "Q5_K": ((0, 2), 0.00005),
    "Q6_K": ((208,), 0.00003),
    "IQ4_NL": ((0,), 0.0008),
}


def shapes(layers: int = 2, width: int = 256, inner: int = 512, kv: int = 128) -> dict[str, tuple[int, ...]]:
    """The tensors of a Llama with an output of its own."""
    found: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (VOCABULARY, width),
        "output_norm.weight": (width,),
        "output.weight": (VOCABULARY, width),
    }
    for i in range(layers):
        found |= {
            f"blk.{i}.attn_norm.weight": (width,),
            f"blk.{i}.attn_q.weight": (width, width),
            f"blk.{i}.attn_k.weight": (kv, width),
            f"blk.{i}.attn_v.weight": (kv, width),
            f"blk.{i}.attn_output.weight": (width, width),
            f"blk.{i}.ffn_norm.weight": (width,),
            f"blk.{i}.ffn_gate.weight": (inner, width),
            f"blk.{i}.ffn_up.weight": (inner, width),
            f"blk.{i}.ffn_down.weight": (width, inner),
        }
    return found


def random_raw(rng: np.random.Generator, kind: Kind, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor's bytes as the file holds them, its values of a deviation near 0.05."""
    values = (rng.standard_normal(shape) * 0.05).astype("float32")
    if kind.name not in _FACTORS:
        return np.ascontiguousarray(gguf.quantize(values, kind)).view("uint8").reshape(*shape[:-1], -1)
    # The library has no code that makes the other types: any codes, and small float16 factors.
    raw = rng.integers(0, 256, (*shape[:-1], row_bytes(kind, shape[-1])), "uint8")
    size = gguf.GGML_QUANT_SIZES[kind][1]
    blocks = raw.reshape(-1, size)
    places, scale = _FACTORS[kind.name]
    for at in places:
        blocks[:, at : at + 2] = (rng.uniform(0.5, 1, (len(blocks), 1)) * scale).astype("float16").view("uint8")
    return raw


def write(
    path: Path,
    tensors: Mapping[str, tuple[Kind, np.ndarray]],
    values: Mapping[str, Any] = SIZES,
    architecture: str = "llama",
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """A file of `tensors` (type and raw bytes [..., bytes of a row]); `values` are the architecture's own keys."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in {f"{architecture}.{key}": value for key, value in values.items()}.items():
        _add(writer, key, value)
    for key, value in (metadata or {"tokenizer.ggml.model": "no_vocab"}).items():
        _add(writer, key, value)
    for name, (kind, raw) in tensors.items():
        writer.add_tensor(name, raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case _:
            writer.add_array(key, value.tolist() if isinstance(value, np.ndarray) else value)


def model(rng: np.random.Generator, kind: Kind, tied: bool = False) -> dict[str, tuple[Kind, np.ndarray]]:
    """A random Llama's tensors: matrices in `kind`, norms near 1 in float32."""
    found = {}
    for name, shape in shapes().items():
        if tied and name == "output.weight":
            continue
        if len(shape) == 1:
            found[name] = Kind.F32, rng.uniform(0.8, 1.2, shape).astype("float32").view("uint8")
        else:
            found[name] = kind, random_raw(rng, kind, shape)
    return found


def unpacked(kind: Kind, raw: np.ndarray) -> np.ndarray:
    """The library's numbers, float32."""
    return gguf.dequantize(raw, kind)


def letters() -> dict[int, str]:
    """How byte-level vocabularies spell bytes."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


def byte_level(**changes: Any) -> dict[str, Any]:
    """Metadata of a byte-level vocabulary of 261 tokens; `changes` by key, `_ggml_pre` being `tokenizer.ggml.pre`."""
    tokens = [*sorted(letters().values()), "Ġa", "12", "123", "<|im_end|>", "<|end_of_text|>"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array([1] * 259 + [3] * 2, "int32"),
        "tokenizer.ggml.merges": ["Ġ a", "1 2"],
        "tokenizer.ggml.eos_token_id": 260,
        **{f"tokenizer.{key.replace('_ggml_', 'ggml.')}": value for key, value in changes.items()},
    }
