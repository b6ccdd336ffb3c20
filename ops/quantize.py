"""Weight formats: how a packed weight is described, packed, unpacked, and what a kernel does with its activations.

A format is data: kernels are generated from its description (`ops.schedule.quantized`), and so is what stands here.
A packed weight is one tensor whose dtype is the format's name. In memory it is a row of records, one for `rows` weight
rows and a group of inputs: the codes of the group, then `rows` scales, then `rows` minima where the format has them.
Four neighbouring inputs of a weight row lie in one 32-bit word, as dot-product instructions take them, and the words of
the rows of a record side by side, as a vector register takes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from . import target
from .errors import DTypeError, ShapeError

TINIEST = 2.0**-100  # groups of activations that stay below it count as zero: their inverse would overflow
_WORD = 4  # codes that a dot-product instruction takes for one row


@dataclass(frozen=True)
class Format:
    """value = scale * (code - offset), or scale * levels[code]; plus the group's minimum where there is one.

    A group is `group` neighbouring inputs of one weight row, which share a scale of dtype `scale`. Codes take `bits`
    bits (2, 4 or 8), and all that they stand for fits a signed byte.

    Formats of other runtimes are descriptions too, their values kept exactly: larger groups (AWQ, GPTQ: 128) repeat
    their scale, products of scales (Q4_K, Q6_K) and powers of two (MXFP4) become float32, codes of 6 bits take 8.
    """

    name: str
    bits: int
    group: int = 32
    offset: int = 0
    levels: tuple[int, ...] | None = None
    scale: str = "float16"
    minimum: bool = False

    def __post_init__(self):
        if self.bits not in (2, 4, 8) or self.group % (_WORD * self.parts) or self.group > 32:
            raise DTypeError(
                f"format {self.name}: bits is {self.bits} and group {self.group}; expected 2, 4 or 8 bits and a "
                f"multiple of {_WORD * 8 // max(self.bits, 1)}, at most 32"
            )
        if self.levels is not None and (self.bits == 8 or len(self.levels) != 2**self.bits):
            raise DTypeError(f"format {self.name} has {len(self.levels)} levels; expected one a code, of 2 or 4 bits")
        if self.values.min() < -128 or self.values.max() > 127:
            low, high = self.values.min(), self.values.max()
            raise DTypeError(f"format {self.name}: codes stand for {low} to {high}, expected -128 to 127")

    @property
    def parts(self) -> int:
        """How many codes share a byte. They are a word apart: a part is a vector by one shift and one mask."""
        return 8 // self.bits

    @property
    def values(self) -> np.ndarray:
        """What each code stands for, without its scale: int32 [2**bits]."""
        codes = np.arange(2**self.bits, dtype="int32")
        return codes - self.offset if self.levels is None else np.asarray(self.levels, "int32")

    def record(self, rows: int) -> int:
        """Bytes of a record of `rows` rows."""
        return rows * (self.group * self.bits // 8 + np.dtype(self.scale).itemsize * (1 + self.minimum))

    def records(self, shape: tuple[int, ...], rows: int) -> tuple[int, int]:
        """How many blocks of rows, and how many groups a row has; the last of each may be filled in part."""
        return -(-shape[0] // rows), -(-shape[1] // self.group)

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a packed weight [rows, inputs] on this machine."""
        rows = target.lanes()
        blocks, groups = self.records(shape, rows)
        return blocks * groups * self.record(rows)


FORMATS: dict[str, Format] = {
    "q4": Format("q4", bits=4, offset=8),
    "q8": Format("q8", bits=8, offset=128),
}


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
    form = FORMATS[form] if isinstance(form, str) else form
    if weight.ndim != 2:
        raise ShapeError(f"a packed weight is [rows, inputs]; given the shape {list(weight.shape)}")
    rows, (blocks, groups) = target.lanes(), form.records(weight.shape, target.lanes())
    out = np.empty(form.nbytes(weight.shape), "uint8") if out is None else out
    into = out.reshape(blocks, groups, form.record(rows))
    step = max(1, 2**21 // (groups * form.group * rows))  # float32 copies of some MiB at a time
    for start in range(0, blocks, step):
        stop = min(start + step, blocks)
        piece = np.zeros(((stop - start) * rows, groups * form.group), "float32")
        given = weight[start * rows : stop * rows]
        piece[: given.shape[0], : given.shape[1]] = given
        codes, scales, minima = quantize(piece.reshape(-1, groups, form.group), form)
        lay_out(form, codes, scales, minima, into[start:stop])
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


def lay_out(form: Format, codes: np.ndarray, scales: np.ndarray, minima: np.ndarray | None, out: np.ndarray) -> None:
    """Put codes [blocks * rows, groups, group] and their scales into the records `out` [blocks, groups, record]."""
    blocks, groups, rows = len(out), out.shape[1], target.lanes()
    # [block, row, group, word, part, byte] to [block, group, word, row, byte] with the parts side by side in a byte
    parts = codes.reshape(blocks, rows, groups, -1, form.parts, _WORD)
    packed = parts[..., 0, :]
    for part in range(1, form.parts):
        packed = packed | (parts[..., part, :] << (part * form.bits))
    size = rows * form.group * form.bits // 8
    out[..., :size] = packed.transpose(0, 2, 3, 1, 4).reshape(blocks, groups, size)
    for values in (scales, minima):
        if values is not None:
            raw = np.ascontiguousarray(values.reshape(blocks, rows, groups).transpose(0, 2, 1)).view("uint8")
            out[..., size : size + raw.shape[-1]] = raw
            size += raw.shape[-1]


def take_apart(
    packed: np.ndarray, shape: tuple[int, ...], form: Format
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """The inverse of `lay_out`: codes uint8 [rows, groups, group], scales and minima [rows, groups], without fill."""
    lanes = target.lanes()
    blocks, groups = form.records(shape, lanes)
    records = packed.reshape(blocks, groups, form.record(lanes))
    size = lanes * form.group * form.bits // 8
    words = records[..., :size].reshape(blocks, groups, -1, lanes, _WORD)
    mask = 2**form.bits - 1
    parts = np.stack([(words >> (part * form.bits)) & mask for part in range(form.parts)], axis=3)
    # [block, group, word, part, row, byte] to [block, row, group, word, part, byte]
    codes = parts.transpose(0, 4, 1, 2, 3, 5).reshape(blocks * lanes, groups, form.group)[: shape[0]]

    def per_group(start: int) -> np.ndarray:
        raw = np.ascontiguousarray(records[..., start : start + lanes * np.dtype(form.scale).itemsize])
        return raw.view(form.scale).transpose(0, 2, 1).reshape(blocks * lanes, groups)[: shape[0]]

    scales = per_group(size)
    minima = per_group(size + lanes * np.dtype(form.scale).itemsize) if form.minimum else None
    return codes, scales, minima


def unpack(packed: np.ndarray, shape: tuple[int, ...], form: Format | str) -> Values:
    """The values of a packed weight, float32 [rows, inputs]: exact where there is no minimum."""
    form = FORMATS[form] if isinstance(form, str) else form
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
