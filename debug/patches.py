"""Patches: what a module or a call gets or gives is changed while a `with` lasts.

    with debug.patch("layers.3.mlp", output=debug.ablate()):                    # the output of a module
        model(ids)
    with debug.patch("/attention", input={"k": debug.scale(0.5)}):              # an input, in every call of an op
        model(ids)
    with debug.patch("layers.2/add[0]", output=other, rows=[7]):                # one token's row of one call's output
        model(ids)

A selector with a slash means op calls, as everywhere; a path alone means the module of that path itself, as
`layers.0-3.mlp` or `layers.*.mlp`, and so does the module object. The values are changed in NumPy, in a copy: no tensor
that the model holds is touched, and no other tool sees a call more.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Self

import numpy as np

import ops
from ops import Call, DTypeError, OpError, Selector, ShapeError, Tensor
from ops.scope import Scope
from ops.spec import DTYPES, FLOATS

from .tool import Tool

Rows = int | slice | Sequence[int]
Values = Callable[[np.ndarray], Any]  # changes an array in place and gives None, or gives the array to put in its place


class Patch(Tool):
    """Changes the calls and modules that `where` means while it is on; see `patch`."""

    def __init__(self, where: Any, output: Any, input: Mapping[str, Any] | None, rows: Rows | None, index: Any):
        super().__init__(where)
        if output is None and not input:
            raise OpError("a patch changes something: give output=, or input={name: ...}")
        self.output, self.input = output, dict(input or {})
        self._rows, self._index = rows, index
        parts = list(_parts(where))
        self._modules = [_module_test(each) for each in parts if _means_module(each)]
        calls = [each for each in parts if not _means_module(each)]
        self.where.matches = Selector(calls).matches if calls else lambda call: False

    def __enter__(self) -> Self:
        for change in (self.output, *self.input.values()):
            if isinstance(change, _Noise):
                change.restart()
        return super().__enter__()

    def call(self, call: Call, launch: Callable[[Call], Any]) -> Any:
        if not self.means(call):
            return launch(call)
        if self.input:
            call = call.replace(self._arguments(call))
        output = launch(call)
        return output if self.output is None else self._first(call.full_address, output)

    def scope(self, scope: Scope, run: Callable[..., Any]) -> Any:
        if not any(test(scope) for test in self._modules):
            return run(*scope.args, **scope.constants)
        self.hits += 1
        here, args, kwargs = f"{scope.path or 'model'}@{scope.number}", scope.args, scope.constants
        if self.input:
            bound = inspect.signature(scope.module.forward).bind(*args, **kwargs)
            bound.arguments |= {name: self._input(here, name, bound.arguments) for name in self.input}
            args, kwargs = bound.args, bound.kwargs
        output = run(*args, **kwargs)
        return output if self.output is None else self._first(here, output)

    def _arguments(self, call: Call) -> tuple:
        inputs = call.inputs
        for name in self.input:
            if name in call.op.writes:
                raise OpError(f"{call.full_address}: {name} is written by the call; patch what is written into it")
            inputs[name] = self._input(call.full_address, name, inputs)
        return tuple(inputs.values())

    def _input(self, here: str, name: str, inputs: Mapping[str, Any]) -> Tensor:
        if name not in inputs:
            raise OpError(f"{here} has no input {name!r}; it has {', '.join(inputs)}")
        if not isinstance(inputs[name], Tensor):
            raise OpError(f"{here}: {name} is {inputs[name]!r}; a patch changes tensors")
        return self._changed(f"{here}, {name}", inputs[name], self.input[name])

    def _first(self, here: str, output: Any) -> Any:
        """The output, the first where there are several, changed."""
        if isinstance(output, Tensor):
            return self._changed(f"{here}, output", output, self.output)
        if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
            return (self._changed(f"{here}, output", output[0], self.output), *output[1:])
        raise OpError(f"{here} gave {type(output).__name__}; a patch changes tensors")

    def _changed(self, what: str, tensor: Tensor, change: Any) -> Tensor:
        """A copy with the chosen part changed; where it is not, the same bits."""
        spec, before = tensor.spec, tensor.numpy()
        if spec.format is not None:
            raise DTypeError(f"{what}: {spec} is packed; patch the output of the call instead")
        chosen = _chosen(what, spec, self._rows, self._index)
        with np.errstate(over="ignore", invalid="ignore"):  # an infinity is a value like others, as in kernels
            make = _function if callable(change) else _replacement
            made = make(what, tensor, change, self._rows)
            _check_kind(what, spec, made)
            result = ops.empty(spec)
            np.copyto(result.numpy(), before)
            np.copyto(result.numpy(), made.astype(DTYPES[spec.dtype]), where=chosen)
        return result

    def __repr__(self) -> str:
        changed = [*(["output"] if self.output is not None else []), *self.input]
        return f"<patch of {', '.join(changed)} where {self.where}, {self.hits} hits>"


class _Noise:
    """Adds seeded noise; `restart` has it draw the same again."""

    def __init__(self, deviation: float, seed: int):
        self.deviation, self.seed = deviation, seed
        self.restart()

    def restart(self) -> None:
        self._generator = np.random.default_rng(self.seed)

    def __call__(self, values: np.ndarray) -> np.ndarray:
        return values + self.deviation * self._generator.standard_normal(values.shape, "float32")


class _AsCall(NamedTuple):
    """A module call as a selector asks of calls."""

    op: Any
    path: str
    scope: Scope
    args: tuple
    ordinal: int = 0


class _Module(NamedTuple):
    name: str = "module"


def _parts(where: Any) -> Iterator[Any]:
    """What stands between the commas, or in the list."""
    if isinstance(where, str):
        yield from (part.strip() for part in where.split(","))
    elif isinstance(where, (list, tuple, set, frozenset)):
        for each in where:
            yield from _parts(each)
    else:
        yield where


def _means_module(part: Any) -> bool:
    if not isinstance(part, str):
        return hasattr(part, "forward")
    first = part.split()[0]  # of `@2` and of `rows=1` alone there is no path
    return not first.startswith("@") and "/" not in first and "=" not in first


def _module_test(part: Any) -> Callable[[Scope], bool]:
    if not isinstance(part, str):
        return lambda scope: scope.module is part
    selector, path = Selector(part), part.split()[0].partition("@")[0]
    subtree = not {"*", "?"} & {*path}  # it means its subtree there; here the module alone

    def test(scope: Scope) -> bool:
        if subtree and scope.path.count(".") != path.count("."):
            return False
        return selector.matches(_AsCall(_Module(), scope.path, scope, scope.args))  # type: ignore[arg-type]

    return test


def _chosen(what: str, spec: ops.Spec, rows: Rows | None, index: Any) -> np.ndarray | bool:
    """True, or bool of the tensor's shape, where it is to be changed."""
    if rows is None and index is None:
        return True
    if not spec.shape:
        raise ShapeError(f"{what}: {spec} has no rows to choose from")
    along, across = np.zeros(spec.shape[0], bool), np.zeros(spec.shape[1:], bool)
    try:
        along[slice(None) if rows is None else rows] = True
        across[... if index is None else index] = True
    except IndexError as error:
        raise ShapeError(f"{what}: {spec} has nothing at rows={rows}, index={index}: {error}") from None
    chosen = along.reshape(-1, *[1] * across.ndim) & across
    if not chosen.any():  # a patch that changes nothing would pass for one without effect
        raise ShapeError(
            f"{what}: {spec} has nothing at rows={rows}, index={index}; narrow the selector, as with rows=14"
        )
    return chosen


def _function(what: str, tensor: Tensor, change: Values, _: Any) -> np.ndarray:
    values = tensor.numpy().astype("float32" if tensor.dtype in FLOATS else tensor.dtype)
    given = change(values)
    made = values if given is None else np.asarray(given)
    if made.shape != values.shape:
        raise ShapeError(f"{what}: the function gave the shape {list(made.shape)}, expected {list(values.shape)}")
    return made


def _replacement(what: str, tensor: Tensor, value: Any, rows: Rows | None) -> np.ndarray:
    """`value` in the tensor's shape: a number, the whole, one row for all, or as many rows as are chosen."""
    if isinstance(value, Tensor) and value.dtype != tensor.dtype:
        raise DTypeError(f"{what} is {tensor.spec}, and its replacement {value.spec}; ops.cast it first")
    made, shape = np.asarray(value), tensor.shape
    if made.shape in ((), shape, shape[1:]):
        return np.broadcast_to(made, shape)
    count = np.arange(shape[0])[slice(None) if rows is None else rows].size if shape else 0
    if rows is not None and made.shape == (count, *shape[1:]):
        whole = np.zeros(shape, made.dtype)
        whole[rows] = made
        return whole
    fitting = f"{list(shape)}, one row {list(shape[1:])}"
    fitting += f", the {count} chosen rows {[count, *shape[1:]]}" if rows is not None else ""
    raise ShapeError(f"{what} is {tensor.spec}, and its replacement {list(made.shape)}; expected {fitting} or a number")


def _check_kind(what: str, spec: ops.Spec, made: np.ndarray) -> None:
    floats, integers = made.dtype.kind == "f" or made.dtype == DTYPES["bfloat16"], made.dtype.kind in "iu"
    if not integers and not (floats and spec.dtype in FLOATS):
        raise DTypeError(f"{what} is {spec}, and its change gave {made.dtype}, which is no value of it")


def patch(
    where: Any,
    output: Any = None,
    *,
    input: Mapping[str, Any] | None = None,
    rows: Rows | None = None,
    index: Any = None,
) -> Patch:
    """Change what `where` means, inside `with`: its `output`, or its `input` by argument name, or both.

    A change is a number, an array or a tensor to put there (of the whole shape, one row, or the chosen rows), or a
    function of the values: `ablate()`, `scale(0.5)`, `noise(0.1)` or your own. A function gets all values in a copy,
    float32 for any float dtype; it changes them in place and gives None, or gives an array of that shape.

    Only `rows` (tokens: an int, a slice or a list) and there only `index` are changed: a NumPy index into the axes
    after the first, as `index=2` for head 2 of [tokens, heads, dim], or `np.s_[:, :8]`.

    Raises ShapeError or DTypeError when the change does not fit, and at the end of the `with` SelectorError when
    `where` meant nothing. Of several outputs the first is changed; what an op writes is changed by its other inputs. Of
    patches inside each other the innermost is the first to change an output.
    """
    return Patch(where, output, input, rows, index)


def ablate(by: str = "zero") -> Values:
    """A change to zero, or, by "mean", to each column's mean over the rows of that tensor."""
    if by not in ("zero", "mean"):
        raise OpError(f"ablate by {by!r}, expected 'zero' or 'mean'; for another value give it as the change itself")
    if by == "zero":
        return np.zeros_like
    return lambda values: np.broadcast_to(values.mean(axis=0), values.shape)


def scale(factor: float) -> Values:
    """A change to `factor` times the values."""
    return lambda values: values * factor


def noise(deviation: float, seed: int = 0) -> Values:
    """A change that adds normal noise of that standard deviation: another in each call, the same in each `with`."""
    return _Noise(deviation, seed)
