"""What a bug does to the logits, and what rounding does: a bug that is not well above rounding is none."""

from __future__ import annotations

from typing import Any

import numpy as np

import ops
from ops import Call, Interceptor
from ops.difference import Expected


def transcript(model: Any, ids: list[int]) -> np.ndarray:
    """The logits, float32, of `ids` (130 tokens or more) read in all ways in which some bug shows."""
    rows = []

    def read(cache: Any, *pieces: list[int]) -> None:
        rows.extend(model(piece, cache).numpy().astype("float32") for piece in pieces)

    def single(start: int, stop: int) -> list[list[int]]:
        return [[each] for each in ids[start:stop]]

    read(model.new_cache(), ids[:129], ids[129:130])
    read(model.new_cache(), ids[:61])
    read(model.new_cache(), ids[:60], *single(60, 80))  # past the first capacity of a cache
    cache = model.new_cache()
    read(cache, ids[:20])
    cache.truncate(12)
    read(cache, ids[12:25], ids[25:33])
    return np.concatenate(rows)


def distance(actual: np.ndarray, wanted: np.ndarray) -> float:
    """max|actual - wanted| / max|wanted|; infinite where `actual` is no number."""
    error = np.abs(actual - wanted).max() / np.abs(wanted).max()
    return float(error) if np.isfinite(error) else float("inf")


class _InNumpy(Interceptor):
    """Every call gives what its reference says, rounded to the dtype of its output."""

    def call(self, call: Call, launch: Any) -> Any:
        results = iter(Expected(call).values)
        outputs = []
        for spec in call.outputs:
            outputs.append(ops.empty(spec.shape, spec.dtype))
            outputs[-1].numpy()[...] = next(results)
        for tensor in call.written.values():
            tensor.numpy()[...] = next(results)
        return outputs[0] if len(outputs) == 1 else tuple(outputs) or None


class _Watched(Interceptor):
    """Keeps the first output of the call at an address."""

    def __init__(self, address: str):
        self.address, self.output = address, np.zeros(0)

    def call(self, call: Call, launch: Any) -> Any:
        output = launch(call)
        if call.address == self.address and not self.output.size:
            self.output = output.numpy().astype("float32")
        return output


def rounding(model: Any, ids: list[int]) -> float:
    """How far the logits are from those of the same model with every kernel replaced by its NumPy reference."""
    wanted = model(ids).numpy().astype("float32")
    with ops.intercepted(_InNumpy()):
        return distance(model(ids).numpy().astype("float32"), wanted)


def output_at(model: Any, ids: list[int], address: str, numpy: bool = False) -> np.ndarray:
    """What the call at `address` gives, or its NumPy reference on the same inputs."""
    watched = _Watched(address)
    reference = [_Only(address)] * numpy
    with ops.intercepted(watched, *reference):
        model(ids)
    return watched.output


class _Only(_InNumpy):
    """The same for the call at an address only."""

    def __init__(self, address: str):
        self.address = address

    def call(self, call: Call, launch: Any) -> Any:
        return super().call(call, launch) if call.address == self.address else launch(call)
