"""How tests compile and run CUDA text in the emulator."""

from __future__ import annotations

from typing import Any

import numpy as np

from ops.languages.base import Launch, Options, Parameter, Source
from ops.languages.cuda import Cuda, EmulatedCuda
from ops.languages.emulator import EmulatedProgram
from ops.spec import DTYPES

SPELLED = {"float32": "float", "float16": "half", "bfloat16": "__nv_bfloat16", "int32": "int", "int64": "long long"}


def source(text: str, entry: str) -> Source:
    """The text, as if it began at line 100 of a file."""
    return Source(text, entry, "/some/where/kernels.py", 100)


def parsed(text: str, entry: str) -> tuple[Parameter, ...]:
    parameters = Cuda().parse(source(text, entry))
    assert parameters is not None
    return parameters


def compiled(text: str, entry: str, flags: tuple[str, ...] = ()) -> EmulatedCuda:
    program = Cuda(Options("emulate", flags)).compile(source(text, entry), parsed(text, entry))
    assert isinstance(program, EmulatedCuda)
    assert program.emulated
    return program


def run(program: EmulatedProgram, values: dict[str, Any], launch: Launch) -> None:
    program.run([values[p.name] for p in program.parameters], launch)


def kernel(body: str, arrays: dict[str, np.ndarray], before: str = "") -> EmulatedCuda:
    """A kernel k of a body at line 100, in which `i` is the thread's number in the grid."""
    given = ", ".join(f"{SPELLED[array.dtype.name]}* {name}" for name, array in arrays.items())
    index = "int i = blockIdx.x * blockDim.x + threadIdx.x; (void)i;"
    return compiled(f'{before} extern "C" __global__ void k({given}) {{ {index} {body}\n}}', "k")


def threads(
    body: str,
    count: int,
    dtype: str = "int32",
    blocks: int = 1,
    shared: int = 0,
    before: str = "",
    **arrays: np.ndarray,
) -> np.ndarray:
    """What `out`, an element for each thread, is after the body; the same from both libraries of the program."""
    results = [np.zeros(count * blocks, DTYPES[dtype]) for _ in range(2)]
    program = kernel(body, {**arrays, "out": results[0]}, before)
    for each, result in zip((program, program.watched()), results, strict=True):
        copies = {name: array.copy() for name, array in arrays.items()}
        run(each, {**copies, "out": result}, Launch((blocks, 1, 1), (count, 1, 1), shared))
    assert results[0].tobytes() == results[1].tobytes()
    return results[0]
