"""What was measured as JSON, as a table and as a chart. `python -m tests.bench.report FILE.json` draws both again."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

JSON, CHART = "peers.json", "peers.png"
_DISPATCH = 0.04  # share of a decode step that may be Python and dispatch
_OTHERS = 0.03  # share of a decode step that kernels other than linear and attention may take
_MET, _MISSED, _OPEN = "#2a7f62", "#c0392b", "#5b6770"


def check() -> None:
    """Raises ImportError with what to do, before an hour of measurements, where the chart cannot be drawn."""
    try:
        import matplotlib  # pyright: ignore[reportMissingImports] # noqa: F401
    except ImportError:
        raise ImportError("the chart needs matplotlib: pip install -e '.[bench]'") from None


def write(result: dict[str, Any], folder: Path) -> None:
    """Put `peers.json` and `peers.png` into `folder`, the former in one step."""
    draft = folder / f".{JSON}.{os.getpid()}"
    draft.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    draft.replace(folder / JSON)
    if result["rows"]:
        draw(result, folder / CHART)


def show(result: dict[str, Any], console: Console | None = None) -> None:
    """Print the tables."""
    console = console or Console(highlight=False, width=None if sys.stdout.isatty() else 150)
    console.print(f"{result['shape']}, {result['threads']} threads, {result['machine']['cpu']}")
    table = Table("work", "ours", "peer", "ratio", "wanted", "met", box=None, pad_edge=False)
    for row in result["rows"]:
        ratio = row["ratio"]
        table.add_row(
            row["work"],
            f"{row['ours']:.1f} {row['unit']}",
            f"{row['against']}: {row['theirs']:.1f}",
            f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})",
            "" if row["wanted"] is None else f">= {row['wanted']:.1f}",
            _met(row["met"]),
        )
    for work, value, wanted, met in alone(result):
        table.add_row(work, value, "", "", wanted, _met(met))
    for failure in result["failures"]:
        table.add_row(", ".join(failure["rows"]), "", "", "failed", "", "")
    console.print(table)
    busy = [row["name"] for row in result["rows"] if row["others"] > 0.05]
    if busy:
        console.print(f"other processes took more than 5 % of the machine in: {', '.join(busy)}")
    for failure in result["failures"]:
        first = failure["error"].splitlines()[0]
        console.print(f"{', '.join(failure['rows'])}: {first}", style="red", markup=False, soft_wrap=True)


def alone(result: dict[str, Any]) -> list[tuple[str, str, str, bool | None]]:
    """What is said of Limpid alone: work, value, wanted, met. One line a weight format."""
    lines: list[tuple[str, str, str, bool | None]] = []
    seen = set()
    for side in result["sides"]:
        dispatch = side.get("dispatch")
        if dispatch is None or dispatch["weights"] in seen:
            continue
        weights = dispatch["weights"]
        seen.add(weights)
        share = max(dispatch["outside_kernels"], dispatch["nothing_launched"])
        aim = f"<= {_DISPATCH:.0%}"
        lines.append((f"Python and dispatch of a decode step, {weights}", f"{share:.1%}", aim, share <= _DISPATCH))
        others = dispatch["other_kernels"]
        what = f"kernels but linear and attention in a decode step, {weights}"
        lines.append((what, f"{others:.1%}", f"<= {_OTHERS:.0%}", others <= _OTHERS))
        lines.append((f"compiles after warm-up, {weights}", str(side["compiles"]), "0", side["compiles"] == 0))
        peak = side["peak_memory_bytes"]
        lines.append((f"peak resident memory, {weights}", f"{peak['ours'] / 1e9:.2f} GB", "", None))
        bandwidth = side["ceilings"]["read_bandwidth"]
        lines.append((f"read bandwidth of the machine, beside {weights}", f"{bandwidth / 1e9:.1f} GB/s", "", None))
    return lines + [(each["work"], each["shown"], each["wanted"], each["met"]) for each in result["own"]]


def draw(result: dict[str, Any], path: Path) -> None:
    """A row a line: the median ratio as a dot, all rounds as a bar, what was wanted as a tick."""
    import matplotlib  # pyright: ignore[reportMissingImports]

    matplotlib.use("Agg")
    from matplotlib import pyplot  # pyright: ignore[reportMissingImports]

    rows = result["rows"]
    figure, axes = pyplot.subplots(figsize=(9, 1.6 + 0.36 * len(rows)), layout="constrained")
    for y, row in enumerate(rows):
        ratio, wanted = row["ratio"], row["wanted"]
        color = _OPEN if row["met"] is None else _MET if row["met"] else _MISSED
        axes.plot([ratio["min"], ratio["max"]], [y, y], color=color, linewidth=5, alpha=0.3, solid_capstyle="butt")
        axes.plot(ratio["median"], y, marker="o", color=color, markersize=7)
        said = f"{ratio['median']:.2f}" + ("" if wanted is None else f"  (wanted {wanted})")
        axes.text(1.01, y, said, transform=axes.get_yaxis_transform(), va="center", size=8.5)
        if wanted is not None:
            axes.plot([wanted, wanted], [y - 0.36, y + 0.36], color="black", linewidth=2)
    axes.axvline(1, color="black", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(rows)), [f"{row['work']}\nagainst {row['against']}" for row in rows], size=8)
    axes.invert_yaxis()
    most = max(max(row["ratio"]["max"], row["wanted"] or 1) for row in rows)
    axes.set_xlim(0, 1.05 * most)
    axes.set_xlabel("times as fast as the peer (bar: all rounds, dot: their median, tick: wanted, dotted: as fast)")
    axes.set_title(f"Limpid against its peers: {result['shape']}, {result['threads']} threads", size=11)
    handles = [axes.plot([], [], "o", color=color, label=label)[0] for color, label in _legend(rows)]
    figure.legend(handles=handles, loc="outside upper right", ncols=3, frameon=False, fontsize=8)
    axes.grid(axis="x", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _legend(rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """The colours that occur."""
    labels = {True: (_MET, "met"), False: (_MISSED, "missed"), None: (_OPEN, "no aim")}
    return [labels[each] for each in (True, False, None) if any(row["met"] is each for row in rows)]


def _met(met: bool | None) -> str:
    return {True: "yes", False: "no", None: ""}[met]


if __name__ == "__main__":
    source = Path(sys.argv[1])
    loaded = json.loads(source.read_text("utf-8"))
    show(loaded)
    draw(loaded, source.with_suffix(".png"))
