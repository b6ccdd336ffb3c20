"""Packed weights as other tools read them: compressed-tensors' `pack-quantized`, with a scale for each 32 inputs.

Codes lie in 32-bit words along the inputs, the first lowest; scales are float16 [rows, groups]. That is what q4 and q8
are, in an order that does not depend on the machine: nothing is rounded on the way. `quantized` reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from llm.weights.codes import Codes, unpacked
from ops import Tensor, quantize
from ops.quantize import FORMATS, Format

_PIECE = 2**22  # values that are quantised at a time


class Words(Codes):
    """words: int32 [rows, words]; scales: float16 [rows, groups of 32]. An index chooses rows."""

    def __init__(self, words: np.ndarray, scales: np.ndarray, inputs: int, bits: int):
        index = np.arange(inputs) // 32
        super().__init__(lambda: unpacked(words, bits)[:, :inputs], scales, 2 ** (bits - 1), index, bits)
        self.words, self.scales = words, scales

    def __getitem__(self, index: Any) -> Words:
        return Words(self.words[index], self.scales[index], self.shape[1], self.bits)


def packed(weight: np.ndarray | Tensor, form: str) -> Words:
    """A matrix [rows, inputs] of floats, quantised as `ops.quantize.pack` does; or one that is packed so already.

    Raises DTypeError for values that the format's scale cannot hold.
    """
    described, (rows, inputs) = FORMATS[form], weight.shape
    if isinstance(weight, Tensor) and weight.dtype == form:
        codes, scales, _ = quantize.take_apart(np.from_dlpack(weight.buffer.data), (rows, inputs), described)
        return Words(_words(codes, inputs, described.bits), scales, inputs, described.bits)
    array = weight.numpy() if isinstance(weight, Tensor) else weight
    groups = -(-inputs // described.group)
    words = np.empty((rows, -(-inputs * described.bits // 32)), "int32")
    scales = np.empty((rows, groups), described.scale)
    step = max(1, _PIECE // inputs)
    for start in range(0, rows, step):
        piece = slice(start, start + step)
        words[piece], scales[piece] = _quantized(array[piece], groups, described)
    return Words(words, scales, inputs, described.bits)


def _quantized(array: np.ndarray, groups: int, form: Format) -> tuple[np.ndarray, np.ndarray]:
    filled = np.zeros((len(array), groups * form.group), "float32")
    filled[:, : array.shape[1]] = array
    codes, scales, _ = quantize.quantize(filled.reshape(len(array), groups, form.group), form)
    return _words(codes, array.shape[1], form.bits), scales


def _words(codes: np.ndarray, inputs: int, bits: int) -> np.ndarray:
    """int32 [rows, words] of codes uint8 [rows, groups, group]."""
    flat = codes.reshape(len(codes), -1)[:, : -(-inputs * bits // 32) * 32 // bits]
    if bits == 4:
        flat = flat[:, ::2] | flat[:, 1::2] << 4
    return np.ascontiguousarray(flat).view("<i4")


def written(tensors: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint, `Words` by their parts."""
    found: dict[str, np.ndarray] = {}
    for name, each in tensors.items():
        if isinstance(each, Words):
            module = name.removesuffix("weight")
            found[f"{module}weight_packed"] = each.words
            found[f"{module}weight_scale"] = each.scales
            found[f"{module}weight_shape"] = np.array(each.shape, "int64")
        else:
            found[name] = np.asarray(each)
    return found


def settings(tensors: Mapping[str, Any], linears: set[str]) -> dict[str, Any] | None:
    """The `quantization_config` of a checkpoint; None where nothing is packed. `linears` are its linear modules.

    The format of most linear layers goes by the class, so that the list is short; others are listed by name.
    """
    bits = {name.removesuffix(".weight"): each.bits for name, each in tensors.items() if isinstance(each, Words)}
    if not bits:
        return None
    counted = [number for module, number in bits.items() if module in linears] or [*bits.values()]
    usual = max(sorted(set(counted)), key=counted.count)
    groups: dict[str, Any] = {}
    for number in sorted(set(bits.values()), key=lambda each: each != usual):
        named = [module for module, each in bits.items() if each == number]
        if number == usual:
            named = ["Linear", *(module for module in named if module not in linears)]
        groups[f"group_{len(groups)}"] = {
            "targets": named,
            "weights": {
                "num_bits": number, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32,
                "dynamic": False, "actorder": None, "observer": "minmax", "block_structure": None,
            },
            "input_activations": None, "output_activations": None, "format": "pack-quantized",
        }  # fmt: skip
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": sorted(linears - bits.keys()),
        "kv_cache_scheme": None,
    }
