"""Mixtures of experts: the experts of a layer as modules, and as checkpoints hold them, a matrix for each."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

import ops
from ops import Spec, Tensor

from .errors import CheckpointError
from .nn import Module
from .weights.lazy import concatenated


class ExpertLinear(Module):
    """y = x @ weight_e.T + bias_e for a token's experts e. weight: [experts * outputs, inputs], one below the other."""

    def __init__(self, experts: int, inputs: int, outputs: int, dtype: str = "float32", bias: bool = False):
        self.weight: Any = Spec((experts * outputs, inputs), dtype)
        self.bias: Any = Spec((experts * outputs,), dtype) if bias else None
        self.experts = experts

    @property
    def packs(self) -> bool:
        """Whether the weight may be packed on this machine: no record holds rows of two experts."""
        return self.weight.shape[0] // self.experts % ops.target.lanes() == 0

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return ops.experts_linear(x, self.weight, ids, self.bias, experts=self.experts)


class Experts(Module):
    """Gated feed-forward layers, of which a token takes some: `ids` [n, k], each counted by `weights` [n, k]."""

    def __init__(self, experts: int, width: int, hidden: int, dtype: str):
        self.gate_proj = ExpertLinear(experts, width, hidden, dtype)
        self.up_proj = ExpertLinear(experts, width, hidden, dtype)
        self.down_proj = ExpertLinear(experts, hidden, width, dtype)

    def forward(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        mixed = ops.silu_mul(self.gate_proj(x, ids), self.up_proj(x, ids))
        return ops.combine(self.down_proj(mixed, ids), weights)


def stacked(named: Mapping[str, np.ndarray], of: str = "experts") -> dict[str, np.ndarray]:
    """`layers.0.experts.7.up_proj.weight`, for each number, as one `layers.0.experts.up_proj.weight`, by their number.

    Raises CheckpointError where numbers are missing, or shapes and dtypes differ.
    """
    result: dict[str, np.ndarray] = {}
    parts: dict[str, dict[int, np.ndarray]] = {}
    for name, array in named.items():
        found = re.fullmatch(rf"((?:.*\.)?{of})\.(\d+)\.(.*)", name)
        if found is None:
            result[name] = array
        else:
            parts.setdefault(f"{found[1]}.{found[3]}", {})[int(found[2])] = array
    for name, members in parts.items():
        kinds = {(each.shape, each.dtype.name) for each in members.values()}
        if len(kinds) > 1 or max(members) != len(members) - 1:
            raise CheckpointError(
                f"{name}: the checkpoint has {len(members)} {of}, the last of number {max(members)}, as "
                f"{', '.join(f'{dtype}{list(shape)}' for shape, dtype in sorted(kinds))}; expected all, of one kind"
            )
        result[name] = concatenated([members[i] for i in range(len(members))])
    return result


def unstacked(named: Mapping[str, np.ndarray], count: int, of: str = "experts") -> dict[str, np.ndarray]:
    """The inverse of `stacked`, for `count` of them."""
    result: dict[str, np.ndarray] = {}
    for name, array in named.items():
        before, found, after = name.rpartition(f"{of}.")
        if not found or (before and not before.endswith(".")):  # `shared_experts` are no such list
            result[name] = array
            continue
        rows = array.shape[0] // count
        for i in range(count):
            result[f"{before}{of}.{i}.{after}"] = array[i * rows : (i + 1) * rows]
    return result
