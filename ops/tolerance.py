"""The one tolerance table: how far a kernel may be from its reference, relative to max|reference|, by dtype.

The tests and the checking tools share it. It changes only with evidence in the changelog.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

KERNEL: dict[str, float] = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1.6e-2}


def relative_error(actual: np.ndarray, reference: np.ndarray, dtype: str | None = None) -> float:
    """max|actual - reference| / max|reference|. Equal infinities agree; a NaN on one side only is an infinite error.

    `dtype` is that of the kernel's output: a difference below its smallest number is none, as it has nothing nearer.
    """
    actual, reference = np.asarray(actual, "float64"), np.asarray(reference, "float64")
    if actual.shape != reference.shape:
        raise ValueError(f"the shapes differ: {actual.shape} and {reference.shape}")
    same = (actual == reference) | (np.isnan(actual) & np.isnan(reference))
    if dtype in KERNEL:
        with np.errstate(invalid="ignore"):
            same |= np.abs(actual - reference) < float(ml_dtypes.finfo(dtype).smallest_subnormal)
    if same.all():
        return 0.0
    if not np.isfinite(actual[~same]).all() or not np.isfinite(reference[~same]).all():
        return float("inf")
    finite = np.abs(reference[np.isfinite(reference)])
    scale = finite.max() if finite.size else 0.0
    worst = np.abs(actual[~same] - reference[~same]).max()
    return float(worst / scale) if scale else float("inf")
