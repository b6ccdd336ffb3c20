"""How a tensor shows itself: as text at a prompt, as HTML in a notebook. Quick for tensors of any size."""

from __future__ import annotations

import base64
import struct
import zlib
from dataclasses import dataclass
from html import escape

import numpy as np

from . import quantize, target
from .quantize import KNOWN
from .spec import FLOATS
from .tensor import Tensor

_ALL = 2**20  # elements up to which statistics look at every one
_CHUNKS, _CHUNK = 1024, 256  # else at so many stretches of so many elements: few pages of a mapped file are touched
_EDGE = 3  # rows and columns shown at each end
_MAP_ROWS, _MAP_COLUMNS = 32, 64
_PER_CELL = 4  # sampled rows and columns in a cell of the map of a huge tensor
_MANY = 32  # values from which on there is a histogram
_BARS, _BAR, _HIGH = 48, 6, 72  # of the histogram: how many, how wide and how high in pixels
_OUTLIERS = 6


@dataclass(frozen=True)
class Statistics:
    """Over `seen` of a tensor's values; `least`, `mean`, `most`, `deviation` of the finite ones, None if none is."""

    seen: int
    nan: int
    inf: int
    least: float | None = None
    mean: float | None = None
    most: float | None = None
    deviation: float | None = None


def statistics(tensor: Tensor) -> Statistics:
    """Over all values, or over 262144 of them, spread evenly, when there are more than 1048576."""
    values = _sampled(_values(tensor))
    seen = values.size
    if values.dtype.kind in "iu":
        nan, inf, finite = 0, 0, values
    else:
        values = values.astype("float32", copy=False)
        nan, inf = int(np.isnan(values).sum()), int(np.isinf(values).sum())
        finite = values[np.isfinite(values)] if nan + inf else values
    if finite.size == 0:
        return Statistics(seen, nan, inf)
    mean, deviation = float(finite.mean(dtype="float64")), float(finite.std(dtype="float64"))
    return Statistics(seen, nan, inf, finite.min().item(), mean, finite.max().item(), deviation)


def _sampled(values: np.ndarray) -> np.ndarray:
    """All values, or stretches of them; flat."""
    values = values.reshape(-1)
    if values.size <= _ALL:
        return values
    return values[: values.size // _CHUNKS * _CHUNKS].reshape(_CHUNKS, -1)[:, :_CHUNK].reshape(-1)


def text(tensor: Tensor) -> str:
    """Dtype, shape and device; least, mean and greatest value, NaN and Inf when there are any; the corners."""
    lines = [_header(tensor)]
    if tensor.size == 0:
        return f"{lines[0]}, empty"
    found = statistics(tensor)
    if tensor.size > 1:
        lines.append("  ".join(f"{name} {value}" for name, value in _facts(tensor, found) if name != "std"))
    if tensor.ndim > 2:
        lines.append(f"{_place(tensor)}:")
    return "\n".join(lines + _corners(_matrix(tensor), tensor.ndim))


def _header(tensor: Tensor) -> str:
    return f"{tensor.dtype}[{', '.join(map(str, tensor.shape))}] on {tensor.device}"


def _facts(tensor: Tensor, found: Statistics) -> list[tuple[str, str]]:
    """Names and values to show."""
    named = {"min": found.least, "mean": found.mean, "max": found.most, "std": found.deviation}
    facts = [(name, _number(value)) for name, value in named.items() if value is not None]
    facts += [(name, str(count)) for name, count in (("NaN", found.nan), ("Inf", found.inf)) if count]
    if found.seen < tensor.size:
        facts.append(("of", f"{found.seen} sampled values"))
    return facts


def _number(value: float) -> str:
    if isinstance(value, int):
        return str(value)
    return f"{value:.4g}" if value else "0"  # without the sign of a zero


def _values(tensor: Tensor) -> np.ndarray:
    """All values; of a huge packed weight those of some rows, the first and the last among them."""
    form = tensor.spec.format
    if form is None or tensor.size <= _ALL:
        return np.asarray(tensor)
    blocks = max(2, _ALL // (tensor.shape[1] * target.lanes()))
    return np.asarray(quantize.unpack_some(np.from_dlpack(tensor.buffer.data), tensor.shape, form, blocks))


def _matrix(tensor: Tensor) -> np.ndarray:
    """The last two axes, at the start of the others."""
    array = _values(tensor)
    return array[(0,) * max(array.ndim - 2, 0)].reshape((1,) * max(2 - array.ndim, 0) + array.shape[-2:])


def _place(tensor: Tensor) -> str:
    return f"[{', '.join(['0'] * (tensor.ndim - 2) + [':', ':'])}]"


def _corners(matrix: np.ndarray, ndim: int) -> list[str]:
    """Lines with the ends of the first and the last rows, in columns."""
    rows, columns = (_ends(size) for size in matrix.shape)
    cells = [[("..." if None in (r, c) else _number(matrix[r, c].item())) for c in columns] for r in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
    lines = ["..." if r is None else line for r, line in zip(rows, lines, strict=True)]
    if ndim < 2:
        return [f"[{lines[0]}]" if ndim else lines[0]]
    opened = [("[[" if i == 0 else " [" if r is not None else " ") for i, r in enumerate(rows)]
    closed = [("]]" if i == len(rows) - 1 else "]" if r is not None else "") for i, r in enumerate(rows)]
    return [before + line + after for before, line, after in zip(opened, lines, closed, strict=True)]


def _ends(size: int) -> list[int | None]:
    """Indices of both ends; None stands for what is left out."""
    if size <= 2 * _EDGE + 1:
        return list(range(size))
    return [*range(_EDGE), None, *range(size - _EDGE, size)]


def html(tensor: Tensor) -> str:
    """A header, a table of statistics and a map of the values; readable on light and dark backgrounds."""
    header = f"<div style='font-weight:600;margin-bottom:6px'>{escape(_header(tensor))}{_bytes(tensor.nbytes)}</div>"
    if tensor.size == 0:
        return box(header + _small("empty"))
    if tensor.size == 1:
        return box(header + escape(_corners(_matrix(tensor), 0)[0]))
    found = statistics(tensor)
    parts = [_listed(_facts(tensor, found)), _map(tensor)]
    if found.seen >= _MANY and found.least is not None and tensor.dtype in (*FLOATS, *KNOWN):
        parts += [_histogram(tensor), _outliers(tensor, found)]
    row = "display:flex;flex-wrap:wrap;gap:8px 18px;align-items:flex-start"
    return box(f"{header}<div style='{row}'>{''.join(parts)}</div>")


def _listed(rows: list[tuple[str, str]], title: str = "") -> str:
    """A small table of names and values."""
    cell = "padding:1px 14px 1px 0;text-align:left;white-space:nowrap;background:none;border:none"
    body = "".join(
        f"<tr style='background:none'><td style='{cell};opacity:.72'>{escape(name)}</td>"
        f"<td style='{cell};font-variant-numeric:tabular-nums'>{escape(value)}</td></tr>"
        for name, value in rows
    )
    look = "border-collapse:collapse;border:none;margin:0;min-width:150px;width:auto;font-size:12px;color:inherit"
    return f"<div>{_small(title) if title else ''}<table style='{look}'>{body}</table></div>"


def _histogram(tensor: Tensor) -> str:
    """How often values are, a bar for each of 48 stretches, on a logarithmic scale."""
    values = _sampled(_values(tensor)).astype("float64")
    counts, edges = np.histogram(values[np.isfinite(values)], _BARS)
    heights = np.rint(np.log1p(counts) / np.log1p(counts.max()) * _HIGH).astype(int)
    bars = "".join(f"M{i * _BAR} {_HIGH}v-{h}h{_BAR - 1}v{h}z" for i, h in enumerate(heights.tolist()) if h)
    zero = -edges[0] / (edges[-1] - edges[0]) * _BARS * _BAR if edges[0] < 0 < edges[-1] else None
    line = "" if zero is None else f"<path d='M{zero:.1f} 0V{_HIGH}' stroke='currentColor' stroke-opacity='.6'/>"
    drawn = (
        f"<svg width='{_BARS * _BAR}' height='{_HIGH}' style='display:block;max-width:100%' role='img' "
        f"aria-label='histogram' fill='currentColor'><path d='{bars}' fill-opacity='.5'/>{line}</svg>"
    )
    return f"<div>{drawn}{_small(f'{_number(edges[0])} to {_number(edges[-1])}, log of counts')}</div>"


def _outliers(tensor: Tensor, found: Statistics) -> str:
    """The largest magnitudes and where they are; of a huge tensor among the values that were looked at."""
    if tensor.spec.format is not None and tensor.size > _ALL:
        return ""  # the rows that were looked at are not known by their numbers
    values = _sampled(_values(tensor)).astype("float64")
    size = np.where(np.isnan(values), np.inf, np.abs(values))
    largest = np.argpartition(-size, _OUTLIERS)[:_OUTLIERS]
    rows = []
    for at in largest[np.lexsort((largest, -size[largest]))].tolist():
        place = at if tensor.size <= _ALL else at // _CHUNK * (tensor.size // _CHUNKS) + at % _CHUNK
        index = ", ".join(str(int(i)) for i in np.unravel_index(place, tensor.shape))
        value, text = values[at].item(), _number(values[at].item())
        if np.isfinite(value) and found.mean is not None and found.deviation:
            text += f" ({(value - found.mean) / found.deviation:+.1f} std)"
        rows.append((f"[{index}]", text))
    return _listed(rows, "largest magnitudes" + (", of those sampled" if found.seen < tensor.size else ""))


def box(content: str) -> str:
    """A piece of a page: text in one width, in the colours of the page around it."""
    font = "font-family:ui-monospace,Menlo,Consolas,'DejaVu Sans Mono',monospace;font-size:13px;line-height:1.5"
    return f'<div style="{font};color:inherit">{content}</div>'


def _small(content: str) -> str:
    return f"<div style='font-size:11px;opacity:.72;margin-top:4px'>{escape(content)}</div>"


def _bytes(count: int) -> str:
    size, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB"):
        if size >= 1024:
            size, unit = size / 1024, larger
    return f"<span style='font-weight:400;opacity:.72'>, {size:.4g} {unit}</span>"


def _map(tensor: Tensor) -> str:
    """The last two axes as an image: blue below zero, red above, nothing at zero, yellow where it is not finite."""
    matrix = _matrix(tensor)
    cells = _cells(matrix)
    finite = np.abs(cells[np.isfinite(cells)])
    scale = float(finite.max()) if finite.size and finite.max() > 0 else 1.0
    colours = np.full(cells.shape, _NOT_FINITE, "uint8")
    colours[np.isfinite(cells)] = np.rint(cells[np.isfinite(cells)] / scale * 127 + 127)
    height, width = cells.shape
    side = max(8, min(20, 512 // width, 256 // height))
    frame = "border:1px solid rgba(128,128,128,.45);image-rendering:pixelated;display:block;margin:0;max-width:none"
    image = base64.b64encode(_png(colours)).decode()
    notes = [f"blue: -{_number(scale)}", f"red: +{_number(scale)}"] if finite.any() else []
    notes += ["yellow: NaN or Inf"] if finite.size < cells.size else []
    notes += ["a cell is the mean of a block"] if cells.shape != matrix.shape else []
    caption = (f"{_place(tensor)} " if tensor.ndim > 2 else "") + ", ".join(notes)
    source = f"src='data:image/png;base64,{image}' alt='map of the values' width={side * width} height={side * height}"
    return f"<div><img {source} style='{frame}'>{_small(caption)}</div>"


def _cells(matrix: np.ndarray) -> np.ndarray:
    """At most 32 x 64 means of blocks; a huge matrix is thinned out before."""
    for axis, most in ((0, _MAP_ROWS), (1, _MAP_COLUMNS)):
        size = matrix.shape[axis]
        if matrix.size > _ALL and size > most * _PER_CELL:
            matrix = np.take(matrix, np.linspace(0, size - 1, most * _PER_CELL).astype("int64"), axis)
    cells = matrix.astype("float64")
    for axis, most in ((0, _MAP_ROWS), (1, _MAP_COLUMNS)):
        count = min(cells.shape[axis], most)
        starts = np.arange(count) * cells.shape[axis] // count
        lengths = np.diff([*starts, cells.shape[axis]])
        with np.errstate(invalid="ignore"):  # infinities of both signs make a NaN, which is shown as such
            cells = np.add.reduceat(cells, starts, axis) / (lengths[:, None] if axis == 0 else lengths)
    return cells


_NOT_FINITE = 255
_BLUE, _RED, _YELLOW = (47, 111, 237), (226, 61, 61), (234, 179, 8)


def _png(indices: np.ndarray) -> bytes:
    """A PNG of palette indices: 0 to 126 blue, 127 transparent, 128 to 254 red, 255 yellow."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = indices.shape
    palette = bytes(_BLUE) * 127 + bytes(_RED) * 128 + bytes(_YELLOW)
    opacity = bytes(min(255, round(255 * (abs(i - 127) / 127) ** 0.8)) for i in range(255)) + b"\xff"
    lines = b"".join(b"\0" + row.tobytes() for row in indices)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0))
        + chunk(b"PLTE", palette)
        + chunk(b"tRNS", opacity)
        + chunk(b"IDAT", zlib.compress(lines, 9))
        + chunk(b"IEND", b"")
    )
