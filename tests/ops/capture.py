"""Ops as a Relax function of `call_tir`s of their block definitions: what a whole graph will be, in the small."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm
from tvm import relax, tirx

import ops
from ops import build
from ops.schedule import fused
from ops.spec import Dim, Spec


def capture(steps: Callable[..., Any], **inputs: Spec) -> tvm.IRModule:
    """The module whose `main` computes `steps(call, **values)`; there, `call(op, *values, **constants)` calls an op."""
    builder = relax.BlockBuilder()
    sizes: dict[str, Any] = {}
    specs: dict[Any, Spec] = {}

    def declared(spec: Spec) -> relax.TensorType:
        if spec.format is not None:
            return relax.TensorType((spec.nbytes,), "uint8")
        shape = [
            sizes.setdefault(size.name, tirx.Var(size.name, "int64")) if isinstance(size, Dim) else size
            for size in spec.shape
        ]
        return relax.TensorType(shape, spec.dtype)

    def call(op: Any, *values: Any, **constants: Any) -> Any:
        given = tuple(specs[each] for each in values)
        request = build.Request(op, given, op._bound(given, constants, also=Spec)[1])
        out = op.spec(*given, **constants)
        function = builder.add_func(request.blocks(), op.name)
        result = builder.emit(relax.call_tir(function, list(values), out_ty=declared(out)))
        specs[result] = out
        return result

    values = {name: relax.Var(name, declared(spec)) for name, spec in inputs.items()}
    specs |= {value: inputs[name] for name, value in values.items()}
    with builder.function("main", list(values.values())):
        with builder.dataflow():
            output = builder.emit_output(steps(call, **values))
        builder.emit_func_output(output)
    return builder.get()


def tokens(count: int) -> int | Dim:
    """The size that the ops build a kernel of so many tokens for."""
    return 1 if count == 1 else Dim("n", 2, 16) if count <= 16 else Dim("n", 17)


def only_function(module: tvm.IRModule) -> tirx.PrimFunc:
    """The one PrimFunc of a fused module, which its `main` calls once."""
    functions = [each for each in module.functions.values() if isinstance(each, tirx.PrimFunc)]
    bindings = [each for block in module["main"].body.blocks for each in block.bindings]
    calls = [each.value for each in bindings if isinstance(each.value, relax.Call)]
    assert len(functions) == 1, f"{len(functions)} functions: {[str(each) for each in module.get_global_vars()]}"
    assert len(calls) == 1 and calls[0].op.name == "relax.call_tir", calls
    return functions[0]


def compiled(steps: Callable[..., Any], **inputs: Spec) -> Callable[..., None]:
    """The steps as one kernel of tensors: the inputs that they use, in the order of use, then the output."""
    function = only_function(fused.fuse(capture(steps, **inputs)))
    size = next(spec.shape[0] for spec in inputs.values())
    low, high = (size.low, size.high) if isinstance(size, Dim) else (size, size)
    kernel = build.compiled(fused.schedule(function, low, high), "fused")

    def run(*tensors: ops.Tensor) -> None:
        kernel(*(each.buffer.data for each in tensors))

    return run
