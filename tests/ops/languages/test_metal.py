"""Metal kernels on the CPU: right ones agree with the references, wrong ones are named in Metal's words."""

from __future__ import annotations

import numpy as np
import pytest

from ops.languages.base import LaunchError, Options
from ops.languages.emulator import EmulatedProgram
from ops.languages.metal import Metal
from ops.spec import FLOATS
from ops.tolerance import KERNEL, relative_error

from .emulation import run, source
from .metal_kernels import CASES, MetalCase, Twin


def compiled(text: str, entry: str, device: str | None = None, flags: tuple[str, ...] = ()) -> EmulatedProgram:
    language = Metal(Options(device, flags))
    parameters = language.parse(source(text, entry))
    assert parameters is not None
    program = language.compile(source(text, entry), parameters)
    assert isinstance(program, EmulatedProgram)
    assert program.emulated
    return program


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kernels_agree_with_the_reference(case: MetalCase, dtype: str):
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
def test_mistakes_are_named(case: MetalCase, twin: Twin):
    text = case.in_dtype("float32")
    assert twin.right in text
    program = compiled(text.replace(twin.right, twin.wrong, 1), case.name)
    values = case.values(np.random.default_rng(), case.shapes[-1], "float32")
    with pytest.raises(LaunchError, match=twin.said):
        run(program.watched(), values, case.launch(case.shapes[-1]))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_an_array_of_another_dtype_is_refused(case: MetalCase):
    program = compiled(case.in_dtype("float16"), case.name)
    values = case.values(np.random.default_rng(), case.shapes[0], "float32")
    with pytest.raises(LaunchError, match=r"half4?\* \w+ was given an array of float32, expected an array of float16"):
        run(program, values, case.launch(case.shapes[0]))
