"""Kernels for GPUs that need not be there: an op's blocks, scheduled and lowered, as source text and machine code.

A lowered kernel is two modules of TIR: functions for the device, and one for the host that computes their launches,
from the sizes that were left open, and makes the buffers between them. The text, with what a launch takes, is kept in
the disk cache for the device that comes, by the target among others (`target.building_for_gpu`).
"""

from __future__ import annotations

import base64
import contextvars
import functools
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tvm
import tvm_ffi
from tvm import ir, tirx
from tvm.tirx.build import split_host_device_mods

from . import build, store, target
from .errors import KernelError
from .languages import nvrtc
from .schedule import gpu as schedule
from .target import Gpu

if TYPE_CHECKING:
    from .build import Request


_only_text: contextvars.ContextVar[bool] = contextvars.ContextVar("only_text", default=False)
CPU, _DEVICE_TYPE = 1, 10  # DLPack's number of the CPU; TVM's of the field that says where a tensor is


@dataclass(frozen=True)
class Function:
    """A function of the device: the dtypes of its parameters, and which of its launch's sizes it is given, in order.

    A pointer is written "float32*". `launch` names sizes as blockIdx.x (of the grid) and threadIdx.x (of a block).
    """

    parameters: tuple[str, ...]
    launch: tuple[str, ...]


@dataclass(frozen=True)
class Lowered:
    """TIR for the host and for the device, the device's source text, and what launches of its functions take.

    `texts` has the text that each function stands in: for WGSL one of its own, else all of them in one.
    """

    gpu: Gpu
    host: tvm.IRModule
    device: tvm.IRModule
    texts: Mapping[str, str]
    functions: Mapping[str, Function]

    @property
    def text(self) -> str:
        """All of it."""
        return "\n".join(dict.fromkeys(self.texts.values()))


def lower(primfunc: Any, gpu: Gpu) -> Lowered:
    """What becomes of a scheduled function. Compiles no source text, and needs no GPU."""
    module = tvm.tirx.transform.BindTarget(gpu.target)(tvm.IRModule.from_expr(primfunc))
    pipeline, _, finish_device = tvm.tirx.get_default_tir_pipeline(gpu.target)
    host, devices = split_host_device_mods(pipeline(module))
    if not devices:
        raise KernelError(f"{primfunc.attrs['global_symbol']} has nothing to run on a GPU")
    [(device_target, device)] = devices.items()
    device = finish_device()(device)
    functions = {name.name_hint: _function(each) for name, each in device.functions.items()}
    apart = [tvm.IRModule({name: each}) for name, each in device.functions.items()] if gpu.apart else [device]
    texts = {
        name.name_hint: text for each in apart for text in [text_of(each, device_target)] for name in each.functions
    }
    return Lowered(gpu, host, device, texts, functions)


def text_of(device: tvm.IRModule, device_target: Any) -> str:
    """Source text of functions for a device."""
    _compile_on_demand()
    token = _only_text.set(True)
    try:
        text = tvm.get_global_func(f"target.build.{device_target.kind.name}")(device, device_target).inspect_source()
    finally:
        _only_text.reset(token)
    # All threads of a warp come to each shuffle; after a branch, those that happen to be active may be fewer.
    text = text.replace("__activemask()", "0xffffffffu")
    if device_target.kind.name == "cuda":
        # A thread's array keeps the alignment of what is copied to it, less than the vectors that it is read by.
        text = re.sub(r"\balignas\([1-8]\)", "alignas(16)", text)
    if device_target.kind.name == "metal":
        text = _right_in_metal(text)
    return _right_in_wgsl(text) if device_target.kind.name == "webgpu" else text


@functools.cache
def _compile_on_demand() -> None:
    """TVM compiles CUDA's text where there is a GPU, with headers that the wheels do not put where it looks.

    NVRTC compiles it here (`_built`); where only the text is asked for, nothing does.
    """
    original = tvm_ffi.get_global_func("tvm_callback_cuda_compile")

    def compile(code: str) -> Any:
        return b"//" if _only_text.get() else original(code)

    tvm_ffi.register_global_func("tvm_callback_cuda_compile", compile, override=True)


def _right_in_wgsl(text: str) -> str:
    """What TVM writes and WGSL has not: the least int32 as a literal (its sign is an operator), and `inff`."""
    text = text.replace("-2147483648i", "(-2147483647i - 1i)")
    infinite = re.sub(r"\binff\b", "infinity_()", text)
    if infinite == text:
        return text
    # No constant may be infinite, so it is made when the kernel runs.
    return infinite.rstrip() + "\n\nfn infinity_() -> f32 { var bits = 0x7f800000u; return bitcast<f32>(bits); }\n"


def _right_in_metal(text: str) -> str:
    """What TVM writes as for CUDA and Metal does not have: lanes past the last, `nearbyint`, integers of 16 bits that
    stay so when they meet. Seen by the emulator."""
    text = re.sub(r"\bsimd_shuffle\((\w+\[0\]), (.*)\);", r"simd_shuffle(\1, (\2) & 31);", text)
    return text.replace("as_type<half>(", "as_type<half>((ushort)").replace("nearbyint(", "rint(")


def _function(primfunc: Any) -> Function:
    launch = tuple(str(each) for each in primfunc.attrs["tirx.kernel_launch_params"])
    return Function(tuple(_type(each) for each in primfunc.params), launch)


def _type(parameter: Any) -> str:
    pointed = getattr(parameter.ty, "element_type", None)
    return str(parameter.ty.dtype) if pointed is None else f"{pointed.dtype}*"


@dataclass(frozen=True)
class Built:
    """A kernel as it waits for its device: source text, its functions, and for CUDA machine code and PTX.

    `host` is the host function as LLVM's text, for tensors in unified memory.
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


def lowered(request: Request) -> Lowered:
    """An op's kernel for the GPU of `building_for_gpu`, scheduled and lowered under the op's name."""
    with build.named(request):
        return lower(request.scheduled().with_attr("global_symbol", request.op.name), _chosen())


def check(request: Request) -> Any:
    """What the op checks of its arguments' values, as a function on tensors of the CPU; None where there is nothing."""
    template = request.op._templates.get("check")
    found = schedule.checks(request.blocks()) if template is None else request.build(template)
    return None if found is None else build.compiled(found, f"{request.op.name}_check")


def _chosen() -> Gpu:
    gpu = target.gpu()
    if gpu is None:
        raise KernelError("no GPU is chosen: do this inside of target.building_for_gpu(...)")
    return gpu


def built(request: Request) -> Built:
    """A kernel for the GPU of `building_for_gpu`: from the disk cache, or compiled as far as this machine can.

    CUDA becomes machine code, by NVRTC; the other languages stay text, which their drivers compile.
    """
    gpu, key = _chosen(), request.key
    with store.kernels.locked(key):
        path, _ = store.kernels.find(key)
        if path is not None:
            return Built.load(path)
        made = _built(lowered(request))
        what = f"{request.op.name}({request.arguments}) for {gpu}"
        store.kernels.put(key, what, lambda folder: made.save(folder / "kernel.gpu"))
    return made


def _built(kernel: Lowered) -> Built:
    gpu = kernel.gpu
    compiled = nvrtc.compile(kernel.text, gpu.arch) if gpu.language == "cuda" else nvrtc.Compiled("", b"", "")
    [(symbol, host)] = kernel.host.functions.items()
    host = host_code(tvm.IRModule({symbol: host.with_body(unified(host.body))}), gpu).inspect_source("ll")
    return Built(gpu.language, gpu.arch, kernel.text, dict(kernel.functions), host, compiled.ptx, compiled.cubin)


def unified(body: Any) -> Any:
    """A host function's code for tensors in unified memory, which say that they are on the CPU."""

    def asserted(node: Any) -> Any:
        found: list[Any] = []
        tvm_ffi.structural_walk(node.condition, (ir.Call, lambda each: found.append(_is_device_type(each))))
        if not any(found):
            return node
        wanted = tvm_ffi.structural_map(node.condition, (tirx.EQ, lambda e: tirx.EQ(e.a, tirx.const(CPU, "int32"))))
        return tirx.AssertStmt(wanted, node.error_kind, node.message_parts)

    return tvm_ffi.structural_map(body, (tirx.AssertStmt, asserted))


def _is_device_type(call: Any) -> bool:
    return getattr(call.op, "name", "") == "tirx.tvm_struct_get" and int(call.args[2]) == _DEVICE_TYPE


def host_code(host: tvm.IRModule, gpu: Gpu) -> Any:
    """The host's functions as a module of machine code for this machine."""
    _, finish, _ = tvm.tirx.get_default_tir_pipeline(gpu.target)
    return tvm.get_global_func("target.build.llvm")(finish()(host), gpu.target.host)
