"""The roofline plot (Williams, Waterman and Patterson 2009) as SVG, in the colours of the page around it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from .profiler import Row

_WIDTH, _HEIGHT = 640, 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 90, 16, 44
_LINE, _CHARACTER = 13, 6.7  # height of a line and width of a character


def plot(rows: Sequence[Row], bandwidth: float, peak: float) -> str:
    """Each row a circle, its area the share of the time; rows without flops have no place and are named below."""
    placed = sorted((row for row in rows if row.flops and row.bytes and row.seconds), key=lambda row: -row.seconds)
    ridge = peak / bandwidth
    x = _Axis([row.flops / row.bytes for row in placed] + [ridge / 8, ridge * 4], _LEFT, _WIDTH - _RIGHT)
    y = _Axis([row.flops / row.seconds for row in placed] + [peak / 30, peak], _HEIGHT - _BOTTOM, _TOP)
    total = sum(row.seconds for row in rows) or 1.0
    circles = [
        _Circle(row, x(row.flops / row.bytes), y(row.flops / row.seconds), 3 + 14 * math.sqrt(row.seconds / total))
        for row in placed
    ]
    boxes = [circle.box for circle in circles]
    parts = [*_frame(x, y), *_roofs(x, y, bandwidth, peak), *(circle.drawn() for circle in circles)]
    parts += [circle.named(boxes) for circle in circles]
    others = ", ".join(row.name for row in rows if row not in placed)
    below = f"<div class='note'>without operations: {escape(others)}</div>" if others else ""
    style = "font-size:11px;max-width:100%;height:auto;display:block"
    return (
        f"<svg viewBox='0 0 {_WIDTH} {_HEIGHT}' width='{_WIDTH}' height='{_HEIGHT}' role='img' style='{style}' "
        f"xmlns='http://www.w3.org/2000/svg' fill='currentColor' aria-label='roofline'>{''.join(parts)}</svg>{below}"
    )


Box = tuple[float, float, float, float]  # left, right, top, bottom


class _Circle(NamedTuple):
    """Where a row is on the plot, in pixels."""

    row: Row
    x: float
    y: float
    radius: float

    @property
    def box(self) -> Box:
        return self.x - self.radius, self.x + self.radius, self.y - self.radius, self.y + self.radius

    def drawn(self) -> str:
        row = self.row
        title = (
            f"{row.name}: {row.calls} calls, {row.seconds * 1e6:.4g} us, "
            f"{row.percent_of_bandwidth:.3g} % of bandwidth, {row.percent_of_peak:.3g} % of peak"
        )
        place = f"cx='{self.x:.1f}' cy='{self.y:.1f}' r='{self.radius:.1f}'"
        return f"<circle {place} fill='#2f6fed' fill-opacity='.55'><title>{escape(title)}</title></circle>"

    def named(self, taken: list[Box]) -> str:
        """Its name beside it, or as far below as there is nothing else; the place is taken then."""
        left, at = self.x + self.radius + 4, self.y + 4
        right = left + _CHARACTER * len(self.row.name)
        while any(left < b[1] and b[0] < right and at - _LINE + 2 < b[3] and b[2] < at + 2 for b in taken):
            at += 2
        taken.append((left, right, at - _LINE + 2, at + 2))
        return _text(left, at, self.row.name, "start")


class _Axis:
    """A logarithmic axis over the values and some room, from pixel `start` to pixel `stop`."""

    def __init__(self, values: Sequence[float], start: float, stop: float):
        self.low, self.high = math.log10(min(values)) - 0.3, math.log10(max(values)) + 0.3
        self.start, self.stop = start, stop

    def __call__(self, value: float) -> float:
        return self.start + (math.log10(value) - self.low) / (self.high - self.low) * (self.stop - self.start)

    @property
    def ticks(self) -> list[float]:
        return [10.0**power for power in range(math.ceil(self.low), math.floor(self.high) + 1)]


def _frame(x: _Axis, y: _Axis) -> list[str]:
    """Lines at the decades, their numbers, and what the axes are."""
    parts = []
    for tick in x.ticks:
        parts.append(_line(x(tick), y.start, x(tick), y.stop, "stroke-opacity='.18'"))
        parts.append(_text(x(tick), y.start + 15, f"{tick:g}", "middle"))
    for tick in y.ticks:
        parts.append(_line(x.start, y(tick), x.stop, y(tick), "stroke-opacity='.18'"))
        parts.append(_text(x.start - 6, y(tick) + 4, f"{tick / 1e9:g}", "end"))
    turn = f"transform='rotate(-90 14 {(y.start + y.stop) / 2:.1f})'"
    parts.append(_text((x.start + x.stop) / 2, _HEIGHT - 8, "flops a byte", "middle"))
    parts.append(_text(14, (y.start + y.stop) / 2, "GFLOP/s", "middle", turn))
    return parts


def _roofs(x: _Axis, y: _Axis, bandwidth: float, peak: float) -> list[str]:
    ridge = peak / bandwidth
    left = max(10**x.low, 10**y.low / bandwidth)
    start, middle, end = (x(left), y(left * bandwidth)), math.sqrt(left * ridge), (x(ridge), y(peak))
    angle = math.degrees(math.atan2(end[1] - start[1], end[0] - start[0]))
    at = x(middle), y(middle * bandwidth) - 7
    turn = f"transform='rotate({angle:.1f} {at[0]:.1f} {at[1]:.1f})'"
    return [
        _line(*start, *end, "stroke-width='1.6'"),
        _line(*end, x.stop, y(peak), "stroke-width='1.6'"),
        _text(x.stop, y(peak) - 6, f"peak {peak / 1e9:.4g} GFLOP/s", "end"),
        _text(*at, f"memory {bandwidth / 1e9:.3g} GB/s", "middle", turn),
    ]


def _line(x1: float, y1: float, x2: float, y2: float, more: str) -> str:
    return f"<line x1='{x1:.1f}' y1='{y1:.1f}' x2='{x2:.1f}' y2='{y2:.1f}' stroke='currentColor' {more}/>"


def _text(x: float, y: float, text: str, anchor: str, more: str = "") -> str:
    return f"<text x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}' {more}>{escape(text)}</text>"
