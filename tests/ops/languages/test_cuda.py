"""CUDA kernels on the CPU: right ones agree with the references, wrong ones are named with their line."""

from __future__ import annotations

import numpy as np
import pytest

from debug.tolerance import KERNEL, relative_error
from ops.languages.base import Launch, LaunchError, Options, Source, SourceError
from ops.languages.cuda import Cuda, EmulatedCuda
from ops.spec import DTYPES, FLOATS

from .cuda_kernels import CASES, LINEAR, RMS_NORM, Case, Twin

EMULATE = Options("emulate")


def compiled(text: str, entry: str, options: Options = EMULATE) -> EmulatedCuda:
    language = Cuda(options)
    source = Source(text, entry, "/some/where/kernels.py", 100)
    parameters = language.parse(source)
    assert parameters is not None
    program = language.compile(source, parameters)
    assert isinstance(program, EmulatedCuda)
    assert program.emulated
    return program


def run(program: EmulatedCuda, values: dict, launch: Launch = Launch()) -> None:
    program.run([values[p.name] for p in program.parameters], launch)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kernels_agree_with_the_reference(case: Case, dtype: str):
    program = compiled(case.in_dtype(dtype), case.name)
    rng = np.random.default_rng()
    for shape in case.shapes:
        values = case.values(rng, shape, dtype)
        expected = case.expected(values)
        for each in (program, program.watched()):
            values["out"][...] = np.nan
            run(each, values, case.launch(shape))
            assert relative_error(values["out"], expected, dtype) <= KERNEL[dtype], shape


@pytest.mark.parametrize(
    ("case", "twin"),
    [pytest.param(case, twin, id=f"{case.name}-{twin.name}") for case in CASES for twin in case.twins],
)
def test_mistakes_are_named(case: Case, twin: Twin):
    text = case.in_dtype("float32")
    assert twin.right in text
    program = compiled(text.replace(twin.right, twin.wrong, 1), case.name)
    values = case.values(np.random.default_rng(), case.shapes[-1], "float32")
    with pytest.raises(LaunchError, match=twin.said):
        run(program.watched(), values, case.launch(case.shapes[-1]))
