"""Limpid against its peers: `python -m tests.bench.peers --shape llama-1b` prints a table, writes JSON and a chart.

Peers run in long-lived processes of their own, on random weights of the same shape and the same bits per tensor.
CONTRIBUTING.md says how to install them.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import functools
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llm.bench import SHAPES

from . import report, rounds
from .own import FIGURES, Figure
from .process import Worker, WorkerError, available_memory, machine
from .table import BITS, COMPILED, EAGER, LLAMA, OPENVINO, OURS, ROWS, STEPS, Row, matrices

_ROOM = 2 * 2**30  # bytes that runtimes, caches and activations of both sides take beside the weights


def main(arguments: list[str] | None = None) -> int:
    """The command line. Gives 0 when every row was measured, whatever the ratios."""
    options = _options(arguments)
    rows = [row for row in ROWS if _selected(row, options) and (options.openvino_python or row.peer != OPENVINO)]
    figures = [figure for figure in FIGURES if _selected(figure, options)]
    if not rows and not figures:
        print(
            f"--only {','.join(options.only)} selects nothing of {', '.join(each.name for each in (*ROWS, *FIGURES))}"
        )
        return 2
    report.check()
    options.out.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {
        "shape": options.shape,
        "config": SHAPES[options.shape],
        "threads": options.threads,
        "wanted_rounds": options.rounds,
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "machine": machine(),
        **{each: [] for each in ("sides", "rows", "own", "failures")},
    }
    work: list[tuple[list[str], Callable[[], None]]] = [
        ([row.name for row in group], functools.partial(_measure, group, options, result)) for group in _groups(rows)
    ]
    work += [([figure.name], functools.partial(_take, figure, options, result)) for figure in figures]
    for names, measure in work:
        print(f"{time.strftime('%H:%M:%S')} {', '.join(names)}", file=sys.stderr)
        try:
            measure()
        except WorkerError as error:
            result["failures"].append({"rows": names, "error": str(error)})
            print(error, file=sys.stderr)
        report.write(result, options.out)
    report.show(result)
    print(f"written: {', '.join(map(str, sorted(options.out.glob('peers.*'))))}")
    return 1 if result["failures"] else 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.peers", description=__doc__)
    parser.add_argument("--shape", choices=list(SHAPES), default="llama-1b")
    parser.add_argument("--rounds", type=int, default=5, help="calm rounds of each row (default 5)")
    parser.add_argument("--only", type=lambda text: text.split(","), default=["*"], help="rows, as decode-q4,prefill-*")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("build/peers"), help="folder of results and logs")
    parser.add_argument("--llama-python", default=sys.executable, help="interpreter that has llama_cpp and gguf")
    parser.add_argument("--torch-python", default=sys.executable, help="interpreter that has torch and transformers")
    parser.add_argument("--openvino-python", help="one that has openvino-genai and gguf; without it, no such rows")
    options = parser.parse_args(arguments)
    if options.rounds < 1 or options.threads < 1:
        parser.error("--rounds and --threads are at least 1")
    return options


def _groups(rows: list[Row]) -> list[list[Row]]:
    """Rows that share their workers: two models are in memory at a time."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.ours, row.peer, row.theirs), []).append(row)
    return list(groups.values())


def _selected(item: Row | Figure, options: argparse.Namespace) -> bool:
    return any(fnmatch.fnmatch(item.name, each) for each in options.only)


def _take(figure: Figure, options: argparse.Namespace, result: dict[str, Any]) -> None:
    result["own"].append(figure.take(options, SHAPES[options.shape]))


def _measure(group: list[Row], options: argparse.Namespace, result: dict[str, Any]) -> None:
    """Start both sides, run the rounds, and add to `result`. Raises WorkerError."""
    config, first = SHAPES[options.shape], group[0]
    models = any(row.kind != "gemm" for row in group)
    if models:
        _check_memory(options, first)
    shared = {"config": config, "threads": options.threads}
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="limpid-peers-"))
        ours = stack.enter_context(_worker(sys.executable, "worker_limpid", options, first.ours))
        python, module, more = {
            LLAMA: (options.llama_python, "worker_llama", {"folder": folder}),
            EAGER: (options.torch_python, "worker_torch", {"compiled": False}),
            COMPILED: (options.torch_python, "worker_torch", {"compiled": True}),
            OPENVINO: (options.openvino_python, "worker_openvino", {"folder": folder}),
        }[first.peer]
        theirs = stack.enter_context(_worker(python, module, options, first.theirs))
        facts = {
            "ours": ours.ask(open=shared | OURS[first.ours]),
            "theirs": theirs.ask(open=shared | {"weights": first.theirs} | more),
        }
        rounds.warm(group, ours, theirs)
        taken = rounds.take(group, ours, theirs, options.rounds)
        side: dict[str, Any] = {"rows": [row.name for row in group], "facts": facts}
        if models:
            side["compiles"] = sum(each["compiles"] for each_row in taken.values() for each in each_row)
            side["peak_memory_bytes"] = {"ours": ours.peak_memory(), "theirs": theirs.peak_memory()}
            side["dispatch"] = ours.ask(test="dispatch", context=16, steps=STEPS) | {"weights": first.ours}
            side["ceilings"] = ours.ask(test="ceilings")  # last: it takes memory of its own
    result["sides"].append(side)
    result["rows"] += [rounds.summary(row, each, options.rounds) for row, each in taken.items()]


def _worker(python: str, module: str, options: argparse.Namespace, weights: str) -> Worker:
    return Worker(python, f"tests.bench.{module}", options.threads, options.out / f"{module}-{weights}.log")


def _check_memory(options: argparse.Namespace, row: Row) -> None:
    """Raises WorkerError when both models do not fit."""
    bits = BITS[row.ours] + BITS[row.theirs]
    need = int(sum(matrices(SHAPES[options.shape])) * bits / 8) + _ROOM
    if (free := available_memory()) < need:
        raise WorkerError(f"both models need {need / 1e9:.1f} GB of memory, {free / 1e9:.1f} are free")


if __name__ == "__main__":
    sys.exit(main())
