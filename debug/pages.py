"""HTML that needs nothing else, for a notebook and as a page: readable on light and dark, everything escaped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np

_COLUMNS = 160  # of a heat map: more positions share one, which shows the largest
_FLOOR, _CEILING = 1e-7, 1.0  # errors between which colours run, by their logarithm
_CELL = 14  # pixels
_FONT = "font-family:ui-monospace,Menlo,Consolas,'DejaVu Sans Mono',monospace;font-size:13px;line-height:1.5"
_RED, _YELLOW, _GREEN = "#e23d3d", "#c98500", "#2f9e58"
_COLOURS = {"introduced": _RED, "wrong": _RED, "inherited": _YELLOW, "agrees": _GREEN, "clean": _GREEN}

_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ background: #ffffff; color: #1b1f24; max-width: 1100px; margin: 24px auto; padding: 0 16px; {font}; }}
@media (prefers-color-scheme: dark) {{ body {{ background: #14171c; color: #e4e7eb; }} }}
h1 {{ font-size: 18px; font-weight: 600; }}
</style>
<h1>{title}</h1>
{body}
</html>
"""


def page(title: str, body: str) -> str:
    """A whole page; `body` is HTML."""
    return _PAGE.format(title=escape(title), body=body, font=_FONT)


def save(path: Path, title: str, body: str) -> Path:
    """Write a page into a file."""
    path.write_text(page(title, body), "utf-8")
    return path


def box(content: str) -> str:
    """A piece of HTML in our font and the colour of what is around it."""
    return f'<div style="{_FONT};color:inherit">{content}</div>'


def sentence(text: str, status: str = "") -> str:
    """A line of text, with a coloured edge where it has a status."""
    edge = f"border-left:4px solid {_COLOURS[status]};padding-left:8px;" if status else ""
    return f"<p style='{edge}margin:8px 0'>{escape(text)}</p>"


def folded(title: str, content: str, opened: bool) -> str:
    """HTML under a title that opens and closes it."""
    return (
        f"<details{' open' if opened else ''} style='margin:10px 0'><summary style='cursor:pointer'>{escape(title)}"
        f"</summary><div style='overflow-x:auto'>{content}</div></details>"
    )


def table(rows: Sequence[dict[str, str]], status: str = "") -> str:
    """A table of texts; the words of the column `status` have colours."""
    if not rows:
        return sentence("nothing")
    cell = "padding:1px 16px 1px 0;text-align:left;white-space:nowrap;background:none;border:none;color:inherit"
    head = "".join(f"<th style='{cell};opacity:.65;font-weight:600'>{escape(name)}</th>" for name in rows[0])
    lines = []
    for row in rows:
        cells = []
        for name, value in row.items():
            colour = _COLOURS.get(value) if name == status else None
            mark = f"<span style='color:{colour}' aria-hidden=true>\N{BLACK CIRCLE} </span>" if colour else ""
            cells.append(f"<td style='{cell};font-variant-numeric:tabular-nums'>{mark}{escape(value)}</td>")
        lines.append(f"<tr style='background:none'>{''.join(cells)}</tr>")
    look = "border-collapse:collapse;border:none;margin:4px 0;font-size:12px;color:inherit"
    return f"<table style='{look}'><tr style='background:none'>{head}</tr>{''.join(lines)}</table>"


def heat_map(names: Sequence[str], errors: np.ndarray, title: str, axis: str) -> str:
    """Errors [names, positions] as a picture, by their logarithm: nothing at 1e-7 and below, red at 1 and above."""
    if not errors.size:
        return sentence(f"{title}: nothing to show")
    count, step = errors.shape[1], math.ceil(errors.shape[1] / _COLUMNS)
    left = 8 * max(map(len, names)) + 12
    cells = []
    for row, name in enumerate(names):
        top = 20 + row * _CELL
        cells.append(f"<text x='{left - 8}' y='{top + 11}' text-anchor='end' fill='currentColor'>{escape(name)}</text>")
        for column, start in enumerate(range(0, count, step)):
            part = errors[row, start : start + step]
            worst = np.inf if np.isnan(part).any() else float(part.max())
            where = f"{start}" if step == 1 else f"{start}-{min(start + step, count) - 1}"
            cells.append(
                f"<rect x='{left + column * _CELL}' y='{top}' width='{_CELL - 1}' height='{_CELL - 1}' "
                f"fill='{_RED}' fill-opacity='{_opacity(worst):.3f}'>"
                f"<title>{escape(name)}, {escape(axis)} {where}: {worst:.2g}</title></rect>"
            )
    columns = -(-count // step)
    width, height = left + max(columns * _CELL, 8 * len(title)) + 8, 20 + len(names) * _CELL
    frame = (
        f"<rect x='{left - 1}' y='19' width='{columns * _CELL + 1}' height='{len(names) * _CELL + 1}' fill='none' "
        "stroke='currentColor' stroke-opacity='.35'/>"
    )
    ends = f"<text x='{left}' y='{height + 14}' fill='currentColor'>{escape(axis)} 0 to {count - 1}</text>"
    drawn = f"<text x='{left}' y='12' fill='currentColor'>{escape(title)}</text>{''.join(cells)}{frame}{ends}"
    return (
        f"<div style='overflow-x:auto'><svg width='{width}' height='{height + 24}' font-size='12' role='img' "
        f"aria-label='{escape(title)}' style='font-family:inherit;color:inherit'>{drawn}</svg></div>{_legend()}"
    )


def _opacity(error: float) -> float:
    if error <= _FLOOR:
        return 0.0
    reach = math.log10(min(error, _CEILING) / _FLOOR) / math.log10(_CEILING / _FLOOR)
    return 0.08 + 0.92 * reach


def _legend() -> str:
    parts = []
    for power in range(-7, 1):
        look = "display:inline-block;width:12px;height:12px;border:1px solid rgba(128,128,128,.5);margin:0 4px 0 12px"
        parts.append(f"<span style='{look};background:rgba(226,61,61,{_opacity(10.0**power):.3f})'></span>1e{power}")
    return f"<div style='font-size:11px;opacity:.8'>error relative to max|reference|{''.join(parts)}</div>"
