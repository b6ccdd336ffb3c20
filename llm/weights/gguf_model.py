"""A GGUF file as a checkpoint: the values of a config.json, and tensors under Hugging Face's names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np

from llm.errors import CheckpointError, ConfigError
from llm.weights.gguf import Container
from llm.weights.gguf_config import config
from llm.weights.gguf_families import FAMILIES, Family
from llm.weights.lazy import Lazy, changed

_NAME = re.compile(r"(?:blk\.(0|[1-9]\d{0,5})\.)?([a-z][a-z0-9_]*(?:\.\d+)?)(?:\.(weight|bias))?")
# What says how to rotate goes into the config; old files repeat the frequencies in each layer.
_ROPE = ("rope_freqs", "rope_factors_long", "rope_factors_short", "attn_rot_embd")


def translate(given: Container) -> tuple[dict[str, Any], dict[str, Any]]:
    """(values of a config.json, tensors under the checkpoint's names) of a model's GGUF file.

    Tensors are arrays or `Lazy` ones; what the converter did to them is undone. Raises ConfigError for an architecture,
    or a key of one, that is not understood, CheckpointError for tensors that do not belong to it.
    """
    path, tensors = given.files[0], dict(given.tensors)
    family = _family(given)
    if "token_embd.weight" not in tensors or getattr(tensors["token_embd.weight"], "ndim", 0) != 2:
        raise CheckpointError(f"{path} has no matrix token_embd.weight: it is a vocabulary or an adapter, not a model")
    _check_layers(given)
    values = config(given, family)
    _join(tensors)
    found: dict[str, Any] = {}
    unknown: list[str] = []
    for name, array in tensors.items():
        parts = _NAME.fullmatch(name)
        if parts and parts[2] in _ROPE:
            continue
        stem = "blk.{i}." * (parts[1] is not None) + parts[2] if parts else ""
        alone = parts is not None and family.changes.get(parts[2]) in _ALONE
        if not parts or stem not in family.tensors or (parts[3] is None) != alone:
            unknown.append(name)
            continue
        try:
            named = _named(family, stem, parts[1], parts[3], array, values)
            found |= dict(named)
        except (ValueError, IndexError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path}: tensor {name!r} {list(array.shape)} does not fit the config: {error}"
            ) from None
    if unknown:
        shown = ", ".join(repr(name[:60]) for name in unknown[:8]) + (
            f" and {len(unknown) - 8} more" * (len(unknown) > 8)
        )
        raise CheckpointError(f"{path}: tensors that a {family.model_type} does not have: {shown}")
    if family.model_type == "gpt2" and _same(tensors["token_embd.weight"], tensors.get("output.weight")):
        del found["lm_head.weight"]  # some files repeat the embedding, which is GPT-2's output
        values["tie_word_embeddings"] = True
    return values, found


def _family(given: Container) -> Family:
    name = given.metadata.get("general.architecture")
    if name == "llama" and given.metadata.get("llama.expert_count"):
        name = "mixtral"
    if not isinstance(name, str) or name not in FAMILIES:
        known = ", ".join(each for each in FAMILIES if each != "mixtral")
        raise ConfigError(f"{given.files[0]}: architecture {name!r:.60} is not supported; supported are {known}")
    return FAMILIES[name]


def _check_layers(given: Container) -> None:
    """The layers that the metadata claim are there: before anything is made for each."""
    claimed = given.metadata.get(f"{given.metadata['general.architecture']}.block_count")
    there = {int(parts[1]) for name in given.tensors if (parts := _NAME.fullmatch(name)) and parts[1]}
    if type(claimed) is not int or claimed != len(there) or claimed != max(there, default=-1) + 1:
        raise CheckpointError(
            f"{given.files[0]}: block_count is {claimed!r:.40}, and there are tensors of {len(there)} layers, "
            f"the last being {max(there, default=None)}; the file is damaged or incomplete: download it again"
        )


def _same(a: Any, b: Any) -> bool:
    """Whether two tensors hold the same bits."""
    return b is not None and np.array_equal(getattr(a, "raw", a), getattr(b, "raw", b))


def _join(tensors: dict[str, Any]) -> None:
    """Put together what the converter takes apart: DeepSeek's kv_b."""
    for name in [*tensors]:
        layer, _, kind = name.rpartition("attn_k_b.")
        if layer and f"{layer}attn_v_b.{kind}" in tensors:
            k, v = tensors.pop(name), tensors.pop(f"{layer}attn_v_b.{kind}")
            tensors[f"{layer}attn_kv_b.{kind}"] = _kv_b(k, v)


def _kv_b(k: Any, v: Any) -> Lazy:
    """[heads * (k + v), rank] of k [heads, rank, k] and v [heads, v, rank]."""

    def make() -> np.ndarray:
        heads = np.concatenate((np.asarray(k).swapaxes(1, 2), np.asarray(v)), 1)
        return heads.reshape(-1, heads.shape[-1])

    return Lazy((k.shape[0] * (k.shape[2] + v.shape[1]), v.shape[2]), make, k.dtype)


def _named(
    family: Family, stem: str, layer: str | None, kind: str | None, array: Any, values: Mapping[str, Any]
) -> Iterator[tuple[str, Any]]:
    """A tensor's names in the checkpoint, and what stands under them."""
    name = family.tensors[stem].replace("{i}", layer or "")
    change = family.changes.get(stem.removeprefix("blk.{i}."), "")
    if kind is None:
        yield name, _CHANGES[change](array, values)
    elif change == "underscore":
        yield f"{name}_{kind}", array
    elif change == "bare":
        yield name if kind == "weight" else f"{name}_{kind}", array
    elif change == "stack":  # as the model has them: one below the other
        yield f"{name}.{kind}", array.reshape(-1, *array.shape[2:])
    elif "{e}" in name:
        for i in range(array.shape[0]):
            yield f"{name.replace('{e}', str(i))}.{kind}", array[i]
    else:
        yield f"{name}.{kind}", _CHANGES[change](array, values) if change else array


def _heads(array: Any, values: Mapping[str, Any], key: str) -> Any:
    """Rows of each head from pairs side by side, as llama.cpp rotates, to first and second halves."""
    order = np.arange(array.shape[0]).reshape(values[key], -1, 2).swapaxes(1, 2)
    return array[order.reshape(-1)]


def _by_head(array: Any, values: Mapping[str, Any]) -> Any:
    """Queries, keys and values one after another to those of one head after another."""
    heads = values["num_attention_heads"]
    return array[np.arange(array.shape[0]).reshape(3, heads, -1).swapaxes(0, 1).reshape(-1)]


def _transposed(array: Any, values: Mapping[str, Any]) -> Any:
    return array if array.ndim == 1 else changed(array, array.shape[::-1], np.transpose)


def _minus_one(array: Any, values: Mapping[str, Any]) -> Any:
    """Gemma's norms multiply by 1 + weight, which is what the file holds."""
    return changed(array, array.shape, lambda a: a - a.dtype.type(1))


def _logarithm(array: Any, values: Mapping[str, Any]) -> Any:
    """[heads] of A = -exp(A_log) [heads, 1], all of whose values are below 0."""

    def make(a: np.ndarray) -> np.ndarray:
        if not (a < 0).all():
            raise CheckpointError("A of a state-space model holds a value that is not below 0: the file is damaged")
        return np.log(-a).reshape(-1)

    return changed(array, (array.size,), make)


def _flat(array: Any, values: Mapping[str, Any]) -> Any:
    return array.reshape(-1)


def _with_axis(array: Any, values: Mapping[str, Any]) -> Any:
    """A convolution's weight [channels, taps] with the axis of inputs, of which each channel has one."""
    return array if array.ndim == 1 else array.reshape(array.shape[0], 1, -1)


def _one_row(array: Any, values: Mapping[str, Any]) -> Any:
    return array.reshape(1, -1) if array.ndim == 1 else array


_CHANGES: dict[str, Callable[[Any, Mapping[str, Any]], Any]] = {
    "heads": partial(_heads, key="num_attention_heads"),
    "kv heads": partial(_heads, key="num_key_value_heads"),
    "by head": _by_head,
    "transposed": _transposed,
    "plus one": _minus_one,
    "one row": _one_row,
    "minus exp": _logarithm,
    "column": _flat,
    "by group": _flat,
    "no axis": _with_axis,
}
_ALONE = ("minus exp", "column")  # what has no `.weight` behind its name
