"""`python -m tests.bug_hunt`: plants every bug, calls the doctor, prints what it found; then clean models."""

from __future__ import annotations

import argparse
import contextlib
import secrets
import sys
from collections.abc import Iterable

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from .bugs import BUGS
from .hunt import Hunt, clean, hunt


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bug_hunt", description="How many planted bugs are found?")
    parser.add_argument("--only", action="append", metavar="NAME", help="this bug, or all whose names hold NAME")
    parser.add_argument("--seeds", type=int, default=10, metavar="N", help="clean models are drawn N times; default 10")
    parser.add_argument("--seconds", type=float, default=20, metavar="S", help="for each clean model; default 20")
    parser.add_argument("--seed", type=int, default=None, help="repeat a run; default: a fresh one")
    options = parser.parse_args()
    chosen = [bug for name, bug in BUGS.items() if _chosen(name, options.only)]
    if not chosen:
        parser.error(f"no bug is called {', '.join(options.only)}; there are {', '.join(BUGS)}")
    seed = secrets.randbits(31) if options.seed is None else options.seed
    console = Console()
    console.print(f"{len(chosen)} bugs, {options.seeds} seeds for the clean models; --seed {seed} repeats this")
    hunts = _shown(console, "planted bugs", (hunt(bug, seed) for bug in chosen), "[red]missed[/]")
    found = sum(each.verdict.found for each in hunts)
    runs = (each for i in range(options.seeds) for each in clean(seed + i, options.seconds))
    cleans = _shown(console, "clean models", runs, "[red]false alarm[/]") if options.seeds else []
    alarms = sum(not each.verdict.found for each in cleans)
    seconds = sum(each.seconds for each in (*hunts, *cleans))
    console.print(f"{found}/{len(hunts)} found, {alarms} false alarms in {len(cleans)} clean runs, {seconds:.0f} s")
    return 0 if found == len(hunts) and not alarms else 1


def _chosen(name: str, only: list[str] | None) -> bool:
    return not only or any(each in (name, "all") or (each not in BUGS and each in name) for each in only)


def _shown(console: Console, title: str, hunts: Iterable[Hunt], failed: str) -> list[Hunt]:
    """Take the hunts one after the other, with a table that grows; into a file, a line for each and then the table."""
    table = Table("name", "", "what was found; what of it is wrong", "s", title=title, expand=True)
    live = Live(table, console=console, auto_refresh=False, vertical_overflow="visible")
    done = []
    with live if console.is_terminal else contextlib.nullcontext():
        for each in hunts:
            done.append(each)
            said = [f"[dim]{escape(each.verdict.said)}[/]"] * bool(each.verdict.said)
            wrong = [f"[red]{escape(text)}[/]" for text in each.verdict.wrong]
            state = "[green]ok[/]" if each.verdict.found else failed
            table.add_row(escape(each.name), state, "\n".join([*said, *wrong]), f"{each.seconds:.1f}")
            if console.is_terminal:
                live.refresh()
            else:
                print(f"{'ok  ' if each.verdict.found else 'FAIL'} {each.seconds:6.1f} s  {each.name}", flush=True)
    if not console.is_terminal:
        console.print(table)
    return done


if __name__ == "__main__":
    sys.exit(main())
