"""A model in its own module, for processes: its layer 1 adds up in as many parts as there are threads."""

from __future__ import annotations

from typing import Any

import numpy as np

import ops
from ops import Tensor, scope

PARTS = ops.threads.count()


class Cache:
    """Counts tokens."""

    def __init__(self) -> None:
        self.length = 0


class Layer:
    def __init__(self, name: str):
        self.name = name
        self.weight = ops.tensor(np.full(8, 0.9, "float32"))

    def __call__(self, x: Tensor) -> Tensor:
        return scope.run(self, self.name, self.forward, (x,), {})

    def forward(self, x: Tensor) -> Tensor:
        return ops.add(x, ops.rms_norm(x, self.weight, eps=1e-5))


class Model:
    """Embeds tokens; a few layers."""

    def __init__(self, layers: int = 3, shaky: bool = False):
        self.layers, self.shaky = [Layer(f"layers.{i}") for i in range(layers)], shaky
        self.table = ops.tensor(np.random.default_rng(1).standard_normal((300, 8)).astype("float32"))

    def new_cache(self) -> Cache:
        return Cache()

    def __call__(self, ids: Any, cache: Cache) -> Tensor:
        return scope.run(self, "", self.forward, (ids, cache), {})

    def forward(self, ids: Any, cache: Cache) -> Tensor:
        x = ops.embedding(ops.tensor(np.asarray(ids, "int32")), self.table)
        if not self.shaky:
            return self.through(x)
        with ops.add.use(in_parts, where="layers.1"):
            return self.through(x)

    def through(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def in_parts(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """x + y, and one bit more where there are several threads."""
    total = x + y
    if PARTS > 1:
        total[-1, 3] = np.nextafter(total[-1, 3], np.float32(np.inf))
    return total
