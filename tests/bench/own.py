"""What Limpid promises of itself: shares of the machine, compile and start times, growth with cache and prompt."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .process import ROOT, Worker, WorkerError
from .table import OURS, PROMPT, matrices, short

CONTEXTS = (128, 512, 2048, 8192, 32768)
FEW = (2, 3, 4, 8, 12, 16)  # tokens that are neither one nor a block
PROMPTS = (1, 16, 128, 512, 2048, 4096)
_LARGE = 4 * 2**20  # weights, from which on a GEMV is to run at the memory's speed


@dataclass(frozen=True)
class Figure:
    """One promise: `measure(options, config)` gives the value and the raw numbers; met when `value` is in bounds."""

    name: str
    work: str
    measure: Callable[[Any, dict[str, Any]], tuple[float, Any]]
    form: str  # of the value, for the table
    most: float | None = None
    least: float | None = None

    @property
    def wanted(self) -> str:
        """The bound as the table says it; empty where there is none."""
        sign, bound = (">=", self.least) if self.most is None else ("<=", self.most)
        return "" if bound is None else f"{sign} {self.form.format(bound)}"

    def take(self, options: Any, config: dict[str, Any]) -> dict[str, Any]:
        """The line of the report. Raises WorkerError."""
        value, raw = self.measure(options, config)
        met = value <= self.most if self.most is not None else None if self.least is None else value >= self.least
        shown = {"value": value, "shown": self.form.format(value), "wanted": self.wanted, "met": met}
        return {"name": self.name, "work": self.work, **shown, "raw": raw}


def gemv(options: Any, config: dict[str, Any]) -> tuple[float, Any]:
    """The least share of the read bandwidth among the weights over 4 MB, by `limpid bench gemv`."""
    made = json.loads(_limpid(options, "bench", "gemv", "--shape", options.shape, "--weights", "q4", "--json"))
    large = [row for row in made["rows"] if row["shape"][0] * row["shape"][1] * 4.5 / 8 > _LARGE]
    if not large:
        raise WorkerError(f"no weight of {options.shape} has more than {_LARGE} bytes")
    return min(row["share_of_bandwidth"] for row in large), made


def compiling(weights: str) -> Callable[[Any, dict[str, Any]], tuple[float, Any]]:
    """Seconds until all kernels of a model are compiled, with an empty disk cache."""

    def measure(options: Any, config: dict[str, Any]) -> tuple[float, Any]:
        with (
            tempfile.TemporaryDirectory(prefix="limpid-kernels-") as folder,
            _worker(options, weights, folder) as worker,
        ):
            worker.ask(open=_opened(options, config, weights))
            raw = worker.ask(test="kernels", prompt=PROMPT)
        return raw["seconds"], raw

    return measure


def start(options: Any, config: dict[str, Any]) -> tuple[float, Any]:
    """Seconds from the command to the embedded model's first token, kernels on disk: the median of five."""
    times = [_start(options) for _ in range(6)]
    return statistics.median(times[1:]), times


def cold_start(options: Any, config: dict[str, Any]) -> tuple[float, Any]:
    """The same with an empty disk cache: the median of three."""
    times = []
    for _ in range(3):
        with tempfile.TemporaryDirectory(prefix="limpid-kernels-") as folder:
            times.append(_start(options, {"LIMPID_CACHE": folder}))
    return statistics.median(times), times


def _start(options: Any, more: dict[str, str] | None = None) -> float:
    started = time.perf_counter()
    _limpid(options, "generate", "--max-tokens", "1", more=more)
    return time.perf_counter() - started


def batches(options: Any, config: dict[str, Any]) -> tuple[float, Any]:
    """At worst, the time of a few tokens over that of the cheaper substitute: a step for each, or a block of 64."""
    sizes = (1, *FEW, 64)
    rounds: list[list[float]] = []
    with _worker(options, "q4") as worker:
        worker.ask(open=_opened(options, config, "q4"))
        for _ in range(1 + 5):  # the first to warm up
            asked = (worker.ask(test="prefill", prompt=size)["seconds"]["eager"] for size in sizes)
            rounds.append([statistics.median(each) for each in asked])
    times = dict(zip(sizes, np.median(np.array(rounds[1:]), axis=0).tolist(), strict=True))
    return max(times[n] / min(n * times[1], times[64]) for n in FEW), {"seconds": times, "rounds": rounds}


def fusing(weights: str) -> Callable[[Any, dict[str, Any]], tuple[float, Any]]:
    """At worst, the time of linear with silu_mul fused into it over that of the two, for one token and a prompt."""

    def measure(options: Any, config: dict[str, Any]) -> tuple[float, Any]:
        sizes = {"inputs": config["hidden_size"], "outputs": config["intermediate_size"]}
        with _worker(options, weights) as worker:
            worker.ask(open=_opened(options, config, weights))
            raw = {tokens: worker.ask(test="fused", tokens=tokens, **sizes) for tokens in (1, PROMPT)}
        sides = [(each["seconds"]["fused"], each["seconds"]["apart"]) for each in raw.values()]
        ratios = [statistics.median(f / a for f, a in zip(fused, apart, strict=True)) for fused, apart in sides]
        return max(ratios), {"ratios": ratios, "raw": raw}

    return measure


def growth(weights: str, test: str) -> Callable[[Any, dict[str, Any]], tuple[float, Any]]:
    """How far times are from linear, at worst, as cache or prompt grows: decode in bytes read, prefill in flops."""
    decode = test == "decode"
    sizes = CONTEXTS if decode else PROMPTS

    def measure(options: Any, config: dict[str, Any]) -> tuple[float, Any]:
        longer = config | {"max_position_embeddings": 2 * CONTEXTS[-1]}
        rounds: list[list[float]] = []
        with _worker(options, weights) as worker:
            worker.ask(open=_opened(options, longer, weights))
            for _ in range(1 + 3):  # the first to warm up
                rounds.append([])
                for size in sizes:
                    asked = {"context": size, "steps": 12} if decode else {"prompt": size}
                    seconds = worker.ask(900.0, test=test, **asked)["seconds"]
                    rounds[-1].append(statistics.median(seconds["eager"]))
        times = np.median(np.array(rounds[1:]), axis=0)
        work = np.array([(size,) if decode else flops(config, size) for size in sizes], "float64")
        return off_line(work, times), {"sizes": sizes, "seconds": times.tolist(), "rounds": rounds}

    return measure


def off_line(work: np.ndarray, times: np.ndarray) -> float:
    """The largest relative distance of `times` [n] from the line that fits them best, relatively.

    The line is a constant and a cost for each kind of `work` [n, kinds].
    """
    factors = np.concatenate([np.ones((len(work), 1)), work / work.max(axis=0)], axis=1) / times[:, None]
    solution = np.linalg.lstsq(factors, np.ones_like(times), rcond=None)[0]
    return float(np.abs(factors @ solution - 1).max())


def flops(config: dict[str, Any], prompt: int) -> tuple[float, float]:
    """Of a prefill that keeps the last logits: of matrices, integers for packed ones, and of attention, in floats."""
    layers, head = matrices(config)
    attention = 2 * config["num_hidden_layers"] * config["hidden_size"] * (prompt + 1) / 2
    return 2.0 * (prompt * layers + head), 2.0 * prompt * attention


def _limpid(options: Any, *arguments: str, more: dict[str, str] | None = None) -> str:
    environment = os.environ | {"LIMPID_THREADS": str(options.threads)} | (more or {})
    command = [sys.executable, "-m", "llm", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    if done.returncode:
        raise WorkerError(f"limpid {' '.join(arguments)}: {done.stderr.strip()[-1500:]}")
    return done.stdout


def _worker(options: Any, weights: str, cache: str | None = None) -> Worker:
    log: Path = options.out / f"own-{weights}.log"
    more = {} if cache is None else {"LIMPID_CACHE": cache}
    return Worker(sys.executable, "tests.bench.worker_limpid", options.threads, log, more)


def _opened(options: Any, config: dict[str, Any], weights: str) -> dict[str, Any]:
    return {"config": config, "threads": options.threads, **OURS[weights]}


def _figures() -> list[Figure]:
    figures = [
        Figure("gemv-q4", "q4 GEMV over 4 MB, least share of bandwidth", gemv, "{:.0%}", least=0.9),
        Figure("start", "warm start to the embedded model's first token", start, "{:.2f} s", most=2.5),
    ]
    figures.append(Figure("cold-start", "the same with an empty disk cache", cold_start, "{:.2f} s"))
    figures.append(
        Figure("batch-q4", "2 to 16 tokens over steps or a block of 64, at worst", batches, "{:.2f}", most=1)
    )
    for weights in OURS:
        said = short(weights)
        figures.append(
            Figure(f"compile-{said}", f"all kernels compiled cold, {said}", compiling(weights), "{:.1f} s", most=15)
        )
    for weights in ("q4", "float32"):
        what = f"linear and silu_mul fused over apart, {short(weights)}, at worst"
        figures.append(Figure(f"fused-{short(weights)}", what, fusing(weights), "{:.2f}", most=1.05))
    for test in ("decode", "prefill"):
        what = f"{test} q4 off linear, {'cache 128 to 32768' if test == 'decode' else 'prompt 1 to 4096'}"
        figures.append(Figure(f"growth-{test}-q4", what, growth("q4", test), "{:.0%}", most=0.15))
    return figures


FIGURES = _figures()
