"""What counts as found: the first finding names the first wrong call, its line, and the weight when one is wrong."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .bug import ROOT, Bug, Place


@dataclass(frozen=True)
class Verdict:
    """Whether the bug was found; `wrong` is what the diagnosis says that is not so, `said` what it says."""

    wrong: tuple[str, ...]
    said: str = ""

    @property
    def found(self) -> bool:
        return not self.wrong


def judge(bug: Bug, diagnosis: Any) -> Verdict:
    """Against the truth: of the places that count, one must fit in address, op, path and line at a time."""
    if diagnosis.ok or not diagnosis.findings:
        return Verdict((f"nothing found; ok is {diagnosis.ok} with {len(diagnosis.findings)} findings",))
    culprit = diagnosis.findings[0]
    said = f"{culprit.address} at {culprit.source}" + (f", {culprit.parameter}" if culprit.parameter else "")
    wrong = min((_differences(culprit, each) for each in bug.places), key=len)
    return Verdict((*wrong, *_blame(bug, culprit.parameter)), said)


def _differences(culprit: Any, place: Place) -> tuple[str, ...]:
    file, line = place.source
    wanted = {"address": place.address, "op": place.op, "path": place.path, "source": f"{_shown(file)}:{line}"}
    given = {name: getattr(culprit, name) for name in wanted} | {"source": _resolved(culprit.source)}
    return tuple(f"{name} is {given[name]}, not {wanted[name]}" for name in wanted if given[name] != wanted[name])


def _blame(bug: Bug, parameter: str | None) -> tuple[str, ...]:
    """A wrong weight must be named, with or without the checkpoint's base prefix, and a right one must not."""
    name = None if parameter is None else parameter.removeprefix("model.")
    if name in (bug.parameters or (None,)):
        return ()
    return (f"parameter is {parameter}, not {' or '.join(bug.parameters) or None}",)


def _resolved(source: str | None) -> str:
    """`file:line` with the file as the house writes it, from wherever the tool took it to be relative to."""
    given = re.fullmatch(r"(.+):(\d+)", source or "")
    if not given:
        return str(source)
    path = Path(given[1])
    return f"{_shown(path.resolve() if path.resolve().exists() else (ROOT / path).resolve())}:{given[2]}"


def _shown(path: Path) -> str:
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)
