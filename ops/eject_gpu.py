"""Eject for GPUs: the kernel that TVM generates in CUDA, Metal, WGSL or OpenCL, with the launch of its host code."""

from __future__ import annotations

import re
from typing import Any

import tvm_ffi
from tvm import ir, tirx

from . import build, cross, target
from .errors import OpError
from .languages.binding import output_names

_BINARY = {
    "Add": "+", "Sub": "-", "Mul": "*", "FloorDiv": "//", "FloorMod": "%", "Div": "//", "Mod": "%", "LT": "<",
    "LE": "<=", "GT": ">", "GE": ">=", "EQ": "==", "NE": "!=", "And": "and", "Or": "or",
}  # fmt: skip


def kernel(request: build.Request, language: str, name: str) -> tuple[str, list[str], dict[str, str]]:
    """The text under `name`, with the op's own names for its arrays, the decorator's options, and its sizes as dims."""
    with target.building_for_gpu(language):
        lowered, scheduled = cross.lowered(request), request.scheduled()
    if len(lowered.functions) != 1:
        raise OpError(
            f"{request.op.name}({request.arguments}) takes {len(lowered.functions)} kernels on a GPU, one after the "
            f"other; a swap holds one"
        )
    [(function, described)] = lowered.functions.items()
    arrays, sizes = _named(request, scheduled)
    passed, launched = _launch(lowered, described)
    launch = {tag: _python(each, sizes, {}) for tag, each in zip(described.launch, launched, strict=True)}
    text = re.sub(rf"\b{function}(_args_t)?\b", rf"{name}\1", lowered.text)
    for ours in arrays.values():  # TVM's own variables of that name; a member, as in threadIdx.x, is none
        text = re.sub(rf"(?<![.\w]){ours}\b", f"{ours}_", text)
    for tvms, ours in arrays.items():
        text = re.sub(rf"\b{tvms}_ptr\b", ours, text)
    grid, block = ([launch.get(f"{kind}.{axis}", "1") for axis in "xyz"] for kind in ("blockIdx", "threadIdx"))
    head = _head(request, sizes)
    options = [f"grid=lambda {head}: ({', '.join(grid)})", f"block=({', '.join(block)})"]
    numbers = {n: each for n, each in passed.items() if n not in request.op.parameters}
    dims = {number: f"lambda {head}: {_python(each, sizes, {})}" for number, each in numbers.items()}
    if "packGridDimX" in text:  # TVM's own, for grids that are larger than WebGPU's
        dims["packGridDimX"] = f"lambda {head}: {grid[0]} - 1"
    return _without_declaration(text, name), options, dims


def _named(request: build.Request, scheduled: Any) -> tuple[dict[str, str], dict[str, str]]:
    """By TVM's names: the op's names of the arrays, and where the sizes that stay open are found."""
    op = request.op
    given = [name for name, spec in zip(op.parameters, request.specs, strict=False) if spec is not None]
    arrays: dict[str, str] = {}
    sizes: dict[str, str] = {}
    for name, parameter in zip([*given, *output_names(op)], scheduled.params, strict=True):
        if not hasattr(parameter, "shape"):
            continue
        arrays[parameter.name] = name
        for axis, size in enumerate(parameter.shape if name in op.parameters else ()):
            if isinstance(size, tirx.Var):
                sizes.setdefault(size.name, f"{name}.shape[{axis}]")
    return arrays, sizes


def _head(request: build.Request, sizes: dict[str, str]) -> str:
    """The parameters of a function of the call's arguments: as many as the sizes are read from."""
    read = {where.partition(".")[0] for where in sizes.values()}
    most = max((i for i, name in enumerate(request.op.parameters) if name in read), default=-1)
    return ", ".join([*request.op.parameters[: most + 1], "*_"])


def _launch(lowered: cross.Lowered, described: cross.Function) -> tuple[dict[str, Any], list[Any]]:
    """What the host passes: the numbers by the names of the kernel's parameters, and the sizes of the launch."""
    [(_, host)], [(_, device)] = lowered.host.functions.items(), lowered.device.functions.items()
    found: list[Any] = []

    def see(node: Any) -> None:
        if getattr(node.op, "name", "") == "tirx.call_ffi_kernel":
            found.append(node)

    tvm_ffi.structural_walk(host.body, (ir.Call, see))
    given = [*found[0].args[1:]]
    named = zip(described.parameters, device.params, given, strict=False)
    numbers = {parameter.name: each for kind, parameter, each in named if not kind.endswith("*")}
    bound = _bindings(host.body)
    whole = [_resolved(each, bound) for each in (*numbers.values(), *given[len(described.parameters) :])]
    return dict(zip(numbers, whole, strict=False)), whole[len(numbers) :]


def _bindings(body: Any) -> dict[str, Any]:
    """What the host's variables stand for."""
    bound: dict[str, Any] = {}

    def see(node: Any) -> None:
        bound.setdefault(node.var.name, node.value)

    tvm_ffi.structural_walk(body, (tirx.Bind, see))
    return bound


def _resolved(expression: Any, bound: dict[str, Any]) -> Any:
    """An expression without the host's own variables, but for those of sizes, which it reads from its arguments."""
    if type(expression).__name__ != "Var" or "tvm_struct_get" in str(bound.get(expression.name, "tvm_struct_get")):
        return expression
    return _resolved(bound[expression.name], bound)


def _python(expression: Any, sizes: dict[str, str], bound: dict[str, Any]) -> str:
    """A whole-number expression of TIR as Python over the call's arguments."""
    kind = type(expression).__name__

    def again(each: Any) -> str:
        return _python(each, sizes, bound)

    if kind == "IntImm":
        return str(int(expression))
    if kind == "Var" and expression.name in sizes:
        return sizes[expression.name]
    if kind == "Var" and expression.name in bound:
        return again(bound[expression.name])
    if kind == "Cast":
        return again(expression.value)
    if kind in ("Min", "Max"):
        return f"{kind.lower()}({again(expression.a)}, {again(expression.b)})"
    if kind in _BINARY:
        return f"({again(expression.a)} {_BINARY[kind]} {again(expression.b)})"
    if kind == "Select":
        return f"({again(expression.true_value)} if {again(expression.condition)} else {again(expression.false_value)})"
    shift = {"tirx.shift_right": ">>", "tirx.shift_left": "<<"}.get(
        getattr(getattr(expression, "op", None), "name", "")
    )
    if shift:
        return f"({again(expression.args[0])} {shift} {again(expression.args[1])})"
    raise OpError(f"a launch of {expression} is not understood")


def _without_declaration(text: str, name: str) -> str:
    """Without the line that declares the function before it is defined: it would only have to be edited as well."""
    return re.sub(rf"^.*\b{name}\([^{{;]*\);\n", "", text, flags=re.MULTILINE)
