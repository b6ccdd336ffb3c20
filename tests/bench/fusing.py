"""What fusing costs or saves: linear and silu_mul as one function, beside the two kernels one after the other."""

from __future__ import annotations

import itertools
import time
from typing import Any

import numpy as np

import ops
from ops.spec import Spec
from tests.ops import capture

_COLD = 2**28  # bytes of weights in turn, so that each comes from memory


def times(tokens: int, inputs: int, outputs: int, dtype: str, weights: str, seconds: float = 3.0) -> dict[str, Any]:
    """Seconds of each run of "fused", "apart" and "linear" alone, taken in turns."""
    rng = np.random.default_rng(0)
    size = capture.tokens(tokens)
    kernel = capture.compiled(
        lambda call, x, w, up: call(ops.silu_mul, call(ops.linear, x, w), up),
        x=Spec((size, inputs), dtype), w=Spec((outputs, inputs), weights), up=Spec((size, outputs), dtype),
    )  # fmt: skip

    def tensor(shape: tuple[int, ...], kind: str) -> ops.Tensor:
        return ops.tensor(rng.standard_normal(shape).astype("float32"), kind)

    x, up = tensor((tokens, inputs), dtype), tensor((tokens, outputs), dtype)
    first = tensor((outputs, inputs), weights)
    turn = itertools.cycle([first, *(tensor((outputs, inputs), weights) for _ in range(_COLD // first.nbytes))])

    def fused() -> None:
        kernel(x, next(turn), up, ops.empty(up.shape, dtype))

    sides = {
        "fused": fused,
        "apart": lambda: ops.silu_mul(ops.linear(x, next(turn)), up),
        "linear": lambda: ops.linear(x, next(turn)),
    }
    found: dict[str, list[float]] = {name: [] for name in sides}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(found["linear"]) < 5:
        for name, run in sides.items():
            started = time.perf_counter()
            run()
            found[name].append(time.perf_counter() - started)
    return {"seconds": {name: each[1:] for name, each in found.items()}}  # the first run compiles
