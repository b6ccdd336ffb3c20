"""CUDA that TVM generates runs in the emulator, and what a GPU's driver is told, by a driver that is played."""

from __future__ import annotations

import ctypes
import enum
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import s_tir
from tvm.target import Target

import ops
from ops.languages import cuda, cuda_driver, nvrtc
from ops.languages.base import Launch, LaunchError
from ops.spec import DTYPES, FLOATS
from ops.tolerance import KERNEL, relative_error

from .cuda_kernels import CASES, Case
from .emulation import parsed, run, source


def generated(width: int, dtype: str) -> str:
    """rms_norm by TVM: a block a row, its sum by warps and shared memory."""
    x, weight = ops.tensor(np.ones((2, width), DTYPES[dtype])), ops.tensor(np.ones(width, DTYPES[dtype]))
    schedule = s_tir.Schedule(ops.rms_norm.plan((x, weight), {"eps": 1e-5, "plus_one": False}).request().blocks())
    total, normalise = schedule.get_child_blocks(schedule.get_sblock("root"))
    row, column = schedule.get_loops(normalise)
    schedule.bind(row, "blockIdx.x")
    schedule.bind(schedule.split(column, [None, 64])[1], "threadIdx.x")
    schedule.set_scope(total, 0, "shared")
    schedule.compute_at(total, row)
    schedule.bind(schedule.split(schedule.get_loops(total)[-1], [None, 64])[1], "threadIdx.x")
    target = Target({"kind": "cuda", "arch": "sm_80"}, host="llvm")
    return tvm.compile(schedule.mod, target).mod.imports[0].inspect_source()


@pytest.mark.parametrize("width", [64, 200])
@pytest.mark.parametrize("dtype", FLOATS)
def test_generated_source_runs(dtype: str, width: int):
    text = generated(width, dtype)
    parameters = parsed(text, "rms_norm_kernel")
    program = cuda.emulated(source(text, "rms_norm_kernel"), parameters)
    rng = np.random.default_rng()
    x, weight = (rng.standard_normal(shape).astype(DTYPES[dtype]) for shape in ((5, width), (width,)))
    expected = ops.rms_norm.reference(x, weight, eps=1e-5)
    for each in (program, program.watched()):
        out = np.full_like(x, np.nan)
        values: dict[str, Any] = {"X_ptr": x, "W_ptr": weight, "Y_ptr": out, "n": 5}
        run(each, values, Launch((5, 1, 1), (64, 1, 1)))
        assert relative_error(out, expected, dtype) <= KERNEL[dtype]


class Result(enum.Enum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_ILLEGAL_ADDRESS = 700


class PlayedDriver:
    """The driver's functions with their arguments as cuda-bindings has them; its GPU is the emulator.

    Memory of the device is memory of the host that nobody else knows of.
    """

    CUresult = Result
    CUpointer_attribute = SimpleNamespace(CU_POINTER_ATTRIBUTE_IS_MANAGED="managed")
    CUfunction_attribute = SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES="shared")

    def __init__(self, program: Any):
        self.program, self.memory, self.state, self.told = program, {}, Result.CUDA_SUCCESS, []

    def cuCtxSetCurrent(self, context: str):
        assert context == "context"
        return (Result.CUDA_SUCCESS,)

    def cuModuleLoadData(self, image: bytes):
        assert image == b"cubin"
        return Result.CUDA_SUCCESS, "module"

    def cuModuleGetFunction(self, module: str, name: bytes):
        return Result.CUDA_SUCCESS, name

    def cuFuncSetAttribute(self, function: bytes, attribute: str, value: int):
        self.told.append((attribute, value))
        return (Result.CUDA_SUCCESS,)

    def cuPointerGetAttribute(self, attribute: str, address: int):
        assert attribute == "managed"
        return Result.CUDA_ERROR_INVALID_VALUE, None  # as of memory of the host

    def cuMemAlloc(self, size: int):
        assert size > 0
        held = ctypes.create_string_buffer(size)
        self.memory[ctypes.addressof(held)] = held
        return Result.CUDA_SUCCESS, ctypes.addressof(held)

    def cuMemFree(self, address: int):
        del self.memory[address]
        return (Result.CUDA_SUCCESS,)

    def cuMemcpyHtoD(self, device: int, host: int, size: int):
        assert len(self.memory[device]) == size
        ctypes.memmove(device, host, size)
        return (Result.CUDA_SUCCESS,)

    def cuMemcpyDtoH(self, host: int, device: int, size: int):
        assert len(self.memory[device]) == size
        ctypes.memmove(host, device, size)
        return (Result.CUDA_SUCCESS,)

    def cuLaunchKernel(self, function: bytes, *numbers: int):
        *dimensions, stream, pointers, extra = numbers
        assert (stream, extra) == (0, 0)
        parameters = self.program.parameters
        addresses = (ctypes.c_void_p * len(parameters)).from_address(pointers)
        values, sizes = (ctypes.c_void_p * len(parameters))(), (ctypes.c_uint64 * len(parameters))()
        for i, parameter in enumerate(parameters):
            values[i] = ctypes.c_uint64.from_address(addresses[i]).value if parameter.pointer else addresses[i]
            sizes[i] = len(self.memory[values[i]]) if parameter.pointer else 0
        library = ctypes.CDLL(str(self.program.checked))
        failed = library.limpid_launch((ctypes.c_uint32 * 7)(*dimensions), values, sizes)
        self.state = Result.CUDA_ERROR_ILLEGAL_ADDRESS if failed else Result.CUDA_SUCCESS
        return (Result.CUDA_SUCCESS,)

    def cuCtxSynchronize(self):
        return (self.state,)

    def cuGetErrorName(self, status: Result):
        return Result.CUDA_SUCCESS, status.name.encode()

    def cuGetErrorString(self, status: Result):
        return Result.CUDA_SUCCESS, b"an illegal memory access was encountered"


def played(case: Case, text: str) -> tuple[PlayedDriver, cuda_driver.CudaProgram]:
    parameters = parsed(text, case.name)
    driver = PlayedDriver(cuda.emulated(source(text, case.name), parameters))
    device = cuda_driver.Device(driver, "sm_90", "context")
    return driver, cuda_driver.CudaProgram(parameters, nvrtc.Compiled("ptx", b"cubin", ""), case.name, device)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_the_driver_is_told(case: Case):
    driver, program = played(case, case.in_dtype("float32"))
    assert not program.emulated
    for shape in case.shapes:
        values = case.values(np.random.default_rng(), shape, "float32")
        given = {name: value.copy() for name, value in values.items() if isinstance(value, np.ndarray)}
        program.run([values[p.name] for p in program.parameters], case.launch(shape))
        assert relative_error(values["out"], case.expected(values), "float32") <= KERNEL["float32"]
        assert all((values[name] == given[name]).all() for name in given if name != "out")
    assert not driver.memory


def test_a_launch_that_fails_on_the_gpu():
    case = CASES[0]
    driver, program = played(case, case.in_dtype("float32").replace("i < width", "i <= width"))
    values = case.values(np.random.default_rng(), (3, 33), "float32")
    with pytest.raises(LaunchError, match=r"rms_norm failed on the GPU: CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory"):
        program.run([values[p.name] for p in program.parameters], Launch((3, 1, 1), (128, 1, 1), 50000))
    assert driver.told == [("shared", 50000)]
    assert not driver.memory
    assert np.isnan(values["out"]).all()
