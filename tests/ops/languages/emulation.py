"""How tests compile and run CUDA text in the emulator."""

from __future__ import annotations

from typing import Any

import numpy as np

from ops.languages.base import Launch, Options, Parameter, Source
from ops.languages.cuda import Cuda, EmulatedCuda
from ops.languages.emulator import EmulatedProgram


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


def threads(body: str, count: int, out: str = "float", blocks: int = 1, shared: int = 0, **arrays: np.ndarray) -> Any:
    """What each thread's `out[i]` is after `body`, with `i` the thread's number in the grid; watched."""
    spelled = {"float32": "float", "int32": "int", "float16": "half", "uint16": "half", "int64": "long long"}
    given = "".join(f"{spelled[array.dtype.name]}* {name}, " for name, array in arrays.items())
    text = f"""extern "C" __global__ void k({given}{out}* out) {{
      int i = blockIdx.x * blockDim.x + threadIdx.x;
      {body}
    }}"""
    results = []
    program = compiled(text, "k")
    for each in (program, program.watched()):
        dtype = {"float": "float32", "int": "int32", "half": "float16", "long long": "int64"}[out]
        result = np.zeros(count * blocks, dtype)
        copies = {name: array.copy() for name, array in arrays.items()}
        run(each, {**copies, "out": result}, Launch((blocks, 1, 1), (count, 1, 1), shared))
        results.append(result)
    assert (results[0].view("uint8") == results[1].view("uint8")).all()
    return results[0]
