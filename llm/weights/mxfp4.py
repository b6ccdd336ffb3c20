"""MXFP4, as GPT-OSS checkpoints hold it: 4-bit floats in groups of 32 that share a power of two (OCP MX 1.0)."""

from __future__ import annotations

from collections.abc import Mapping

import ml_dtypes
import numpy as np

from llm.errors import CheckpointError

# A code's lower three bits are the magnitude, the fourth the sign.
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES = np.array([*_MAGNITUDES, *(-each for each in _MAGNITUDES)], "float32")
_PAIRS = np.stack([np.tile(_VALUES, 16), np.repeat(_VALUES, 16)], axis=1)  # of a byte: the low code, then the high one


def dequantize(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The values, bfloat16 [..., groups * 32], of codes uint8 [..., groups, 16] and exponents uint8 [..., groups].

    Every value is a code's times 2**(exponent - 127), rounded to bfloat16 where that is below its normal numbers.
    """
    values = _PAIRS[blocks].reshape(*blocks.shape[:-1], -1)
    scaled = np.ldexp(values, (scales.astype("int32") - 127)[..., None])
    return scaled.reshape(*blocks.shape[:-2], -1).astype(ml_dtypes.bfloat16)


def read_mxfp4(named: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint with each pair `X_blocks`, `X_scales` as X [experts, inputs, outputs], bfloat16.

    Raises CheckpointError where one of a pair is missing, or they do not fit each other.
    """
    result = {name: each for name, each in named.items() if not name.endswith(("_blocks", "_scales"))}
    for base in sorted({name.rpartition("_")[0] for name in named.keys() - result.keys()}):
        blocks, scales = named.get(f"{base}_blocks"), named.get(f"{base}_scales")
        if blocks is None or scales is None:
            raise CheckpointError(f"{base}: {'blocks' if blocks is None else 'scales'} are missing; they come in pairs")
        fits = blocks.ndim == 4 and blocks.shape[-1] == 16 and blocks.shape[:-1] == scales.shape
        if not (fits and blocks.dtype == scales.dtype == np.uint8):
            raise CheckpointError(
                f"{base}: blocks are {blocks.dtype}{list(blocks.shape)} and scales {scales.dtype}{list(scales.shape)}; "
                f"expected uint8 [experts, outputs, groups, 16] and [experts, outputs, groups]"
            )
        result[base] = np.swapaxes(dequantize(blocks, scales), 1, 2)
    return result
