"""Kernels in TVMScript: a PrimFunc over the op's tensors and then its outputs, or a function that gives one.

    @ops.silu.swap("tvmscript")
    @T.prim_func(s_tir=True)
    def twice(x: T.handle, out: T.handle): ...

Sizes that the PrimFunc leaves open serve every call, those it fixes serve calls of that size. Accesses that TVM can
see to lie out of bounds are refused before the kernel is compiled.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tvm
from tvm import tirx
from tvm.s_tir.analysis import OOBChecker

from .. import build, device
from ..call import Call, Kernel, raw
from ..errors import SwapRefused
from ..op import Op
from ..spec import Spec
from ..tensor import Tensor
from .base import Options
from .binding import held, output_names


def kernel(op: Op, given: Any, shape: Any, dims: Mapping[str, Any], options: Options) -> Kernel:
    """A kernel of a PrimFunc. Raises SwapRefused where its parameters are not the op's."""
    if shape.grid is not None or shape.block is not None or dims:
        raise SwapRefused(f"a TVMScript kernel of {op.name} has no grid, block or dims: its sizes are in its buffers")
    function = given if build.is_primfunc(given) else given()
    if not build.is_primfunc(function):
        raise SwapRefused(f"a TVMScript kernel of {op.name} is a PrimFunc, or a function that gives one, not {given!r}")
    name = given.__name__ if callable(given) and hasattr(given, "__name__") else str(function.attrs["global_symbol"])
    return PrimFuncKernel(op, name, function)


class PrimFuncKernel(Kernel):
    """A compiled PrimFunc in the place of an op's kernel; `dtypes` are those of its tensors, by the op's names."""

    def __init__(self, op: Op, name: str, function: Any):
        super().__init__(name, "tvmscript", self._launch)
        self.function = function
        self._names = (*op.parameters, *output_names(op))
        self._parameters = list(function.params)
        _check_bounds(name, function)
        self._run = build.compiled(function, name)
        given = zip(self._names, self._parameters, strict=False)
        self.dtypes = {n: str(p.dtype) for n, p in given if hasattr(p, "shape")}

    def fits(self, call: Call) -> bool:
        """Whether the sizes that the PrimFunc fixes are those of the call."""
        values = [each for each in (*call.args, *call.outputs) if each is not None]
        if len(values) != len(self._parameters):
            return False
        for parameter, value in zip(self._parameters, values, strict=True):
            spec = value.spec if isinstance(value, Tensor) else value
            if isinstance(spec, Spec) and not _same_sizes(parameter, spec):
                return False
        return True

    def _launch(self, call: Call, outputs: tuple[Tensor, ...]) -> None:
        if not self.fits(call):
            wanted = ", ".join(map(_described, self._parameters))
            given = ", ".join(str(getattr(each, "spec", each)) for each in (*call.args, *outputs))
            raise SwapRefused(
                f"{self.name} is made for ({wanted}), this call of {call.op.name} has ({given}); narrow the swap with "
                f"where=, such as '/{call.op.name} dtype=float32'"
            )
        device.wait(call.device)  # it is compiled for the CPU
        self._run(*raw((*call.args, *outputs)))

    def sources(self) -> dict[str, str]:
        """The TVMScript, and what TVM made of it."""
        return {"tvmscript": self.function.script()}


def _described(parameter: Any) -> str:
    sizes = f"[{', '.join(map(str, parameter.shape))}]" if hasattr(parameter, "shape") else ""
    return f"{parameter.name}: {parameter.dtype}{sizes}"


def _same_sizes(parameter: Any, spec: Spec) -> bool:
    shape = spec.shape if spec.format is None else (spec.nbytes,)
    if not hasattr(parameter, "shape") or len(parameter.shape) != len(shape) or str(parameter.dtype) != held(spec):
        return False
    sizes = zip(parameter.shape, shape, strict=True)
    return all(int(size) == given for size, given in sizes if isinstance(size, tirx.IntImm))


def _check_bounds(name: str, function: Any) -> None:
    """TVM's own look for accesses out of bounds, where it can tell from the text alone."""
    module = tvm.IRModule({"main": function.with_attr("global_symbol", "main")})
    try:
        OOBChecker()(module)
    except tvm.s_tir.ScheduleError as error:
        lines = str(error).split("\n")
        marks = [i for i in range(1, len(lines)) if set(lines[i]) == {" ", "^"}]
        marked = f"\n  {lines[marks[-1] - 1].strip()}" if marks else ""
        why = str(error).rpartition("Error message: ")[2].strip()
        raise SwapRefused(f"{name} reaches out of bounds: {why}{marked}") from None
