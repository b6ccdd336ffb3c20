"""A model as a GGUF file, written with the library `gguf`: the inverse of `gguf_model`, by the same tables."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import ml_dtypes
import numpy as np

from llm.errors import CheckpointError, ConfigError
from llm.rope import Rope, frequencies
from llm.weights.blocks import Kind
from llm.weights.compressed import Words
from llm.weights.gguf_families import FAMILIES, Family
from llm.weights.lazy import Lazy, changed

KINDS = {"f32": Kind.F32, "f16": Kind.F16, "bf16": Kind.BF16, "q8_0": Kind.Q8_0, "q4_0": Kind.Q4_0}
_STORED = {"float32": Kind.F32, "float16": Kind.F16, "bfloat16": Kind.BF16, "q8": Kind.Q8_0, "q4": Kind.Q4_0}
_FLOATS: dict[Kind, Any] = {Kind.F32: "<f4", Kind.F16: "<f2", Kind.BF16: ml_dtypes.bfloat16}
_FILE_TYPES = {Kind.F32: 0, Kind.F16: 1, Kind.Q4_0: 2, Kind.Q8_0: 7, Kind.BF16: 32}  # what most matrices are
_REAL = re.compile(r".*(epsilon|freq_base|freq_base_swa|scale|softcapping|capping)")  # float32, whatever was given
_WHOLE = ("ffn_gate_inp", "position_embd")  # small, and never quantised
ARCHITECTURES = {"mixtral": "llama"}
_TYPES = ("llama", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3_text", "granite", "olmo2",
          "smollm3", "phi", "phi3", "gpt2", "gpt_neox")  # fmt: skip


class Piece(NamedTuple):
    """A tensor to write: its bytes, uint8 [..., bytes of a row], are made by `make`."""

    kind: Kind
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]

    @property
    def raw_shape(self) -> tuple[int, ...]:
        block, size = gguf.GGML_QUANT_SIZES[self.kind]
        return (*self.shape[:-1], self.shape[-1] // block * size)


def family_of(model_type: str, config: Any) -> tuple[str, Family]:
    """GGUF's name of the architecture, and the tables. Raises ConfigError for one that is not written."""
    if model_type == "mistral" and config.sliding_window is None:
        model_type = "llama"
    found = [(name, each) for name, each in FAMILIES.items() if each.model_type == model_type]
    if not found or model_type not in _TYPES:
        more = " with a sliding window" * (model_type == "mistral")
        raise ConfigError(
            f"a {model_type}{more} cannot be written as GGUF; supported are {', '.join(_TYPES)}, and mistral without a "
            "sliding window"
        )
    return found[0]


def keys(config: Any, values: Mapping[str, Any], family: Family) -> tuple[dict[str, Any], dict[str, Piece]]:
    """The architecture's own metadata, and the tensors that say how to rotate.

    `config` is the model's, `values` the same as a config.json has it. Raises ConfigError for what GGUF cannot say.
    """
    values = {**values, **{f.name: getattr(config, f.name) for f in dataclasses.fields(config)}}
    ropes = {f.metadata.get("layer_type"): values[f.name] for f in dataclasses.fields(config)
             if isinstance(values[f.name], Rope)}  # fmt: skip
    main = ropes.get(None) or ropes.get("full_attention")
    if main is not None:
        values |= {"rope_theta": main.theta, "rotary_emb_base": main.theta}
    if local := ropes.get("sliding_attention"):
        values["rope_local_base_freq"] = local.theta
    found = {key: values[name] for key, name in family.values.items() if values.get(name) is not None}
    found = {
        key: float(value) if _REAL.fullmatch(key) and type(value) is int else value for key, value in found.items()
    }
    found["vocab_size"] = values["vocab_size"]
    if "attention.key_length" in found:
        found["attention.value_length"] = found["attention.key_length"]
    if "feed_forward_length" in family.values and "feed_forward_length" not in found:
        found["feed_forward_length"] = 4 * found["embedding_length"]
    pieces: dict[str, Piece] = {}
    if main is not None:
        found["rope.dimension_count"] = main.rotary_dim
        pieces = _scaling(main, found)
    return found, pieces


def _scaling(rope: Rope, found: dict[str, Any]) -> dict[str, Piece]:
    """Put into `found` how the rotation is scaled; what takes numbers for each frequency becomes tensors."""
    s = rope.scaling
    if s is None:
        return {}
    said = {"rope.scaling.type": s.rope_type, "rope.scaling.factor": s.factor,
            "rope.scaling.original_context_length": s.original_max_position_embeddings}  # fmt: skip
    match s.rope_type:
        case "linear":
            said.pop("rope.scaling.original_context_length")
        case "yarn":
            said |= {"rope.scaling.yarn_beta_fast": s.beta_fast, "rope.scaling.yarn_beta_slow": s.beta_slow}
            said["rope.scaling.yarn_log_multiplier"] = None if s.mscale_all_dim is None else s.mscale_all_dim / 10
        case "llama3":
            plain, scaled = (frequencies(each, 1)[0] for each in (dataclasses.replace(rope, scaling=None), rope))
            return {"rope_freqs.weight": _float32((plain / scaled).astype("float32"))}
        case "longrope":
            said = {"rope.scaling.original_context_length": s.original_max_position_embeddings,
                    "rope.scaling.attn_factor": s.attention_factor}  # fmt: skip
            found |= {key: value for key, value in said.items() if value is not None}
            return {
                f"rope_factors_{name}.weight": _float32(np.asarray(factors, "float32"))
                for name, factors in (("long", s.long_factor), ("short", s.short_factor))
            }
        case _:
            raise ConfigError(f"GGUF cannot say that rotary frequencies are scaled by {s.rope_type!r}")
    found |= {key: value for key, value in said.items() if value is not None}
    return {}


def _float32(array: np.ndarray) -> Piece:
    return Piece(Kind.F32, array.shape, lambda: array.view("uint8"))


def pieces(
    family: Family, tensors: Mapping[str, Any], values: Mapping[str, Any], kind: Kind | None
) -> dict[str, Piece]:
    """The tensors of a checkpoint (arrays, or `Words`) under GGUF's names, matrices as `kind`, by default as stored.

    Raises CheckpointError for a tensor that GGUF has no name for, and rows that no whole number of blocks makes up.
    """
    found: dict[str, Piece] = {}
    stacks: dict[str, dict[int, Piece]] = {}
    patterns = [(_pattern(theirs), ours) for ours, theirs in family.tensors.items()]
    for name, array in tensors.items():
        module, _, ending = name.rpartition(".")
        hit = next(((match, ours) for each, ours in patterns if (match := each.fullmatch(module))), None)
        if hit is None or ending not in ("weight", "bias"):
            raise CheckpointError(f"GGUF has no name for {name!r} of a {family.model_type}")
        match, ours = hit
        stem, parts = ours.removeprefix("blk.{i}."), match.groupdict()
        title = f"{ours.replace('{i}', parts.get('i') or '')}.{ending}"
        change = family.changes.get(stem, "")
        piece = _piece(title, _CHANGES[change](array, values) if change else array, stem, kind)
        if parts.get("e") is None:
            found[title] = piece
        else:
            stacks.setdefault(title, {})[int(parts["e"])] = piece
            found.setdefault(title, piece)  # keeps its place
    return found | {title: _stack(members) for title, members in stacks.items()}


def _pattern(name: str) -> re.Pattern[str]:
    escaped = re.escape(name).replace(r"\{i\}", r"(?P<i>\d+)").replace(r"\{e\}", r"(?P<e>\d+)")
    return re.compile(escaped)


def _stack(members: Mapping[int, Piece]) -> Piece:
    """Experts, in their order, as one tensor."""
    order = [members[i] for i in range(len(members))]
    shape = (len(order), *order[0].shape)
    return Piece(order[0].kind, shape, lambda: np.stack([each.make() for each in order]))


def _piece(title: str, array: Any, stem: str, kind: Kind | None) -> Piece:
    if array.ndim == 1 or stem in _WHOLE:
        kind = Kind.F32
    elif kind is None:
        kind = _STORED[(array.form if isinstance(array, Words) else None) or array.dtype.name]
    block = gguf.GGML_QUANT_SIZES[kind][0]
    if array.shape[-1] % block:
        raise CheckpointError(
            f"{title} has rows of {array.shape[-1]} values, which {kind.name}'s blocks of {block} do not make up; "
            "choose f32, f16 or bf16"
        )
    return Piece(kind, tuple(array.shape), lambda: _raw(array, kind))


def _raw(array: Any, kind: Kind) -> np.ndarray:
    """The bytes of a tensor: of floats rounded to `kind`; of packed codes as they are."""
    if isinstance(array, Words) and _STORED.get(array.form or "") == kind:
        return _blocks(array)
    plain = np.asarray(array)
    if kind in _FLOATS:
        return np.ascontiguousarray(plain.astype(_FLOATS[kind])).view("uint8")
    return gguf.quantize(np.ascontiguousarray(plain.astype("float32")), kind)


def _blocks(words: Words) -> np.ndarray:
    """Q4_0: byte i of 16 has value i low and value i + 16 high. Q8_0: signed bytes. Each after a float16 scale."""
    codes = words.codes().reshape(len(words.words), -1, 32)
    scales = np.ascontiguousarray(words.scales, "<f2")[..., None].view("uint8")
    body = codes[..., :16] | codes[..., 16:] << 4 if words.bits == 4 else codes ^ 128
    return np.concatenate((scales, body), -1).reshape(len(codes), -1)


def _heads(array: Any, values: Mapping[str, Any], key: str) -> Any:
    """Rows of first and second halves of each head, as checkpoints have them, to pairs side by side."""
    return array[np.arange(array.shape[0]).reshape(values[key], 2, -1).swapaxes(1, 2).reshape(-1)]


def _plus_one(array: Any, values: Mapping[str, Any]) -> Any:
    return np.asarray(array, "float32") + np.float32(1)


def _by_head(array: Any, values: Mapping[str, Any]) -> Any:
    """Queries, keys and values of one head after another to all queries, all keys, all values."""
    heads = values["num_attention_heads"]
    return array[np.arange(array.shape[0]).reshape(heads, 3, -1).swapaxes(0, 1).reshape(-1)]


def _transposed(array: Any, values: Mapping[str, Any]) -> Any:
    return array if array.ndim == 1 else changed(array, array.shape[::-1], np.transpose)


_CHANGES: dict[str, Callable[[Any, Mapping[str, Any]], Any]] = {
    "heads": lambda array, values: _heads(array, values, "num_attention_heads"),
    "kv heads": lambda array, values: _heads(array, values, "num_key_value_heads"),
    "plus one": _plus_one,
    "by head": _by_head,
    "transposed": _transposed,
}


def as_read(found: Mapping[str, Piece]) -> dict[str, Any]:
    """The tensors as a reader will have them, made when they are looked at."""
    return {
        name: Lazy(each.shape, lambda each=each: gguf.dequantize(each.make(), each.kind))
        for name, each in found.items()
    }


def write(
    path: Path,
    architecture: str,
    metadata: Mapping[str, Any],
    found: Mapping[str, Piece],
    tracked: Callable[[Iterator[Any], int], Any],
) -> None:
    """The file, a tensor at a time. `metadata` has all keys but the architecture's name."""
    writer = gguf.GGUFWriter(None, architecture)
    sizes = dict.fromkeys(_FILE_TYPES, 0)
    for each in found.values():
        sizes[each.kind] += int(np.prod(each.shape)) if len(each.shape) > 1 else 0
    writer.add_type("model")
    writer.add_file_type(_FILE_TYPES[max(sizes, key=lambda kind: sizes[kind])])
    if sizes[Kind.Q4_0] or sizes[Kind.Q8_0]:
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in metadata.items():
        _add(writer, key, value)
    for name, each in found.items():
        nbytes = int(np.prod(each.raw_shape))
        writer.add_tensor_info(name, each.raw_shape, np.dtype("uint8"), nbytes, raw_dtype=each.kind)
    writer.write_header_to_file(path)
    try:
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for each in tracked(iter(found.values()), len(found)):
            writer.write_tensor_data(each.make())
    finally:
        writer.close()


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
