"""Limpid itself, eager: `python -m tests.bench.worker_limpid` serves the pipe."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any

import numpy as np
import tvm_ffi

import ops
from llm.cache import Cache
from llm.generate import prepare
from llm.load import build, randomize
from ops.op import registry
from ops.plan import Plan

from . import fusing
from .worker import WARM, serve, timed, tokens

_LARGE = ("linear", "attention")  # what a decode step is to consist of


class Limpid:
    """A model of random weights in the format `weights`, with activations and cache of the given dtypes."""

    def __init__(self, config: dict[str, Any], threads: int, weights: str, dtype: str, cache: str):
        if ops.target.threads() != threads:
            raise ValueError(f"TVM runs {ops.target.threads()} threads, asked for {threads}: set LIMPID_THREADS")
        self.config, self.weights, self.dtype, self.cache_dtype = config, weights, dtype, cache
        self._model: Any = None
        self._filled: dict[int, Cache] = {}

    def facts(self) -> dict[str, Any]:
        versions = {name: version(name) for name in ("limpid", "apache-tvm", "numpy")}
        kinds = {"weights": self.weights, "dtype": self.dtype, "cache": self.cache_dtype}
        return versions | kinds | {"target": ops.target.describe()}

    def measure(self, test: str, **sizes: int) -> dict[str, Any]:
        """As a `Side`, with "compiles": how many kernels were compiled meanwhile. "dispatch" gives shares instead,
        "kernels" the seconds of building all, for a prompt, a few tokens and one, "fused" those of a group beside its
        parts, "ceilings" the machine's."""
        if test == "gemm":
            return self._gemm(**sizes)
        if test == "fused":
            return fusing.times(**sizes, dtype=self.dtype, weights=self.weights)
        if test == "ceilings":
            return {"read_bandwidth": ops.ceilings.read_bandwidth(), "fma_peak": ops.ceilings.fma_peak()}
        if self._model is None:
            self._model = randomize(build(self.config, self.dtype, self.weights))
        if test == "dispatch":
            return self._dispatch(**sizes)
        if test == "kernels":
            return self._kernels(**sizes)
        kinds = {"decode": self._decode, "prefill": self._prefill}
        before = len(ops.build.log)
        seconds = {"eager": kinds[test](**sizes)}
        return {"seconds": seconds, "compiles": len(ops.build.log) - before}

    def _decode(self, context: int, steps: int) -> list[float]:
        cache = self._cache(context, steps)
        times = timed(lambda: self._step(cache), WARM, steps)
        cache.truncate(context)
        return times

    def _prefill(self, prompt: int) -> list[float]:
        ids = tokens(prompt, self.config)
        prepare(self._model, prompt, self.cache_dtype, progress=False)
        return timed(lambda: self._checked(self._model(ids, self._new_cache(), logits_to_keep=1)), 0, 1, 1.0)

    def _kernels(self, prompt: int) -> dict[str, Any]:
        started = time.perf_counter()
        compiled = sum(prepare(self._model, each, self.cache_dtype, progress=False) for each in (prompt, 8))
        return {"seconds": time.perf_counter() - started, "compiles": compiled}

    def _gemm(self, rows: int, inputs: int, outputs: int) -> dict[str, Any]:
        rng, before = np.random.default_rng(0), len(ops.build.log)
        x = ops.tensor(rng.standard_normal((rows, inputs)).astype("float32"), self.dtype)
        weight = ops.tensor(rng.standard_normal((outputs, inputs)).astype("float32"), self.weights)
        seconds = {"eager": timed(lambda: ops.linear(x, weight), WARM, 20, 1.0)}
        return {"seconds": seconds, "compiles": len(ops.build.log) - before}

    def _dispatch(self, context: int, steps: int) -> dict[str, Any]:
        """What of a decode step is not kernels, measured twice.

        `outside_kernels`: a step less the time inside its launches. The clock around each launch counts as outside, so
        this is the upper bound. `nothing_launched`: a step whose launches reach a function that does nothing, over a
        whole one: the call itself counts, but no kernel has driven Python's data out of the caches. `other_kernels`:
        the time inside launches of all ops but linear and attention.
        """
        cache, whole, outside, idle, others, calls = self._cache(context, steps), [], [], [], [], 0
        inside: list[tuple[str, float]] = []
        nothing = tvm_ffi.get_global_func("testing.nop")
        timed(lambda: self._step(cache), WARM, 1)
        for _ in range(steps // 4):  # in turns, so that all see the same machine
            cache.truncate(context)
            whole += timed(lambda: self._step(cache), 0, 4)
            cache.truncate(context)
            with _launches(lambda plan: _clocked(plan.op.name, plan.run, inside)):
                for _ in range(4):
                    inside.clear()
                    seconds = timed(lambda: self._step(cache), 0, 1)[0]
                    outside.append((seconds - sum(took for _, took in inside)) / seconds)
                    others.append(sum(took for name, took in inside if name not in _LARGE) / seconds)
                    calls = len(inside)
            cache.truncate(context)
            with _launches(lambda plan: nothing):
                idle += timed(lambda: self._model([1], cache, logits_to_keep=1), 0, 4)
        cache.truncate(context)
        return {
            "outside_kernels": statistics.median(outside),
            "nothing_launched": statistics.median(idle) / statistics.median(whole),
            "other_kernels": statistics.median(others),
            "launches": calls,
            "seconds": {"whole": whole, "idle": idle},
            "shares": {"outside": outside, "others": others},
        }

    def _cache(self, context: int, steps: int) -> Cache:
        """A cache that holds `context` random keys and values, with room for the steps without growing."""
        if context not in self._filled:
            prepare(self._model, 1, self.cache_dtype, progress=False)
            cache, c = self._new_cache(), self._model.config
            values = np.random.default_rng(0).standard_normal((context, c.num_key_value_heads, c.head_dim))
            rows, positions = ops.tensor(values.astype("float32"), self.dtype), cache.extend(context)
            for i in range(c.num_hidden_layers):
                cache[i].write(rows, rows, positions)
            cache.commit(ops.zeros((context,), "int32"))
            timed(lambda: self._step(cache), 0, steps + WARM)
            cache.truncate(context)
            self._filled[context] = cache
        return self._filled[context]

    def _new_cache(self) -> Cache:
        return Cache(self._model.context, self.cache_dtype)

    def _step(self, cache: Cache) -> None:
        self._checked(self._model([1], cache, logits_to_keep=1))

    def _checked(self, logits: Any) -> None:
        first = logits.numpy()[-1, :8].astype("float32")
        if not np.isfinite(first).all():
            raise RuntimeError(f"Limpid computes no logits: {first}")


@contextlib.contextmanager
def _launches(replaced: Callable[[Plan], Callable]) -> Iterator[None]:
    """The launch of every plan replaced meanwhile by what `replaced` makes of it."""
    plans: list[Plan] = list({id(plan): plan for op in registry.values() for plan in op._plans.values()}.values())
    kept = [plan.run for plan in plans]
    for plan in plans:
        plan.run = replaced(plan)
    try:
        yield
    finally:
        for plan, run in zip(plans, kept, strict=True):
            plan.run = run


def _clocked(name: str, run: Callable, inside: list[tuple[str, float]]) -> Callable:
    def launch(*data: Any) -> None:
        started = time.perf_counter()
        run(*data)
        inside.append((name, time.perf_counter() - started))

    return launch


if __name__ == "__main__":
    serve(Limpid)
