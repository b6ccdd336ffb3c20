"""How bugs get into a running model, and out again without a trace."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

import ops
from ops import Call, Kernel, Op, Spec, Tensor, memory
from ops.call import raw
from ops.plan import Plan
from ops.tensor import _wrap


class Launch(NamedTuple):
    """What a kernel is given: inputs by name, as arrays over the tensors' memory, its output, and the constants."""

    inputs: dict[str, Any]
    output: np.ndarray
    constants: dict[str, Any]


# Given a launch and the right kernel for it, to be run or not.
Fault = Callable[[Launch, Callable[[], None]], None]


@contextlib.contextmanager
def compiled(op: Op, fault: Fault) -> Iterator[None]:
    """The compiled kernel of the op is faulty, under the seam: from outside, nothing shows that it was touched."""
    make, plans, seen = op.plan, op._plans, set[Plan]()

    def plan(args: tuple, constants: dict[str, Any]) -> Plan:
        found = make(args, constants)
        if found not in seen:
            seen.add(found)
            right = Plan(op, found.specs, found.constants, found.outputs)
            found.run = functools.partial(_run, fault, right)
        return found

    op._plans = {}
    vars(op)["plan"] = plan
    try:
        yield
    finally:
        del vars(op)["plan"]
        op._plans = plans


def _run(fault: Fault, right: Plan, *data: Any) -> None:
    """Launch `right` by way of the fault, on the runtime's tensors."""
    given, inputs = iter(data), {}
    for name, spec in zip(right.op.parameters, right.specs, strict=False):
        if spec is not None:
            value = next(given)
            inputs[name] = _array(value, spec) if isinstance(spec, Spec) else value
    output = _array(next(given), right.outputs[0])
    with np.errstate(all="ignore"):
        fault(Launch(inputs, output, right.constants), lambda: right.run(*data))


def _array(data: Any, spec: Spec) -> np.ndarray:
    return _wrap(spec, memory.Buffer(data), owner=data).numpy()


@contextlib.contextmanager
def used(op: Op, fault: Fault, where: str) -> Iterator[None]:
    """Another kernel is in use for the calls that `where` means, and it is faulty."""

    def launch(call: Call, outputs: tuple[Tensor, ...]) -> None:
        plan = op.plan(call.args, call.constants)
        inputs = {n: each.numpy() if isinstance(each, Tensor) else each for n, each in call.inputs.items()}
        data = [*raw(call.args), *[each.buffer.data for each in outputs]]
        with np.errstate(all="ignore"):
            fault(Launch(inputs, outputs[0].numpy(), call.constants), lambda: plan.run(*data))

    use = op.use(Kernel(f"fast_{op.name}", "python", launch), where)
    try:
        yield
    finally:
        use.remove()


@contextlib.contextmanager
def changed(thing: Any, **attributes: Any) -> Iterator[None]:
    """An object, a module or a class has other attributes; `__class__` makes it one of another class."""
    before = {name: getattr(thing, name) for name in attributes}
    for name, value in attributes.items():
        setattr(thing, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(thing, name, value)


@contextlib.contextmanager
def weights(model: Any, arrays: Mapping[str, Any]) -> Iterator[None]:
    """Weights by name are others: arrays, in the weight's dtype, or tensors."""
    before = {name: weight for name, weight in model.parameters() if name in arrays}
    for name, array in arrays.items():
        dtype = before[name].dtype
        model.set_parameter(name, array if isinstance(array, Tensor) else ops.tensor(array, dtype))
    try:
        yield
    finally:
        for name, weight in before.items():
            model.set_parameter(name, weight)


def weight(model: Any, name: str) -> np.ndarray:
    """A copy of a weight's values."""
    return dict(model.parameters())[name].numpy().copy()
