"""Weights of integer codes with scales, as AWQ, GPTQ, MLX and compressed-tensors hold them, each in its own order."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from llm.weights.lazy import Lazy
from ops import quantize
from ops.quantize import FORMATS, Groups

_FORMS = {form.bits: form for form in FORMATS.values()}


class Codes(Lazy):
    """value = scale * (code - zero), rounded to the dtype of the scales, as the libraries that make such weights do.

    codes() gives uint8 [rows, inputs]; scales and zeros are [rows, groups]; input i belongs to group `index[i]`.
    Where all zeros are in the middle, and each 32 inputs share a scale that a float16 holds, it packs to a format of
    ours; its numbers are then the products, not rounded.
    """

    def __init__(
        self, codes: Callable[[], np.ndarray], scales: np.ndarray, zeros: np.ndarray | int, index: np.ndarray, bits: int
    ):
        super().__init__((scales.shape[0], len(index)), self._values, scales.dtype)
        self._codes, self._scales, self._zeros, self._index, self.bits = codes, scales, zeros, index, bits
        self.form = _FORMS[bits].name if bits in _FORMS and self._packs(bits) else None

    def _packs(self, bits: int) -> bool:
        blocks = self._index[: len(self._index) // 32 * 32].reshape(-1, 32)
        rest = self._index[blocks.size :]
        whole = (blocks == blocks[:, :1]).all() and (rest == rest[:1]).all()
        with np.errstate(over="ignore"):
            return bool(
                whole
                and np.all(self._zeros == 2 ** (bits - 1))
                and np.array_equal(self._scales.astype("float16").astype("float64"), self._scales.astype("float64"))
            )

    def codes(self) -> np.ndarray:
        """uint8 [rows, inputs]."""
        return self._codes()

    def _values(self) -> np.ndarray:
        zeros = self._zeros if isinstance(self._zeros, int) else self._zeros.astype("int16")[:, self._index]
        with np.errstate(over="ignore"):
            steps = (self._codes().astype("int16") - zeros).astype(self.dtype)
            return steps * self._scales[:, self._index]

    def pack(self, form: str, out: np.ndarray) -> np.ndarray:
        codes, described = self._codes(), FORMATS[form]
        first = self._index[:: described.group]

        def rows(start: int, stop: int) -> Groups:
            filled = np.full((stop - start, len(first) * described.group), described.offset, "uint8")
            filled[:, : codes.shape[1]] = codes[start:stop]
            scales = self._scales[start:stop][:, first].astype("float16")
            return Groups(filled.reshape(stop - start, -1, described.group), scales)

        return quantize.assemble(self.shape, form, rows, out)


def unpacked(words: np.ndarray, bits: int, order: tuple[int, ...] | None = None) -> np.ndarray:
    """The codes of 32-bit words along the last axis, the lowest bits first: uint8 [..., words * 32 / bits].

    `order[i]` is which of a word's codes stands at place i.
    """
    shifts = np.arange(0, 32, bits, dtype="uint32")
    if order is not None:
        shifts = shifts[list(order)]
    each = (np.ascontiguousarray(words).view("uint32")[..., None] >> shifts) & np.uint32(2**bits - 1)
    return each.astype("uint8").reshape(*words.shape[:-1], -1)
