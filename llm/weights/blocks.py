"""Weights as GGUF holds them: blocks of codes and scales, unpacked by the library `gguf`, or repacked code by code."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from math import prod
from typing import Any

import gguf
import numpy as np

from llm.weights.lazy import Lazy
from ops import quantize, target
from ops.quantize import Groups

Kind = gguf.GGMLQuantizationType

_UNPACKED = """
Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K MXFP4 TQ1_0 TQ2_0
IQ4_NL IQ4_XS IQ3_XXS IQ3_S IQ2_XXS IQ2_XS IQ2_S IQ1_S IQ1_M
"""
# What the library unpacks; the other types are refused when the file is read.
QUANTIZED = frozenset(Kind[name] for name in _UNPACKED.split())
_PIECE = 1 << 20  # values that a thread unpacks at a time


class Blocks(Lazy):
    """A quantised tensor: `raw` is uint8 [..., bytes of a row] and stays in the file; as an array it is float32.

    An index chooses rows, or matrices of a stack; a row is never divided.
    """

    def __init__(self, kind: Kind, raw: np.ndarray):
        block, size = gguf.GGML_QUANT_SIZES[kind]
        super().__init__((*raw.shape[:-1], raw.shape[-1] // size * block), self._unpacked)
        self.kind, self.raw = kind, raw

    @property
    def form(self) -> str | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        return _FORMS[self.kind][0] if self.kind in _FORMS and self.ndim == 2 else None

    def __getitem__(self, index: Any) -> Blocks:
        return Blocks(self.kind, self.raw[index])

    def reshape(self, *shape: int) -> Lazy:
        whole = super().reshape(*shape)
        rows = whole.shape[:-1] if whole.ndim and whole.shape[-1] == self.shape[-1] else None
        return whole if rows is None else Blocks(self.kind, self.raw.reshape(*rows, self.raw.shape[-1]))

    def _unpacked(self) -> np.ndarray:
        rows = self.raw.reshape(-1, self.raw.shape[-1])
        out = np.empty((len(rows), self.shape[-1]), "float32")
        step = max(1, _PIECE // self.shape[-1])

        def unpack(start: int) -> None:
            with np.errstate(all="ignore"):  # a scale may be infinite: so is the value then
                out[start : start + step] = gguf.dequantize(rows[start : start + step], self.kind)

        with ThreadPoolExecutor(target.threads()) as pool:
            list(pool.map(unpack, range(0, len(rows), step)))
        return out.reshape(self.shape)

    def pack(self, form: str, out: np.ndarray) -> np.ndarray:
        taken = _FORMS[self.kind][1]
        return quantize.assemble(self.shape, form, lambda start, stop: taken(self.raw[start:stop]), out)


def _q4_0(raw: np.ndarray) -> Groups:
    """18 bytes: a float16 scale, then bytes whose low halves are the values 0 to 15 and high halves 16 to 31."""
    blocks = raw.reshape(len(raw), -1, 18)
    pairs = blocks[..., 2:]
    return Groups(np.concatenate((pairs & 15, pairs >> 4), -1), _halves(blocks[..., :2]))


def _q8_0(raw: np.ndarray) -> Groups:
    """34 bytes: a float16 scale, then 32 signed bytes."""
    blocks = raw.reshape(len(raw), -1, 34)
    return Groups(blocks[..., 2:] ^ 128, _halves(blocks[..., :2]))


def _q4_k(raw: np.ndarray) -> Groups:
    """144 bytes: a factor of the scales and one of what is subtracted, 12 bytes of 8 of each in 6 bits, 256 codes.

    The first 8 bytes hold the lower 6 bits of scales 0 to 3 and minima 0 to 3; their upper 2 bits and the last 4 bytes
    are scales and minima 4 to 7. Of each 32 bytes of codes the low halves are a group and the high halves the next.
    """
    blocks = raw.reshape(len(raw), -1, 144)
    packed, pairs = blocks[..., 4:16], blocks[..., 16:].reshape(*blocks.shape[:2], 4, 1, 32)
    first, second, last = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scales = np.concatenate((first & 63, (last & 15) | (first >> 6 << 4)), -1)
    minima = np.concatenate((second & 63, (last >> 4) | (second >> 6 << 4)), -1)
    codes = np.concatenate((pairs & 15, pairs >> 4), -2)
    factors = _halves(blocks[..., :2]), -_halves(blocks[..., 2:4])
    return Groups(codes.reshape(len(raw), -1, 32), _joined(scales), _joined(minima), factors)


def _q6_k(raw: np.ndarray) -> Groups:
    """210 bytes: 128 of the lower 4 bits of 256 codes, 64 of their upper 2 bits, 16 signed scales, their factor.

    In each half of 128 codes, byte i of 64 holds the lower bits of codes i and i + 64, byte i of 32 the upper bits of
    codes i, i + 32, i + 64 and i + 96.
    """
    blocks = raw.reshape(len(raw), -1, 210)
    lower = blocks[..., :128].reshape(*blocks.shape[:2], 2, 1, 64)
    upper = blocks[..., 128:192].reshape(*blocks.shape[:2], 2, 1, 32)
    lower = np.concatenate((lower & 15, lower >> 4), -2).reshape(*blocks.shape[:2], 2, 128)
    upper = np.concatenate([(upper >> shift) & 3 for shift in (0, 2, 4, 6)], -2).reshape(lower.shape)
    codes = (lower | (upper << 4)).reshape(len(raw), -1, 16)
    return Groups(codes, _joined(blocks[..., 192:208]).view("int8"), None, (_halves(blocks[..., 208:]),))


def _mxfp4(raw: np.ndarray) -> Groups:
    """17 bytes: the exponent of a power of two, then codes as in Q4_0, those of 4-bit floats doubled."""
    blocks = raw.reshape(len(raw), -1, 17)
    pairs = blocks[..., 1:]
    codes = np.concatenate((pairs & 15, pairs >> 4), -1)
    return Groups(codes, np.ldexp(np.float32(1), blocks[..., 0].astype("int32") - 128))


def _joined(values: np.ndarray) -> np.ndarray:
    """[rows, blocks, groups of a block] as [rows, groups]."""
    return np.ascontiguousarray(values.reshape(len(values), -1))


def _halves(raw: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(raw).view("float16")[..., 0]


# kind -> the format that holds exactly its values, and how codes [rows, groups, group] and scales are taken out
_FORMS: dict[Kind, tuple[str, Callable[[np.ndarray], Groups]]] = {
    Kind.Q4_0: ("q4", _q4_0),
    Kind.Q8_0: ("q8", _q8_0),
    Kind.Q4_K: ("q4k", _q4_k),
    Kind.Q6_K: ("q6k", _q6_k),
    Kind.MXFP4: ("mxfp4", _mxfp4),
}


def row_bytes(kind: Kind, inputs: int) -> int:
    """Bytes of a row of `inputs` values. Raises ValueError where a row is no whole number of blocks."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    if inputs % block:
        raise ValueError(f"rows of {inputs} values are no multiple of {kind.name}'s blocks of {block}")
    return inputs // block * size


def nbytes(kind: Kind, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor. Raises ValueError as `row_bytes`."""
    return prod(shape[:-1]) * row_bytes(kind, shape[-1])
