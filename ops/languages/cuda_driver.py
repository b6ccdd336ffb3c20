"""An NVIDIA GPU through its driver: machine code loaded, arrays copied there, a launch, what it wrote copied back."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import emulator, native, nvrtc
from .base import Launch, LaunchError, Parameter, Program, Value

_PLENTY = 48 << 10  # bytes of dynamic shared memory above which a kernel must ask for it


@dataclass(frozen=True)
class Device:
    """The GPU that kernels run on: the first one. Its primary context is the one that other libraries use too."""

    driver: Any
    architecture: str
    context: Any


@functools.cache
def _found() -> Device | str:
    """The GPU, or why there is none."""
    try:
        driver = importlib.import_module("cuda.bindings.driver")
        (status,) = driver.cuInit(0)
    except ImportError:
        return str(nvrtc.missing("the package cuda-bindings"))
    except RuntimeError as error:  # the bindings find no driver
        return f"no NVIDIA driver: {str(error).rstrip('.')}"
    if status != driver.CUresult.CUDA_SUCCESS:
        return f"no NVIDIA GPU: {status.name}"
    if not done(driver, driver.cuDeviceGetCount()):
        return "no NVIDIA GPU"
    handle = done(driver, driver.cuDeviceGet(0))
    attribute = driver.CUdevice_attribute
    major, minor = (
        done(driver, driver.cuDeviceGetAttribute(each, handle))
        for each in (
            attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
            attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
        )
    )
    return Device(driver, f"sm_{major}{minor}", done(driver, driver.cuDevicePrimaryCtxRetain(handle)))


def device() -> Device | None:
    """The GPU; None where there is none."""
    found = _found()
    return found if isinstance(found, Device) else None


def absent() -> str:
    """Why there is no GPU."""
    found = _found()
    return found if isinstance(found, str) else ""


def done(driver: Any, result: tuple) -> Any:
    """The value of a call of the driver. Raises LaunchError."""
    status, *values = result
    if status != driver.CUresult.CUDA_SUCCESS:
        name, text = (get(status)[1] for get in (driver.cuGetErrorName, driver.cuGetErrorString))
        raise LaunchError(f"{(name or b'?').decode()}: {(text or b'unknown').decode()}")
    return values[0] if values else None


class CudaProgram(Program):
    """Machine code that runs on a GPU. Arrays in unified memory are used as they are; of others it gets copies, and
    those that are not const are copied back."""

    def __init__(self, parameters: Sequence[Parameter], compiled: nvrtc.Compiled, entry: str, device: Device):
        self.parameters, self.compiled, self.device = tuple(parameters), compiled, device
        self._entry, self._function = entry, None

    def run(self, values: Sequence[Value], launch: Launch) -> None:
        driver = self.device.driver
        emulator.check_dtypes(self.parameters, values)
        kept, _, _ = native.marshalled(self.parameters, values)
        done(driver, driver.cuCtxSetCurrent(self.device.context))
        function = self._loaded(launch.shared)
        with self._copies(kept) as copies:
            held = [
                each if not p.pointer else ctypes.c_uint64(each.ctypes.data if copy is None else int(copy))
                for p, copy, each in zip(self.parameters, copies, kept, strict=True)
            ]
            addresses = [each.ctypes.data if isinstance(each, np.ndarray) else ctypes.addressof(each) for each in held]
            pointers = (ctypes.c_void_p * max(1, len(addresses)))(*addresses)
            started = driver.cuLaunchKernel(
                function, *launch.grid, *launch.block, launch.shared, 0, ctypes.addressof(pointers), 0
            )
            try:
                done(driver, started)
                done(driver, driver.cuCtxSynchronize())
            except LaunchError as error:
                raise LaunchError(
                    f'{self._entry} failed on the GPU: {error}; with device="emulate" the CPU says where'
                ) from None
            for parameter, copy, array in zip(self.parameters, copies, kept, strict=True):
                if copy is not None and not parameter.const and array.nbytes:
                    done(driver, driver.cuMemcpyDtoH(array.ctypes.data, copy, array.nbytes))

    def _loaded(self, shared: int) -> Any:
        driver = self.device.driver
        if self._function is None:
            module = done(driver, driver.cuModuleLoadData(self.compiled.cubin))
            self._function = done(driver, driver.cuModuleGetFunction(module, self._entry.encode()))
        if shared > _PLENTY:
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            done(driver, driver.cuFuncSetAttribute(self._function, attribute, shared))
        return self._function

    @contextlib.contextmanager
    def _copies(self, kept: Sequence[np.ndarray]) -> Iterator[list[Any]]:
        """Of every array a copy in the GPU's memory; None of a number, and of what the GPU reaches where it is."""
        driver, copies = self.device.driver, []
        try:
            for parameter, array in zip(self.parameters, kept, strict=True):
                if not parameter.pointer or self._is_unified(array):
                    copies.append(None)
                    continue
                copies.append(done(driver, driver.cuMemAlloc(max(1, array.nbytes))))
                if array.nbytes:
                    done(driver, driver.cuMemcpyHtoD(copies[-1], array.ctypes.data, array.nbytes))
            yield copies
        finally:
            for copy in copies:
                if copy is not None:
                    driver.cuMemFree(copy)  # after a failed launch the context is gone, and says so to everything

    def _is_unified(self, array: np.ndarray) -> bool:
        driver = self.device.driver
        attribute = driver.CUpointer_attribute.CU_POINTER_ATTRIBUTE_IS_MANAGED
        status, found = driver.cuPointerGetAttribute(attribute, array.ctypes.data)
        return status == driver.CUresult.CUDA_SUCCESS and bool(found)  # memory of the CPU alone is no value for it

    def sources(self) -> dict[str, str]:
        return listings(self.compiled)


def listings(compiled: nvrtc.Compiled) -> dict[str, str]:
    """What NVRTC made: PTX, and the machine code's listing where nvdisasm is installed."""
    with contextlib.suppress(nvrtc.Missing):
        return {"ptx": compiled.ptx, "sass": nvrtc.sass(compiled.cubin)}
    return {"ptx": compiled.ptx}
