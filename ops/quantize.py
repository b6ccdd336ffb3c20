"""Weight formats: how a packed weight is described, packed, unpacked, and what a kernel does with its activations.

A format is data: kernels are generated from its description (`ops.schedule.quantized`), and so is what stands here.
A packed weight is one tensor whose dtype is the format's name. In memory it is a row of records, one for `rows` weight
rows and a group of inputs: the codes of the group, then `rows` scales, then `rows` minima where the format has them.
Four neighbouring inputs of a weight row lie in one 32-bit word, as dot-product instructions take them, and the words of
the rows of a record side by side, as a vector register takes them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from . import target
from .errors import DTypeError, ShapeError

TINIEST = 2.0**-100  # groups of activations that stay below it count as zero: their inverse would overflow
_WORD = 4  # codes that a dot-product instruction takes for one row


class Plane(NamedTuple):
    """Some bits of all codes of a group, side by side: `bits` of each, which count 2**shift, `parts` codes to a byte.

    The codes of a byte are a word apart: a part is a vector by one shift and one mask.
    """

    bits: int
    shift: int

    @property
    def parts(self) -> int:
        return 8 // self.bits


@dataclass(frozen=True)
class Format:
    """value = scale * (code - offset), or scale * levels[code]; plus the group's minimum where there is one.

    A group is `group` neighbouring inputs of one weight row, which share a scale of dtype `scale`. Codes take `bits`
    bits (2, 4 or 8; 6 lie as 4 and 2), and all that they stand for fits a signed byte. Where `shared` groups of a row
    have a factor in common, float16, their scales and minima are integers times it: `scale` and float16 multiplied in
    float32.

    Formats of other runtimes are descriptions too, their values kept exactly: larger groups (AWQ, GPTQ: 128) repeat
    their scale, powers of two (MXFP4) become float32.
    """

    name: str
    bits: int
    group: int = 32
    offset: int = 0
    levels: tuple[int, ...] | None = None
    scale: str = "float16"
    minimum: bool = False
    shared: int = 1

    def __post_init__(self):
        fits = self.bits in (2, 4, 6, 8) and not any(self.group % (_WORD * plane.parts) for plane in self.planes)
        if not fits or self.group > 32:
            raise DTypeError(
                f"format {self.name}: bits is {self.bits} and group {self.group}; expected 2, 4 or 8 bits, or 6, and a "
                f"multiple of {_WORD * 8 // max(self.bits, 1)}, at most 32"
            )
        if (self.shared > 1) != (np.dtype(self.scale).kind in "iu"):
            raise DTypeError(f"format {self.name}: scales are {self.scale}, and {self.shared} groups share a factor")
        if self.levels is not None and (self.bits > 4 or len(self.levels) != 2**self.bits):
            raise DTypeError(f"format {self.name} has {len(self.levels)} levels; expected one a code, of 2 or 4 bits")
        if self.values.min() < -128 or self.values.max() > 127:
            low, high = self.values.min(), self.values.max()
            raise DTypeError(f"format {self.name}: codes stand for {low} to {high}, expected -128 to 127")

    @property
    def planes(self) -> tuple[Plane, ...]:
        """Where the bits of a code lie."""
        return (Plane(4, 0), Plane(2, 4)) if self.bits == 6 else (Plane(self.bits, 0),)

    @property
    def parts(self) -> int:
        """How many codes share a byte of the first plane."""
        return self.planes[0].parts

    @property
    def values(self) -> np.ndarray:
        """What each code stands for, without its scale: int32 [2**bits]."""
        codes = np.arange(2**self.bits, dtype="int32")
        return codes - self.offset if self.levels is None else np.asarray(self.levels, "int32")

    def codes(self, rows: int) -> int:
        """Bytes of the codes of a record of `rows` rows."""
        return rows * self.group * self.bits // 8

    def record(self, rows: int) -> int:
        """Bytes of a record of `rows` rows."""
        return self.codes(rows) + rows * np.dtype(self.scale).itemsize * (1 + self.minimum)

    def factors(self, rows: int) -> int:
        """Bytes of the factors that stand before the records which share them: float16 [rows], twice with minima."""
        return 2 * rows * (1 + self.minimum) if self.shared > 1 else 0

    def block(self, groups: int, rows: int) -> int:
        """Bytes of a block of `rows` rows of `groups` groups."""
        return groups * self.record(rows) + -(-groups // self.shared) * self.factors(rows)

    def start(self, group: Any, rows: int) -> Any:
        """Where in its block the record of a group begins: for an int or an expression."""
        records = group * self.record(rows)
        return records if self.shared == 1 else records + (group // self.shared + 1) * self.factors(rows)

    def factor(self, group: Any, rows: int) -> Any:
        """Where in its block the factors of a group begin."""
        return group // self.shared * (self.shared * self.record(rows) + self.factors(rows))

    def records(self, shape: tuple[int, ...], rows: int) -> tuple[int, int]:
        """How many blocks of rows, and how many groups a row has; the last of each may be filled in part."""
        return -(-shape[0] // rows), -(-shape[1] // self.group)

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a packed weight [rows, inputs] on this machine."""
        rows = target.lanes()
        blocks, groups = self.records(shape, rows)
        return blocks * self.block(groups, rows)


# What is made from floats.
FORMATS: dict[str, Format] = {
    "q4": Format("q4", bits=4, offset=8),
    "q8": Format("q8", bits=8, offset=128),
}
# What may be held: those, and what is only taken over as it was made elsewhere: GGUF's Q4_K, Q6_K and MXFP4.
KNOWN: dict[str, Format] = {
    **FORMATS,
    "q4k": Format("q4k", bits=4, scale="uint8", minimum=True, shared=8),
    "q6k": Format("q6k", bits=6, group=16, offset=32, scale="int8", shared=16),
    "mxfp4": Format("mxfp4", bits=4, levels=(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12), scale="float32"),
}


class Groups(NamedTuple):
    """Rows of a packed weight: codes uint8 [rows, groups, group]; scales and minima [rows, groups] as they are stored.

    `factors`, where groups share them: float16 [rows, factors of a row] of the scales, then of the minima.
    """

    codes: np.ndarray
    scales: np.ndarray
    minima: np.ndarray | None = None
    factors: tuple[np.ndarray, ...] = ()


class Values(np.ndarray):
    """The values of a packed weight, float32, exactly as the kernels take them; `format` says how they are held."""

    format: Format | None

    def __array_finalize__(self, source: Any) -> None:
        self.format = getattr(source, "format", None)


def pack(weight: np.ndarray, form: Format | str, out: np.ndarray | None = None) -> np.ndarray:
    """Quantise a float weight [rows, inputs] and pack it for this machine: uint8 [form.nbytes(shape)], or into `out`.

    The scale of a group is the one that its value of largest magnitude asks for, rounded to the format's scale; every
    value takes the nearest code. Raises DTypeError for values that the format's scale cannot hold.
    """
    form = KNOWN[form] if isinstance(form, str) else form
    if weight.ndim != 2:
        raise ShapeError(f"a packed weight is [rows, inputs]; given the shape {list(weight.shape)}")
    if form.shared > 1 or (form is KNOWN.get(form.name) and form.name not in FORMATS):
        raise DTypeError(f"{form.name} is not made from floats, only taken over from a file: use {', '.join(FORMATS)}")
    groups = form.records(weight.shape, target.lanes())[1]

    def quantized(start: int, stop: int) -> Groups:
        given = weight[start:stop]
        piece = np.zeros((len(given), groups * form.group), "float32")
        piece[:, : given.shape[1]] = given
        return Groups(*quantize(piece.reshape(-1, groups, form.group), form))

    return assemble(weight.shape, form, quantized, out)


def assemble(
    shape: tuple[int, ...],
    form: Format | str,
    rows: Callable[[int, int], Groups],
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Lay out a packed weight [rows, inputs] whose codes are known: uint8 [form.nbytes(shape)], or into `out`.

    `rows(start, stop)` gives those rows.
    """
    form = KNOWN[form] if isinstance(form, str) else form
    lanes, (blocks, groups) = target.lanes(), form.records(shape, target.lanes())
    out = np.empty(form.nbytes(shape), "uint8") if out is None else out
    into = out.reshape(blocks, -1)
    step = max(1, 2**21 // (groups * form.group * lanes))  # copies of some MiB at a time
    for start in range(0, blocks, step):
        stop = min(start + step, blocks)
        taken = rows(start * lanes, min(stop * lanes, shape[0]))
        lay_out(form, taken.codes, taken.scales, taken.minima, into[start:stop], taken.factors)
    return out


def quantize(weight: np.ndarray, form: Format) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Codes uint8 [rows, groups, group], scales and minima [rows, groups] of a float32 weight [rows, groups, group]."""
    with np.errstate(over="ignore"):  # it is refused below
        minima, scales = _scales(weight, form)
    if not np.isfinite(scales).all() or not (minima is None or np.isfinite(minima).all()):
        largest = np.abs(weight).max()
        raise DTypeError(f"a weight of magnitude {largest:.4g} does not fit the {form.scale} scales of {form.name}")
    if minima is not None:
        weight = weight - minima.astype("float32")[..., None]
    wide = scales.astype("float32")
    inverse = np.divide(1, wide, out=np.zeros_like(wide), where=wide != 0)
    return _nearest(weight * inverse[..., None], form), scales, minima


def _scales(weight: np.ndarray, form: Format) -> tuple[np.ndarray | None, np.ndarray]:
    """Minima, where the format has them, and scales."""
    if form.minimum:
        low, high = np.minimum(weight.min(-1), 0), weight.max(-1)
        return low.astype(form.scale), ((high - low) / float(np.ptp(form.values))).astype(form.scale)
    largest = np.take_along_axis(weight, np.abs(weight).argmax(-1)[..., None], -1)[..., 0]
    return None, (largest / form.values[np.abs(form.values).argmax()]).astype(form.scale)


def _nearest(scaled: np.ndarray, form: Format) -> np.ndarray:
    if form.levels is None:
        return np.clip(np.rint(scaled) + form.offset, 0, 2**form.bits - 1).astype("uint8")
    order = np.argsort(form.values)
    levels = form.values[order]
    return order[np.searchsorted((levels[1:] + levels[:-1]) / 2, scaled)].astype("uint8")


def lay_out(
    form: Format,
    codes: np.ndarray,
    scales: np.ndarray,
    minima: np.ndarray | None,
    out: np.ndarray,
    factors: tuple[np.ndarray, ...] = (),
) -> None:
    """Put rows, as `Groups` has them, into the blocks `out` uint8 [blocks, bytes]; the last may be filled in part."""
    blocks, groups, rows = len(out), codes.shape[1], target.lanes()
    codes, scales, minima = (_filled(each, blocks * rows) for each in (codes, scales, minima))
    out = out.reshape(blocks, form.block(groups, rows))
    # [block, row, group, word, byte] to [block, group, word, row, byte]
    pieces = [
        _plane(codes, plane)
        .reshape(blocks, rows, groups, -1, _WORD)
        .transpose(0, 2, 3, 1, 4)
        .reshape(blocks, groups, -1)
        for plane in form.planes
    ]
    for values in (scales, minima):
        if values is not None:
            pieces.append(np.ascontiguousarray(values.reshape(blocks, rows, groups).transpose(0, 2, 1)).view("uint8"))
    records = np.concatenate(pieces, -1)
    if form.shared == 1:
        out.reshape(records.shape)[...] = records
        return
    for group in range(groups):
        start = form.start(group, rows)
        out[:, start : start + form.record(rows)] = records[:, group]
    for which, values in enumerate(_filled(each, blocks * rows) for each in factors):
        raw = np.ascontiguousarray(values.reshape(blocks, rows, -1).transpose(0, 2, 1)).view("uint8")
        for i in range(raw.shape[1]):
            start = form.factor(i * form.shared, rows) + which * 2 * rows
            out[:, start : start + 2 * rows] = raw[:, i]


def _plane(codes: np.ndarray, plane: Plane) -> np.ndarray:
    """The bytes of a plane [..., group / parts] of codes [..., group]."""
    bits = (codes >> plane.shift) & (2**plane.bits - 1)
    parts = bits.reshape(*codes.shape[:-1], -1, plane.parts, _WORD)
    packed = parts[..., 0, :]
    for part in range(1, plane.parts):
        packed = packed | (parts[..., part, :] << (part * plane.bits))
    return packed.reshape(*codes.shape[:-1], -1)


def _filled(values: Any, rows: int) -> Any:
    """With rows of zeros at the end, so that there are `rows`."""
    if values is None or len(values) == rows:
        return values
    return np.concatenate((values, np.zeros((rows - len(values), *values.shape[1:]), values.dtype)))


def take_apart(
    packed: np.ndarray, shape: tuple[int, ...], form: Format
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """The inverse of `lay_out`, without fill: codes uint8 [rows, groups, group], scales and minima [rows, groups].

    Where scales share a factor it is multiplied in: they are float32.
    """
    lanes = target.lanes()
    blocks, groups = form.records(shape, lanes)
    data = packed.reshape(blocks, form.block(groups, lanes))
    starts = [form.start(group, lanes) for group in range(groups)]
    if form.shared == 1:
        records = data.reshape(blocks, groups, form.record(lanes))
    else:
        records = np.stack([data[:, start : start + form.record(lanes)] for start in starts], 1)
    codes, at = np.zeros((blocks, lanes, groups, form.group), "uint8"), 0
    for plane in form.planes:
        size = lanes * form.group // plane.parts
        words = records[..., at : at + size].reshape(blocks, groups, -1, lanes, _WORD)
        parts = [(words >> (part * plane.bits)) & (2**plane.bits - 1) for part in range(plane.parts)]
        # [block, group, word, part, row, byte] to [block, row, group, word, part, byte]
        codes |= np.stack(parts, 3).transpose(0, 4, 1, 2, 3, 5).reshape(codes.shape) << plane.shift
        at += size

    def per_group(which: int) -> np.ndarray:
        size = lanes * np.dtype(form.scale).itemsize
        raw = np.ascontiguousarray(records[..., at + which * size : at + (which + 1) * size]).view(form.scale)
        if form.shared > 1:
            first = [form.factor(group, lanes) + which * 2 * lanes for group in range(groups)]
            factors = np.stack([data[:, start : start + 2 * lanes] for start in first], 1).view("float16")
            raw = factors.astype("float32") * raw.astype("float32")
        return raw.transpose(0, 2, 1).reshape(blocks * lanes, groups)[: shape[0]]

    codes = codes.reshape(blocks * lanes, groups, form.group)[: shape[0]]
    return codes, per_group(0), per_group(1) if form.minimum else None


def unpack(packed: np.ndarray, shape: tuple[int, ...], form: Format | str) -> Values:
    """The values of a packed weight, float32 [rows, inputs]: exact where there is no minimum."""
    form = KNOWN[form] if isinstance(form, str) else form
    codes, scales, minima = take_apart(packed, shape, form)
    values = form.values.astype("float32")[codes] * scales.astype("float32")[..., None]
    if minima is not None:
        values = values + minima.astype("float32")[..., None]
    result = np.ascontiguousarray(values.reshape(shape[0], -1)[:, : shape[1]]).view(Values)
    result.format = form
    return result


def unpack_some(packed: np.ndarray, shape: tuple[int, ...], form: Format, blocks: int) -> Values:
    """The values of `blocks` blocks of rows, spread evenly from the first to the last, at least two of them."""
    rows, count = target.lanes(), form.records(shape, target.lanes())[0]
    chosen = np.unique(np.linspace(0, count - 1, blocks).astype("int64"))
    records = packed.reshape(count, -1)[chosen]
    return unpack(records, ((len(chosen) - 1) * rows + (shape[0] - 1) % rows + 1, shape[1]), form)


def round_activations(x: np.ndarray, form: Format) -> np.ndarray:
    """Activations [n, inputs] as a kernel for packed weights takes them, float64: int8 times a float32 scale a group.

    The scale is the group's largest magnitude / 127; a group that holds a NaN or an infinity is NaN as a whole.
    """
    codes, scales = quantize_activations(x, form.group)
    return (codes.astype("float64") * scales.astype("float64")[..., None]).reshape(len(x), -1)[:, : x.shape[1]]


def quantize_activations(x: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray]:
    """int8 [n, groups, group] and scales float32 [n, groups] of activations [n, inputs], the last group filled up."""
    n, inputs = x.shape
    groups = -(-inputs // group)
    filled = np.zeros((n, groups * group), "float32")
    filled[:, :inputs] = x
    filled = filled.reshape(n, groups, group)
    largest = np.abs(filled).max(-1)  # NaN where one is
    finite = np.isfinite(largest)
    used = finite & (largest >= TINIEST)
    one = np.where(used, largest, np.float32(1))
    scales = np.where(finite, np.where(used, one * np.float32(1 / 127), np.float32(0)), np.float32(np.nan))
    inverse = (np.float32(127) / one).astype("float64")
    return np.rint(np.where(used[..., None], filled, 0) * inverse[..., None]).astype("int8"), scales
