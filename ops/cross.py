"""Kernels for GPUs that need not be there: an op's blocks, scheduled and lowered, as source text and machine code.

A lowered kernel is two modules of TIR: functions for the device, and one for the host that computes their launches,
from the sizes that were left open, and makes the buffers between them. The text, with what a launch takes, is kept in
the disk cache for the device that comes, by the target among others (`target.building_for_gpu`).
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tvm
from tvm.tirx.build import split_host_device_mods

from . import store, target
from .errors import KernelError
from .languages import nvrtc
from .target import Gpu

if TYPE_CHECKING:
    from .build import Request


@dataclass(frozen=True)
class Function:
    """A function of the device: the dtypes of its parameters, and which of its launch's sizes it is given, in order.

    A pointer is written "float32*". `launch` names sizes as blockIdx.x (of the grid) and threadIdx.x (of a block).
    """

    parameters: tuple[str, ...]
    launch: tuple[str, ...]


@dataclass(frozen=True)
class Lowered:
    """TIR for the host and for the device, the device's source text, and what launches of its functions take."""

    gpu: Gpu
    host: tvm.IRModule
    text: str
    functions: Mapping[str, Function]


def lower(primfunc: Any, gpu: Gpu) -> Lowered:
    """What becomes of a scheduled function. Compiles no source text, and needs no GPU."""
    module = tvm.tirx.transform.BindTarget(gpu.target)(tvm.IRModule.from_expr(primfunc))
    pipeline, finish_host, finish_device = tvm.tirx.get_default_tir_pipeline(gpu.target)
    host, devices = split_host_device_mods(pipeline(module))
    if not devices:
        raise KernelError(f"{primfunc.attrs['global_symbol']} has nothing to run on a GPU")
    [(device_target, device)] = devices.items()
    device = finish_device()(device)
    functions = {name.name_hint: _function(each) for name, each in device.functions.items()}
    text = tvm.get_global_func(f"target.build.{gpu.kind}")(device, device_target).inspect_source()
    return Lowered(gpu, host, text, functions)


def _function(primfunc: Any) -> Function:
    launch = tuple(str(each) for each in primfunc.attrs["tirx.kernel_launch_params"])
    return Function(tuple(_type(each) for each in primfunc.params), launch)


def _type(parameter: Any) -> str:
    pointed = getattr(parameter.ty, "element_type", None)
    return str(parameter.ty.dtype) if pointed is None else f"{pointed.dtype}*"


@dataclass(frozen=True)
class Built:
    """A kernel as it waits for its device: source text, its functions, and for CUDA machine code and PTX.

    `host` is the host function as LLVM's text.
    """

    language: str
    arch: str
    text: str
    functions: dict[str, Function]
    host: str
    ptx: str = ""
    cubin: bytes = b""

    def save(self, path: Path) -> Path:
        kept = asdict(self) | {"cubin": base64.b64encode(self.cubin).decode()}
        path.write_text(json.dumps(kept))
        return path

    @classmethod
    def load(cls, path: Path) -> Built:
        kept = json.loads(path.read_text())
        functions = {n: Function(tuple(f["parameters"]), tuple(f["launch"])) for n, f in kept["functions"].items()}
        return cls(**kept | {"functions": functions, "cubin": base64.b64decode(kept["cubin"])})


def build(request: Request) -> Built:
    """A kernel for the GPU of `building_for_gpu`: from the disk cache, or compiled as far as this machine can.

    CUDA becomes machine code, by NVRTC; the other languages stay text, which their drivers compile.
    """
    gpu = target.gpu()
    if gpu is None:
        raise KernelError("no GPU is chosen: call this inside of target.building_for_gpu(...)")
    key = request.key
    with store.kernels.locked(key):
        path, _ = store.kernels.find(key)
        if path is not None:
            return Built.load(path)
        made = _built(lower(request.scheduled(), gpu))
        what = f"{request.op.name}({request.arguments}) for {gpu}"
        store.kernels.put(key, what, lambda folder: made.save(folder / "kernel.gpu"))
    return made


def _built(lowered: Lowered) -> Built:
    gpu = lowered.gpu
    compiled = nvrtc.compile(lowered.text, gpu.arch) if gpu.language == "cuda" else nvrtc.Compiled("", b"", "")
    _, finish_host, _ = tvm.tirx.get_default_tir_pipeline(gpu.target)
    host = tvm.get_global_func("target.build.llvm")(finish_host()(lowered.host), gpu.target.host)
    text = host.inspect_source("ll")
    return Built(gpu.language, gpu.arch, lowered.text, dict(lowered.functions), text, compiled.ptx, compiled.cubin)
