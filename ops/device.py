"""Devices: where tensors lie, and where the ops on them run.

"cpu"; "cuda", an NVIDIA GPU; "emulate", the kernels of such a GPU run by the CPU, thread by thread. The CPU sees the
memory of all of them, on CUDA by unified memory: NumPy and every tool work on any tensor, and a model may be larger
than the GPU's memory. A call only starts a GPU's kernel; who looks at a tensor waits first (`Tensor.numpy`).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from . import target
from .errors import OpError

if TYPE_CHECKING:
    from .build import Request
    from .spec import Spec

NAMES = ("cpu", "cuda", "emulate")


class Device:
    """What has kernels of its own. `gpu` is what they are built for."""

    name: ClassVar[str]
    gpu: target.Gpu

    def memory(self, nbytes: int) -> np.ndarray | None:
        """Fresh memory, uint8 [nbytes], that the device reaches; None where any does. Raises MemoryError."""
        return None

    def wait(self) -> None:
        """Until all that was started has ended. Raises LaunchError for what failed meanwhile."""

    def filled(self, array: np.ndarray) -> None:
        """The CPU has filled this memory, which kernels read next."""

    def has(self, key: str) -> bool:
        """Whether the machine code of a request's key is in the disk cache."""
        return False

    def function(self, request: Request) -> Callable[..., None]:
        """The kernel of a request, on runtime tensors: arguments, then outputs. `building` is on."""
        raise NotImplementedError


class Emulated(Device):
    """A GPU that is not there: its kernels, in CUDA, compiled for the CPU."""

    name = "emulate"
    gpu = replace(target.GPUS["cuda"], arch="sm_75")  # later ones' tensor cores are not emulated

    def function(self, request: Request) -> Callable[..., None]:
        from .languages import cuda, hosted  # they know ops, which know tensors, which know devices

        return hosted.of_request(request, hosted.programs(cuda.emulated))


@functools.cache
def find(name: str) -> Device:
    """The device of a name other than "cpu". Raises OpError where this machine has none."""
    if name == "emulate":
        return Emulated()
    if name == "cuda":
        from .device_cuda import Cuda

        return Cuda()
    hint = "; Metal's kernels are generated and emulated (op.source, op.swap)" if name == "metal" else ""
    raise OpError(f"no device {name!r}; there are {', '.join(NAMES)}{hint}")


def check(name: str) -> None:
    """Raise OpError where there is no such device."""
    if name != "cpu":
        find(name)


def here(spec: Spec) -> Spec:
    """The spec, of a tensor from another machine, on the CPU where its device is missing."""
    try:
        check(spec.device)
    except OpError:
        return spec.on("cpu")
    return spec


def wait(name: str) -> None:
    """Until all that was started on a device has ended; on the CPU nothing outlasts its call."""
    if name != "cpu":
        find(name).wait()


def building(name: str) -> AbstractContextManager[Any]:
    """In the `with`, kernels are built for the device."""
    return contextlib.nullcontext() if name == "cpu" else target.building_for_gpu(find(name).gpu)
