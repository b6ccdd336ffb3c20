"""A Llama with random weights as a GGUF file, pure: every matrix in one format, the embedding included, norms float32.

It has no vocabulary, which llama.cpp takes where only token ids go in and logits come out, or a made-up one.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf  # pyright: ignore[reportMissingImports]
import numpy as np

TYPES = {"q4": "Q4_0", "q8": "Q8_0", "float16": "F16", "bfloat16": "BF16", "float32": "F32"}
_POOL = 1 << 20  # random weights that are drawn and packed; every matrix repeats them from a place of its own


def shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the tensors of a Llama with tied embeddings, as llama.cpp names them."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    kv = head_dim(config) * config["num_key_value_heads"]
    queries = head_dim(config) * config["num_attention_heads"]
    yield "token_embd.weight", (config["vocab_size"], width)
    yield "output_norm.weight", (width,)
    for i in range(config["num_hidden_layers"]):
        for name, shape in (
            ("attn_norm", (width,)),
            ("attn_q", (queries, width)),
            ("attn_k", (kv, width)),
            ("attn_v", (kv, width)),
            ("attn_output", (width, queries)),
            ("ffn_norm", (width,)),
            ("ffn_gate", (inner, width)),
            ("ffn_up", (inner, width)),
            ("ffn_down", (width, inner)),
        ):
            yield f"blk.{i}.{name}.weight", shape


def head_dim(config: dict[str, Any]) -> int:
    """Values of one head."""
    return config["hidden_size"] // config["num_attention_heads"]


def write(path: Path, config: dict[str, Any], weights: str, vocabulary: bool = False, seed: int = 0) -> int:
    """Write the file, one tensor at a time, and give the bytes of its tensors.

    `config`: HF's names, tied embeddings; `weights`: a key of TYPES; `vocabulary`: with a made-up one, for readers
    that insist on it. Raises ValueError for an unknown format, for
    embeddings that are not tied, and for rows that are no multiple of the format's block.
    """
    if weights not in TYPES:
        raise ValueError(f"weights {weights!r} have no GGUF type here; choose one of {', '.join(TYPES)}")
    if not config["tie_word_embeddings"]:
        raise ValueError("tie_word_embeddings is false; only a tied embedding is written")
    kind, plain = gguf.GGMLQuantizationType[TYPES[weights]], gguf.GGMLQuantizationType.F32
    values = (np.random.default_rng(seed).standard_normal((_POOL // 1024, 1024)) * 0.02).astype("float32")
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    pool = np.ascontiguousarray(gguf.quantize(values, kind)).view("uint8").reshape(-1, block_bytes)
    writer = gguf.GGUFWriter(path, "llama")
    try:
        _describe(writer, config, weights)
        if vocabulary:
            _name_tokens(writer, config["vocab_size"])
        else:
            writer.add_tokenizer_model("no_vocab")
        types = {name: kind if len(shape) == 2 else plain for name, shape in shapes(config)}
        total = 0
        for name, shape in shapes(config):
            if shape[-1] % gguf.GGML_QUANT_SIZES[types[name]][0]:
                raise ValueError(f"{name} has rows of {shape[-1]}, no multiple of {kind.name}'s block of {block}")
            count = int(np.prod(shape))
            nbytes = count // block * block_bytes if len(shape) == 2 else count * 4
            writer.add_tensor_info(name, shape, np.dtype("float32"), nbytes, types[name])
            total += nbytes
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for i, (_, shape) in enumerate(shapes(config)):
            count = int(np.prod(shape))
            writer.write_tensor_data(
                _repeated(pool, count // block, 977 * i) if len(shape) == 2 else np.ones(count, "float32")
            )
    finally:
        writer.close()
    return total


def _describe(writer: Any, config: dict[str, Any], weights: str) -> None:
    """The hyperparameters."""
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(head_dim(config))
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config.get("rms_norm_eps", 1e-6))
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{TYPES[weights]}" if weights != "float32" else "ALL_F32"])


def _name_tokens(writer: Any, count: int) -> None:
    """A byte-level vocabulary: printable characters, their pairs and merges, then numbered tokens."""
    letters = [chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 324))]
    pairs = [(a, b) for a in letters for b in letters][: max(count - len(letters), 0)]
    names = [*letters, *(a + b for a, b in pairs)][:count]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(names + [f"<|{i}|>" for i in range(len(names), count)])
    writer.add_token_types([gguf.TokenType.NORMAL] * count)
    writer.add_token_merges([f"{a} {b}" for a, b in pairs])
    writer.add_bos_token_id(count - 2)
    writer.add_eos_token_id(count - 1)


def _repeated(pool: np.ndarray, count: int, start: int) -> np.ndarray:
    """`count` rows of `pool`, over and over, from row `start` on."""
    return np.resize(np.roll(pool, -(start % len(pool)), axis=0), (count, pool.shape[1]))
