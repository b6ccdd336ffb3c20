"""An NVIDIA GPU as a device: unified memory, and kernels that TVM's runtime launches on the default stream."""

from __future__ import annotations

import contextlib
import ctypes
import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tvm
import tvm_ffi

from . import cross, store, target
from .device import Device
from .errors import OpError
from .languages import cuda_driver, hosted, nvrtc
from .languages.base import LaunchError
from .spec import Spec

if TYPE_CHECKING:
    from .build import Request

_CREATE = "ffi.Module.create.cuda"  # TVM's, where its CUDA runtime is loaded
_POSITIONS = ("int32", "int64")  # what ids and positions are: the numbers that are checked before a launch
_LARGE = 64 * 2**10  # bytes of what is sent ahead: smaller things come when a kernel asks for them


class Cuda(Device):
    """The first GPU. Memory moves between it and the CPU by itself; what the CPU has filled is sent ahead."""

    name = "cuda"

    def __init__(self):
        found = cuda_driver.device()
        if found is None:
            raise OpError(f'device "cuda": {cuda_driver.absent()}; device "emulate" has the CPU run the same kernels')
        _load_runtime()
        self._found, self._driver = found, found.driver
        self.gpu = replace(target.GPUS["cuda"], arch=found.architecture)
        self._filled: set[int] = set()  # where numbers lie that the CPU has written and no kernel since
        attribute = self._driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_CONCURRENT_MANAGED_ACCESS
        self._shares = bool(self._call("cuDeviceGetAttribute", attribute, 0))  # the CPU reads while kernels run

    def memory(self, nbytes: int) -> np.ndarray:
        flags = self._driver.CUmemAttach_flags.CU_MEM_ATTACH_GLOBAL
        try:
            address = int(self._call("cuMemAllocManaged", max(nbytes, 1), flags.value))
        except LaunchError as error:
            if "OUT_OF_MEMORY" not in str(error):
                raise self._failed(error) from None
            raise MemoryError(str(error)) from None
        return np.asarray(_Managed(self, address, nbytes))

    def wait(self) -> None:
        try:
            self._call("cuCtxSynchronize")
        except LaunchError as error:
            raise self._failed(error) from None

    def _failed(self, error: LaunchError) -> LaunchError:
        """After it, all that is asked of the GPU in this process says so."""
        return LaunchError(f'a kernel failed on the GPU: {error}; on device "emulate" the CPU says where')

    def filled(self, array: np.ndarray) -> None:
        address = array.ctypes.data
        if array.dtype.name in _POSITIONS:
            self._filled.add(address)
        if array.nbytes < _LARGE or not self._shares:
            return
        here = self._driver.CUmemLocation()
        here.type, here.id = self._driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE, 0
        advice = self._driver.CUmem_advise.CU_MEM_ADVISE_SET_PREFERRED_LOCATION
        self._call("cuMemAdvise", address, array.nbytes, advice, here)
        self._call("cuMemPrefetchAsync", address, array.nbytes, here, 0, 0)

    def has(self, key: str) -> bool:
        return store.kernels.has(key)

    def function(self, request: Request) -> Callable[..., None]:
        kernel, check = _loaded(cross.built(request), request.op.name), cross.check(request)
        tensors = [each for each in (*request.specs, *request.outputs) if each is not None]
        arrays = [i for i, each in enumerate(tensors) if isinstance(each, Spec)]
        integers = [i for i in arrays if tensors[i].dtype in _POSITIONS]
        first = len(tensors) - len(request.outputs)
        read = [i for i in integers if i < first]
        changed = [i for i in integers if i >= first or request.op.writes]

        def run(*given: Any) -> None:
            for i in arrays:
                if given[i].data_ptr() % hosted.ALIGNMENT or given[i].numel() > hosted.MOST:
                    hosted.check(given[i])
            if check is not None:  # the CPU reads numbers, which a kernel may still be about to write
                if not self._shares or any(given[i].data_ptr() not in self._filled for i in read):
                    self.wait()
                check(*given)
            for i in changed:
                self._filled.discard(given[i].data_ptr())
            kernel(*given)
            if not self._shares:  # the CPU may look at any time, and must find nothing running
                self.wait()

        return run

    def free(self, address: int) -> None:
        self._filled.discard(address)
        with contextlib.suppress(Exception):  # the interpreter, or the GPU's context, is going down
            self._call("cuMemFree", address)

    def _call(self, name: str, *arguments: Any) -> Any:
        """A function of the driver, in the GPU's context. Raises LaunchError."""
        driver = self._driver
        cuda_driver.done(driver, driver.cuCtxSetCurrent(self._found.context))
        return cuda_driver.done(driver, getattr(driver, name)(*arguments))


class _Managed:
    """Unified memory, freed with the last array over it."""

    def __init__(self, device: Cuda, address: int, nbytes: int):
        self._device, self._address = device, address
        self.__array_interface__ = {"version": 3, "shape": (nbytes,), "typestr": "|u1", "data": (address, False)}

    def __del__(self):
        self._device.free(self._address)


def _load_runtime() -> None:
    """TVM's CUDA runtime: it asks for NVIDIA's, which the wheels of the extra bring. Raises OpError."""
    if tvm_ffi.get_global_func(_CREATE, allow_missing=True) is not None:
        return
    ours = Path(tvm.__file__).parent / "lib" / "libtvm_runtime_cuda.so"
    try:
        for library in (*nvrtc.libraries("libcudart.so*"), ours):
            ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise OpError(
            f"device \"cuda\": TVM's CUDA runtime does not load: {error}; pip install 'limpid[cuda]'"
        ) from None


def _loaded(built: cross.Built, name: str) -> Callable[..., None]:
    """A built kernel as a function: its host code, with the machine code for the GPU beside it."""
    described = {
        kernel: {
            "name": "",
            "arg_types": ["handle" if each.endswith("*") else each for each in function.parameters],
            "launch_param_tags": [*function.launch],
        }
        for kernel, function in built.functions.items()
    }
    table = json.dumps({"tvm_version": version("apache-tvm"), "func_info": described})
    functions = tvm_ffi.get_global_func("runtime.LoadMetaDataFromJSON")(table)
    device = tvm_ffi.get_global_func(_CREATE)(built.cubin, "cubin", functions, {"cuda": built.text})
    with tempfile.TemporaryDirectory(prefix="limpid-") as folder:
        path = Path(folder) / "host.ll"
        path.write_text(built.host)
        host = tvm.runtime.load_module(str(path))
    host.import_module(device)
    return host[name]
