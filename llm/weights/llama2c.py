"""Checkpoints of llama2.c (<https://github.com/karpathy/llama2.c>, export.py): versions 0 and 1, float32."""

import os
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llm.errors import CheckpointError
from llm.weights.safetensors import map_file

_MAGIC = 0x616B3432  # "ak42", which opens every version but 0
_V0_HEADER, _V1_HEADER = 28, 256
_LAYER_NAMES = {
    "attention_norm": "input_layernorm",
    "wq": "self_attn.q_proj",
    "wk": "self_attn.k_proj",
    "wv": "self_attn.v_proj",
    "wo": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "w1": "mlp.gate_proj",
    "w2": "mlp.down_proj",
    "w3": "mlp.up_proj",
}
# The order of the weights in the file; a layer's kind is stored for all layers at once.
_V0_ORDER = "tok attention_norm wq wk wv wo ffn_norm w1 w2 w3 norm freqs_cos freqs_sin output"
_V1_ORDER = "attention_norm ffn_norm norm tok wq wk wv wo w1 w2 w3 output"


class _Header(NamedTuple):
    dim: int
    hidden_dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int
    max_seq_len: int


def read_llama2c(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(config values under HF's names, float32 tensors under HF's Llama names) of a llama2.c model file.

    The tensors are writable copy-on-write views of the file, except q_proj and k_proj, which are permuted copies.
    Version 0's rotary tables are skipped, as llama2.c's run.c does: theta is 10000. Raises CheckpointError when the
    header is impossible, when the size is not exactly what it implies, and for the int8 version 2.
    """
    path = Path(path)
    data = map_file(path)
    version, header, tied, start = _read_header(path, data)
    head_dim = _check(path, version, header)
    blocks = list(_blocks(header, head_dim, version, tied))
    want = start + 4 * sum(prod(shape) for _, shape in blocks)
    if len(data) != want:
        raise CheckpointError(
            f"{path}: {len(data)} bytes found, {want} expected by its version {version} header "
            f"({', '.join(f'{k} {v}' for k, v in header._asdict().items())}, {'tied' if tied else 'untied'} output); "
            f"the file is truncated or not a llama2.c model: download it again"
        )
    floats = data[start:].view(np.float32)
    tensors: dict[str, np.ndarray] = {}
    offset = 0
    for kind, shape in blocks:
        block = floats[offset : offset + prod(shape)].reshape(shape)
        offset += block.size
        tensors |= _named(kind, block, head_dim)
    return _config(header, tied), tensors


def _read_header(path: Path, data: np.ndarray) -> tuple[int, _Header, bool, int]:
    """version, header, whether the output shares the embedding, where the weights start."""
    if len(data) < _V0_HEADER:
        raise CheckpointError(f"{path}: {len(data)} bytes found, a llama2.c header alone takes {_V0_HEADER}")
    ints = [int(value) for value in data[:_V0_HEADER].view("<i4")]
    if ints[0] != _MAGIC:
        # Version 0 marks an output of its own by a negative vocabulary.
        tied = ints[5] > 0
        return 0, _Header(*ints)._replace(vocab_size=abs(ints[5])), tied, _V0_HEADER
    version = ints[1]
    if version == 2:
        raise CheckpointError(
            f"{path}: llama2.c version 2 (int8) is not supported: export it with --version 1 (float32)"
        )
    if version != 1:
        raise CheckpointError(f"{path}: llama2.c version {version} is unknown: versions 0 and 1 can be read")
    if len(data) < _V1_HEADER:
        raise CheckpointError(f"{path}: {len(data)} bytes found, a version 1 header alone takes {_V1_HEADER}")
    shared = int(data[36])
    if shared > 1:
        raise CheckpointError(f"{path}: the shared-classifier byte is {shared}, 0 or 1 expected: download it again")
    return 1, _Header(*(int(value) for value in data[8:36].view("<i4"))), bool(shared), _V1_HEADER


def _check(path: Path, version: int, h: _Header) -> int:
    """The head size, once the header makes sense."""
    values = ", ".join(f"{key} {value}" for key, value in h._asdict().items())
    if min(h) < 1:
        fault = "every value must be positive"
    elif h.dim % h.n_heads or h.dim // h.n_heads % 2:
        fault = "dim must be n_heads times an even head size"
    elif h.n_heads % h.n_kv_heads:
        fault = "n_heads must be a multiple of n_kv_heads"
    else:
        return h.dim // h.n_heads
    raise CheckpointError(f"{path}: impossible version {version} header ({values}): {fault}; is it a llama2.c model?")


def _blocks(h: _Header, head_dim: int, version: int, tied: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(kind, shape) of what the file holds, in its order."""
    kv_dim = h.n_kv_heads * head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "tok": (h.vocab_size, h.dim),
        "attention_norm": (h.n_layers, h.dim),
        "wq": (h.n_layers, h.dim, h.dim),
        "wk": (h.n_layers, kv_dim, h.dim),
        "wv": (h.n_layers, kv_dim, h.dim),
        "wo": (h.n_layers, h.dim, h.dim),
        "ffn_norm": (h.n_layers, h.dim),
        "w1": (h.n_layers, h.hidden_dim, h.dim),
        "w2": (h.n_layers, h.dim, h.hidden_dim),
        "w3": (h.n_layers, h.hidden_dim, h.dim),
        "norm": (h.dim,),
        "freqs_cos": (h.max_seq_len, head_dim // 2),
        "freqs_sin": (h.max_seq_len, head_dim // 2),
        "output": (h.vocab_size, h.dim),
    }
    for kind in (_V1_ORDER if version else _V0_ORDER).split():
        if not (kind == "output" and tied):
            yield kind, shapes[kind]


def _named(kind: str, block: np.ndarray, head_dim: int) -> dict[str, np.ndarray]:
    """HF name -> tensor, for one kind of the file."""
    if kind in ("wq", "wk"):
        block = _half_split(block, head_dim)
    if kind in _LAYER_NAMES:
        return {f"model.layers.{i}.{_LAYER_NAMES[kind]}.weight": tensor for i, tensor in enumerate(block)}
    names = {"tok": "model.embed_tokens.weight", "norm": "model.norm.weight", "output": "lm_head.weight"}
    return {names[kind]: block} if kind in names else {}


def _half_split(block: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of [layers, rows, dim] from llama2.c's rotary order to HF's, a copy.

    llama2.c rotates the neighbours (2i, 2i+1) of a head, HF the pair (i, i + head_dim/2). Scores are sums over a
    head, so any order serves that q and k share: moving row 2i to i and 2i+1 to i + head_dim/2 makes them agree.
    """
    layers, rows, dim = block.shape
    pairs = block.reshape(layers, rows // head_dim, head_dim // 2, 2, dim)
    return np.ascontiguousarray(pairs.swapaxes(2, 3)).reshape(block.shape)


def _config(h: _Header, tied: bool) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": h.dim,
        "intermediate_size": h.hidden_dim,
        "num_hidden_layers": h.n_layers,
        "num_attention_heads": h.n_heads,
        "num_key_value_heads": h.n_kv_heads,
        "vocab_size": h.vocab_size,
        "max_position_embeddings": h.max_seq_len,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
