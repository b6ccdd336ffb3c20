"""A heat map of layer x position, as text with shades, as SVG and as HTML; beside each other for several kinds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np

from ops import OpError

Matrices = Mapping[str, np.ndarray]  # [layers, positions] by kind

_FONT = "ui-monospace,Menlo,Consolas,'DejaVu Sans Mono',monospace"
_RED, _BLUE = "rgb(226,61,61)", "rgb(47,111,237)"
_ROW, _WIDE, _NARROW = 20, 36, 14  # pixels; cells of more than 12 layers are narrow and bear no numbers
_GAP, _TOP, _CHARACTER = 22, 44, 7.3
_SHADES = " ░▒▓█"
_PLAIN = 0.05  # below it in magnitude a cell counts as nothing


def text(matrices: Matrices, labels: Sequence[str], caption: str) -> str:
    """A line a token, a column a layer: the darker, the nearer to 1; `-` is below zero. Then each kind's largest."""
    left = max(map(len, labels)) + 5
    each = 2 if sum(len(matrix) for matrix in matrices.values()) <= 48 else 1
    widths = {kind: max(each * len(matrix), len(kind)) for kind, matrix in matrices.items()}
    lines = [caption, " " * left + "  ".join(kind.ljust(widths[kind]) for kind in matrices)]
    lines.append(" " * left + "  ".join(_numbers(len(m), each).ljust(widths[k]) for k, m in matrices.items()))
    for position, name in enumerate(labels):
        shades = ("".join(_shade(value) * each for value in matrix[:, position]) for matrix in matrices.values())
        cells = "  ".join(shade.ljust(widths[kind]) for kind, shade in zip(matrices, shades, strict=True))
        lines.append(f"{position:3} {name:{left - 4}}{cells}".rstrip())
    for kind, matrix in matrices.items():
        layer, position = map(int, np.unravel_index(int(np.nan_to_num(matrix, nan=-np.inf).argmax()), matrix.shape))
        most = f"most at layer {layer}, position {position} {labels[position]}: {matrix[layer, position]:.2f}"
        lines.append(f"{kind}: {most}")
    return "\n".join(lines)


def _numbers(layers: int, each: int) -> str:
    """The last digit of each layer's number, over its column."""
    return "".join(str(layer % 10).ljust(each) for layer in range(layers))


def _shade(value: float) -> str:
    if np.isnan(value):
        return "?"
    if value < -_PLAIN:
        return "-"
    return "·" if value < _PLAIN else _SHADES[min(int(min(value, 1.0) * 4) + 1, 4)]


def svg(matrices: Matrices, labels: Sequence[str], caption: str, style: str = "") -> str:
    """The picture: red towards 1, blue below 0; lines and letters in the colour of the text around it."""
    most = max(len(matrix) for matrix in matrices.values())
    side = _WIDE if most <= 12 else _NARROW
    left = int((max(map(len, labels)) + 4) * _CHARACTER) + 12
    parts = [_row_label(left, position, name) for position, name in enumerate(labels)]
    parts.append(_label(left - 8, _TOP - 8, "layer", anchor="end", size=11, faint=True))
    at = left
    for kind, matrix in matrices.items():
        parts.append(_panel(kind, matrix, labels, at, side))
        at += max(side * len(matrix), int(len(kind) * _CHARACTER)) + _GAP
    width = max(at - _GAP + 8, int(len(caption) * _CHARACTER * 11 / 12) + 8)
    height = _TOP + _ROW * len(labels) + 30
    parts.append(_label(2, height - 8, caption, size=11, faint=True))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" fill="currentColor" font-family="{_FONT}" font-size="12" style="{style}">'
        f"<title>effect by layer and position</title>{''.join(parts)}</svg>"
    )


def _panel(kind: str, matrix: np.ndarray, labels: Sequence[str], at: int, side: int) -> str:
    """One kind: its name, the layers' numbers, a cell for each layer and position."""
    every = 1 if side == _WIDE else 4
    parts = [_label(at, 14, kind, weight=600)]
    for layer in range(0, len(matrix), every):
        parts.append(_label(at + side * (layer + 0.5), _TOP - 8, str(layer), anchor="middle", size=11, faint=True))
    for (layer, position), value in np.ndenumerate(matrix):
        if not np.isnan(value):
            where = f"{kind}, layer {layer}, position {position} {labels[position]}: {value:.3f}"
            parts.append(_cell(at + side * layer, _TOP + _ROW * position, side, float(value), where))
    return "".join(parts)


def _cell(x: int, y: int, side: int, value: float, where: str) -> str:
    depth = min(abs(value), 1.0)
    box = (
        f'<rect x="{x}" y="{y}" width="{side}" height="{_ROW}" fill="{_RED if value > 0 else _BLUE}" '
        f'fill-opacity="{depth:.2f}" stroke="currentColor" stroke-opacity=".2"/>'
    )
    number = ""
    if side == _WIDE and depth >= _PLAIN:
        colour = ' fill="#fff"' if depth > 0.6 else ""
        number = f'<text x="{x + side / 2}" y="{y + 14}" text-anchor="middle" font-size="11"{colour}>{value:.2f}</text>'
    return f"<g><title>{escape(where)}</title>{box}{number}</g>"


def _row_label(left: int, position: int, name: str) -> str:
    y = _TOP + _ROW * position + 14
    return _label(2, y, str(position), size=11, faint=True) + _label(left - 8, y, name, anchor="end")


def _label(
    x: float, y: float, words: str, anchor: str = "start", size: int = 12, weight: int = 400, faint: bool = False
) -> str:
    opacity = ' fill-opacity=".72"' if faint else ""
    return (
        f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-size="{size}" font-weight="{weight}"{opacity}>'
        f"{escape(words)}</text>"
    )


def html(matrices: Matrices, labels: Sequence[str], caption: str) -> str:
    """The picture for a notebook, in the colours of the page around it."""
    picture = svg(matrices, labels, caption, style="color:inherit;display:block")
    return f'<div style="color:inherit;overflow-x:auto">{picture}</div>'


def write(path: Path, matrices: Matrices, labels: Sequence[str], caption: str) -> None:
    """The picture as a file of its own, .svg or .html, dark on white."""
    picture = svg(matrices, labels, caption, style="color:#1f2328;background:#fff")
    if path.suffix == ".html":
        picture = f'<!doctype html><meta charset="utf-8"><title>effects</title><body>{picture}'
    elif path.suffix != ".svg":
        raise OpError(f"{path} ends neither in .svg nor in .html")
    path.write_text(picture, "utf-8")
