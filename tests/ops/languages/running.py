"""How a program in some language is tried: outputs full of NaN, compared with an op's reference by the one table."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ops.languages.base import Language, Launch, Parameter, Program, Source
from ops.spec import DTYPES

from ..harness import KERNEL, relative_error

ROOT = Path(__file__).resolve().parents[3]
FILE = "user/kernels.py"
LINE = 41  # where a text begins in it


def source(text: str, entry: str = "work") -> Source:
    return Source(text, entry, FILE, LINE)


def compiled(language: Language, text: str, entry: str = "work") -> Program:
    """The program of a whole text."""
    parameters = language.parse(source(text, entry))
    assert parameters is not None
    return language.compile(source(text, entry), parameters)


def completed(language: Language, body: str, *parameters: Parameter) -> Program:
    """The program of a body, whose signature is written by the language."""
    assert language.parse(source(body)) is None
    whole = language.with_signature(source(body), parameters)
    return language.compile(whole, parameters)


def empty(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """An output that holds NaN, or a number that is no result."""
    filled = np.empty(shape, DTYPES[dtype])
    filled.view("uint8")[...] = 0xFF
    return filled


def judge(output: np.ndarray, expected: Any, dtype: str) -> None:
    error = relative_error(output.astype("float64"), np.asarray(expected, "float64"), dtype)
    assert error <= KERNEL.get(dtype, 0.0), f"error {error:.3g} for {dtype}{list(output.shape)}"


def run(program: Program, *values: Any, grid: Sequence[int] = (1, 1, 1), block: Sequence[int] = (1, 1, 1)) -> None:
    program.run(values, Launch(three(grid), three(block)))


def three(sizes: Sequence[int]) -> tuple[int, int, int]:
    x, y, z = (*sizes, 1, 1)[:3]
    return x, y, z


def alone(code: str) -> subprocess.CompletedProcess[str]:
    """Python code in a process of its own, in which every warning is an error."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
