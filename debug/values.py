"""Values: what one run computed, under names that every run shares, whatever computed it.

A value is known by the path of a module and a slot: `input` and `output` of the module, and for attention `q`, `k`, `v`
as it takes them and `mixed` as it gives it, all [tokens, heads, dim]. Runs of Limpid's models also have calls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

# Tensors that one model has as one and another as several, along the outputs; parts but the first are of one size.
FUSED: dict[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "c_attn": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
CACHED = ("k", "v")  # slots that hold a row for every token so far, not only for those of the forward


@dataclass
class CallValues:
    """One call of a run: its op, its constants, and its outputs as arrays."""

    op_name: str
    constants: dict[str, Any]
    outputs: list[np.ndarray]


@dataclass
class Values:
    """What a run gave for `tokens` tokens. `dtype` is what it was computed in; a list holds each time in order.

    `constants` are those of a module's op, by path and op, where the run tells them without calls; `rotary` are the
    frequencies and the factor that its rotary embeddings use.
    """

    tokens: int
    dtype: str
    slots: dict[tuple[str, str], list[np.ndarray]] = field(default_factory=dict)
    calls: dict[str, list[CallValues]] = field(default_factory=dict)
    constants: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    rotary: list[tuple[np.ndarray, float]] = field(default_factory=list)

    def add(self, path: str, slot: str, value: np.ndarray) -> None:
        self.slots.setdefault((path, slot), []).append(value)

    def get(self, path: str, slot: str, time: int = 0, width: int | None = None) -> np.ndarray | None:
        """The value of a slot, at its last time when it was not computed that often; None where there is none.

        Where this run has a fused tensor, or the parts of one, it is cut to `width` or put together.
        """
        found = by_fusion(lambda name: self.slots.get((name, slot)), path)
        if found is None:
            return None
        arrays, part = found
        chosen = [each[min(time, len(each) - 1)] for each in arrays]
        if slot == "input":
            return chosen[0]
        whole = chosen[0] if len(chosen) == 1 else np.concatenate(chosen, axis=-1)
        return whole if part is None or width is None else take_part(whole, part, width, axis=-1)

    def rows(self, value: np.ndarray, slot: str, start: int, stop: int) -> np.ndarray:
        """What of a value a forward over the tokens `start` to `stop` has."""
        if len(value) != self.tokens:
            return value
        return value[:stop] if slot in CACHED else value[start:stop]


def by_fusion(find: Callable[[str], Any], path: str) -> tuple[list[Any], tuple[int, int] | None] | None:
    """What `find` gives under a module's path, or under its parts, or under what it is a part of.

    Gives the finds, several for the parts, and which part of how many of a single one is meant.
    """
    whole = find(path)
    if whole is not None:
        return [whole], None
    parent, _, name = path.rpartition(".")
    above = f"{parent}." if parent else ""
    if name in FUSED:
        parts = [find(above + each) for each in FUSED[name]]
        return None if any(each is None for each in parts) else (parts, None)
    for fused, names in FUSED.items():
        if name in names and (whole := find(above + fused)) is not None:
            return [whole], (names.index(name), len(names))
    return None


def take_part(whole: np.ndarray, part: tuple[int, int], width: int, axis: int) -> np.ndarray:
    """One part of a fused tensor, `width` wide along `axis`: (0, n) is the first of n, those behind are of one size."""
    index, count = part
    start = 0 if index == 0 else whole.shape[axis] - (count - index) * width
    return np.take(whole, range(start, start + width), axis)


class Weights(Mapping[str, np.ndarray]):
    """A reference's weights by our paths: without the base prefix, fused ones put together or cut as ours are."""

    def __init__(self, named: Mapping[str, Any], base: str):
        self._named = {name.removeprefix(base): array for name, array in named.items()}

    def __getitem__(self, name: str) -> np.ndarray:
        return np.asarray(self._named[name])

    def __iter__(self):
        return iter(self._named)

    def __len__(self) -> int:
        return len(self._named)

    def find(self, name: str, shape: tuple[int, ...]) -> np.ndarray | None:
        """The weight that ours of this name and shape should be; None where the reference has none."""
        module, _, kind = name.rpartition(".")
        found = by_fusion(lambda path: self._named.get(f"{path}.{kind}" if path else kind), module)
        if found is None:
            return None
        arrays, part = found
        whole = np.asarray(arrays[0]) if len(arrays) == 1 else np.concatenate([np.asarray(each) for each in arrays])
        return whole if part is None else take_part(whole, part, shape[0], axis=0)
