"""Runs kernels for GPUs where there is none: TVM's host code on the CPU, and `launch` for what the GPU would do.

The host code of a lowered kernel checks the arguments, computes each launch from the sizes that were left open, makes
the buffers between them and frees them. Here it runs over memory of the CPU, and each launch is a call of a Python
function: an emulator, or a driver that computes in place, such as PoCL.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import tvm
import tvm_ffi
from tvm import ir, tirx

from .. import cross
from ..errors import KernelError
from ..spec import DTYPES
from ..target import Gpu
from .base import Launch, Parameter, Program, Source

if TYPE_CHECKING:
    from ..build import Request
    from ..op import Op

Launcher = Callable[[str, list[Any], tuple[int, int, int], tuple[int, int, int], str], None]
ALIGNMENT = 16  # bytes: arguments of GPU kernels begin at multiples of them, as a device's own memory does
MOST = 2**31 - 1  # elements: indices are 32-bit
_STORED = DTYPES | {"uint16": np.dtype("uint16"), "uint32": np.dtype("uint32")}
_SPELLED = {  # as TVM writes them in CUDA
    "float32": "float", "float16": "half", "bfloat16": "nv_bfloat16", "int32": "int", "int64": "int64_t",
    "int8": "signed char", "uint8": "uchar", "uint16": "ushort", "uint32": "uint",
}  # fmt: skip
_numbers = itertools.count()


def build(primfunc: Any, gpu: Gpu, launch: Launcher) -> Callable[..., None]:
    """A function on tensors of the CPU (anything with DLPack), outputs last, that has `launch` compute.

    `primfunc` is scheduled for `gpu`. `launch(name, args, grid, block, source)` is called for each function of the
    device, in order: args are NumPy arrays over the memory itself, flat, and numbers; grid counts
    blocks and block threads; source is the text that the function stands in. What it raises is raised by the call.
    """
    return run(cross.lower(primfunc, gpu), launch)


def of(
    op: Op, args: tuple, constants: dict[str, Any], launcher: Callable[[cross.Lowered], Launcher]
) -> Callable[..., None]:
    """The kernel of an op for the GPU of `target.building_for_gpu`; it serves all calls of one range of sizes.

    What the op checks of its arguments' values is checked on the CPU, in front.
    """
    return of_request(op._request(args, constants), launcher)


def of_request(request: Request, launcher: Callable[[cross.Lowered], Launcher]) -> Callable[..., None]:
    """The kernel of a request, as `of`."""
    lowered = cross.lowered(request)
    kernel, check = run(lowered, launcher(lowered)), cross.check(request)

    def call(*given: Any) -> None:
        if check is not None:
            check(*given)
        kernel(*given)

    return call


def programs(
    compiled: Callable[[Source, tuple[Parameter, ...]], Program],
) -> Callable[[cross.Lowered], Launcher]:
    """A launcher for `of` of what a language of C's kind compiles: a program for each function."""

    def launcher(lowered: cross.Lowered) -> Launcher:
        made = functions(lowered, compiled)

        def launch(name: str, args: list[Any], grid: Any, block: Any, _: str) -> None:
            made[name].run([_known(each) for each in args], Launch(grid, block))

        return launch

    return launcher


def functions(
    lowered: cross.Lowered, compiled: Callable[[Source, tuple[Parameter, ...]], Program]
) -> dict[str, Program]:
    """The device's functions, each as a program of its own, by name."""
    made: dict[str, Program] = {}
    for name, function in lowered.functions.items():
        parameters = tuple(map(_parameter, itertools.count(), function.parameters))
        source = Source(lowered.texts[name], name, f"<generated {lowered.gpu.language}>", 1)
        made[name] = compiled(source, parameters)
    return made


def _parameter(index: int, kind: str) -> Parameter:
    dtype = kind.removesuffix("*")
    known = dtype if dtype in DTYPES else "uint8"
    return Parameter(f"p{index}", _SPELLED.get(dtype, dtype), known, kind.endswith("*"), False)


def _known(value: Any) -> Any:
    """An array in a dtype of Limpid's: of others as bytes."""
    return value if not isinstance(value, np.ndarray) or value.dtype.name in DTYPES else value.view("uint8")


def run(lowered: cross.Lowered, launch: Launcher) -> Callable[..., None]:
    """As `build`, of a kernel that is lowered already."""
    names = {name: f"limpid.hosted.{next(_numbers)}.{name}" for name in lowered.functions}
    for name, registered in names.items():
        tvm_ffi.register_global_func(registered, _launching(name, lowered, launch))
    [(symbol, host)] = lowered.host.functions.items()
    module = tvm.IRModule({symbol: host.with_body(_on_cpu(host.body, names))})
    library = cross.host_code(module, lowered.gpu)
    function = library[str(host.attrs["global_symbol"]).removeprefix("__tvm_ffi_")]

    def call(*args: Any) -> None:
        for each in args:
            check(each)
        function(*args)

    weakref.finalize(call, _forget, tuple(names.values()))
    return call


def _forget(names: tuple[str, ...]) -> None:
    for each in names:
        tvm_ffi.registry.remove_global_func(each)


def check(argument: Any) -> None:
    """What GPU kernels take for granted of a tensor. Raises KernelError."""
    if not hasattr(argument, "__dlpack__"):
        return
    tensor: Any = tvm_ffi.from_dlpack(argument)
    shown = f"an argument of shape {list(tensor.shape)}"
    if tensor.data_ptr() % ALIGNMENT:
        raise KernelError(f"{shown} begins at an address that is no multiple of {ALIGNMENT} bytes: copy it")
    if math.prod(tensor.shape) > MOST:
        raise KernelError(f"{shown} has more than {MOST} elements, too many for a GPU kernel: split it")


def _launching(name: str, lowered: cross.Lowered, launch: Launcher) -> Callable[..., int]:
    """What the host code calls in a launch's place: numbers, and a pointer with a number of bytes for each array."""
    function = lowered.functions[name]

    def called(*given: Any) -> int:
        rest = iter(given)
        args: list[Any] = []
        for each in function.parameters:
            value = next(rest)
            args.append(_array(value, next(rest), each[:-1]) if each.endswith("*") else value)
        sizes = {"blockIdx": [1, 1, 1], "threadIdx": [1, 1, 1]}
        for tag, size in zip(function.launch, rest, strict=True):
            kind, _, axis = tag.partition(".")
            if kind not in sizes:
                raise KernelError(f"{name} asks for {tag} at its launch, which is not known here")
            sizes[kind]["xyz".index(axis)] = int(size)
        grid, block = sizes["blockIdx"], sizes["threadIdx"]
        if min(grid) > 0:
            text = lowered.texts[name]
            launch(name, args, (grid[0], grid[1], grid[2]), (block[0], block[1], block[2]), text)
        return 0

    return called


def _array(pointer: Any, size: int, dtype: str) -> np.ndarray:
    address = pointer.value if isinstance(pointer, ctypes.c_void_p) else pointer
    if not address or not size:
        return np.empty(0, _STORED[dtype])
    memory: Any = (ctypes.c_uint8 * size).from_address(address)
    return np.frombuffer(memory, "uint8").view(_STORED[dtype])


def _on_cpu(body: Any, names: dict[str, str]) -> Any:
    """The host's code with its tensors on the CPU, and launches that call the functions registered under `names`."""

    def call(node: Any) -> Any:
        kind = getattr(node.op, "name", "")
        if kind == "tirx.call_ffi_kernel":
            return tirx.call_packed(names[node.args[0].value], *_with_sizes(node.args[1:]))
        if kind == "tirx.tvm_call_packed" and node.args[0].value == "__tvm_set_device":
            return tirx.const(0, "int32")
        return node

    def attribute(node: Any) -> Any:
        if node.attr_key != "device_type":
            return node
        return tirx.AttrStmt(node.node, node.attr_key, tirx.const(cross.CPU, "int32"), node.body)

    return tvm_ffi.structural_map(cross.unified(body), ((ir.Call, call), (tirx.AttrStmt, attribute)))


def _with_sizes(args: Any) -> list[Any]:
    """The arguments of a launch, after each pointer the bytes that it points to."""
    result: list[Any] = []
    for each in args:
        result.append(each)
        if getattr(getattr(each, "op", None), "name", "") == "tirx.buffer_data":
            buffer = each.args[0]
            size: Any = tirx.const(_STORED[str(buffer.dtype)].itemsize, "int64")
            for extent in buffer.shape:
                size = size * extent.astype("int64")
            result.append(size)
    return result
